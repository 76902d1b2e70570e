"""Read segmentation data sets as they were published: COCO-Stuff, ADE20K, or a plain folder.

    from data import open_split
    image, label = open_split("cocostuff10k", Path("data/cocostuff10k"), "train")[0]

``prepare_data.py`` downloads the data sets and checks them. Layouts, below ``root``:

- ``cocostuff10k``: ``images/*.jpg``, ``annotations/*.mat`` and ``imageLists/{train,test}.txt`` as
  in the archive of version 1.1, or MMSegmentation's
  ``{images,annotations}/{train2014,test2014}`` with ``*_labelTrainIds.png``
- ``cocostuff164k``: ``{images,annotations}/{train2017,val2017}`` with the published ``*.png`` or
  MMSegmentation's ``*_labelTrainIds.png``
- ``ade20k``: ``{images,annotations}/{training,validation}``
- ``folder``: ``images/{train,val}/*.{jpg,jpeg,png}``, ``labels/{train,val}/*.png`` with a class
  index for each pixel (255: unlabelled) and ``classes.txt``: one name a line, class 0 first
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.io import loadmat
from torch.utils.data import Dataset
from torchvision import tv_tensors

from quickstart import IGNORE, open_image, read_classes, stored_indices

LAYOUTS = ("cocostuff10k", "cocostuff164k", "ade20k", "folder")
NAMES = Path(__file__).parent / "classes"
UNKNOWN = -1

# COCO-Stuff numbers 182 classes from 1; these eleven were never annotated.
COCO_HOLES = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
COCO_IDS = [id_ for id_ in range(1, 183) if id_ not in COCO_HOLES]


class Files(NamedTuple):
    """Where the images and labels of one split are, and what the labels' ids stand for."""

    pairs: list[tuple[Path, Path]]
    classes: list[str]
    lookup: np.ndarray


class SegmentationData(Dataset[tuple[tv_tensors.Image, tv_tensors.Mask]]):
    """Images, uint8 (3, H, W) in RGB, and labels, uint8 (H, W): 0 .. C - 1, or 255 for ignored.

    Attributes:
        classes: The names of the classes, index 0 first.
        pairs: Image and label of each item.
        lookup: The label of each of the 256 ids that the files may hold; -1: no such class.
    """

    def __init__(self, files: Files) -> None:
        self.pairs = files.pairs
        self.classes = tuple(files.classes)
        self.lookup = files.lookup

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), read_label(label_path, self.lookup)
        if image.shape[1:] != label.shape:
            raise ValueError(
                f"{label_path} must have the size of {image_path}, {tuple(image.shape[1:])}, got "
                f"{tuple(label.shape)} (height, width). Make both from the same original."
            )
        return image, label


def open_split(layout: str, root: Path, split: Literal["train", "val"]) -> SegmentationData:
    """List a split of a data set; its files are read when they are asked for."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}.')
    find = {
        "cocostuff10k": find_cocostuff10k,
        "cocostuff164k": find_cocostuff164k,
        "ade20k": find_ade20k,
        "folder": find_folder,
    }[layout]
    return SegmentationData(find(Path(root), split))


def find_cocostuff10k(root: Path, split: str) -> Files:
    classes = read_classes(NAMES / "cocostuff171.txt")
    names = root / "imageLists" / ("train.txt" if split == "train" else "test.txt")
    if names.is_file():
        pairs = [
            (root / "images" / f"{name}.jpg", root / "annotations" / f"{name}.mat")
            for name in names.read_text("utf-8").split()
        ]
        return Files(pairs, classes, lookup_table(COCO_IDS, ignored=0))
    part = "train2014" if split == "train" else "test2014"
    pairs = pair(root / "images" / part, root / "annotations" / part, "_labelTrainIds.png")
    return Files(pairs, classes, lookup_table(range(1, 172), ignored=0))


def find_cocostuff164k(root: Path, split: str) -> Files:
    classes = read_classes(NAMES / "cocostuff171.txt")
    images, labels = root / "images" / f"{split}2017", root / "annotations" / f"{split}2017"
    if any(name.endswith("_labelTrainIds.png") for name in listdir(labels)):
        pairs = pair(images, labels, "_labelTrainIds.png")
        return Files(pairs, classes, lookup_table(range(171)))
    return Files(pair(images, labels, ".png"), classes, lookup_table([i - 1 for i in COCO_IDS]))


def find_ade20k(root: Path, split: str) -> Files:
    classes = read_classes(NAMES / "ade20k150.txt")
    part = "training" if split == "train" else "validation"
    pairs = pair(root / "images" / part, root / "annotations" / part, ".png")
    return Files(pairs, classes, lookup_table(range(1, 151), ignored=0))


def find_folder(root: Path, split: str) -> Files:
    classes = read_classes(root / "classes.txt")
    pairs = pair(root / "images" / split, root / "labels" / split, ".png")
    return Files(pairs, classes, lookup_table(range(len(classes))))


def lookup_table(ids: Sequence[int], ignored: int = IGNORE) -> np.ndarray:
    """Table of 256 ids: an id's rank among ``ids``, 255 for ``ignored`` and 255, else -1."""
    table = np.full(256, UNKNOWN, np.int16)
    table[list(ids)] = np.arange(len(ids))
    table[[ignored, IGNORE]] = IGNORE
    return table


def listdir(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def pair(images: Path, labels: Path, suffix: str) -> list[tuple[Path, Path]]:
    found = [n for n in listdir(images) if n.lower().endswith((".jpg", ".jpeg", ".png"))]
    if not found:
        raise ValueError(f"{images} must hold images (jpg or png), found none.")
    return [(images / name, labels / f"{Path(name).stem}{suffix}") for name in found]


def read_image(path: Path) -> tv_tensors.Image:
    with open_image(path) as image:
        pixels = np.array(image.convert("RGB"))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def read_label(path: Path, lookup: np.ndarray) -> tv_tensors.Mask:
    if path.suffix == ".mat":
        indices = loadmat(path, variable_names=["S"])["S"]
    else:
        with open_image(path) as image:
            indices = stored_indices(image, path)
    labels = np.where((indices >= 0) & (indices < 256), lookup[indices & 255], UNKNOWN)
    if (labels == UNKNOWN).any():
        wrong = np.unique(indices[labels == UNKNOWN])
        raise ValueError(f"{path} must hold class indices of its data set, got {wrong[:10]}.")
    return tv_tensors.Mask(torch.from_numpy(labels.astype(np.uint8)))
