"""From one file to an image, a label map or the names of classes; or a line that says why not.

Pictures are read as a viewer shows them: an orientation in their EXIF data is applied, in every
format and to labels, too. So a label belongs to what was seen when it was drawn.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat

IGNORE = 255
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of images."""
_HEADERS = {"name", "names", "class", "classes", "class_name", "label", "labels"}
LOSSLESS = {"BMP", "GIF", "PNG", "PPM", "TIFF"}
"""Formats, as Pillow calls them, in which a label is what was saved."""


def as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert to RGB; Pillow would turn the 16 or 32 bits of a grey image into white."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"{path} must have 8 bits a channel, got mode {image.mode!r} of Pillow. Scale it to "
            "0 .. 255 and save it anew."
        )
    return image.convert("RGB")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Decode a file as it is shown; a broken one, or a decompression bomb, is named in the error.

    ``info`` has, beside Pillow's own, ``"stored"``: the pixels' form in the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with path.open("rb") as file:  # closed whatever Pillow finds in it
                image = Image.open(file)
                stored = image.tile[0][3] if image.tile else image.mode
                image.load()
        except (
            OSError,
            SyntaxError,  # so Pillow calls some broken PNG files, and others ValueError
            ValueError,
            RuntimeError,  # of AVIF, and of what Pillow has not implemented
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            # Its own words show the file object.
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is no image that Pillow knows" if unknown else error
            raise ValueError(f"{path} cannot be read: {reason}. Replace or remove it.") from error
    with image:
        # Pillow turns a TIFF itself on loading. EXIF data that are broken turn nothing.
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        image.info["stored"] = stored
        yield image


def orientation_of(path: Path) -> int:
    """Return the EXIF orientation of an image file, 1 if it has none that can be read."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data lead Pillow to errors of any kind
        return 1
    return orientation if orientation in range(1, 9) else 1


def stored_indices(image: Image.Image, path: Path) -> np.ndarray:
    """Return the numbers of a label; they must stand in the file as they are."""
    # Never convert("L"): that makes greys of a palette's colours, and class 0 of most labels.
    if image.mode not in {"1", "P", "L", "I;16", "I"}:
        raise ValueError(
            f"{path} must hold one class index for each pixel (mode 1, P, L, I;16 or I), got mode "
            f"{image.mode}. Save the indices of the classes, not their colours."
        )
    # JPEG mixes the indices of neighbours; Pillow scales greys of 2 or 4 bits to 0 .. 255.
    few = image.info["stored"] in ("L;2", "L;4")
    packed = str(image.info.get("compression", ""))  # of a TIFF
    lossy = packed in ("jpeg", "webp")
    if few or lossy or image.format not in LOSSLESS:
        form = image.format + few * f" with pixels stored as {image.info['stored']}"
        form += lossy * f" with {packed} inside"
        raise ValueError(
            f"{path} must hold class indices as they are, got {form}. Save the labels as PNG with "
            "8 bits a pixel."
        )
    indices = np.array(image)
    return indices.astype(np.uint8) if image.mode == "1" else indices


def read_mat(path: Path) -> np.ndarray:
    """Return the label map of a .mat file of COCO-Stuff 10k, version 1.1."""
    try:
        found = loadmat(path, variable_names=["S", "names"])
        numbers, names = found["S"], found.get("names", ())
    except Exception as error:  # broken bytes lead scipy to errors of any kind
        raise ValueError(
            f"{path} cannot be read for its label map S: {error!r}. Replace or remove it."
        ) from error
    if np.size(names) == 172:  # "unlabeled" is its number 1; version 1.1 has it as 0
        raise ValueError(
            f"{path} must be of COCO-Stuff 10k version 1.1, got the 172 names of version 1.0, "
            'which numbers the classes differently. Run "python examples/recipes/prepare_data.py '
            'cocostuff10k".'
        )
    whole = np.issubdtype(numbers.dtype, np.number) and (numbers == np.floor(numbers.real)).all()
    if numbers.ndim != 2 or not whole:
        raise ValueError(
            f"{path} must hold a map S of whole numbers (height, width), got {numbers.dtype} of "
            f"shape {numbers.shape}. Replace or remove it."
        )
    return numbers if numbers.dtype == np.uint8 else numbers.real.astype(np.int64)


def read_classes(path: Path) -> list[str]:
    """Return the names in a classes.txt: one a line, class 0 first.

    Each may stand behind its number, as in ``0: sky`` or ``0,sky``, below a header or not.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing. Write one class name a line, class 0 first.")
    lines = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    check_lines(lines, path)
    classes = without_numbers(lines, path)
    if len(classes) == 1:
        raise ValueError(
            f"{path} must hold at least two class names, got {classes[0]!r} alone. Write the "
            "background first: it is class 0, with the label 0."
        )
    if not 2 <= len(classes) <= IGNORE or len(set(classes)) < len(classes):
        raise ValueError(
            f"{path} must hold 2 to {IGNORE} different class names, one a line, got "
            f"{len(classes)} lines with {len(set(classes))} names. Name every class once, and no "
            f"more than {IGNORE}: that number marks unlabelled pixels in labels of 8 bits."
        )
    return classes


def text_of(path: Path) -> str:
    """Decode a text that may begin with a byte order mark; without one it is UTF-8."""
    content = path.read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got the byte 0x{content[error.start]:02x} at "
            f"{error.start}. Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} must be text in UTF-8, got zero bytes. Save it as UTF-8.")
    return text


def check_lines(lines: list[str], path: Path) -> None:
    """Raise if a line holds more than a class, so that a name or its place would be a guess."""
    header = [each.strip(' "').lower() for each in re.split("[,;\t]", lines[0])] if lines else []
    named = len(header) > 1 and header[1] in _HEADERS  # the second column, says the header
    for number, line in enumerate(lines):
        if number and line.startswith("#"):
            raise ValueError(
                f"{path} must hold class names only, got the comment {line!r}. Remove it."
            )
        bare = re.sub('"[^"]*"', '""', line)
        parts = re.fullmatch(r'(?:""|\d+)\s*([,;\t]).*', bare)
        if not named and parts and parts[1] in bare[parts.end(1) :]:
            raise ValueError(
                f"{path} must hold the name of a class alone, or its number and its name, got "
                f"the line {line!r}. Leave out what is neither."
            )
    behind = [re.fullmatch(r"(.*[^\d\s])(\s*[:;,=\t]\s*| +)(\d+)", line) for line in lines]
    rows = [row for row in behind if row]
    # "road 7" and "building 11" are names with numbers behind them, "zone 1" and "zone 2" are not.
    apart = all(row[2].strip(" ") for row in rows)
    indices = {row[3] for row in rows if int(row[3]) <= IGNORE}
    listed = len({row[1] for row in rows}) == len(indices) == len(lines) > 1
    if rows and len(rows) == len(lines) and (apart or listed):
        raise ValueError(
            f"{path} must list the classes in the order of their indices, 0 first, got names with "
            f"numbers behind them, {lines[0]!r}. Sort the lines by number, and leave the numbers "
            "out."
        )


def without_numbers(lines: list[str], path: Path) -> list[str]:
    """Take the numbers off that stand before the names of all classes, and a header above them."""
    numbered = [re.fullmatch(r'"?(\d+)"?(\s*[:;,=]\s*|\s+)"?([^;,\t"]+).*', line) for line in lines]
    header = len(lines) > 1 and numbered[0] is None
    rows = [row for row in numbered[header:] if row]
    if not rows or len(rows) < len(lines) - header:
        first = re.split("[,;\t]", lines[0])[0].strip(' "').lower() if lines else ""
        if first in _HEADERS or first.startswith(("#", "[", "{")):
            raise ValueError(
                f"{path} must hold class names only, got the line {lines[0]!r} first, which looks "
                "like a header, a comment or JSON. Remove it; write one name a line, and no more."
            )
        return lines
    numbers = [int(row[1]) for row in rows]
    if numbers == list(range(len(rows))):
        return [row[3].strip() for row in rows]
    counted = sorted(numbers) in (list(range(len(rows))), list(range(1, 1 + len(rows))))
    counted |= numbers == sorted({*numbers}) and numbers[:2] in ([0, 1], [1, 2])
    if all(row[2].isspace() for row in rows) and not counted:
        return lines  # such as "2 doors"
    raise ValueError(
        f"{path} must list the classes in the order of their indices, 0 first, got the numbers "
        f"{', '.join(map(str, numbers[:5]))} .... Number classes and labels from 0, leave out what "
        "is no class, and give unlabelled pixels 255."
    )
