"""Numbers that show whether the centroids do anything: cheap enough to log at each step.

Pure functions of features, labels and centroids. Nothing here has a gradient, changes its
arguments, draws from a random generator that anyone else uses, or waits for the device: each
answer is a tensor that stays where the inputs are until you read it. Cosines are computed in
float32 at least, under autocast too. What was not measured, as the cosine between classes of a
batch that has a single one, is NaN, never a number that looks like an answer.

Throughout, ``features`` is R, the dense map that enters the classifier, shape
``(batch, dim, *spatial)`` with one to three spatial axes; ``labels`` is Y, shape
``(batch, *spatial')`` of any size and integer dtype (R15); ``centroids`` is V, shape
``(groups, num_classes, dim)``; ``ignore_index`` is the label of pixels that do not count, by
default 255, or -100 where 255 is a class; ``grid_label`` is which label a feature pixel takes, as
in :class:`mvsc.MVSCRegularizer`. A tensor of a wrong dtype is a ``TypeError``, one of a
wrong shape a ``ValueError``, and so are features and labels on two devices and, on the CPU, a label
out of range; elsewhere such pixels are ignored.
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mvsc import checks, equations
from mvsc.kernel import segment_sum
from mvsc.labels import (
    check_label_values,
    check_labels,
    check_no_channels,
    default_ignore_index,
)
from mvsc.sampling import ON_GRID, draw_groups, labels_on_grid

_HUGE = 1e15
"""Numbers whose squares, added up, may have no float32."""


@torch.no_grad()
def group_similarity(centroids: Tensor) -> Tensor:
    """Return how alike the groups are: the mean cosine of centroids of one class.

    Over all pairs of different groups, averaged over the classes. The global target of Eq. (2)
    and the pull of Eq. (3) both drive it to 1 (R3), where the groups hold one prototype.

    Args:
        centroids: V.

    Returns:
        Scalar in [-1 / (groups - 1), 1], no unit; 1 for a single group.

    Example:
        >>> centroids = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[0.0, 2.0]]])
        >>> round(group_similarity(centroids).item(), 4)  # of the cosines 1, 0, 0
        0.3333
    """
    checks.check_centroids("centroids", centroids)
    groups = len(centroids)
    unit = _unit(centroids)
    if groups == 1:
        return unit.new_ones(())
    # |sum of u|^2 is the sum of all products u_g u_h; those with g = h are taken off.
    pairs = unit.sum(dim=0).square().sum(dim=-1) - unit.square().sum(dim=(0, 2))
    return pairs.mean() / (groups * (groups - 1))


@torch.no_grad()
def centroid_similarity(centroids: Tensor) -> Tensor:
    """Compare each centroid with each other one, ordered by class.

    Args:
        centroids: V.

    Returns:
        Cosines in [-1, 1], shape ``(num_classes * groups, num_classes * groups)``; row
        ``class * groups + group``, so the groups of a class are a block on the diagonal. A
        zero centroid has cosine 0 to everything, itself included.

    Example:
        >>> centroids = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]])
        >>> centroid_similarity(centroids)[0].round(decimals=3).tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    checks.check_centroids("centroids", centroids)
    rows = rearrange(centroids, "g c d -> (c g) d")
    return _cosines(rows, rows)


@torch.no_grad()
def centroid_norms(centroids: Tensor) -> Tensor:
    """Measure the length of each centroid.

    Lengths far above those of the features mean that L_v scales centroids up rather than turning
    them; a length near 0, that weight decay is on (R17).

    Args:
        centroids: V.

    Returns:
        Shape ``(groups, num_classes)``, in the unit of the features, at least 0.

    Example:
        >>> centroid_norms(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist()
        [[5.0, 0.0]]
    """
    checks.check_centroids("centroids", centroids)
    wide = _wide(centroids)
    size = _size(wide)
    return (wide / size).square().sum(dim=-1).sqrt() * size[..., 0]


@torch.no_grad()
def cell_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    groups: int = 1,
    *,
    ignore_index: int | None = None,
    grid_label: Literal["centre", "commonest"] = "centre",
) -> tuple[Tensor, Tensor]:
    """Average the features of each cell, for :func:`alignment_accuracy` and its kin.

    Eq. (1), with a split of its own that is the same at each call, so that numbers of different
    steps compare. With one group, a cell is a class.

    Args:
        features: R.
        labels: Y.
        num_classes: C.
        groups: G, into how many cells the pixels of a class are split.
        ignore_index: label of pixels that do not count.
        grid_label: ``"commonest"`` for points, strokes and other sparse labels.

    Returns:
        ``(means, present)``: shape ``(groups, num_classes, dim)``, float32 or float64, 0 in a
        cell without pixels, and the mask of cells with pixels, ``(groups, num_classes)``, bool.

    Example:
        >>> features = torch.tensor([1.0, 3.0, 5.0, 100.0]).reshape(1, 1, 2, 2)
        >>> means, present = cell_means(features, torch.tensor([[[0, 0], [2, 255]]]), 3)
        >>> means.flatten().tolist(), present.tolist()
        ([2.0, 0.0, 5.0], [[True, False, True]])
    """
    checks.check_positive_int("groups", groups)
    grid = _grid(features, labels, num_classes, ignore_index, grid_label)
    cells = draw_groups(grid, groups, num_classes, step=grid.new_zeros(()))
    sums, counts = segment_sum(features, cells, groups * num_classes)
    return equations.class_group_means(sums, counts, groups)


@torch.no_grad()
def alignment_accuracy(
    means: Tensor,
    centroids: Tensor,
    present: Tensor,
    *,
    align_to: Literal["global", "group"] = "global",
) -> Tensor:
    """Return the share of cells that are nearer to the centroid of their class than to any other.

    What Eq. (2) trains for: of the cells that are present (R5), against the classes that are
    present (R2).

    Args:
        means: R, shape ``(groups, num_classes, dim)``, as :func:`cell_means` returns them. With
            ``align_to="global"`` they may have a single group whatever the centroids have.
        centroids: V.
        present: cells with at least one pixel, shape ``(groups, num_classes)``, bool.
        align_to: the target, as in :class:`mvsc.MVSCRegularizer` (R3).

    Returns:
        Scalar in [0, 1], no unit; a tie is a miss. 1 if a single class is present, NaN if none
        is. Chance is one over the number of classes present.

    Example:
        >>> means = torch.tensor([[[1.0, 0.1], [0.2, 1.0], [0.9, 1.0]]])
        >>> centroids = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
        >>> present = torch.tensor([[True, True, True]])
        >>> round(alignment_accuracy(means, centroids, present).item(), 4)  # the third misses
        0.6667
    """
    cosines = _alignment_cosines(means, centroids, present, align_to)
    own, in_batch = _own(cosines), present.any(dim=0)
    others = cosines.masked_fill(~(in_batch & _different(present)), -torch.inf).amax(dim=-1)
    hits = torch.where(own.isnan() | others.isnan(), torch.nan, _wide(own > others))
    return _mean_where(hits, present)


@torch.no_grad()
def alignment_cosines(
    means: Tensor,
    centroids: Tensor,
    present: Tensor,
    *,
    align_to: Literal["global", "group"] = "global",
) -> tuple[Tensor, Tensor]:
    """Average the cosines of Eq. (2): to the own class, and to the others in the batch.

    The loss alone does not show a map whose classes point apart from one whose features are
    merely long or short; these do. Arguments as in :func:`alignment_accuracy`.

    Returns:
        ``(positive, negative)``, scalars in [-1, 1], no unit: over the cells that are present,
        and over their pairs with each other class that is present. NaN where there is none.

    Example:
        >>> means, present = torch.eye(2).unsqueeze(0), torch.tensor([[True, True]])
        >>> positive, negative = alignment_cosines(means, means, present)
        >>> round(positive.item(), 3), round(negative.item(), 3)
        (1.0, 0.0)
    """
    cosines = _alignment_cosines(means, centroids, present, align_to)
    pairs = present.unsqueeze(-1) & present.any(dim=0) & _different(present)
    return _mean_where(_own(cosines), present), _mean_where(cosines, pairs)


@torch.no_grad()
def unit_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    grid_label: Literal["centre", "commonest"] = "centre",
) -> tuple[Tensor, Tensor]:
    """Average the features of each class, each scaled to length 1.

    What :func:`compactness` and :func:`separation` are computed from. For several batches, add
    up ``means * counts[:, None]`` and ``counts``, and divide at the end.

    Args:
        features: R.
        labels: Y.
        num_classes: C.
        ignore_index: label of pixels that do not count.
        grid_label: as in :func:`cell_means`.

    Returns:
        ``(means, counts)``: shape ``(num_classes, dim)``, of length at most 1, 0 for an absent
        class; and the number of pixels of each class, shape ``(num_classes,)``, int64.

    Example:
        >>> features = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).reshape(1, 2, 1, 2)
        >>> means, counts = unit_means(features, torch.tensor([[[0, 1]]]), num_classes=2)
        >>> means, counts.tolist()
        (tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]]), [1, 1])
    """
    grid = _grid(features, labels, num_classes, ignore_index, grid_label)
    unit = _unit(features.movedim(1, -1)).movedim(-1, 1)
    sums, counts = segment_sum(unit, grid, num_classes)
    return equations.divide(sums, counts), counts


@torch.no_grad()
def compactness(means: Tensor, counts: Tensor) -> Tensor:
    """Return how closely the features of a class keep to one direction.

    The mean cosine of its pixels to the mean of their directions, which is the length of that
    mean; averaged over the classes that have pixels, each counting the same.

    Args:
        means: mean unit features, shape ``(num_classes, dim)``, from :func:`unit_means`.
        counts: pixels of each class, shape ``(num_classes,)``; a class with 0 is left out.

    Returns:
        Scalar in [0, 1], no unit; 1 if each class has a single direction, NaN without pixels.

    Example:
        >>> means = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
        >>> round(compactness(means, torch.tensor([7, 2, 0])).item(), 4)  # of 1 and 0.5
        0.75
    """
    _check_unit_means(means, counts)
    return _mean_where(_wide(means).square().sum(dim=-1).sqrt(), counts > 0)


@torch.no_grad()
def separation(means: Tensor, counts: Tensor) -> Tensor:
    """Return how far the classes lie apart: the mean of 1 - cosine between their directions.

    Over all pairs of different classes that have pixels. Arguments as in :func:`compactness`.

    Returns:
        Scalar in [0, 2], no unit; 0 if all classes share a direction, 1 if they are orthogonal,
        NaN if fewer than two classes have pixels.

    Example:
        >>> means = torch.tensor([[0.6, 0.0], [0.0, 0.9], [-0.5, 0.0]])
        >>> round(separation(means, torch.tensor([7, 2, 4])).item(), 4)  # of 1, 2 and 1
        1.3333
    """
    _check_unit_means(means, counts)
    present = counts > 0
    pairs = present.unsqueeze(-1) & present & _different(present)
    return _mean_where(1 - _cosines(means, means), pairs)


@torch.no_grad()
def class_ages(ages: Tensor, labels: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Count the steps since each class was last seen.

    Call it once a step and keep what it returns: the regularizer itself has no such state. A
    class that is rarely seen has centroids that only Eq. (3) moves.

    Args:
        ages: of the step before, shape ``(num_classes,)``, int64; zeros to begin with.
        labels: Y of this step. Other labels than ``0 .. num_classes - 1`` are ignored.
        ignore_index: label of pixels that do not count.

    Returns:
        The new ages, same shape; 0 for a class that the labels hold, else one more than before.
        (A class of few pixels may be in the labels and yet miss a coarser feature grid.)

    Example:
        >>> ages = torch.zeros(3, dtype=torch.int64)
        >>> for labels in ([[[0, 1]]], [[[1, 255]]], [[[1, 1]]]):
        ...     ages = class_ages(ages, torch.tensor(labels))
        >>> ages.tolist()
        [2, 0, 3]
    """
    _check_ages(ages, labels)
    num_classes = len(ages)
    ignored = _ignored(ignore_index, num_classes)
    grid = labels_on_grid(labels, labels.shape[1:], num_classes, ignored)
    # Everything that does not count lands in a spare entry, as in the kernel.
    older = torch.cat([ages + 1, ages.new_zeros(1)])
    return older.scatter(0, grid.flatten(), 0)[:num_classes]


@torch.no_grad()
def centroid_heatmap(
    features: Tensor, centroids: Tensor, class_index: int, group: int | None = None
) -> Tensor:
    """Compare each pixel with one centroid: the heat maps of the paper's Figs. 4 and 5.

    Args:
        features: R.
        centroids: V.
        class_index: whose centroid, in ``0 .. num_classes - 1``.
        group: which of its centroids, in ``0 .. groups - 1``; ``None`` for the global one, the
            mean over the groups.

    Returns:
        Cosines in [-1, 1], shape ``(batch, *spatial)``, float32 or float64; 0 for a zero vector.

    Example:
        >>> features = torch.tensor([[3.0, -1.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> centroids = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
        >>> centroid_heatmap(features, centroids, class_index=1, group=0).round(decimals=3)
        tensor([[[ 0.6000, -1.0000]]])
    """
    _check_heatmap(features, centroids, class_index, group)
    own = centroids[:, class_index]
    chosen = own.mean(dim=0) if group is None else own[group]
    return _cosines(features.movedim(1, -1), chosen.unsqueeze(0)).squeeze(-1)


def _alignment_cosines(means: Tensor, centroids: Tensor, present: Tensor, align_to: str) -> Tensor:
    _check_alignment(means, centroids, present, align_to)
    return _cosines(means, equations.alignment_targets(centroids, align_to))


def _grid(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int | None,
    grid_label: str,
) -> Tensor:
    """Bring labels to the grid of a map that they fit; values are read on the CPU only."""
    checks.check_positive_int("num_classes", num_classes)
    checks.check_choice("grid_label", grid_label, tuple(ON_GRID))
    ignored = _ignored(ignore_index, num_classes)
    check_labels(labels, checks.check_feature_map(features), num_classes=num_classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_label_values(labels, num_classes, ignored)
    return ON_GRID[grid_label](labels, features.shape[2:], num_classes, ignored)


def _ignored(ignore_index: int | None, num_classes: int) -> int:
    if ignore_index is None:
        return default_ignore_index(num_classes)
    return checks.check_int("ignore_index", ignore_index)


def _wide(tensor: Tensor) -> Tensor:
    """Widen to float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit(vectors: Tensor) -> Tensor:
    # Where a training diverges, the square of a feature has no float32.
    vectors = _wide(vectors)
    return equations.unit(vectors / _size(vectors))


def _size(vectors: Tensor) -> Tensor:
    """Return what to divide each vector by before it is squared: 1, unless it is huge."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    return torch.where(largest > _HUGE, largest, 1)


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply unit vectors; autocast, which would halve the digits, is off for that."""
    rows, columns = _unit(rows), _unit(columns)
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.to(dtype) @ columns.to(dtype).mT).clamp(-1, 1)


def _own(cosines: Tensor) -> Tensor:
    """Take the cosines of each cell to its own class, ``(groups, num_classes)``."""
    return cosines.diagonal(dim1=-2, dim2=-1)


def _different(present: Tensor) -> Tensor:
    """Mask the pairs of different classes, ``(num_classes, num_classes)``."""
    return ~torch.eye(present.shape[-1], dtype=torch.bool, device=present.device)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values under the mask; NaN if there are none."""
    total = torch.where(mask, _wide(values), 0).sum()
    return total / mask.sum()


def _check_alignment(means: object, centroids: object, present: object, align_to: object) -> None:
    """Raise unless means, centroids and mask of the cells fit each other."""
    means = checks.check_centroids("means", means)
    centroids = checks.check_centroids("centroids", centroids)
    checks.check_choice("align_to", align_to, ("global", "group"))
    if means.shape[1:] != centroids.shape[1:]:
        raise ValueError(
            "means must have the num_classes and dim of the centroids, "
            f"{tuple(centroids.shape[1:])}, got {tuple(means.shape[1:])}. "
            "Take them from the map that enters the classifier."
        )
    checks.check_device("means", means, "centroids", centroids.device)
    if align_to == "group" and len(means) != len(centroids):
        raise ValueError(
            f"means must have the groups of the centroids, {len(centroids)}, with "
            f"align_to='group', got {len(means)}. Use cell_means(..., groups={len(centroids)})."
        )
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(
            f"present must be a bool tensor, got {checks.kind(present)}. Use counts > 0."
        )
    if present.shape != means.shape[:2]:
        raise ValueError(
            f"present must have shape (groups, num_classes), {tuple(means.shape[:2])}, "
            f"got {tuple(present.shape)}. Pass the mask that cell_means returns with the means."
        )


def _check_unit_means(means: object, counts: object) -> None:
    """Raise unless ``means`` is (num_classes, dim) and ``counts`` fits it."""
    means = checks.check_floating("means", means, "Use unit_means.")
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(
            "means must have shape (num_classes, dim) with at least one of each, "
            f"got {tuple(means.shape)}. Use unit_means."
        )
    if not isinstance(counts, Tensor) or counts.shape != means.shape[:1]:
        came = (
            f"shape {tuple(counts.shape)}"
            if isinstance(counts, Tensor)
            else checks.describe(counts)
        )
        raise ValueError(
            f"counts must have one entry for each of the {len(means)} classes, got {came}. "
            "Pass what unit_means returns with the means."
        )


def _check_ages(ages: object, labels: object) -> None:
    """Raise unless ``ages`` is a (num_classes,) int64 tensor and ``labels`` a map of classes."""
    if not isinstance(ages, Tensor) or ages.dtype != torch.int64:
        raise TypeError(
            f"ages must be an int64 tensor, got {checks.kind(ages)}. "
            "Start with torch.zeros(num_classes, dtype=torch.int64)."
        )
    if ages.ndim != 1 or len(ages) == 0:
        raise ValueError(
            f"ages must have shape (num_classes,), got {tuple(ages.shape)}. "
            "Keep one age for each class."
        )
    labels = check_labels(labels)
    checks.check_device("labels", labels, "ages", ages.device)
    if labels.device.type == "cpu" and labels.ndim == 4:  # Or a volume.
        check_no_channels(labels, len(ages))


def _check_heatmap(features: object, centroids: object, class_index: object, group: object) -> None:
    """Raise unless the class and group exist and the map has the width of the centroids."""
    centroids = checks.check_centroids("centroids", centroids)
    features = checks.check_feature_map(features)
    groups, num_classes, dim = centroids.shape
    if features.shape[1] != dim:
        remedy = "Pass the map that enters the classifier."
        if features.shape[-1] == dim:
            remedy = "Use features.movedim(-1, 1)."
        raise ValueError(
            f"features must have shape (batch, dim, *spatial) with dim={dim}, the width of "
            f"the centroids, got {tuple(features.shape)}. {remedy}"
        )
    checks.check_device("features", features, "centroids", centroids.device)
    _check_index("class_index", class_index, num_classes)
    if group is not None:
        _check_index("group", group, groups)


def _check_index(name: str, value: object, count: int) -> None:
    if not 0 <= checks.check_int(name, value) < count:
        raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value}.")
