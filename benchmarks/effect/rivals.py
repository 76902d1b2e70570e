"""Losses on features and labels that a user would attach instead of MVSC, with its face."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss
from torch import Tensor, nn

import mvsc
from data import IGNORE
from mvsc import MVSCRegularizer, equations
from mvsc.classifier import classify_vectors
from mvsc.sampling import labels_on_grid
from mvsc.watch import Watch


class Terms(NamedTuple):
    """The one term of a rival."""

    rival: Tensor


class Rival(nn.Module):
    """A loss on features and labels, with MVSCRegularizer's face."""

    step: Tensor
    steps = 1  # of the whole training
    log_shares: Tensor  # of each class in the labelled training pixels

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__()
        self.num_classes, self.strength = num_classes, strength
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._watch = Watch()  # of which the tap tells what the model does to its images

    def terms(
        self, features: Tensor, labels: Tensor, classifier: nn.Module, **options: Any
    ) -> Terms:
        self.step += 1
        size = (features.shape[2], features.shape[3])
        grid = labels_on_grid(labels, size, self.num_classes, IGNORE)
        return Terms(self.loss(features.float(), grid, classifier))

    def total(self, terms: Terms) -> Tensor:
        return self.strength * terms.rival

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        return {"params": list(self.parameters()), "weight_decay": 0.0, **overrides}

    def of_pixels(self, features: Tensor, classifier: nn.Module) -> Tensor:
        """Ask the classifier about each pixel: ``(batch, height, width, num_classes)``."""
        rows = features.movedim(1, 3)
        logits = classify_vectors(classifier, rows.flatten(0, 2), self.num_classes)
        return logits.view(*rows.shape[:3], -1)

    def pixels(self, features: Tensor, grid: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Draw labelled pixels, each class alike: ``(n, dim)`` and ``(n,)``, n <= count."""
        rows, flat = features.permute(0, 2, 3, 1).flatten(0, 2), grid.flatten()
        sizes = torch.bincount(flat, minlength=self.num_classes + 1).float()
        weight = (flat < self.num_classes) / sizes.clamp_min(1)[flat]
        drawn = torch.multinomial(weight, min(count, int((weight > 0).sum())))
        return rows[drawn], flat[drawn]


class PixelContrast(Rival):
    """Supervised contrast over 1,024 pixels of a batch, temperature 0.1."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, dim, strength)
        self.inner = SupConLoss(temperature=0.1)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        return self.inner(*self.pixels(features, grid, 1024))


class ProxyAnchor(Rival):
    """ProxyAnchor over 4,096 pixels of a batch: a learned proxy for each class."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, dim, strength)
        self.inner = ProxyAnchorLoss(num_classes, dim)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        return self.inner(*self.pixels(features, grid, 4096))


class Centre(Rival):
    """Squared distance of each pixel's direction to a learned centre of its class."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, dim, strength)
        # As MVSC's centroids, from a stream of its own: both arms keep their random numbers.
        drawn = MVSCRegularizer(num_classes, dim, 1).centroids.detach()[0]
        self.centres = nn.Parameter(F.normalize(drawn, dim=1))

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        known = (grid < self.num_classes).float()
        distance = (F.normalize(features, dim=1) - own(self.centres, grid)).square().sum(dim=1)
        return (distance * known).sum() / known.sum().clamp_min(1)


class ClassMeans(Rival):
    """L_v without centroids: the classifier has to recognise the mean of each class."""

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        means, counts = mvsc.segment_mean(features, grid, self.num_classes)
        logits = classify_vectors(classifier, means, self.num_classes)
        return equations.centroid_classification_loss(logits[None], (counts > 0)[None])


def own(vectors: Tensor, grid: Tensor) -> Tensor:
    """Give each pixel the vector of its class, ``(B, D, h, w)``; any to one that has none."""
    return F.embedding(grid.clamp_max(len(vectors) - 1), vectors).movedim(3, 1)
