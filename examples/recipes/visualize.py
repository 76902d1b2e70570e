"""Show what a trained segmenter and its centroids see: pictures, and one HTML file with them all.

    python examples/recipes/visualize.py runs/NAME/best.safetensors photo.jpg --out report
    python examples/recipes/visualize.py runs/NAME/last.safetensors            # validation images

For each image: prediction (beside the label, for validation images) and the cosine of its features
to the centroids of the classes that are there, group by group. For the run: the similarity of all
centroids, and the training report.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from commands import run
from data import IGNORE, open_split, read_image
from evaluate import check_classes, fitted, load_segmenter, logits_at, padded, pick_device
from metrics import read_metrics
from models import Segmenter, features_of
from mvsc import plotting
from pictures import predictions, training_report
from predict import find_images
from recipes import Recipe
from weights import check_folder, load_weights, write_whole


@dataclass(frozen=True)
class Settings:
    """Draw what a trained segmenter and its centroids see, and put it into one HTML file."""

    weights: tyro.conf.Positional[Path]
    """best.safetensors or last.safetensors of a run."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, and folders of them; without any, validation images of the run's data set."""
    out: Path | None = None
    """Folder for the pictures and report.html; by default "report" in the run's folder."""
    data_root: Path | None = None
    """Folder of the data set; by default the one that the run was trained on."""
    count: int = 4
    """Validation images, taken at equal distances."""
    classes: int = 5
    """Heat maps are drawn for the classes with most pixels, at most this many."""
    device: str = "auto"
    """For example "cuda", "mps" or "cpu"; by default the best there is."""


class Scene(NamedTuple):
    """An image with its label, if it has one."""

    name: str
    image: Tensor
    label: Tensor | None


class Picture(NamedTuple):
    """A figure, the name of its file, and what it shows."""

    name: str
    caption: str
    figure: Figure


def main(settings: Settings) -> None:
    for name in ("count", "classes"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")
    out = settings.out or settings.weights.parent / "report"
    check_folder(out)
    device = pick_device(settings.device)
    segmenter, recipe, names = load_segmenter(settings.weights, device)
    recipe = replace(recipe, data_root=settings.data_root or recipe.data_root)
    centroids = load_centroids(settings.weights)
    if settings.images:
        paths = find_images(settings.images)
        scenes = [Scene(path.stem, read_image(path), None) for path in paths]
    else:
        scenes = validation_scenes(recipe, names, settings.count)

    out.mkdir(parents=True, exist_ok=True)
    pictures = [
        picture
        for scene in scenes
        for picture in draw_scene(
            scene, segmenter, centroids, names, recipe.scale, settings.classes, device
        )
    ]
    pictures += draw_run(settings.weights.parent / "metrics.jsonl", centroids, names)
    for picture in pictures:
        path = out / f"{picture.name}.png"
        write_whole(path, lambda p, f=picture.figure: f.savefig(p, format="png", dpi=150))
    text = page(settings.weights, recipe.name, pictures)
    write_whole(out / "report.html", lambda partial: partial.write_text(text, "utf-8"))
    print(f"wrote {len(pictures)} pictures and {out / 'report.html'}")


def validation_scenes(recipe: Recipe, names: Sequence[str], count: int) -> list[Scene]:
    """Take validation images at equal distances."""
    data = open_split(recipe.layout, recipe.data_root, "val")
    check_classes(names, data)
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    return [Scene(data.pairs[i][0].stem, *data[i]) for i in chosen]


def load_centroids(weights: Path) -> Tensor | None:
    """Load the centroids that lie beside the weights; a baseline has none."""
    # Those of best.safetensors are those of best.shifted.safetensors, too.
    path = weights.with_name(f"{weights.stem.removesuffix('.shifted')}.centroids.safetensors")
    if not path.exists():
        print(f"No heat maps, since {path} is not there, as of a run without MVSC.")
        return None
    tensors, _ = load_weights(path)
    return next((value for name, value in tensors.items() if name.endswith("centroids")), None)


@torch.no_grad()
def draw_scene(
    scene: Scene,
    segmenter: Segmenter,
    centroids: Tensor | None,
    names: Sequence[str],
    scale: tuple[int, int],
    most: int,
    device: torch.device,
) -> list[Picture]:
    """Draw the prediction and, with centroids, the heat maps of one image."""
    image = scene.image.as_subclass(Tensor)
    size = (image.shape[1], image.shape[2])
    predicted = logits_at(segmenter, image.to(device), size, scale).argmax(dim=0).cpu()
    if scene.label is None:
        label = predicted
        figure = predictions(image[None], predicted[None], {}, names=names)
        figure.axes[1].set_title("prediction")
    else:
        label = scene.label.as_subclass(Tensor)
        maps = {"prediction": predicted[None]}
        figure = predictions(image[None], label[None], maps, names=names)
    pictures = [Picture(f"{scene.name}_prediction", f"{scene.name}: prediction", figure)]
    if centroids is None:
        return pictures

    whole = fitted(segmenter, image.to(device), scale)
    images = padded(whole)
    features = features_of(segmenter, images)
    # The padding is no part of the picture.
    height, width = (
        max(round(features.shape[axis] * whole.shape[axis] / images.shape[axis]), 1)
        for axis in (2, 3)
    )
    pixels = torch.bincount(label[label != IGNORE].long(), minlength=len(names))
    present = [c for c in pixels.argsort(descending=True).tolist() if pixels[c] > 0][:most]
    if present:
        seen = features[:, :, :height, :width].cpu()
        figure = plotting.heatmaps(image, seen, centroids, present, names=names, labels=label)
        caption = f"{scene.name}: cosine of the features to the centroids of each group"
        pictures.append(Picture(f"{scene.name}_heatmaps", caption, figure))
    return pictures


def draw_run(metrics: Path, centroids: Tensor | None, names: Sequence[str]) -> list[Picture]:
    """Draw what belongs to the run and not to an image."""
    pictures = []
    if centroids is not None:
        figure = Figure((7, 6.4), layout="constrained")
        ax = figure.subplots()
        matrix = plotting.draw_similarity(ax, centroids, names)
        figure.colorbar(matrix, ax=ax, label="cosine", shrink=0.8)
        pictures.append(Picture("centroid_similarity", "Similarity of all centroids", figure))
    if read_metrics(metrics):
        figure = training_report({"": metrics})
        pictures.append(Picture("training", "What the training logged", figure))
    return pictures


def page(weights: Path, recipe: str, pictures: Sequence[Picture]) -> str:
    """Write one HTML page that holds every picture, and needs no other file."""
    parts = []
    for picture in pictures:
        file = io.BytesIO()
        picture.figure.savefig(file, format="png", dpi=110)
        encoded = base64.b64encode(file.getvalue()).decode()
        caption = html.escape(picture.caption)
        shown = f'<img src="data:image/png;base64,{encoded}" alt="{caption}">'
        parts.append(f"<figure><figcaption>{caption}</figcaption>{shown}</figure>")
    title = html.escape(f"{weights.parent.name} / {weights.name}")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ max-width: 70rem; margin: auto; padding: 1rem; font: 1rem/1.5 sans-serif; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption {{ font-weight: 600; margin-bottom: .5rem; }}
</style>
<h1>{title}</h1>
<p>Recipe {html.escape(recipe)}.</p>
{"".join(parts)}
</html>
"""


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings)))
