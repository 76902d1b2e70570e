"""Losses beyond the paper: cells of another size, another question asked of them.

All have the face of MVSCRegularizer. Two axes span most of them: the cell (a class, a class of an
image, k of its pixels, one pixel) and what is asked of it (cross-entropy, or IoU with its price
for false positives). MVSC without centroids, class-balanced cross-entropy and the soft Jaccard
loss are corners. ``strength`` is the weight, in place of L_v's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvsc import segment_mean
from mvsc.classifier import classify_vectors
from rivals import Rival


def balanced_mean(losses: Tensor, owner: Tensor, classes: int) -> Tensor:
    """Average within a class, then over the classes that are there."""
    one = F.one_hot(owner, classes).to(losses.dtype)
    counts = one.sum(dim=0)
    return ((losses @ one) / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def mean_over(losses: Tensor, here: Tensor) -> Tensor:
    """Average the losses of the classes that are here; 0 if none is."""
    return torch.where(here, losses, 0).sum() / here.sum().clamp_min(1)


def pixel_cells(grid: Tensor, classes: int, k: int) -> tuple[Tensor, Tensor]:
    """Deal each class's pixels at random to cells of k; return cells and the class of each."""
    flat = grid.flatten()
    order = (flat + 0.5 * torch.rand(flat.shape, device=flat.device, dtype=torch.float64)).argsort()
    counts = torch.bincount(flat, minlength=classes + 1)
    label = flat[order]
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[label]
    cells = (counts[:classes] + k - 1) // k
    first = F.pad(cells.cumsum(0), (1, 0))  # cell of each class; the last is the spare one
    cell = torch.where(label < classes, first[label] + place // k, first[-1])
    out = torch.empty_like(flat).scatter(0, order, cell)
    return out.view_as(grid), torch.arange(classes, device=flat.device).repeat_interleave(cells)


def image_cells(grid: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Make a cell of each class of each image; return cells and the class of each."""
    images = torch.arange(len(grid), device=grid.device)[:, None, None]
    cell = torch.where(grid < classes, images * classes + grid, len(grid) * classes)
    return cell, torch.arange(classes, device=grid.device).repeat(len(grid))


class Cells(Rival):
    """A loss on the means of cells, each of one class."""

    k: int | None = None
    """Pixels of a cell; None for a cell of each class of each image."""
    coarsest: int | None = None
    """Pixels of a cell in the first step, falling to 1 in the last, in even ratios."""

    def size(self) -> int | None:
        if self.coarsest is None:
            return self.k
        left = max(1 - self.step.item() / self.steps, 0.0)
        return max(round(self.coarsest**left), 1)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        k, classes = self.size(), self.num_classes
        cells, owner = pixel_cells(grid, classes, k) if k else image_cells(grid, classes)
        if not len(owner):  # nothing is labelled
            return 0 * features.sum()
        means, counts = segment_mean(features, cells, len(owner))
        return self.ask(means, counts, owner, classifier)

    def ask(self, means: Tensor, counts: Tensor, owner: Tensor, classifier: nn.Module) -> Tensor:
        raise NotImplementedError


class CellMeans(Cells):
    """Cross-entropy of the cells' means: L_v without centroids, on smaller cells."""

    def ask(self, means: Tensor, counts: Tensor, owner: Tensor, classifier: nn.Module) -> Tensor:
        logits = classify_vectors(classifier, means, self.num_classes)
        losses = F.cross_entropy(logits, owner, reduction="none")
        here = counts > 0  # An image has only some of the classes.
        return balanced_mean(losses[here], owner[here], self.num_classes)


class CellIoU(Cells):
    """-log IoU from the cells' soft confusion: L_v plus a price for false positives."""

    def ask(self, means: Tensor, counts: Tensor, owner: Tensor, classifier: nn.Module) -> Tensor:
        mass = counts[:, None] * classify_vectors(classifier, means, self.num_classes).softmax(
            dim=1
        )
        own = F.one_hot(owner, self.num_classes).to(mass.dtype)
        hit, labelled = (own * mass).sum(dim=0), own.T @ counts.to(mass.dtype)
        union = labelled + mass.sum(dim=0) - hit
        losses = union.clamp_min(1e-6).log() - hit.clamp_min(1e-6).log()
        return mean_over(losses, labelled > 0)


class CellIoUOf16(CellIoU):
    """The same on cells of 16 pixels."""

    k = 16


class CellIoUOfPixels(CellIoU):
    """The same on pixels: the log of the soft Jaccard index on the feature grid."""

    k = 1


class FinerCellIoU(CellIoU):
    """The same from cells of 4,096 pixels, i.e. nearly whole classes, down to pixels."""

    coarsest = 4096


class CellMeansOf16(CellMeans):
    """Cross-entropy of cells of 16 pixels."""

    k = 16


class CellMeansOfPixels(CellMeans):
    """Cross-entropy of pixels, classes alike."""

    k = 1


class FinerCellMeans(CellMeans):
    """Cross-entropy from cells of 4,096 pixels down to pixels."""

    coarsest = 4096


class RivalCells(Rival):
    """Groups by the strongest other class, weighed by what a pixel is worth in mIoU."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, dim, strength)
        self.register_buffer("seen", torch.zeros(num_classes, num_classes))

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        classes, known = self.num_classes, grid < self.num_classes
        own = grid.clamp_max(classes - 1)
        with torch.no_grad():
            logits = self.of_pixels(features, classifier)
            pairs = (own * classes + logits.argmax(dim=3))[known]
            now = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            self.seen.mul_(0.98).add_(now)
            hit = self.seen.diagonal()
            union = (self.seen.sum(0) + self.seen.sum(1) - hit).clamp_min(1)
            # A pixel of c, taken back from k, adds this much to the sum of the IoU.
            worth = 1 / union[:, None] + (hit / union.square())[None]
            rival = logits.scatter(3, own[..., None], -torch.inf).argmax(dim=3)
        cells = torch.where(known, own * classes + rival, classes**2)
        means, counts = segment_mean(features, cells, classes**2)
        owner = torch.arange(classes, device=grid.device).repeat_interleave(classes)
        logits = classify_vectors(classifier, means, self.num_classes)
        losses = F.cross_entropy(logits, owner, reduction="none")
        weight = worth.flatten() * counts
        return (weight * losses).sum() / weight.sum().clamp_min(1e-12)


class Cumulant(Rival):
    """L_v in the limit of infinitely many groups of 1 / lam pixels: the margins' two moments."""

    lam, detach, ramp = 1.0, False, False

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        logits = self.of_pixels(features, classifier).movedim(3, 1)
        margins = logits - logits.gather(1, grid.clamp_max(self.num_classes - 1)[:, None])
        mean, counts = segment_mean(margins, grid, self.num_classes)
        square, _ = segment_mean(margins.square(), grid, self.num_classes)
        variance = (square - mean.square()).clamp_min(0)
        variance = variance.detach() if self.detach else variance
        lam = self.lam * self.step / self.steps if self.ramp else self.lam
        return mean_over(torch.logsumexp(mean + 0.5 * lam * variance, dim=1), counts > 0)


class DetachedCumulant(Cumulant):
    """The same without a gradient through the variance, as in ISDA."""

    detach = True


class RampedCumulant(Cumulant):
    """The same with a variance that counts more and more."""

    ramp = True


class PriorConsistent(Rival):
    """Class means, with the shares of the classes put on the logits: no shift is asked for."""

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        means, counts = segment_mean(features, grid, self.num_classes)
        logits = classify_vectors(classifier, means, self.num_classes)
        logits -= self.log_shares.to(means.device)
        here = counts > 0
        owner = torch.arange(self.num_classes, device=grid.device)
        return mean_over(F.cross_entropy(logits, owner, reduction="none"), here)


class Frozen(Rival):
    """Class means, with no gradient to the classifier: only the features can answer."""

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        means, counts = segment_mean(features, grid, self.num_classes)
        weight = classifier.weight.flatten(2).sum(dim=2).detach()
        bias = None if classifier.bias is None else classifier.bias.detach()
        owner = torch.arange(self.num_classes, device=grid.device)
        losses = F.cross_entropy(F.linear(means, weight, bias), owner, reduction="none")
        return mean_over(losses, counts > 0)


class Simplex(Rival):
    """Class means against a fixed simplex, as CeCo's region branch; cosines times 10."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, dim, strength)
        generator = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(dim, num_classes, generator=generator))[0]
        centred = torch.eye(num_classes) - 1 / num_classes
        self.register_buffer("corners", F.normalize((axes @ centred).T, dim=1))

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        means, counts = segment_mean(features, grid, self.num_classes)
        cosines = F.normalize(means, dim=1) @ self.corners.T
        owner = torch.arange(self.num_classes, device=grid.device)
        return mean_over(F.cross_entropy(10 * cosines, owner, reduction="none"), counts > 0)
