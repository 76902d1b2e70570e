"""What is drawn and what is resampled: labels on the feature grid, groups, halves.

Randomness is private and counter-based: an integer hash of (seed, step, rank, pixel). The
global generators are never touched, so a baseline and a run with MVSC see the same initial
weights and the same order of the data; a resumed run draws what it would have drawn; and the
draws are equal on every device, eager and compiled.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Int = TypeVar("_Int", int, Tensor)

_MASK = 0xFFFFFFFF

_NOT_INDEXED = (torch.uint16, torch.uint32, torch.uint64)
"""What torch 2.6 cannot index on the CPU."""


def labels_on_grid(
    labels: Tensor, size: Sequence[int], num_classes: int, ignore_index: int
) -> Tensor:
    """Bring the labels to the feature grid and give every pixel that does not count one label.

    Each feature pixel takes the label at its centre (reading R15): in an axis that the labels
    divide into H and the features into h, place i takes ``((2 i + 1) H) // (2 h)``, in exact
    integers. Interpolation in floating point differs from that for some sizes and cannot hold
    every class index.

    Args:
        labels: class map, shape ``(batch, *spatial')``, any integer dtype.
        size: ``spatial``, the size of the feature map, with as many axes.
        num_classes: C.
        ignore_index: label of unlabelled pixels; may be any integer.

    Returns:
        int64, shape ``(batch, *spatial)``, in ``0 .. num_classes``; ``num_classes`` stands for
        every pixel that is ignored or out of range.

    Example:
        >>> labels = torch.tensor([[[0, 0, 7, 7], [0, 2, 7, 255]]], dtype=torch.uint8)
        >>> labels_on_grid(labels, (1, 2), num_classes=8, ignore_index=255).tolist()
        [[[2, 8]]]
    """
    if labels.dtype in _NOT_INDEXED:
        labels = labels.long()
    for axis, (source, target) in enumerate(zip(labels.shape[1:], size, strict=True), start=1):
        if source != target:
            centres = ((2 * torch.arange(target, device=labels.device) + 1) * source) // (
                2 * target
            )
            labels = labels.index_select(axis, centres)
    # Widened before any comparison: uint8 == -100 is true for class 156.
    grid = labels.long()
    counts = (grid >= 0) & (grid < num_classes) & (grid != ignore_index)
    return torch.where(counts, grid, num_classes)


def commonest_on_grid(
    labels: Tensor, size: Sequence[int], num_classes: int, ignore_index: int
) -> Tensor:
    """Bring labels to the feature grid by vote: the commonest of each feature pixel's labels.

    For points and strokes, few of which lie at a feature pixel's centre. A label pixel belongs to
    the feature pixel that its own centre lies in; of labels that are equally common the lowest
    wins. A feature pixel that no label pixel's centre lies in, as where the map is finer than the
    labels, takes the label at its centre, as in :func:`labels_on_grid`.

    Args:
        labels: as in :func:`labels_on_grid`.
        size: as in :func:`labels_on_grid`.
        num_classes: C.
        ignore_index: label of unlabelled pixels, which do not vote.

    Returns:
        As :func:`labels_on_grid`; ``num_classes`` where no label pixel is labelled.

    Example:
        >>> labels = torch.tensor([[[255, 1, 3, 255], [255, 2, 2, 255], [0, 255, 255, 255]]])
        >>> commonest_on_grid(labels, (1, 2), num_classes=4, ignore_index=255).tolist()
        [[[0, 2]]]
    """
    batch, spatial = labels.shape[0], tuple(size)
    centres = labels_on_grid(labels, size, num_classes, ignore_index)
    votes = labels_on_grid(labels, labels.shape[1:], num_classes, ignore_index)
    # The number of the feature pixel of each label pixel, axis by axis.
    place = torch.arange(batch, device=labels.device).view(-1, *[1] * len(spatial))
    reached = torch.ones_like(place, dtype=torch.bool)
    for axis, (source, target) in enumerate(zip(labels.shape[1:], spatial, strict=True), start=1):
        shape = [-1 if a == axis else 1 for a in range(1 + len(spatial))]
        own = ((2 * torch.arange(source, device=labels.device) + 1) * target) // (2 * source)
        place = place * target + own.view(shape)
        hit = torch.zeros(target, dtype=torch.bool, device=labels.device)
        reached = reached & hit.index_fill(0, own, True).view(shape)
    # Sorted by (place, label), equal votes are a run; its last vote knows how long it is.
    keys = (place * (num_classes + 1) + votes).flatten().sort().values
    first = torch.searchsorted(keys, keys)
    length = torch.arange(1, len(keys) + 1, device=labels.device) - first
    label = keys % (num_classes + 1)
    # The most votes, then the lowest label; those of unlabelled pixels weigh nothing.
    weight = torch.where(label < num_classes, length, 0) * (num_classes + 1) + num_classes - label
    best = weight.new_zeros(centres.numel())
    best = best.scatter_reduce(0, keys // (num_classes + 1), weight, "amax")
    winner = num_classes - best % (num_classes + 1)
    winner = torch.where(best > num_classes, winner, num_classes).view_as(centres)
    return torch.where(reached, winner, centres)


def stream_key(seed: int, step: Tensor, rank: int = 0) -> Tensor:
    """Mix seed, step and rank into the key of one step's draws.

    Args:
        seed: any integer; its low 64 bits count.
        step: the number of the step, int64 scalar.
        rank: of the process, so that processes with the same seed split differently.

    Returns:
        int64 scalar in ``0 .. 2**32 - 1``, on the device of ``step``.
    """
    key = 0x2545F491
    for word in (seed, seed >> 32, rank):
        key = _mix(key ^ (word & _MASK)) ^ 0x5BD1E995
    # Folded onto 32 bits, so that steps beyond 2^32 draw anew, too.
    return _mix(((step ^ (step >> 31)) & _MASK) ^ key)


def draw_groups(labels: Tensor, groups: int, num_classes: int, key: Tensor) -> Tensor:
    """Split the pixels of each class into G groups, at random and as evenly as possible.

    The split of Eq. (1) as a balanced random partition (reading R9): the sizes of the groups
    of a class differ by at most one, and which groups get the remainder is random too.

    Args:
        labels: int64, shape ``(batch, *spatial)``, in ``0 .. num_classes``, as
            :func:`labels_on_grid` returns it.
        groups: G.
        num_classes: C.
        key: of this step, from :func:`stream_key`.

    Returns:
        The cell ``group * num_classes + label`` of each pixel, int64, same shape;
        ``groups * num_classes`` for a pixel that does not count.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 0, 1, 2]]])
        >>> cells = draw_groups(labels, groups=2, num_classes=2, key=torch.tensor(0))
        >>> torch.bincount(cells.flatten(), minlength=5)[[0, 2, 4]].tolist()
        [2, 2, 1]
    """
    if groups == 1:
        return labels
    flat = labels.flatten()
    # One hash for all that is drawn, a number for each pixel and then for each class: on a GPU
    # each of these small operations costs a launch.
    numbers = torch.arange(len(flat) + num_classes + 1, device=flat.device)
    pixels, hashes = numbers[: len(flat)], _mix(numbers ^ key)
    # Sorting by (class, hash) puts the pixels of each class in random order, one after the
    # other. The hash is a bijection of the pixel's number, so no two keys are equal and the
    # order is unique.
    keys, order = ((flat << 32) | hashes[: len(flat)]).sort()
    label = keys >> 32
    # Dealt in turn from a random first group, so the remainder goes to random groups.
    first_group = hashes[len(flat) :] % groups
    group = (pixels + first_group[label]) % groups
    cells = torch.where(label < num_classes, group * num_classes + label, groups * num_classes)
    return torch.empty_like(flat).scatter(0, order, cells).view_as(labels)


def draw_halves(groups: int, key: Tensor) -> Tensor:
    """Draw the order of the groups whose first half Eq. (3) sets against the rest (R7).

    Args:
        groups: G.
        key: of this step, from :func:`stream_key`.

    Returns:
        A permutation of ``0 .. groups - 1``, int64.
    """
    # Counted down from the last number, far from those of the pixels; by an exclusive or, since
    # the compiler counts in int32 on a GPU.
    return _mix(torch.arange(groups, device=key.device) ^ _MASK ^ key).argsort()


def _mix(x: _Int) -> _Int:
    """Hash 32 bits to 32 bits, one to one; 0 stays 0.

    Every step is invertible, and the multiplier is below 2**31, so that an int64 product never
    overflows. (The multiplier is T. Mueller's, found by search for avalanche.)
    """
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)
