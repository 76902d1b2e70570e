"""What the pictures are made from: the quickstart's model and mosaics.

Trained without and with MVSC from one seed, for as long as a build of the documentation may take.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mvsc
from mvsc import diagnostics

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import quickstart

NAMES = list(quickstart.TEXTURES)
SIZE = (96, 96)


class Trained(NamedTuple):
    """What a training leaves behind: a model, its regularizer, and the path of its metrics."""

    model: nn.Module
    reg: mvsc.MVSCRegularizer
    metrics: Path


def mosaics(count: int = 4) -> quickstart.Split:
    """Return images and labels that no training has seen."""
    return quickstart.generate_mosaics(count, SIZE, seed=1)


@functools.cache
def trained(regularized: bool, steps: int = 150, seed: int = 0) -> Trained:
    """Train, and log as a training script would."""
    torch.manual_seed(seed)
    data = quickstart.Augmented(quickstart.generate_mosaics(240, SIZE, seed=0))
    loader = DataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    model = quickstart.build_model("tu-resnet10t", len(NAMES)).train()
    reg = mvsc.MVSCRegularizer(len(NAMES), quickstart.DIM, groups=4)
    head = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
    groups = [{"params": model.encoder.parameters(), "lr": 1e-3}, {"params": head}]
    optimizer = torch.optim.AdamW([*groups, reg.param_group()], lr=1e-2)
    scheduler = quickstart.warmup_then_poly(optimizer, steps)
    metrics = Path(tempfile.mkdtemp(), "metrics.jsonl")
    batches = (batch for _ in range(steps) for batch in loader)
    with metrics.open("w") as log:
        for step, (images, labels) in zip(range(1, steps + 1), batches, strict=False):
            features = model.decoder(model.encoder(quickstart.normalize(images)))
            loss = F.cross_entropy(
                model.segmentation_head(features), labels.long(), ignore_index=255
            )
            entry = {"step": step, "cross_entropy": loss.item()}
            if regularized:
                terms = reg.terms(features, labels, model.segmentation_head[0])
                loss = loss + reg.total(terms)
                means, present = diagnostics.cell_means(features, labels, reg.num_classes, 4)
                entry |= {name: term.item() for name, term in terms._asdict().items()}
                entry |= {
                    "group_similarity": diagnostics.group_similarity(reg.centroids).item(),
                    "alignment_accuracy": diagnostics.alignment_accuracy(
                        means, reg.centroids, present
                    ).item(),
                }
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 5 == 0:
                log.write(json.dumps(entry) + "\n")
            if step % 50 == 0:
                model.eval()
                log.write(json.dumps({"step": step, "val": {"mIoU": miou(model)}}) + "\n")
                model.train()
    return Trained(model.eval(), reg, metrics)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the map that enters the classifier."""
    return model.decoder(model.encoder(quickstart.normalize(images)))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class of each pixel."""
    return model.segmentation_head(features_of(model, images)).argmax(dim=1)


def miou(model: nn.Module) -> float:
    """Return the mIoU on 30 mosaics, in percent."""
    images, labels = quickstart.generate_mosaics(30, SIZE, seed=2)
    labels = labels.long()
    predicted = predict(model, images)
    pairs = (labels * len(NAMES) + predicted)[labels != 255]
    matrix = torch.bincount(pairs, minlength=len(NAMES) ** 2).reshape(len(NAMES), -1)
    hits, union = matrix.diag(), matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diag()
    return 100 * (hits / union).nanmean().item()
