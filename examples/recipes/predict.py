"""Segment images with trained weights: a mask of class indices and an overlay for each.

    python examples/recipes/predict.py runs/NAME/best.safetensors photo.jpg more_photos/

Masks keep the size of their image and hold class indices (PNG, with the colours as a palette);
overlays are for looking at. What is there already is written anew.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from commands import run
from data import names_in, read_image
from decoding import SUFFIXES
from evaluate import check_window, load_segmenter, logits_at, pick_device
from pictures import class_colors
from weights import check_folder, write_whole

_JPEG = 65_500
"""The longest side of a JPEG."""


@dataclass(frozen=True)
class Settings:
    """Segment images with trained weights."""

    weights: tyro.conf.Positional[Path]
    """best.safetensors or last.safetensors of a run."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders of them."""
    out: Path = Path("predictions")
    """Folder for NAME_mask.png and NAME_overlay.jpg."""
    opacity: float = 0.6
    """Of the colours in the overlay, between 0 and 1."""
    window: int | None = None
    """Side of a sliding window; without it the whole image is seen at once."""
    device: str = "auto"
    """For example "cuda", "mps" or "cpu"; by default the best there is."""


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """List the image files among ``paths`` and in the folders among them.

    Raises:
        ValueError: if a path is missing, there are no images, or two would be written as one.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is missing. Name image files or folders of them.")
        if path.is_dir():
            images = (path / name for name in names_in(path) if name.lower().endswith(SUFFIXES))
            found += [image for image in images if image.is_file()]
        else:
            found.append(path)
    if not found:
        raise ValueError(f"images must name at least one image ({', '.join(SUFFIXES)}).")
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"images must have different names, since outputs are named after them, got more "
            f"than one {twice[0]}. Run once for each folder, with an --out of its own."
        )
    return found


def save(picture: Image.Image, path: Path, kind: str) -> None:
    write_whole(path, lambda partial: picture.save(partial, kind))


def main(settings: Settings) -> None:
    if not 0 <= settings.opacity <= 1:
        raise ValueError(f"opacity must be between 0 and 1, got {settings.opacity}.")
    check_window(settings.window)
    paths = find_images(settings.images)
    if settings.out.resolve() in {path.resolve().parent for path in paths}:
        raise ValueError(
            f"out must not be the folder of the images, {settings.out}, where NAME_mask.png may be "
            "a label. Choose another."
        )
    check_folder(settings.out)
    device = pick_device(settings.device)
    segmenter, recipe, _ = load_segmenter(settings.weights, device)
    settings.out.mkdir(parents=True, exist_ok=True)
    colours = (255 * class_colors()).round().astype(np.uint8)
    failed = []
    for path in tqdm(paths, "predicting", mininterval=1):
        try:
            image = torch.as_tensor(read_image(path)).to(device)
        except ValueError as error:
            failed.append(str(error))
            continue
        size = (image.shape[1], image.shape[2])
        logits = logits_at(segmenter, image, size, recipe.scale, settings.window)
        classes = logits.argmax(dim=0).byte().cpu().numpy()
        mask = Image.fromarray(classes, "P")
        mask.putpalette(colours.tobytes())
        shades = settings.opacity * colours[classes]
        light = (1 - settings.opacity) * image.permute(1, 2, 0).cpu().numpy()
        overlay = Image.fromarray((shades + light).round().astype(np.uint8))
        save(mask, settings.out / f"{path.stem}_mask.png", "PNG")
        kind, ending = ("PNG", "png") if max(overlay.size) > _JPEG else ("JPEG", "jpg")
        save(overlay, settings.out / f"{path.stem}_overlay.{ending}", kind)
    print(f"wrote {len(paths) - len(failed)} masks and overlays to {settings.out}")
    if failed:
        raise ValueError("\n".join(failed))


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings)))
