"""Data sets of a few small images, in the layouts that examples/recipes/data.py reads."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (40, 56)  # height and width of the first image; the next three are wider
COCO_HOLES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_IDS = [i for i in range(1, 183) if i not in COCO_HOLES]


def make_cocostuff10k(root: Path, train: int = 4, val: int = 2, seed: int = 0) -> Path:
    """The official layout: lists of names, images, and .mat files with the raw ids."""
    for split, part, count in (("train", "train", train), ("val", "test", val)):
        names = [f"COCO_train2014_{number:012}" for number in _numbers(split, count)]
        _write(root / "imageLists" / f"{part}.txt", "\n".join(names) + "\n")
        for name, (image, ids) in zip(
            names, _pairs(split, count, [0, *COCO_IDS], seed), strict=True
        ):
            _save_image(root / "images" / f"{name}.jpg", image)
            path = root / "annotations" / f"{name}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            savemat(path, {"S": ids, "captions": ["a caption"]}, do_compression=True)
    return root


def make_cocostuff10k_mmseg(root: Path, train: int = 4, val: int = 2, seed: int = 0) -> Path:
    """MMSegmentation's layout of the same: 0 is ignored, 1 .. 171 are the classes."""
    parts = {"train": "train2014", "val": "test2014"}
    return _make_png(root, train, val, seed, parts, range(172), suffix="_labelTrainIds.png")


def make_cocostuff164k(
    root: Path, train: int = 4, val: int = 2, seed: int = 0, mmseg: bool = False
) -> Path:
    """The published maps of raw ids - 1, or MMSegmentation's train ids beside them; 255 ignored."""
    parts = {"train": "train2017", "val": "val2017"}
    _make_png(root, train, val, seed, parts, [*(i - 1 for i in COCO_IDS), 255])
    if mmseg:
        _make_png(root, train, val, seed, parts, [*range(171), 255], suffix="_labelTrainIds.png")
    return root


def make_ade20k(root: Path, train: int = 4, val: int = 2, seed: int = 0) -> Path:
    """The scene parsing challenge: 0 is ignored, 1 .. 150 are the classes."""
    parts = {"train": "training", "val": "validation"}
    return _make_png(root, train, val, seed, parts, range(151))


def make_folder(root: Path, train: int = 4, val: int = 2, seed: int = 0, classes: int = 3) -> Path:
    """A plain folder with ``classes`` classes, and classes.txt."""
    _write(root / "classes.txt", "".join(f"class {number}\n" for number in range(classes)))
    parts = {"train": "train", "val": "val"}
    return _make_png(root, train, val, seed, parts, [*range(classes), 255], labels="labels")


def _make_png(root, train, val, seed, parts, ids, suffix=".png", labels="annotations"):
    for split, count in (("train", train), ("val", val)):
        numbers = _numbers(split, count)
        for number, (image, label) in zip(numbers, _pairs(split, count, ids, seed), strict=True):
            _save_image(root / "images" / parts[split] / f"{number:012}.jpg", image)
            _save_image(root / labels / parts[split] / f"{number:012}{suffix}", label)
    return root


def _numbers(split, count):
    start = 1 if split == "train" else 1001
    return range(start, start + count)


def _pairs(split, count, ids, seed):
    """Images of flat tiles, one colour for each id, so that a model can learn from them."""
    rng = np.random.default_rng([seed, split == "val"])
    colours = np.random.default_rng(seed).integers(0, 256, (256, 3), dtype=np.uint8)
    for number in range(count):
        height, width = SIZE[0], SIZE[1] + 8 * (number % 4)
        tiles = rng.choice(np.array(ids, np.uint8), (height // 8, width // 8))
        label = tiles.repeat(8, axis=0).repeat(8, axis=1)
        noise = rng.integers(-20, 21, (height, width, 3))
        yield (colours[label] + noise).clip(0, 255).astype(np.uint8), label


def _save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


MAKERS = {
    "cocostuff10k": ("cocostuff10k", make_cocostuff10k),
    "cocostuff10k of mmseg": ("cocostuff10k", make_cocostuff10k_mmseg),
    "cocostuff164k of mmseg": (
        "cocostuff164k",
        lambda root: make_cocostuff164k(root, mmseg=True),
    ),
    "cocostuff164k": ("cocostuff164k", make_cocostuff164k),
    "ade20k": ("ade20k", make_ade20k),
    "folder": ("folder", make_folder),
}
"""The layout, and what makes a data set, of each way to store one that data.DATA_SETS knows."""
