"""The data of a study seen in another way: held out, fewer, or labelled wrongly.

A view is a folder of links to the files, which stay as they are; labels that differ are written.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from data import IGNORE, SegmentationData, open_split, read_label
from weights import write_whole

Pairs = list[tuple[Path, Path]]
Change = Callable[[int, np.ndarray], np.ndarray]  # what the i-th training label becomes


def held_out(data_root: Path, root: Path) -> Path:
    """Validate on every fifth training image, and train on the others."""
    data = open_split("folder", data_root, "train")
    return build(root, data, [p for i, p in enumerate(data.pairs) if i % 5 != 4], data.pairs[4::5])


def few(data_root: Path, root: Path, every: int, first: int) -> Path:
    """Train on one in ``every`` training images, from the ``first`` on."""
    data = open_split("folder", data_root, "train")
    val = open_split("folder", data_root, "val")
    return build(root, data, data.pairs[first % every :: every], val.pairs)


def noisy(data_root: Path, root: Path, share: float, seed: int) -> Path:
    """Train on labels of which a share of the regions has another class of the image."""
    data = open_split("folder", data_root, "train")
    val = open_split("folder", data_root, "val")

    def change(number: int, label: np.ndarray) -> np.ndarray:
        return relabel(label, share, random.Random(f"{seed}/{number}"))

    return build(root, data, data.pairs, val.pairs, change)


def relabel(label: np.ndarray, share: float, chance: random.Random) -> np.ndarray:
    """Give connected regions of a label, each with chance ``share``, another class of its image.

    Pixels that are ignored stay so, and so does an image of one class.
    """
    classes = [value for value in np.unique(label).tolist() if value != IGNORE]
    wrong = label.copy()
    for value in classes if len(classes) > 1 else []:
        regions, count = ndimage.label(label == value)
        others = [other for other in classes if other != value]
        becomes = [
            chance.choice(others) if chance.random() < share else value for _ in range(count)
        ]
        inside = regions > 0
        wrong[inside] = np.array([value, *becomes], label.dtype)[regions[inside]]
    return wrong


def build(
    root: Path, data: SegmentationData, train: Pairs, val: Pairs, change: Change | None = None
) -> Path:
    """Make the folder, if it is not there; classes.txt comes last, and says that the rest is."""
    if (root / "classes.txt").exists():
        return root
    for split, pairs in (("train", train), ("val", val)):
        for number, (image, label) in enumerate(pairs):
            link(root / "images" / split / image.name, image)
            target = root / "labels" / split / label.name
            if change is None or split == "val":
                link(target, label)
            else:
                write_changed(target, change(number, read_label(label, data.coding).numpy()))
    names = "\n".join(data.classes) + "\n"
    write_whole(root / "classes.txt", lambda partial: partial.write_text(names, "utf-8"))
    return root


def write_changed(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole at any time: another study may make the same view.
    write_whole(path, lambda partial: Image.fromarray(label).save(partial, "png"))


def link(at: Path, target: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    if not at.is_symlink():
        at.symlink_to(target.resolve())
