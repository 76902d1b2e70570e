"""Equations (1) to (5) of the paper, in its order, each one pure function.

Everywhere ``g`` runs over the groups, ``c`` over the classes and ``d`` over the feature
dimension; ``present`` says which cells, i.e. (group, class) pairs, have a pixel in the batch.
Nothing here is random, on a certain device, or a module's state.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

EPS = 1e-6
"""Length below which a vector counts as zero when it is normalised."""


_ABSENT, _SUM = -100, 2
"""The target of a row that does not count, and torch's number for reduction="sum"."""


class MVSCTerms(NamedTuple):
    """The three terms of the loss, unweighted scalars.

    Attributes:
        align: Eq. (2), L_fca, feature-centroid alignment, in nats, at least 0.
        pull: Eq. (3), L_cos, centroid pull, in [0, 2].
        classify: L_v, classification of the enhanced centroids, in nats, at least 0.
    """

    align: Tensor
    pull: Tensor
    classify: Tensor


def class_group_means(sums: Tensor, counts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Average the features of each cell.

    Eq. (1), section 3.2. A cell without pixels is masked out of what follows (reading R10).

    Args:
        sums: sum of the features of each cell, shape ``(groups * num_classes, dim)``, group by
            group, as ``mvsc.kernel.segment_sum`` returns it.
        counts: number of pixels of each cell, shape ``(groups * num_classes,)``, integer.
        groups: G, the number of groups.

    Returns:
        ``(means, present)``: R of shape ``(groups, num_classes, dim)``, 0 in an empty cell, and
        the mask of the cells that have a pixel, shape ``(groups, num_classes)``, bool.

    Example:
        >>> sums, counts = torch.tensor([[2.0], [9.0], [0.0], [5.0]]), torch.tensor([2, 3, 0, 1])
        >>> means, present = class_group_means(sums, counts, groups=2)
        >>> means.squeeze(-1).tolist(), present.tolist()
        ([[1.0, 3.0], [0.0, 5.0]], [[True, True], [False, True]])
    """
    means = rearrange(divide(sums, counts), "(g c) d -> g c d", g=groups)
    return means, rearrange(counts > 0, "(g c) -> g c", g=groups)


def divide(sums: Tensor, counts: Tensor) -> Tensor:
    """Turn the sums of some cells into their means; an empty cell stays 0.

    Args:
        sums: shape ``(num_cells, dim)``.
        counts: shape ``(num_cells,)``, integer.

    Returns:
        Shape ``(num_cells, dim)``.

    Example:
        >>> divide(torch.tensor([[6.0], [0.0]]), torch.tensor([3, 0])).tolist()
        [[2.0], [0.0]]
    """
    # Clamped, because where(counts > 0, sums / counts, 0) has a NaN gradient.
    return sums / counts.clamp_min(1).unsqueeze(-1)


def global_centroids(centroids: Tensor) -> Tensor:
    """Average the centroids of a class over the groups: v' of section 3.2.

    Args:
        centroids: V, shape ``(groups, num_classes, dim)``.

    Returns:
        v', shape ``(num_classes, dim)``.

    Example:
        >>> global_centroids(torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])).tolist()
        [[0.5, 1.5]]
    """
    return reduce(centroids, "g c d -> c d", "mean")


def alignment_targets(centroids: Tensor, align_to: str) -> Tensor:
    """Pick what the means are aligned to (R3).

    Args:
        centroids: V, shape ``(groups, num_classes, dim)``.
        align_to: ``"global"`` or ``"group"``.

    Returns:
        The global centroids v', shape ``(num_classes, dim)``, or V itself, so that each mean is
        aligned to the centroid of its own group.

    Example:
        >>> centroids = torch.tensor([[[1.0]], [[3.0]]])
        >>> alignment_targets(centroids, "global").tolist()
        [[2.0]]
    """
    return centroids if align_to == "group" else global_centroids(centroids)


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors to length 1, as ``x / sqrt(|x|^2 + EPS^2)``.

    Args:
        vectors: shape ``(..., dim)``.

    Returns:
        Same shape; a zero vector stays 0 and has a finite gradient.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).round(decimals=4).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    if torch.compiler.is_compiling():  # which fuses them, and cannot trace our own function
        return vectors * _inverse_length(vectors)
    scaled: Tensor = _Unit.apply(vectors)[0]
    return scaled


def alignment_loss(means: Tensor, targets: Tensor, present: Tensor, temperature: float) -> Tensor:
    """Pull each mean to the centroid of its class and push it from those of other classes.

    Eq. (2), section 3.2: cross-entropy over ``cos(R_ng, v_c) / tau`` with target ``n``. Both
    sides are normalised (R1); the negatives are the classes present in the batch (R2); means
    and centroids both learn (R4); the average runs over the cells that are present (R5).

    Args:
        means: R, shape ``(groups, num_classes, dim)``.
        targets: of :func:`alignment_targets`.
        present: cells with at least one pixel, shape ``(groups, num_classes)``, bool.
        temperature: tau, at least 1e-30.

    Returns:
        Scalar, in nats, at least 0; 0 with zero gradients when nothing is present.

    Example:
        >>> means, present = torch.eye(2).unsqueeze(0), torch.tensor([[True, True]])
        >>> round(alignment_loss(means, torch.eye(2), present, temperature=1.0).item(), 4)
        0.3133
    """
    rows = [vectors.flatten(0, -2) for vectors in (means, targets)]
    units, unit_targets = torch.split(unit(torch.cat(rows)), [len(each) for each in rows])
    cosines = units.view_as(means) @ unit_targets.view_as(targets).mT
    # A finite mask value: -inf would turn a row without any class into NaN.
    lowest = torch.finfo(cosines.dtype).min
    logits = torch.where(present.any(dim=0), cosines / temperature, lowest)
    return _cross_entropy_over_present(logits, present)


def centroid_pull_loss(centroids: Tensor, halves: Tensor) -> Tensor:
    """Pull two random halves of the groups of each class together.

    Eq. (3), section 3.2: ``1 - cos(half_a, half_b)``, averaged over all classes; minimised as
    the formula says (R6, R7).

    Args:
        centroids: V, shape ``(groups, num_classes, dim)``.
        halves: what each group weighs in the mean of the one half and of the other, shape
            ``(2, groups)``, as ``mvsc.sampling.draw_halves`` returns it.

    Returns:
        Scalar in [0, 2], no unit; exactly 0 with zero gradients for a single group (R8).

    Example:
        >>> centroids = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> centroid_pull_loss(centroids, torch.eye(2)).item()
        1.0
    """
    groups, num_classes, dim = centroids.shape
    if groups == 1:
        # The sum of nothing: zero, and connected to the graph.
        return centroids[:0].sum()
    means = (halves @ centroids.flatten(1)).view(2, num_classes, dim)
    half_a, half_b = unit(means).flatten(1).unbind()
    return torch.rsub(half_a.dot(half_b), 1, alpha=1 / num_classes)


def enhance_centroids(centroids: Tensor, means: Tensor) -> Tensor:
    """Give the centroids the features' gradient without moving their value.

    Eq. (4), section 3.3: V' = V + (R - SG(R)). Reading R11.

    Args:
        centroids: V, shape ``(groups, num_classes, dim)``.
        means: R, mean feature of each cell, same shape.

    Returns:
        V', same shape. Its value is exactly ``centroids``; a gradient that reaches it is
        passed on, unchanged, to both arguments.

    Example:
        >>> centroids, means = torch.ones(1, 1, 2), torch.full((1, 1, 2), 1e8, requires_grad=True)
        >>> enhanced = enhance_centroids(centroids, means)
        >>> enhanced.sum().backward()
        >>> enhanced.tolist(), means.grad.tolist()
        ([[[1.0, 1.0]]], [[[1.0, 1.0]]])
    """
    # The brackets matter: R - SG(R) is exactly zero, while (V + R) - SG(R) rounds V away
    # wherever the features are much larger than the centroids.
    return centroids + (means - means.detach())


def centroid_classification_loss(logits: Tensor, present: Tensor) -> Tensor:
    """Supervise each enhanced centroid with its class.

    L_v, section 3.3. The average runs over the cells that are present (R5, R10). The gradient
    goes to the classifier that gave the logits (R13), to the centroids and, through Eq. (4), to
    the features.

    Args:
        logits: the model's own classifier's answers to V', shape
            ``(groups, num_classes, num_classes)``: for each cell a logit for each class.
        present: cells with at least one pixel, shape ``(groups, num_classes)``, bool.

    Returns:
        Scalar, in nats, at least 0; 0 with zero gradients when nothing is present.

    Example:
        >>> logits, present = torch.eye(2).unsqueeze(0), torch.tensor([[True, True]])
        >>> round(centroid_classification_loss(logits, present).item(), 4)
        0.3133
    """
    return _cross_entropy_over_present(logits, present)


def weighted_sum(terms: MVSCTerms, weights: tuple[float, float, float]) -> Tensor:
    """Add the terms up: what Eq. (5), section 3.4, adds to the cross-entropy of the pixels.

    Args:
        terms: the unweighted terms; one whose weight is 0 is left out, whatever it holds.
        weights: lambda_f, lambda_c, lambda_v, each at least 0, in the order of the terms (R19).

    Returns:
        Scalar.

    Example:
        >>> terms = MVSCTerms(*torch.tensor([1.0, 2.0, 4.0]))
        >>> weighted_sum(terms, (0.5, 1.0, 0.0)).item()
        2.5
    """
    total: Tensor | None = None
    for term, weight in zip(terms, weights, strict=True):
        if weight > 0:
            total = weight * term if total is None else total.add(term, alpha=weight)
    return terms.align.new_zeros(()) if total is None else total


def _cross_entropy_over_present(logits: Tensor, present: Tensor) -> Tensor:
    """Average the cross-entropy of each present cell with its class as the target."""
    # Row c has target c. What an absent one holds, NaN included, never matters.
    classes = torch.arange(present.shape[-1], device=present.device)
    targets = torch.where(present, classes, _ABSENT).flatten()
    # What F.cross_entropy does, but with the number of rows that it has counted.
    sum_and_count: tuple[Tensor, Tensor] = torch.ops.aten.nll_loss_forward(
        logits.flatten(0, -2).log_softmax(dim=-1), targets, None, _SUM, _ABSENT
    )
    total, count = sum_and_count
    return total / count.clamp_min(1)


def _inverse_length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=-1, keepdim=True).add(EPS**2).rsqrt()


class _Unit(torch.autograd.Function):
    """x / sqrt(|x|^2 + EPS^2), in fewer operations than autograd would take."""

    # F.normalize has gradients of 1e12 at zero, and NaN in float16.
    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse_length(vectors)
        return vectors * inverse, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_inverse: Tensor | None) -> Tensor | None:
        unit, inverse = ctx.saved_tensors
        total = None
        if grad is not None:
            along = (grad * unit).sum(dim=-1, keepdim=True)
            total = torch.addcmul(grad, along, unit, value=-1) * inverse
        if grad_inverse is not None:  # in a second derivative
            other = -grad_inverse * inverse.square() * unit
            total = other if total is None else total + other
        return total
