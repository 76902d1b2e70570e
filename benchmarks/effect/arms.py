"""What is compared: MVSC, its parts, and what a user would pick instead, at equal steps.

An arm changes a recipe, the pixels' own loss, or what is attached to the features. Rivals have the
face of MVSCRegularizer, so that the same tap feeds them. A strength follows the name: dice@0.5;
that of MVSC's own arms multiplies the weights of Eq. (2) and of L_v: mvsc@4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss
from torch import Tensor, nn

import mvsc
from data import IGNORE, SegmentationData
from mvsc import MVSCRegularizer
from mvsc.equations import centroid_classification_loss, global_centroids
from mvsc.finding import find_classifier
from mvsc.sampling import draw_halves, labels_on_grid, stream_key
from recipes import Recipe
from train import Attach, Criterion, attach, cross_entropy


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    mvsc: bool = True
    reg: dict[str, Any] = field(default_factory=dict)
    criterion: Callable[[float, SegmentationData], Criterion] | None = None
    rival: Callable[[int, int, float], nn.Module] | None = None
    split: Callable[[MVSCRegularizer, Tensor, Tensor], Tensor] | None = None
    strength: float = 1.0


class Terms(NamedTuple):
    """The one term of a rival."""

    rival: Tensor


class Rival(nn.Module):
    """A loss on features and labels, with MVSCRegularizer's face."""

    def __init__(self, num_classes: int, strength: float) -> None:
        super().__init__()
        self.num_classes, self.strength = num_classes, strength

    def terms(self, features: Tensor, labels: Tensor, classifier: nn.Module) -> Terms:
        size = (features.shape[2], features.shape[3])
        grid = labels_on_grid(labels, size, self.num_classes, IGNORE)
        return Terms(self.loss(features.float(), grid, classifier))

    def total(self, terms: Terms) -> Tensor:
        return self.strength * terms.rival

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        return {"params": list(self.parameters()), "weight_decay": 0.0, **overrides}

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
        super().__init__(num_classes, strength)
        self.inner = SupConLoss(temperature=0.1)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        return self.inner(*self.pixels(features, grid, 1024))


class ProxyAnchor(Rival):
    """ProxyAnchor over 4,096 pixels of a batch: a learned proxy for each class."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, strength)
        self.inner = ProxyAnchorLoss(num_classes, dim)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        return self.inner(*self.pixels(features, grid, 4096))


class Centre(Rival):
    """Squared distance of each pixel's direction to a learned centre of its class."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, strength)
        # As MVSC's centroids, from a stream of its own: both arms keep their random numbers.
        drawn = MVSCRegularizer(num_classes, dim, 1).centroids.detach()[0]
        self.centres = nn.Parameter(F.normalize(drawn, dim=1))

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        known = (grid < self.num_classes).float()
        distance = (F.normalize(features, dim=1) - own(self.centres, grid)).square().sum(dim=1)
        return (distance * known).sum() / known.sum().clamp_min(1)


class ClassMeans(Rival):
    """L_v without centroids: the classifier has to recognise the mean of each class."""

    def __init__(self, num_classes: int, dim: int, strength: float) -> None:
        super().__init__(num_classes, strength)

    def loss(self, features: Tensor, grid: Tensor, classifier: nn.Module) -> Tensor:
        means, counts = mvsc.segment_mean(features, grid, self.num_classes)
        weight = classifier.weight.flatten(2).sum(dim=2)
        return centroid_classification_loss(
            means[None], (counts > 0)[None], lambda v: F.linear(v, weight, classifier.bias)
        )


def own(vectors: Tensor, grid: Tensor) -> Tensor:
    """Give each pixel the vector of its class, ``(B, D, h, w)``; any to one that has none."""
    return F.embedding(grid.clamp_max(len(vectors) - 1), vectors).movedim(3, 1)


def by_image(reg: MVSCRegularizer, features: Tensor, grid: Tensor) -> Tensor:
    """Deal whole images to the groups, so that the means of a class differ as images do."""
    order = draw_halves(len(grid), stream_key(reg.seed, reg.step))
    return cells(reg, order[:, None, None] % reg.groups, grid)


def by_difficulty(reg: MVSCRegularizer, features: Tensor, grid: Tensor) -> Tensor:
    """Deal each class's pixels by their cosine to its centroid: the hardest to the first group."""
    with torch.no_grad():
        cosine = F.cosine_similarity(features.float(), own(global_centroids(reg.centroids), grid))
    flat = grid.flatten()
    # Class after class, and within one from the lowest cosine to the highest.
    order = (flat + 0.5 + 0.49 * cosine.flatten().double()).argsort()
    label = flat[order]
    sizes = torch.bincount(flat, minlength=reg.num_classes + 1)
    place = torch.arange(len(flat), device=flat.device) - (sizes.cumsum(0) - sizes)[label]
    group = torch.empty_like(flat).scatter(0, order, place * reg.groups // sizes[label])
    return cells(reg, group.view_as(grid), grid)


def cells(reg: MVSCRegularizer, group: Tensor, grid: Tensor) -> Tensor:
    """Number the cells as mvsc.sampling.draw_groups does."""
    cell = group * reg.num_classes + grid
    return torch.where(grid < reg.num_classes, cell, reg.groups * reg.num_classes)


def balanced(strength: float, data: SegmentationData) -> Criterion:
    """Weigh classes by frequency to the power of -strength (0.5: inverse square root)."""
    pixels = torch.zeros(len(data.classes))
    for index in range(len(data)):
        label = data[index][1].flatten().long()
        pixels += torch.bincount(label[label != IGNORE], minlength=len(pixels))
    weight = (pixels / pixels.sum()).clamp_min(1e-6) ** -strength
    # The mean weight of a pixel is 1, as without weights.
    weight = weight * pixels.sum() / (weight * pixels).sum()

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        device = logits.device
        each = F.cross_entropy(
            logits.float(), labels, weight.to(device), ignore_index=IGNORE, reduction="sum"
        )
        return each / (labels != IGNORE).sum().clamp_min(1)

    return criterion


def with_smp(loss: nn.Module) -> Callable[[float, SegmentationData], Criterion]:
    """Add a loss of segmentation_models_pytorch to the cross-entropy."""

    def make(strength: float, data: SegmentationData) -> Criterion:
        return lambda logits, labels: (
            cross_entropy(logits, labels) + strength * loss(logits.float(), labels)
        )

    return make


dice = with_smp(smp.losses.DiceLoss("multiclass", ignore_index=IGNORE))
lovasz = with_smp(smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE))

ARMS: dict[str, Arm] = {
    "ce": Arm(mvsc=False),
    "mvsc": Arm(),
    # Rows of the paper's Table 2.
    "without-eq2": Arm(reg={"align_weight": 0.0}),
    "without-eq3": Arm(reg={"pull_weight": 0.0}),
    "without-lv": Arm(reg={"classify_weight": 0.0}),
    "without-eq4": Arm(reg={"enhance": False}),
    # Its Table 3.
    "groups1": Arm(reg={"groups": 1}),
    "groups2": Arm(reg={"groups": 2}),
    "groups8": Arm(reg={"groups": 8}),
    # Other readings, and weights of its section 4.3 taken the other way round.
    "own-group": Arm(reg={"align_to": "group"}),
    "own-group-without-eq3": Arm(reg={"align_to": "group", "pull_weight": 0.0}),
    "swapped-weights": Arm(reg={"align_weight": 0.05, "classify_weight": 0.1}),
    # Other ways to split a class than at random.
    "by-image": Arm(split=by_image),
    "by-image-8": Arm(split=by_image, reg={"groups": 8}),
    "by-difficulty": Arm(split=by_difficulty),
    # What a user would pick instead.
    "balanced": Arm(mvsc=False, criterion=balanced, strength=0.5),
    "dice": Arm(mvsc=False, criterion=dice, strength=0.5),
    "lovasz": Arm(mvsc=False, criterion=lovasz, strength=0.5),
    "pixel-contrast": Arm(mvsc=False, rival=PixelContrast, strength=0.1),
    "proxy-anchor": Arm(mvsc=False, rival=ProxyAnchor, strength=0.01),
    "centre": Arm(mvsc=False, rival=Centre, strength=0.1),
    "class-means": Arm(mvsc=False, rival=ClassMeans, strength=0.05),
    # Both.
    "balanced+mvsc": Arm(criterion=balanced, strength=0.5),
    "dice+mvsc": Arm(criterion=dice, strength=0.5),
    "lovasz+mvsc": Arm(criterion=lovasz, strength=0.5),
}


def find(name: str) -> Arm:
    """Look an arm up; ``name@strength`` changes its strength.

    Raises:
        ValueError: if there is no such arm.
    """
    title, _, strength = name.partition("@")
    if title not in ARMS:
        raise ValueError(f"arms must be among {', '.join(ARMS)}, got {title!r}.")
    return replace(ARMS[title], strength=float(strength)) if strength else ARMS[title]


def ingredients(
    arm: Arm, recipe: Recipe, data: SegmentationData
) -> tuple[Recipe, Criterion, Attach]:
    """Return what train.train needs for an arm."""
    reg = replace(recipe.reg, **arm.reg)
    if arm.criterion:
        criterion = arm.criterion(arm.strength, data)
    else:
        criterion = cross_entropy
        # Eq. (3) stays: it moves the centroids only, which are close together soon.
        align, classify = reg.align_weight * arm.strength, reg.classify_weight * arm.strength
        reg = replace(reg, align_weight=align, classify_weight=classify)
    recipe = replace(recipe, mvsc=arm.mvsc, reg=reg)
    rival, split = arm.rival, arm.split
    if split is not None:

        def attach_split(model: nn.Module, recipe: Recipe) -> Any:
            attached = attach(model, recipe)
            attached.regularizer._split = partial(split, attached.regularizer)
            return attached

        return recipe, criterion, attach_split
    if rival is None:
        return recipe, criterion, attach

    def attach_rival(model: nn.Module, recipe: Recipe) -> Any:
        path = find_classifier(model, None, None)
        layer = model.get_submodule(path)
        # Its first weights must not move the random numbers that follow.
        with torch.random.fork_rng(devices=[]):
            own = rival(len(data.classes), layer.in_channels, arm.strength)
        return mvsc.AttachedRegularizer(model, path, own, add_to_loss=False)

    return recipe, criterion, attach_rival
