"""The data sets: where their files lie, what their numbers mean, and how a split is read.

    from data import open_split
    image, label = open_split("cocostuff10k", Path("data/cocostuff10k"), "train")[0]

``DATA_SETS`` is the one place that knows them: a further data set is a further entry there.
``prepare_data.py`` downloads and checks them.
"""

import difflib
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from decoding import (
    IGNORE,
    SUFFIXES,
    as_rgb,
    open_image,
    orientation_of,
    read_classes,
    read_mat,
    stored_indices,
)

NO_CLASS = -1
GIB = 2**30


def lookup_table(ids: Sequence[int], ignored: int = IGNORE) -> np.ndarray:
    """The class of each number 0 .. 255: its rank among ``ids``; 255 is ignored, -1 no class."""
    table = np.full(256, NO_CLASS, np.int16)
    table[list(ids)] = np.arange(len(ids))
    table[[ignored, IGNORE]] = IGNORE
    return table


class Coding(NamedTuple):
    """What the numbers in label files stand for, and what to say of other numbers."""

    lookup: np.ndarray
    numbers: str
    remedy: str = "Ask for the layout that the files have, or get the data set again."


class Storage(NamedTuple):
    """One way to store a data set: the folders (or lists of names) of its splits, and the rest.

    A label is called like its image, with ``suffix`` in place of the image's.
    """

    train: str
    val: str
    suffix: str
    coding: Coding | None
    """None: the numbers are the indices of the classes, and 255."""
    labels: str = "annotations"
    mark: str = ""
    """What, below the root, shows that the files are stored this way; with ``{split}`` for its
    folder. Without one, they are if no other way's mark is there."""


class Archive(NamedTuple):
    """A published archive and what is wanted of it."""

    url: str
    parts: dict[str, str]
    """Folders in the archive (or in its one top folder), and where they go below the root."""
    limit: int
    """Bytes that it may unpack to: several times what it holds."""
    checksum: str = ""
    """What others published of it; the authors of the data sets published none."""


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set."""

    stored: tuple[Storage, ...]
    """The ways in which its files may be stored, those with a mark first."""
    classes: Path | None = None
    """Names of its classes; None: classes.txt below the root."""
    published: dict[str, int] = field(default_factory=dict)
    """Images of each split."""
    archives: tuple[Archive, ...] = ()


# COCO-Stuff numbers its classes from 1 to 182; eleven of them were never annotated.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
STUFF_IDS = [number for number in range(1, 183) if number not in UNUSED]
STUFF = Path(__file__).parent / "classes" / "cocostuff171.txt"
ADE = Path(__file__).parent / "classes" / "ade20k150.txt"
MMSEG = "_labelTrainIds.png"

STUFF_10K = Coding(
    lookup_table(STUFF_IDS, ignored=0),
    "0, or 1 .. 182 without the eleven numbers that COCO-Stuff 10k v1.1 leaves unused",
    "Version 1.0 uses these numbers, for other classes. Get version 1.1: run "
    '"python examples/recipes/prepare_data.py cocostuff10k".',
)
STUFF_10K_MMSEG = Coding(lookup_table(range(1, 172), ignored=0), "0 .. 171")
STUFF_164K = Coding(
    lookup_table([number - 1 for number in STUFF_IDS]),
    "255, or 0 .. 181 without the eleven numbers that COCO-Stuff leaves unused",
)
STUFF_164K_MMSEG = Coding(lookup_table(range(171)), "0 .. 170, or 255")
ADE20K = Coding(lookup_table(range(1, 151), ignored=0), "0 .. 150")

CALVIN = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
COCO = "http://images.cocodataset.org/zips"

DATA_SETS = {
    "cocostuff10k": DataSet(
        (
            Storage("train.txt", "test.txt", ".mat", STUFF_10K, mark="imageLists"),
            Storage("train2014", "test2014", MMSEG, STUFF_10K_MMSEG),
        ),
        STUFF,
        {"train": 9000, "val": 1000},
        (
            Archive(
                f"{CALVIN}/cocostuff-10k-v1.1.zip",
                {name: name for name in ("images", "annotations", "imageLists")},
                limit=16 * GIB,
            ),
        ),
    ),
    "cocostuff164k": DataSet(
        (
            # MMSegmentation writes its maps beside the published ones.
            Storage(
                "train2017",
                "val2017",
                MMSEG,
                STUFF_164K_MMSEG,
                mark=f"annotations/{{split}}/[!.]*{MMSEG}",
            ),
            Storage("train2017", "val2017", ".png", STUFF_164K),
        ),
        STUFF,
        {"train": 118287, "val": 5000},
        (
            Archive(
                f"{COCO}/train2017.zip",
                {"train2017": "images/train2017"},
                limit=64 * GIB,
                checksum="md5:cced6f7f71b7629ddf16f17bbcfab6b2",
            ),
            Archive(
                f"{COCO}/val2017.zip",
                {"val2017": "images/val2017"},
                limit=4 * GIB,
                checksum="md5:442b8da7639aecaf257c1dceb8ba8c80",
            ),
            Archive(
                f"{CALVIN}/stuffthingmaps_trainval2017.zip",
                {name: f"annotations/{name}" for name in ("train2017", "val2017")},
                limit=8 * GIB,
            ),
        ),
    ),
    "ade20k": DataSet(
        (Storage("training", "validation", ".png", ADE20K),),
        ADE,
        {"train": 20210, "val": 2000},
        (
            Archive(
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                {name: name for name in ("images", "annotations")},
                limit=8 * GIB,
                checksum="sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            ),
        ),
    ),
    "folder": DataSet((Storage("train", "val", ".png", None, labels="labels"),)),
}
"""By name."""

Layout = Literal[tuple(DATA_SETS)]
"""The names, as the command lines take them."""


@dataclass(frozen=True, eq=False)
class SegmentationData(Dataset[tuple[tv_tensors.Image, tv_tensors.Mask]]):
    """Images, uint8 (3, H, W), RGB, and labels, uint8 (H, W): 0 .. C - 1, or 255 for ignored."""

    classes: tuple[str, ...]
    """Names of the classes, index 0 first."""
    pairs: list[tuple[Path, Path]]
    """Image and label of each item."""
    coding: Coding
    """What the numbers in the label files stand for."""
    split: str = ""
    """"train" or "val"."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, label_path = self.pairs[index]
        image, label = read_image(image_path), read_label(label_path, self.coding)
        check_sizes(image, image_path, label, label_path)
        return image, label

    def missing_files(self) -> list[Path]:
        """Files that are not there; asks once for each folder and not for each file."""
        paths = [path for pair in self.pairs for path in pair]
        there = {folder: set(names_in(folder)) for folder in {path.parent for path in paths}}
        return [path for path in paths if path.name not in there[path.parent]]


class Report(NamedTuple):
    """What ``check`` found: problems, for each label 0 .. 255 its pixels and images, and notes."""

    problems: list[str]
    pixels: np.ndarray
    images: np.ndarray
    notes: tuple[str, ...] = ()
    """What may be right, and has to be known."""


def open_split(layout: str, root: Path, split: Literal["train", "val"]) -> SegmentationData:
    """List a split; its files must all be there, and each is read when it is asked for.

    Args:
        layout: A name in ``DATA_SETS``.
        root: Folder of the data set.
        split: "train", or "val" for what the data set calls test or validation.

    Raises:
        ValueError: A folder or file is missing; the text names it and what to do.
    """
    data = list_split(layout, root, split)
    if missing := data.missing_files():
        raise ValueError(
            f"{describe_missing(missing[0], data)} Missing in all: {len(missing)}; "
            f'"{prepare_command(layout, root)} --check" lists '
            "every problem."
        )
    return data


def list_split(layout: str, root: Path, split: str) -> SegmentationData:
    """List a split as ``open_split`` does, but accept missing files."""
    if layout not in DATA_SETS:
        raise ValueError(f"layout must be one of {', '.join(DATA_SETS)}, got {layout!r}.")
    if split not in {"train", "val"}:
        raise ValueError(f'split must be "train" or "val", got {split!r}.')
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root} is no folder, seen from {Path.cwd()}. Name that of the data set with "
            f"--data-root. {remedy(layout, root)}"
        )
    classes = tuple(read_classes(DATA_SETS[layout].classes or root / "classes.txt"))
    stored = next(each for each in DATA_SETS[layout].stored if is_there(each, root, split))
    part = getattr(stored, split)
    images, labels = root / "images", root / stored.labels
    if part.endswith(".txt"):
        source = root / "imageLists" / part
        listed = source.read_text("utf-8").split() if source.is_file() else []
        names = [f"{name}.jpg" for name in listed]
    else:
        source = images = images / part
        labels = labels / part
        names = [n for n in names_in(images) if n.lower().endswith(SUFFIXES)]
    if not names:
        aside = left_out(images)
        raise ValueError(
            f"{source} must list or hold images, found none. {aside and f'{aside}. '}"
            f"{remedy(layout, root)}"
        )
    pairs = [(images / name, labels / f"{Path(name).stem}{stored.suffix}") for name in names]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(
            f"{source} must hold images of different names, since a label is called like its "
            f"image, got {' and '.join(n for n in names if Path(n).stem == twice)}. Rename or "
            "remove one."
        )
    return SegmentationData(classes, pairs, stored.coding or indices(len(classes)), split)


def is_there(stored: Storage, root: Path, split: str) -> bool:
    """Return whether a mark is there, so that the files are stored in its way."""
    mark = stored.mark.format(split=getattr(stored, split))
    return not mark or any(root.glob(mark))


def indices(count: int) -> Coding:
    """Make the coding of labels that hold the indices of ``count`` classes."""
    return Coding(
        lookup_table(range(count)),
        f"0 .. {count - 1}, or {IGNORE} for unlabelled pixels",
        "Renumber the labels (do they start at 1?), give unlabelled pixels 255, or complete "
        "classes.txt.",
    )


def prepare_command(layout: str, root: Path) -> str:
    """Return the command that makes or checks a data set, to be typed into a shell."""
    folder = shlex.quote(str(root))
    return f"python examples/recipes/prepare_data.py {layout} --data-root {folder}"


def remedy(layout: str, root: Path) -> str:
    if not DATA_SETS[layout].archives:
        return "It needs images/train, images/val, labels/train, labels/val and classes.txt."
    return (
        f'Run "{prepare_command(layout, root)}", or give the '
        "folder that images/ and annotations/ are in."
    )


def names_in(folder: Path) -> list[str]:
    """Names in a folder in order, without hidden ones such as macOS leaves; [] for no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def describe_missing(path: Path, data: SegmentationData) -> str:
    """Say that a file of a pair is missing, and of a label what it has to be called."""
    text = f"{path} is missing. Add it or remove the other file of its pair."
    suffix = data.pairs[0][1].name.removeprefix(data.pairs[0][0].stem)
    if not path.name.endswith(suffix) or path in {image for image, _ in data.pairs}:
        return text
    text += f" A label is called like its image, with {suffix} at the end"
    names = names_in(path.parent)
    same = [name for name in names if plain(name) == plain(path.name)]
    if not names:
        return f"{text}."
    if same and same[0].lower() == path.name.lower():
        return f"{text}: rename {same[0]}."
    if same:
        return f"{text}; one here has the same name in other Unicode characters (NFC, NFD)."
    used = {label.name for _, label in data.pairs}
    others = [name for name in names if name not in used]
    close = difflib.get_close_matches(path.name, others, 1, cutoff=0)
    return f"{text}; the folder has {close[0]}." if close else f"{text}."


def plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def read_image(path: Path) -> tv_tensors.Image:
    with open_image(path) as image:
        pixels = np.array(as_rgb(image, path))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


def read_label(path: Path, coding: Coding) -> tv_tensors.Mask:
    if path.suffix == ".mat":
        numbers = read_mat(path)
    else:
        with open_image(path) as image:
            numbers = stored_indices(image, path)
    labels = coding.lookup[numbers.astype(np.uint8)]
    known = labels != NO_CLASS
    if numbers.dtype != np.uint8:
        known &= (numbers >= 0) & (numbers <= 255)  # 511 has become 255 in eight bits
    wrong = np.unique(numbers[~known])
    if len(wrong):
        raise ValueError(
            f"{path} must hold the numbers {coding.numbers}, got {wrong[:10].tolist()}. "
            f"{coding.remedy}"
        )
    return tv_tensors.Mask(torch.from_numpy(labels.astype(np.uint8)))


def check_sizes(image: Tensor, image_path: Path, label: Tensor, label_path: Path) -> None:
    if image.shape[1:] != label.shape:
        cause = "Make both from one original."
        if (orientation := orientation_of(image_path)) > 4:
            cause = (
                f"The image is shown turned (EXIF orientation {orientation}), and so must be its "
                "label; or save the image anew without an orientation."
            )
        raise ValueError(
            f"{label_path} must have the height and width of {image_path}, "
            f"{tuple(image.shape[1:])}, got {tuple(label.shape)}. {cause}"
        )


def check(data: SegmentationData) -> Report:
    """Read all files of a split and collect what is wrong with any, not only with the first."""
    missing = set(data.missing_files())
    problems = [describe_missing(path, data) for path in sorted(missing)]
    problems += [f"{path} has no image. Add it or remove the label." for path in stray_labels(data)]
    pixels, images = np.zeros((2, 256), np.int64)
    turned, unread = [], 0

    def attempt(step, *args):
        try:
            return step(*args)
        except ValueError as error:
            problems.append(str(error))

    for image_path, label_path in tqdm(data.pairs, "checking", mininterval=1):
        image = None if image_path in missing else attempt(read_image, image_path)
        label = None if label_path in missing else attempt(read_label, label_path, data.coding)
        if image is not None and (orientation := orientation_of(image_path)) > 1:
            turned.append(f"{image_path} ({orientation})")
        if image is not None and label is not None:
            attempt(check_sizes, image, image_path, label, label_path)
        if label is None:
            unread += 1
        else:
            counts = np.bincount(label.numpy().ravel(), minlength=256)
            pixels += counts
            images += counts > 0
            if counts[:IGNORE].sum() == 0:
                problems.append(f"{label_path} has no labelled pixel. Label it or remove the pair.")
    if not unread:
        problems += missing_classes(data, pixels)
    return Report(problems, pixels, images, notes_on(turned, left_out(data.pairs[0][0].parent)))


def missing_classes(data: SegmentationData, pixels: np.ndarray) -> list[str]:
    """Say it if a split shows one class only, or the training images lack some."""
    shown = np.flatnonzero(pixels[: len(data.classes)])
    folder = data.pairs[0][1].parent
    if len(data.classes) > 1 and len(shown) == 1:
        cause = "Check that the labels hold the indices of the classes."
        if pixels[IGNORE]:
            cause = (
                "All other pixels are unlabelled: in masks of 0 and 255 give the foreground its "
                "index in place of 255."
            )
        only = data.classes[shown[0]]
        return [f"{folder} must show at least two classes, found only {only!r}. {cause}"]
    absent = [name for index, name in enumerate(data.classes) if pixels[index] == 0]
    if data.split != "train" or not absent or not len(shown):
        return []
    listed = ", ".join(absent[:10]) + ", ..." * (len(absent) > 10)
    return [
        f"{folder} must show every class, found no pixel of {len(absent)}: {listed}. Leave out "
        f"the last ones, if nothing shows them, and what is no class. {data.coding.remedy}"
    ]


def left_out(folder: Path) -> str:
    """Say what a folder of images holds that is read as no image; '' if nothing."""
    names = [name for name in names_in(folder) if not name.lower().endswith(SUFFIXES)]
    if not names:
        return ""
    return (
        f"{folder} holds what is left out: {', '.join(names[:5])}{', ...' * (len(names) > 5)}. "
        f"Images lie in the folder itself, and end in {', '.join(SUFFIXES)}"
    )


def notes_on(turned: list[str], aside: str) -> tuple[str, ...]:
    """Say which images are not read as they are stored, or not at all."""
    notes = (aside,) if aside else ()
    if not turned:
        return notes
    return (
        *notes,
        f"{len(turned)} images have an EXIF orientation and are read as viewers show them, turned; "
        "their labels must be drawn on that. If they were drawn on the pixels as stored, save the "
        f"images without an orientation: {', '.join(turned[:5])}{', ...' * (len(turned) > 5)}",
    )


def stray_labels(data: SegmentationData) -> list[Path]:
    """Labels of this split that belong to no image of it."""
    image, label = data.pairs[0]
    suffix = label.name.removeprefix(image.stem)
    if suffix == ".mat":  # both splits of COCO-Stuff 10k share a folder
        return []
    used = {label.name for _, label in data.pairs}
    found = [name for name in names_in(label.parent) if name.endswith(suffix)]
    return [label.parent / name for name in found if name not in used]
