"""From one file to an image, a label map or the names of classes; or a line that says why not."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

IGNORE = 255
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of images."""


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
    """Decode a file; a broken one, or a decompression bomb, is an error that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with path.open("rb") as file:  # closed whatever Pillow finds in it
                image = Image.open(file)
                image.info["stored"] = image.tile[0][3] if image.tile else image.mode
                image.load()
        except (
            OSError,
            SyntaxError,  # so Pillow calls some broken PNG files, and others ValueError
            ValueError,
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"{path} cannot be read: {error}. Replace or remove it.") from error
    with image:
        yield image


def stored_indices(image: Image.Image, path: Path) -> np.ndarray:
    # Never convert("L"): that makes greys of a palette's colours, and class 0 of most labels.
    if image.mode not in {"P", "L", "I;16", "I"}:
        raise ValueError(
            f"{path} must hold one class index for each pixel (mode P, L, I;16 or I), got mode "
            f"{image.mode}. Save the indices of the classes, not their colours."
        )
    # JPEG mixes the indices of neighbours; Pillow scales greys of 2 or 4 bits to 0 .. 255.
    if image.format == "JPEG" or image.info.get("stored") in ("L;2", "L;4"):
        raise ValueError(
            f"{path} must hold class indices as they are, got {image.format} with pixels stored "
            f"as {image.info.get('stored')}. Save the labels as PNG with 8 bits a pixel."
        )
    return np.array(image)


def read_mat(path: Path) -> np.ndarray:
    try:
        numbers = loadmat(path, variable_names=["S"])["S"]
    except Exception as error:  # broken bytes lead scipy to errors of any kind
        raise ValueError(
            f"{path} cannot be read for its label map S: {error!r}. Replace or remove it."
        ) from error
    whole = np.issubdtype(numbers.dtype, np.number) and (numbers == np.floor(numbers.real)).all()
    if numbers.ndim != 2 or not whole:
        raise ValueError(
            f"{path} must hold a map S of whole numbers (height, width), got {numbers.dtype} of "
            f"shape {numbers.shape}. Replace or remove it."
        )
    return numbers if numbers.dtype == np.uint8 else numbers.real.astype(np.int64)


def read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Write one class name a line, class 0 first.")
    classes = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    if not 1 <= len(classes) <= IGNORE or len(set(classes)) < len(classes):
        raise ValueError(
            f"{path} must hold 1 to {IGNORE} different class names, one a line, got "
            f"{len(classes)} lines with {len(set(classes))} names. Name every class once."
        )
    return classes
