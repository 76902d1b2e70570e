"""What is drawn and what is resampled: labels on the feature grid, groups, halves.

Randomness is private and counter-based: an integer hash of (seed, step, rank, pixel). The
global generators are never touched, so a baseline and a run with MVSC see the same initial
weights and the same order of the data; a resumed run draws what it would have drawn; and the
draws are equal on every device, eager and compiled.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvsc.running import is_capturing

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
    if labels.shape[1:] != size:
        index = _kept(_centres, labels, tuple(labels.shape[1:]), tuple(size))
        labels = labels.flatten(1).index_select(1, index).view(-1, *size)
    labels = labels.long()  # Before any comparison: uint8 == -100 is true for class 156.
    # What is too low becomes -1, which is C modulo C + 1, as is what is too high.
    counted = labels.clamp(-1, num_classes).remainder(num_classes + 1)
    if 0 <= ignore_index < num_classes:
        counted = counted.masked_fill(labels == ignore_index, num_classes)
    return counted


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
    images = torch.arange(batch, device=labels.device).view(-1, *[1] * len(spatial))
    place = _places(labels.shape[1:], spatial, labels.device) + images * math.prod(spatial)
    reached = torch.zeros(centres.numel(), dtype=torch.bool, device=labels.device)
    reached = reached.index_fill(0, place.flatten(), True).view_as(centres)
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


ON_GRID = {"centre": labels_on_grid, "commonest": commonest_on_grid}
"""How labels come to the feature grid, by the setting ``grid_label``."""


def cells_of_classes(
    labels: Tensor, size: Sequence[int], num_classes: int, ignore_index: int
) -> Tensor:
    """Count the feature pixels in which each class has a label, wherever in them it lies.

    Args:
        labels: as in :func:`labels_on_grid`.
        size: as in :func:`labels_on_grid`.
        num_classes: C.
        ignore_index: label of unlabelled pixels.

    Returns:
        int64, shape ``(num_classes + 1,)``; last the feature pixels in which there is any label.

    Example:
        >>> labels = torch.tensor([[[255, 1, 3, 255], [255, 2, 2, 255]]])
        >>> cells_of_classes(labels, (1, 2), num_classes=4, ignore_index=255).tolist()
        [0, 1, 2, 1, 2]
    """
    votes = labels_on_grid(labels, labels.shape[1:], num_classes, ignore_index)
    place = _places(labels.shape[1:], tuple(size), labels.device) * (num_classes + 1)
    counts = labels.new_zeros(num_classes + 1, dtype=torch.int64)
    for image in votes:  # One after the other: a large map of many classes is long.
        there = torch.zeros(math.prod(size), num_classes + 1, dtype=torch.bool, device=votes.device)
        there.view(-1)[place + image] = True
        there[:, -1] = there[:, :-1].any(dim=1)
        counts += there.sum(dim=0)
    return counts


def draw_groups(
    labels: Tensor, groups: int, num_classes: int, step: Tensor, seed: int = 0, rank: int = 0
) -> Tensor:
    """Split the pixels of each class into G groups, at random and as evenly as possible.

    The split of Eq. (1) as a balanced random partition (reading R9): the sizes of the groups
    of a class differ by at most one, and which groups get the remainder is random too.

    Args:
        labels: int64, shape ``(batch, *spatial)``, in ``0 .. num_classes``, as
            :func:`labels_on_grid` returns it.
        groups: G.
        num_classes: C.
        step: the number of the step, int64 scalar.
        seed: any integer; its low 64 bits count.
        rank: of the process, so that processes with the same seed split differently.

    Returns:
        The cell ``group * num_classes + label`` of each pixel, int64, same shape;
        ``groups * num_classes`` for a pixel that does not count.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 0, 1, 2]]])
        >>> cells = draw_groups(labels, groups=2, num_classes=2, step=torch.tensor(0))
        >>> torch.bincount(cells.flatten(), minlength=5)[[0, 2, 4]].tolist()
        [2, 2, 1]
    """
    if groups == 1:
        return labels
    flat = labels.flatten()
    pixels = len(flat)
    # One draw, a number for each pixel and then for each class, of 32 bits with a sign: on a GPU
    # each of these small operations costs a launch.
    numbers = _draw(pixels + num_classes + 1, step, seed, rank, 0) >> 32
    # Sorting by (class, number) puts the pixels of each class in random order, one after the
    # other. A sort that is stable has one answer, also where two of them are equal.
    order = numbers[:pixels].add(flat, alpha=2**32).sort(stable=True).indices
    label = flat.index_select(0, order)
    # Dealt in turn from a random first group, so the remainder goes to random groups.
    first_group = numbers[pixels:].index_select(0, label)
    group = _kept(_counted, labels, pixels).add(first_group).remainder(groups)
    names = _kept(_cells, labels, groups, num_classes)
    cells = names.index_select(0, label.add(group, alpha=num_classes + 1))
    return torch.empty_like(flat).scatter_(0, order, cells).view_as(labels)


def draw_halves(
    groups: int, step: Tensor, seed: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Draw the two halves of the groups that Eq. (3) sets against each other (R7).

    Args:
        groups: G.
        step: as in :func:`draw_groups`.
        seed: as in :func:`draw_groups`.
        dtype: of what is returned, a floating one; torch's default dtype if None.

    Returns:
        What each group weighs in the mean of either half, shape ``(2, groups)``:
        ``groups // 2`` groups count in the first row, the others in the second. A single group
        is all of the second half; nothing is drawn.

    Example:
        >>> draw_halves(3, torch.tensor(0)).sort().values.tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.5, 0.5]]
    """
    weights = _kept(_halves, step, groups, dtype or torch.get_default_dtype())
    if groups == 1:
        return weights
    return weights.index_select(1, draw_order(groups, step, seed))


def draw_order(count: int, step: Tensor, seed: int = 0) -> Tensor:
    """Draw a permutation of ``0 .. count - 1``, int64, the same on every process.

    Args:
        count: how many.
        step: as in :func:`draw_groups`.
        seed: as in :func:`draw_groups`.
    """
    return _draw(count, step, seed, 0, 1).argsort(stable=True)


# The hash works on 64 bits, which wrap around in int64. What a pixel's number, the seed and the
# rank give does not change, so it is mixed once for each size (splitmix64, by Steele, Lea and
# Flood); a step turns about half of the bits, another half in each step, and a product carries
# them to the upper bits, which are what is used.

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _draw(count: int, step: Tensor, seed: int, rank: int, stream: int) -> Tensor:
    """Draw integers of 64 bits with a sign, whose upper halves are random."""
    word = _signed(_mix(_mix(_mix(seed) ^ rank) ^ stream))
    numbers = _kept(_mixed_numbers, step, count, word)
    return (numbers ^ (step * _signed(_GOLDEN))) * _signed(_FIRST)


def _mixed_numbers(count: int, word: int, device: torch.device) -> Tensor:
    """Mix the numbers from 0 to ``count`` with a word."""
    # inductor multiplies an arange as an index, in integers that never wrap around, and refuses
    # what no int64 holds; after a bitwise operation it multiplies as the tensor does.
    numbers = (torch.arange(count, device=device) ^ 0) * _signed(_GOLDEN) + word
    numbers = (numbers ^ (numbers >> 30)) * _signed(_FIRST)
    numbers = (numbers ^ (numbers >> 27)) * _signed(_SECOND)
    return numbers ^ (numbers >> 31)


def _cells(groups: int, num_classes: int, device: torch.device) -> Tensor:
    """Name the cell of each (group, label), also of the label of pixels that do not count."""
    cells = torch.arange(groups * num_classes, device=device).view(groups, num_classes)
    return F.pad(cells, (0, 1), value=groups * num_classes).flatten()


def _halves(groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    first = groups // 2
    in_first = (torch.arange(groups, device=device) < first).to(dtype)
    return torch.stack([in_first / max(first, 1), (1 - in_first) / (groups - first)])


def _counted(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _centres(sources: tuple[int, ...], targets: tuple[int, ...], device: torch.device) -> Tensor:
    """Number, in a flattened map of labels, the one at the centre of each feature pixel."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    for source, target in zip(sources, targets, strict=True):
        places = _holding_centres(target, source, device)
        index = (index.unsqueeze(1) * source + places).flatten()
    return index


def _places(sources: Sequence[int], targets: Sequence[int], device: torch.device) -> Tensor:
    """Number, in a flattened feature map, the pixel that holds the centre of each label."""
    place = torch.zeros([1] * len(sources), dtype=torch.int64, device=device)
    for axis, (source, target) in enumerate(zip(sources, targets, strict=True)):
        own = _holding_centres(source, target, device)
        place = place * target + own.view([-1 if a == axis else 1 for a in range(len(sources))])
    return place


def _holding_centres(places: int, others: int, device: torch.device) -> Tensor:
    """Number, of so many others in the same axis, the one that holds the centre of each place."""
    return ((2 * torch.arange(places, device=device) + 1) * others) // (2 * places)


def _mix(word: int) -> int:
    """Mix an integer's low 64 bits (splitmix64)."""
    word = (word + _GOLDEN) & (2**64 - 1)
    word = ((word ^ (word >> 30)) * _FIRST) & (2**64 - 1)
    word = ((word ^ (word >> 27)) * _SECOND) & (2**64 - 1)
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """Read 64 bits as int64 does."""
    return word - 2**64 if word >= 2**63 else word


def _kept(make: Callable[..., Tensor], like: Tensor, *arguments: Any) -> Tensor:
    """Return ``make(*arguments, device)``, which depends on sizes alone; made once.

    Not kept where tensors are not what they seem: in a compiler, a fake mode, or a capture, whose
    memory is the graph's.
    """
    device = like.device
    if torch.compiler.is_compiling() or type(like) is not Tensor or is_capturing(device):
        return make(*arguments, device)
    return _made(make, *arguments, device)


@lru_cache(maxsize=16)
def _made(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not use it later
        return make(*arguments)
