"""MVSC with one of its steps done in another way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvsc import MVSCRegularizer, MVSCTerms, equations
from mvsc.regularizer import CellMeans
from mvsc.sampling import draw_order
from rivals import own

Ask = Callable[[Tensor], Tensor]


class Variant(MVSCRegularizer):
    """MVSC, told how long the training is."""

    steps = 1

    def cells(self, group: Tensor, grid: Tensor) -> Tensor:
        """Number the cells as mvsc.sampling.draw_groups does."""
        known = grid < self.num_classes
        return torch.where(known, group * self.num_classes + grid, self.groups * self.num_classes)


class ByImage(Variant):
    """Deals whole images to the groups, so that the means of a class differ as images do."""

    def split(self, grid: Tensor, features: Tensor) -> Tensor:
        order = draw_order(len(grid), self.step, self.seed)
        return self.cells(order[:, None, None] % self.groups, grid)


class ByDifficulty(Variant):
    """Deals each class's pixels by their cosine to its centroid: the hardest to the first group."""

    def split(self, grid: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            centroid = own(equations.global_centroids(self.centroids), grid)
            cosine = F.cosine_similarity(features.float(), centroid)
        flat = grid.flatten()
        # Class after class, and within one from the lowest cosine to the highest.
        order = (flat + 0.5 + 0.49 * cosine.flatten().double()).argsort()
        label = flat[order]
        sizes = torch.bincount(flat, minlength=self.num_classes + 1)
        place = torch.arange(len(flat), device=flat.device) - (sizes.cumsum(0) - sizes)[label]
        group = torch.empty_like(flat).scatter(0, order, place * self.groups // sizes[label])
        return self.cells(group.view_as(grid), grid)


class ByCount(Variant):
    """Weighs each cell by its pixels in L_v: classes do not count alike."""

    def classify(self, enhanced: Tensor, cells: CellMeans, ask: Ask) -> Tensor:
        counts = cells.counts
        classes = torch.arange(self.num_classes, device=counts.device).expand_as(counts)
        logits = ask(enhanced.flatten(0, 1))
        losses = F.cross_entropy(logits, classes.flatten(), reduction="none")
        return (losses * counts.flatten()).sum() / counts.sum().clamp_min(1)


class AllClasses(Variant):
    """Has the classifier recognise the centroids of absent classes, too."""

    def classify(self, enhanced: Tensor, cells: CellMeans, ask: Ask) -> Tensor:
        everywhere = cells._replace(present=torch.ones_like(cells.present))
        return super().classify(enhanced, everywhere, ask)


class Apart(Variant):
    """Decorrelates the groups of a class, in place of Eq. (3)'s pull."""

    def pull(self, centroids: Tensor) -> Tensor:
        unit = F.normalize(centroids, dim=2)
        cosines = torch.einsum("gcd,hcd->cgh", unit, unit)
        return cosines.triu(1).square().sum(dim=(1, 2)).mean()


class Fading(Variant):
    """Lets the weights fall to 0, in proportion to the steps that are left."""

    def total(self, terms: MVSCTerms) -> Tensor:
        return super().total(terms) * (1 - self.step / self.steps).clamp_min(0)


class Slow(Variant):
    """Lets the centroids learn at a tenth of the rate, so that L_v does not fall by them alone."""

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        group = super().param_group(**overrides)
        return {**group, "lr": group["lr"] / 10}


class Memory(Variant):
    """Keeps a running mean of each class, and has L_v look there, not at the centroids."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("memory", torch.zeros(self.num_classes, self.dim))
        self.register_buffer("seen", torch.zeros(self.num_classes, 1, dtype=torch.bool))

    def enhanced(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        means, counts, _ = cells
        with torch.no_grad():
            pixels = counts.sum(dim=0)[:, None]
            now = (means * counts[..., None]).sum(dim=0) / pixels.clamp_min(1)
            followed = torch.where(self.seen, self.memory.lerp(now, 0.1), now)
            self.memory = torch.where(pixels > 0, followed, self.memory)
            self.seen = self.seen | (pixels > 0)
        return equations.enhance_centroids(self.memory.expand_as(means), means)


class Margin(Variant):
    """Asks in Eq. (2) for a cosine that is 0.1 higher than those to other classes."""

    def align(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        targets = equations.alignment_targets(centroids, self.align_to)
        cosines = F.normalize(cells.means, dim=2) @ F.normalize(targets, dim=-1).mT
        cosines = cosines - 0.1 * torch.eye(self.num_classes, device=cosines.device)
        logits = (cosines / self.temperature).masked_fill(~cells.present.any(dim=0), -1e30)
        return equations.centroid_classification_loss(logits, cells.present)


class LearnedTemperature(Variant):
    """Learns the temperature of Eq. (2) beside the centroids."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.log_temperature = nn.Parameter(torch.tensor(self.temperature).log())

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        return {**super().param_group(**overrides), "params": list(self.parameters())}

    def align(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        targets = equations.alignment_targets(centroids, self.align_to)
        temperature = self.log_temperature.exp().clamp_min(0.01)
        return equations.alignment_loss(cells.means, targets, cells.present, temperature)


class Deviation(ByImage):
    """Leaves the deviation of a group's mean from its class's in the value of Eq. (4)."""

    def enhanced(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        pixels = cells.counts.sum(dim=0).clamp_min(1)[:, None]
        mean = (cells.means * cells.counts[..., None]).sum(dim=0) / pixels
        return centroids + (cells.means - mean.detach())
