"""What is compared: MVSC, its parts, and what a user would pick instead, at equal steps.

An arm changes a recipe, the pixels' own loss, or what is attached to the features. Rivals have the
face of MVSCRegularizer, so that the same tap feeds them. A strength follows the name: dice@0.5;
that of MVSC's own arms multiplies the weights of Eq. (2) and of L_v: mvsc@4. A pixels' own loss and
what is attached to the features make a pair: lovasz@4+mvsc@4.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import candidates
import mvsc
import rivals
import variants
from data import IGNORE, SegmentationData
from mvsc.finding import find_classifier
from prior import class_pixels, log_shares
from recipes import Recipe
from train import Criterion, Regularize, cross_entropy, regularize
from weights import load_weights


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    mvsc: bool = True
    reg: dict[str, Any] = field(default_factory=dict)
    criterion: Callable[[float, SegmentationData], Criterion] | None = None
    rival: type[rivals.Rival] | None = None
    variant: type[variants.Variant] | None = None
    longer: bool = False
    """Whether the strength multiplies the steps."""
    strength: float = 1.0


def balanced(strength: float, data: SegmentationData) -> Criterion:
    """Weigh classes by frequency to the power of -strength (0.5: inverse square root)."""
    pixels = class_pixels(data)
    weight = (pixels / pixels.sum()).clamp_min(1e-6) ** -strength
    # The mean weight of a pixel is 1, as without weights.
    weight = weight * pixels.sum() / (weight * pixels).sum()
    return lambda logits, labels: cross_entropy(logits, labels, weight=weight.to(logits.device))


def smoothed(strength: float, data: SegmentationData) -> Criterion:
    """Take a share of each label for the other classes: what one would try with wrong labels."""
    return lambda logits, labels: cross_entropy(logits, labels, label_smoothing=strength)


def with_smp(*losses: nn.Module) -> Callable[[float, SegmentationData], Criterion]:
    """Add losses of segmentation_models_pytorch to the cross-entropy."""

    def make(strength: float, data: SegmentationData) -> Criterion:
        return lambda logits, labels: (
            cross_entropy(logits, labels)
            + strength * sum(loss(logits.float(), labels) for loss in losses)
        )

    return make


def jaccard(strength: float, data: SegmentationData) -> Criterion:
    """Add -log of the soft Jaccard index over a batch's pixels, averaged over its classes."""
    classes = len(data.classes)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        known = labels != IGNORE
        own = F.one_hot(torch.where(known, labels, 0), classes).movedim(3, 1) * known[:, None]
        chances = logits.float().softmax(dim=1) * known[:, None]
        hit, labelled = (own * chances).sum(dim=(0, 2, 3)), own.sum(dim=(0, 2, 3))
        union = labelled + chances.sum(dim=(0, 2, 3)) - hit
        losses = union.clamp_min(1e-6).log() - hit.clamp_min(1e-6).log()
        return cross_entropy(logits, labels) + strength * candidates.mean_over(losses, labelled > 0)

    return criterion


dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORE)
lovasz = smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE)

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
    "by-image": Arm(variant=variants.ByImage),
    "by-difficulty": Arm(variant=variants.ByDifficulty),
    # Other parts, or other weights along the training.
    "by-count": Arm(variant=variants.ByCount),
    "all-classes": Arm(variant=variants.AllClasses),
    "apart": Arm(variant=variants.Apart, reg={"align_to": "group"}),
    "fading": Arm(variant=variants.Fading),
    "slow": Arm(variant=variants.Slow),
    "memory": Arm(variant=variants.Memory),
    "margin": Arm(variant=variants.Margin),
    "learned-temperature": Arm(variant=variants.LearnedTemperature),
    # What a user would pick instead.
    "balanced": Arm(mvsc=False, criterion=balanced, strength=0.5),
    "dice": Arm(mvsc=False, criterion=with_smp(dice), strength=0.5),
    "lovasz": Arm(mvsc=False, criterion=with_smp(lovasz), strength=0.5),
    "lovasz-dice": Arm(mvsc=False, criterion=with_smp(lovasz, dice), strength=0.5),
    "pixel-contrast": Arm(mvsc=False, rival=rivals.PixelContrast, strength=0.1),
    "proxy-anchor": Arm(mvsc=False, rival=rivals.ProxyAnchor, strength=0.01),
    "centre": Arm(mvsc=False, rival=rivals.Centre, strength=0.1),
    "class-means": Arm(mvsc=False, rival=rivals.ClassMeans, strength=0.05),
    "jaccard": Arm(mvsc=False, criterion=jaccard),
    "smoothed": Arm(mvsc=False, criterion=smoothed, strength=0.1),
    # Cross-entropy for longer: @1.25 is 1.25 times the steps.
    "longer": Arm(mvsc=False, longer=True, strength=1.25),
    # Beyond the paper.
    "lv-only": Arm(reg={"align_weight": 0.0, "pull_weight": 0.0}),
    "deviation": Arm(variant=variants.Deviation),
    "cell-iou": Arm(mvsc=False, rival=candidates.CellIoU, strength=0.2),
    "cell-iou-16": Arm(mvsc=False, rival=candidates.CellIoUOf16, strength=0.2),
    "cell-iou-1": Arm(mvsc=False, rival=candidates.CellIoUOfPixels, strength=0.2),
    "cell-iou-finer": Arm(mvsc=False, rival=candidates.FinerCellIoU, strength=0.2),
    "image-means": Arm(mvsc=False, rival=candidates.CellMeans, strength=0.2),
    "cell-means-16": Arm(mvsc=False, rival=candidates.CellMeansOf16, strength=0.2),
    "cell-means-1": Arm(mvsc=False, rival=candidates.CellMeansOfPixels, strength=0.2),
    "cell-means-finer": Arm(mvsc=False, rival=candidates.FinerCellMeans, strength=0.2),
    "rival-cells": Arm(mvsc=False, rival=candidates.RivalCells, strength=0.2),
    "cumulant": Arm(mvsc=False, rival=candidates.Cumulant, strength=0.2),
    "cumulant-detached": Arm(mvsc=False, rival=candidates.DetachedCumulant, strength=0.2),
    "cumulant-ramp": Arm(mvsc=False, rival=candidates.RampedCumulant, strength=0.2),
    "prior-consistent": Arm(mvsc=False, rival=candidates.PriorConsistent, strength=0.2),
    "frozen": Arm(mvsc=False, rival=candidates.Frozen, strength=0.2),
    "etf": Arm(mvsc=False, rival=candidates.Simplex, strength=0.4),
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
) -> tuple[Recipe, Criterion, Regularize]:
    """Return what train.train needs for an arm."""
    reg = replace(recipe.reg, **arm.reg)
    criterion = arm.criterion(arm.strength, data) if arm.criterion else cross_entropy
    # Eq. (3) stays: it moves the centroids only, which are close together soon.
    align, classify = reg.align_weight * arm.strength, reg.classify_weight * arm.strength
    reg = replace(reg, align_weight=align, classify_weight=classify)
    steps = round(recipe.steps * arm.strength) if arm.longer else recipe.steps
    recipe = replace(recipe, mvsc=arm.mvsc, reg=reg, steps=steps)
    if arm.rival is None and arm.variant is None:
        return recipe, criterion, regularize

    def regularize_own(model: nn.Module, recipe: Recipe) -> Any:
        path = find_classifier(model, None, None)
        sizes = len(data.classes), model.get_submodule(path).in_channels
        # Its first weights must not move the random numbers that follow.
        with torch.random.fork_rng(devices=[]):
            if arm.variant:
                options = {"ignore_index": IGNORE, "seed": recipe.seed, **vars(recipe.reg)}
                made = arm.variant(*sizes, **options)
            else:
                made = arm.rival(*sizes, arm.strength)
            made.steps = recipe.steps
            if arm.rival is candidates.PriorConsistent:
                made.log_shares = log_shares(data)
        return mvsc.AttachedRegularizer(model, path, made, add_to_loss=False)

    return recipe, criterion, regularize_own


def classifier_alone(path: Path) -> Regularize:
    """Make what lets train.train train nothing but a new classifier on the weights of a run."""

    def regularize(model: nn.Module, recipe: Recipe) -> None:
        model.load_state_dict(load_weights(path)[0])
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0  # Features in evaluation stay what they are.
        model.requires_grad_(False)
        classifier = model.get_submodule(find_classifier(model)).requires_grad_(True)
        classifier.reset_parameters()

    return regularize
