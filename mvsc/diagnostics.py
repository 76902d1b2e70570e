"""Numbers that tell whether the centroids do anything: cheap enough to log at each step.

Pure functions of features, labels and centroids. Nothing here has a gradient, changes its
arguments, draws from a random generator that anyone else uses, or waits for the device: each
answer is a tensor that stays where the inputs are until you read it. Cosines are computed in
float32 at least, under autocast too. What was not measured, as the cosine between classes of a
batch that has a single one, is NaN, never a number that looks like an answer.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mvsc import checks, equations
from mvsc.sampling import draw_groups, labels_on_grid
from mvsc.segment import divide, segment_sum


@torch.no_grad()
def group_similarity(centroids: Tensor) -> Tensor:
    """Tell how alike the groups are: the mean cosine of centroids of one class.

    Over all pairs of different groups, averaged over the classes. The global target of Eq. (2)
    and the pull of Eq. (3) both drive it to 1 (R3), where the groups hold one prototype.

    Args:
        centroids: V, shape ``(groups, num_classes, dim)``.

    Returns:
        Scalar in [-1 / (groups - 1), 1], no unit; 1 for a single group.

    Raises:
        TypeError: if the centroids are not a floating tensor.
        ValueError: if they do not have three axes.

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
        centroids: V, shape ``(groups, num_classes, dim)``.

    Returns:
        Cosines in [-1, 1], shape ``(num_classes * groups, num_classes * groups)``; row
        ``class * groups + group``, so the groups of a class are a block on the diagonal. A
        zero centroid has cosine 0 to everything, itself included.

    Raises:
        TypeError: if the centroids are not a floating tensor.
        ValueError: if they do not have three axes.

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
        centroids: V, shape ``(groups, num_classes, dim)``.

    Returns:
        Shape ``(groups, num_classes)``, in the unit of the features, at least 0.

    Raises:
        TypeError: if the centroids are not a floating tensor.
        ValueError: if they do not have three axes.

    Example:
        >>> centroid_norms(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist()
        [[5.0, 0.0]]
    """
    checks.check_centroids("centroids", centroids)
    return _wide(centroids).square().sum(dim=-1).sqrt()


@torch.no_grad()
def cell_means(
    features: Tensor, labels: Tensor, num_classes: int, groups: int = 1, *, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Average the features of each cell, for :func:`alignment_accuracy` and its kin.

    Eq. (1), with a split of its own that is the same at each call, so that numbers of different
    steps compare. With one group, a cell is a class.

    Args:
        features: R, the dense map that enters the classifier, shape ``(batch, dim, h, w)``.
        labels: Y, shape ``(batch, H, W)``, any integer dtype and size (R15).
        num_classes: C.
        groups: G, into how many cells the pixels of a class are split.
        ignore_index: label of pixels that do not count.

    Returns:
        ``(means, present)``: shape ``(groups, num_classes, dim)``, float32 or float64, 0 in a
        cell without pixels, and the mask of cells with pixels, ``(groups, num_classes)``, bool.

    Raises:
        TypeError: if features are not floating or labels not integers.
        ValueError: if shapes or devices do not fit or, on the CPU, if a label is out of range;
            elsewhere such pixels are ignored.

    Example:
        >>> features = torch.tensor([1.0, 3.0, 5.0, 100.0]).reshape(1, 1, 2, 2)
        >>> means, present = cell_means(features, torch.tensor([[[0, 0], [2, 255]]]), 3)
        >>> means.flatten().tolist(), present.tolist()
        ([2.0, 0.0, 5.0], [[True, False, True]])
    """
    checks.check_positive_int("num_classes", num_classes)
    checks.check_positive_int("groups", groups)
    checks.check_int("ignore_index", ignore_index)
    checks.check_map_and_labels(features, labels, num_classes, ignore_index)
    size = (features.shape[2], features.shape[3])
    grid = labels_on_grid(labels, size, num_classes, ignore_index)
    cells = draw_groups(grid, groups, num_classes, grid.new_zeros(()))
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
    """Tell how many cells are nearer to the centroid of their class than to any other.

    What Eq. (2) trains for, as a share: of the cells that are present (R5), against the classes
    that are present (R2).

    Args:
        means: R, shape ``(groups, num_classes, dim)``, as :func:`cell_means` returns them. With
            ``align_to="global"`` they may have a single group whatever the centroids have.
        centroids: V, shape ``(groups, num_classes, dim)``.
        present: cells with at least one pixel, shape ``(groups, num_classes)``, bool.
        align_to: the target, as in :class:`mvsc.MVSCRegularizer` (R3).

    Returns:
        Scalar in [0, 1], no unit; a tie is a miss. 1 if a single class is present, NaN if none
        is. Chance is one over the number of classes present.

    Raises:
        TypeError: if means or centroids are not floating, or ``present`` is not bool.
        ValueError: if the shapes do not fit, or ``align_to`` is neither of the two.

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

    The loss alone does not tell a map whose classes point apart from one whose features are
    merely long or short; these do.

    Args:
        means: as in :func:`alignment_accuracy`.
        centroids: as in :func:`alignment_accuracy`.
        present: as in :func:`alignment_accuracy`.
        align_to: as in :func:`alignment_accuracy`.

    Returns:
        ``(positive, negative)``, scalars in [-1, 1], no unit: over the cells that are present,
        and over their pairs with each other class that is present. NaN where there is none.

    Raises:
        TypeError: as in :func:`alignment_accuracy`.
        ValueError: as in :func:`alignment_accuracy`.

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
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Average the features of each class, each scaled to length 1.

    What :func:`compactness` and :func:`separation` are computed from. For several batches, add
    up ``means * counts[:, None]`` and ``counts``, and divide at the end.

    Args:
        features: dense feature map, shape ``(batch, dim, h, w)``.
        labels: shape ``(batch, H, W)``, any integer dtype and size (R15).
        num_classes: C.
        ignore_index: label of pixels that do not count.

    Returns:
        ``(means, counts)``: shape ``(num_classes, dim)``, of length at most 1, 0 for an absent
        class; and the number of pixels of each class, shape ``(num_classes,)``, int64.

    Raises:
        TypeError: as in :func:`cell_means`.
        ValueError: as in :func:`cell_means`.

    Example:
        >>> features = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).reshape(1, 2, 1, 2)
        >>> means, counts = unit_means(features, torch.tensor([[[0, 1]]]), num_classes=2)
        >>> means, counts.tolist()
        (tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]]), [1, 1])
    """
    checks.check_positive_int("num_classes", num_classes)
    checks.check_int("ignore_index", ignore_index)
    checks.check_map_and_labels(features, labels, num_classes, ignore_index)
    size = (features.shape[2], features.shape[3])
    grid = labels_on_grid(labels, size, num_classes, ignore_index)
    sums, counts = segment_sum(F.normalize(_wide(features), dim=1), grid, num_classes)
    return divide(sums, counts), counts


@torch.no_grad()
def compactness(means: Tensor, counts: Tensor) -> Tensor:
    """Tell how closely the features of a class keep to one direction.

    The mean cosine of its pixels to the mean of their directions, which is the length of that
    mean; averaged over the classes that have pixels, each counting the same.

    Args:
        means: mean unit features, shape ``(num_classes, dim)``, from :func:`unit_means`.
        counts: pixels of each class, shape ``(num_classes,)``; a class with 0 is left out.

    Returns:
        Scalar in [0, 1], no unit; 1 if each class has a single direction, NaN without pixels.

    Raises:
        TypeError: if the means are not a floating tensor.
        ValueError: if the shapes do not fit.

    Example:
        >>> means = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
        >>> round(compactness(means, torch.tensor([7, 2, 0])).item(), 4)  # of 1 and 0.5
        0.75
    """
    checks.check_unit_means(means, counts)
    return _mean_where(_wide(means).square().sum(dim=-1).sqrt(), counts > 0)


@torch.no_grad()
def separation(means: Tensor, counts: Tensor) -> Tensor:
    """Tell how far the classes lie apart: the mean of 1 - cosine between their mean directions.

    Over all pairs of different classes that have pixels.

    Args:
        means: mean unit features, shape ``(num_classes, dim)``, from :func:`unit_means`.
        counts: pixels of each class, shape ``(num_classes,)``; a class with 0 is left out.

    Returns:
        Scalar in [0, 2], no unit; 0 if all classes share a direction, 1 if they are orthogonal,
        NaN if fewer than two classes have pixels.

    Raises:
        TypeError: if the means are not a floating tensor.
        ValueError: if the shapes do not fit.

    Example:
        >>> means = torch.tensor([[0.6, 0.0], [0.0, 0.9], [-0.5, 0.0]])
        >>> round(separation(means, torch.tensor([7, 2, 4])).item(), 4)  # of 1, 2 and 1
        1.3333
    """
    checks.check_unit_means(means, counts)
    present = counts > 0
    pairs = present.unsqueeze(-1) & present & _different(present)
    return _mean_where(1 - _cosines(means, means), pairs)


@torch.no_grad()
def class_ages(ages: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Count the steps since each class was last seen.

    Call it once a step and keep what it returns: the regularizer itself has no such state. A
    class that is rarely seen has centroids that only Eq. (3) moves.

    Args:
        ages: of the step before, shape ``(num_classes,)``, int64; zeros to begin with.
        labels: Y of this step, shape ``(batch, H, W)``, any integer dtype. Other labels than
            ``0 .. num_classes - 1`` are ignored.
        ignore_index: label of pixels that do not count.

    Returns:
        The new ages, same shape; 0 for a class that the labels hold, else one more than before.
        (A class of few pixels may be in the labels and yet miss a coarser feature grid.)

    Raises:
        TypeError: if ages or labels are not integers.
        ValueError: if their shapes or devices do not fit.

    Example:
        >>> ages = torch.zeros(3, dtype=torch.int64)
        >>> for labels in ([[[0, 1]]], [[[1, 255]]], [[[1, 1]]]):
        ...     ages = class_ages(ages, torch.tensor(labels))
        >>> ages.tolist()
        [2, 0, 3]
    """
    checks.check_ages(ages, labels)
    checks.check_int("ignore_index", ignore_index)
    num_classes = len(ages)
    grid = labels_on_grid(labels, (labels.shape[1], labels.shape[2]), num_classes, ignore_index)
    # Everything that does not count lands in a spare entry, as in the kernel.
    older = torch.cat([ages + 1, ages.new_zeros(1)])
    return older.scatter(0, grid.flatten(), 0)[:num_classes]


@torch.no_grad()
def centroid_heatmap(
    features: Tensor, centroids: Tensor, class_index: int, group: int | None = None
) -> Tensor:
    """Compare each pixel with one centroid: the heat maps of the paper's Figs. 4 and 5.

    Args:
        features: R, the dense map that enters the classifier, shape ``(batch, dim, h, w)``.
        centroids: V, shape ``(groups, num_classes, dim)``.
        class_index: whose centroid, in ``0 .. num_classes - 1``.
        group: which of its centroids, in ``0 .. groups - 1``; ``None`` for the global one, the
            mean over the groups.

    Returns:
        Cosines in [-1, 1], shape ``(batch, h, w)``, float32 or float64; 0 for a zero vector.

    Raises:
        TypeError: if features or centroids are not floating, or an index is not an int.
        ValueError: if shapes or devices do not fit, or an index is out of range.

    Example:
        >>> features = torch.tensor([[3.0, -1.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> centroids = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
        >>> centroid_heatmap(features, centroids, class_index=1, group=0)
        tensor([[[ 0.6000, -1.0000]]])
    """
    checks.check_heatmap(features, centroids, class_index, group)
    chosen = (
        centroids[:, class_index].mean(dim=0) if group is None else centroids[group, class_index]
    )
    cosines = F.cosine_similarity(_wide(features), _wide(chosen)[:, None, None], dim=1)
    return cosines.clamp(-1, 1)  # Rounding steps a little over.


def _alignment_cosines(means: Tensor, centroids: Tensor, present: Tensor, align_to: str) -> Tensor:
    checks.check_alignment(means, centroids, present, align_to)
    if align_to == "global":
        return _cosines(means, equations.global_centroids(centroids))
    return _cosines(means, centroids)


def _wide(tensor: Tensor) -> Tensor:
    """Widen to float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(_wide(vectors), dim=-1)


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
