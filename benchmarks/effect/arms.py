"""What is compared: MVSC, its parts, and what a user would pick instead, at equal steps.

An arm changes a recipe, the pixels' own loss, or what is attached to the features. Rivals have the
face of MVSCRegularizer, so that the same tap feeds them. A strength follows the name: dice@0.5;
that of MVSC's own arms multiplies the weights of Eq. (2) and of L_v: mvsc@4. A pixels' own loss and
what is attached to the features make a pair: lovasz@4+mvsc@4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from mvsc.segment import segment_sum
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss
from torch import Tensor, nn

import mvsc
from data import IGNORE, SegmentationData, check
from mvsc import MVSCRegularizer, MVSCTerms, equations
from mvsc.finding import find_classifier
from mvsc.sampling import draw_groups, draw_halves, labels_on_grid, stream_key
from recipes import Recipe
from train import Criterion, cross_entropy
from train import Regularize as Attach
from train import regularize as attach

Vectors = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    mvsc: bool = True
    reg: dict[str, Any] = field(default_factory=dict)
    criterion: Callable[[float, SegmentationData], Criterion] | None = None
    rival: Callable[[int, int, float], nn.Module] | None = None
    variant: "type[Variant] | None" = None
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
        return equations.centroid_classification_loss(
            means[None], (counts > 0)[None], linear(classifier)
        )


def linear(classifier: nn.Module) -> Vectors:
    """Return a convolution as what it does to a vector, or inside a uniform region (R13)."""
    weight = classifier.weight.flatten(2).sum(dim=2)
    return lambda vectors: F.linear(vectors, weight, classifier.bias)


def own(vectors: Tensor, grid: Tensor) -> Tensor:
    """Give each pixel the vector of its class, ``(B, D, h, w)``; any to one that has none."""
    return F.embedding(grid.clamp_max(len(vectors) - 1), vectors).movedim(3, 1)


class Variant(MVSCRegularizer):
    """MVSC put together anew from its public parts, so that one of them can be another."""

    steps = 1  # of the whole training

    def terms(self, features: Tensor, labels: Tensor, classifier: nn.Module) -> MVSCTerms:
        self.step += 1
        size = (features.shape[2], features.shape[3])
        grid = labels_on_grid(labels, size, self.num_classes, self.ignore_index)
        cells = self.split(features, grid)
        sums, counts = segment_sum(features, cells, self.groups * self.num_classes)
        means, present = equations.class_group_means(sums, counts, self.groups)
        counts = counts.view_as(present)
        enhanced = self.enhanced(means, counts)
        to_group = self.align_to == "group"
        targets = self.centroids if to_group else equations.global_centroids(self.centroids)
        return MVSCTerms(
            self.align(means, targets, present),
            self.pull(),
            self.classify(enhanced, counts, linear(classifier)),
        )

    def split(self, features: Tensor, grid: Tensor) -> Tensor:
        """Give each pixel its cell, ``group * num_classes + label``."""
        key = stream_key(self.seed, self.step)
        return draw_groups(grid, self.groups, self.num_classes, key)

    def align(self, means: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        return equations.alignment_loss(means, targets, present, self.temperature)

    def pull(self) -> Tensor:
        order = draw_halves(self.groups, stream_key(self.seed, self.step))
        return equations.centroid_pull_loss(self.centroids, order)

    def enhanced(self, means: Tensor, counts: Tensor) -> Tensor:
        return equations.enhance_centroids(self.centroids, means)

    def classify(self, enhanced: Tensor, counts: Tensor, classifier: Vectors) -> Tensor:
        return equations.centroid_classification_loss(enhanced, counts > 0, classifier)

    def cells(self, group: Tensor, grid: Tensor) -> Tensor:
        """Number the cells as mvsc.sampling.draw_groups does."""
        known = grid < self.num_classes
        return torch.where(known, group * self.num_classes + grid, self.groups * self.num_classes)


class ByImage(Variant):
    """Deals whole images to the groups, so that the means of a class differ as images do."""

    def split(self, features: Tensor, grid: Tensor) -> Tensor:
        order = draw_halves(len(grid), stream_key(self.seed, self.step))
        return self.cells(order[:, None, None] % self.groups, grid)


class ByDifficulty(Variant):
    """Deals each class's pixels by their cosine to its centroid: the hardest to the first group."""

    def split(self, features: Tensor, grid: Tensor) -> Tensor:
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

    def classify(self, enhanced: Tensor, counts: Tensor, classifier: Vectors) -> Tensor:
        classes = torch.arange(self.num_classes, device=counts.device).expand_as(counts)
        logits = classifier(enhanced.flatten(0, 1))
        losses = F.cross_entropy(logits, classes.flatten(), reduction="none")
        return (losses * counts.flatten()).sum() / counts.sum().clamp_min(1)


class AllClasses(Variant):
    """Has the classifier recognise the centroids of absent classes, too."""

    def classify(self, enhanced: Tensor, counts: Tensor, classifier: Vectors) -> Tensor:
        return super().classify(enhanced, torch.ones_like(counts), classifier)


class Apart(Variant):
    """Decorrelates the groups of a class, in place of Eq. (3)'s pull."""

    def pull(self) -> Tensor:
        unit = F.normalize(self.centroids, dim=2)
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

    def enhanced(self, means: Tensor, counts: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = counts.sum(dim=0)[:, None]
            now = (means * counts[..., None]).sum(dim=0) / pixels.clamp_min(1)
            followed = torch.where(self.seen, self.memory.lerp(now, 0.1), now)
            self.memory = torch.where(pixels > 0, followed, self.memory)
            self.seen = self.seen | (pixels > 0)
        return equations.enhance_centroids(self.memory.expand_as(means), means)


class Margin(Variant):
    """Asks in Eq. (2) for a cosine that is 0.1 higher than those to other classes."""

    def align(self, means: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        cosines = F.normalize(means, dim=2) @ F.normalize(targets, dim=-1).mT
        cosines = cosines - 0.1 * torch.eye(self.num_classes, device=cosines.device)
        absent = ~present.any(dim=0)
        return equations.centroid_classification_loss(
            cosines / self.temperature, present, lambda each: each.masked_fill(absent, -1e30)
        )


class LearnedTemperature(Variant):
    """Learns the temperature of Eq. (2) beside the centroids."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.log_temperature = nn.Parameter(torch.tensor(self.temperature).log())

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        return {**super().param_group(**overrides), "params": list(self.parameters())}

    def align(self, means: Tensor, targets: Tensor, present: Tensor) -> Tensor:
        temperature = self.log_temperature.exp().clamp_min(0.01)
        return equations.alignment_loss(means, targets, present, temperature)


def class_pixels(data: SegmentationData) -> Tensor:
    """Count the labelled pixels of each class.

    Raises:
        ValueError: if a file of the split cannot be used.
    """
    found = check(data)
    if found.problems:
        raise ValueError("\n".join(found.problems))
    return torch.from_numpy(found.pixels[: len(data.classes)]).float()


def balanced(strength: float, data: SegmentationData) -> Criterion:
    """Weigh classes by frequency to the power of -strength (0.5: inverse square root)."""
    pixels = class_pixels(data)
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
    # Four times one of the two weights that mvsc@4 has four times.
    "strong-eq2": Arm(reg={"align_weight": 0.4}),
    "strong-lv": Arm(reg={"classify_weight": 0.2}),
    # Other ways to split a class than at random.
    "by-image": Arm(variant=ByImage),
    "by-difficulty": Arm(variant=ByDifficulty),
    # Other parts, or other weights along the training.
    "by-count": Arm(variant=ByCount),
    "all-classes": Arm(variant=AllClasses),
    "apart": Arm(variant=Apart, reg={"align_to": "group"}),
    "fading": Arm(variant=Fading),
    "slow": Arm(variant=Slow),
    "memory": Arm(variant=Memory),
    "margin": Arm(variant=Margin),
    "learned-temperature": Arm(variant=LearnedTemperature),
    # What a user would pick instead.
    "balanced": Arm(mvsc=False, criterion=balanced, strength=0.5),
    "dice": Arm(mvsc=False, criterion=dice, strength=0.5),
    "lovasz": Arm(mvsc=False, criterion=lovasz, strength=0.5),
    "pixel-contrast": Arm(mvsc=False, rival=PixelContrast, strength=0.1),
    "proxy-anchor": Arm(mvsc=False, rival=ProxyAnchor, strength=0.01),
    "centre": Arm(mvsc=False, rival=Centre, strength=0.1),
    "class-means": Arm(mvsc=False, rival=ClassMeans, strength=0.05),
}


def find(name: str) -> Arm:
    """Look an arm up; ``name@strength`` changes its strength, ``+`` joins two.

    Raises:
        ValueError: if there is no such arm, or two do not go together.
    """
    first, plus, second = name.partition("+")
    if plus:
        loss, attached = find(first), find(second)
        if loss.criterion is None or attached.criterion is not None or attached == ARMS["ce"]:
            raise ValueError(
                "arms joined by + must be a loss and what is attached, as lovasz+mvsc, got "
                f"{name!r}."
            )
        criterion, own = loss.criterion, loss.strength
        return replace(attached, criterion=lambda _, data: criterion(own, data))
    title, _, strength = name.partition("@")
    if title not in ARMS:
        raise ValueError(f"arms must be among {', '.join(ARMS)}, got {title!r}.")
    return replace(ARMS[title], strength=float(strength)) if strength else ARMS[title]


def ingredients(
    arm: Arm, recipe: Recipe, data: SegmentationData
) -> tuple[Recipe, Criterion, Attach]:
    """Return what train.train needs for an arm."""
    reg = replace(recipe.reg, **arm.reg)
    criterion = arm.criterion(arm.strength, data) if arm.criterion else cross_entropy
    # Eq. (3) stays: it moves the centroids only, which are close together soon.
    align, classify = reg.align_weight * arm.strength, reg.classify_weight * arm.strength
    reg = replace(reg, align_weight=align, classify_weight=classify)
    recipe = replace(recipe, mvsc=arm.mvsc, reg=reg)
    if arm.rival is None and arm.variant is None:
        return recipe, criterion, attach

    def attach_own(model: nn.Module, recipe: Recipe) -> Any:
        path = find_classifier(model, None, None)
        sizes = len(data.classes), model.get_submodule(path).in_channels
        # Its first weights must not move the random numbers that follow.
        with torch.random.fork_rng(devices=[]):
            if arm.variant:
                options = {"ignore_index": IGNORE, "seed": recipe.seed, **vars(recipe.reg)}
                made = arm.variant(*sizes, **options)
                made.steps = recipe.steps
            else:
                made = arm.rival(*sizes, arm.strength)
        return mvsc.AttachedRegularizer(model, path, made, add_to_loss=False)

    return recipe, criterion, attach_own
