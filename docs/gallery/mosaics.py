"""What the pictures are made from: two runs of the recipes on the quickstart's mosaics.

Trained without and with MVSC from one seed, for as long as a build of the documentation may take.
"""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES / "recipes"))
import models
from data import open_split
from evaluate import load_segmenter
from recipes import Recipe
from train import train
from visualize import load_centroids

FOLDER = Path(tempfile.mkdtemp())
quickstart = [sys.executable, EXAMPLES / "quickstart.py", "--epochs", "0", "--out", FOLDER]
subprocess.run(quickstart, check=True)
VAL = open_split("folder", FOLDER / "mosaics", "val")
NAMES = VAL.classes


class Trained(NamedTuple):
    """What a training leaves behind; without MVSC there are no centroids."""

    segmenter: models.Segmenter
    centroids: Tensor | None
    metrics: Path


def mosaics(count: int = 4) -> tuple[Tensor, Tensor]:
    """Return images and labels that no training has seen."""
    images, labels = zip(*(VAL[i] for i in range(count)), strict=True)
    return torch.stack(images), torch.stack(labels)


@functools.cache
def trained(*, regularized: bool) -> Trained:
    """Train as train.py does."""
    out = FOLDER / ("mvsc" if regularized else "baseline")
    recipe = Recipe(
        data_root=FOLDER / "mosaics",
        out=out,
        mvsc=regularized,
        model="smp/Segformer/tu-resnet10t",
        decoder_dim=128,
        pretrained=False,
        steps=100,
        batch_size=8,
        warmup=7,
        lr=1e-3,
        scale=(96, 96),
        crop=(96, 96),
        workers=0,
        cpu=True,
        log_every=5,
        eval_every=50,
    )
    train(recipe)
    weights = out / "last.safetensors"
    segmenter, *_ = load_segmenter(weights, torch.device("cpu"))
    return Trained(segmenter, load_centroids(weights), out / "metrics.jsonl")


@torch.no_grad()
def features_of(model: Trained, images: Tensor) -> Tensor:
    """Return the map that enters the classifier."""
    return models.features_of(model.segmenter, model.segmenter.normalize(images))


@torch.no_grad()
def predict(model: Trained, images: Tensor) -> Tensor:
    """Return the class of each pixel."""
    return model.segmenter.model(model.segmenter.normalize(images)).argmax(dim=1)
