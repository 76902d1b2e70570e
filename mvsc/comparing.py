"""Is what left a layer what the model returns, up to a resize, a softmax or a crop?"""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvsc.checks import grid_of_ratio, on_grid, sums_to_one
from mvsc.classifier import AUXILIARY, is_channels_last, widths

_SAME = 1e-3
"""Relative distance up to which a layer's resized output is taken for the logits."""

_ALIKE = 0.3
"""The same for a forward in training, whose resize may be of another kind."""

_MUCH = 4
"""By how much a head of cosines multiplies, at least; a temperature may be less."""

_LOGITS = ("out", "logits", "seg", "segmentation", "sem_seg", "masks")
"""Names that models have for their logits, the commonest first."""

SOFTMAX = 1e-2
"""Up to which distance chances that a model returns sum to 1."""

_STRIDES = (2, 4, 7, 8, 14, 16, 28, 32, 64)
"""Strides that models have."""

_CUT = (
    "it gives {} classes, and the model returns {} of them: a cut follows. Pass the features to "
    "MVSCRegularizer, with a callable that cuts as the model does."
)
_REARRANGED = (
    "it gives {} classes, and the model returns its values as maps of {}: a PixelShuffle or a "
    "reshape follows, so that a place of the features has several answers. Pass the features to "
    f"MVSCRegularizer, with {AUXILIARY}."
)
_FOLDED = (
    "it gives {} values, which the model folds to {} classes, as where a class has several. Pass "
    "the features to MVSCRegularizer, with num_classes={} and a callable that folds as the model "
    "does."
)
_OTHER = (
    "it gives {} classes, and the model returns {}: another layer, or a product with prototypes or "
    "texts, follows. Name the layer that makes these (classifier=...), or pass the features, and a "
    "callable that makes these of them, to MVSCRegularizer. If this layer is meant, name it in "
    "attach, and all is well."
)
_SCALED = (
    "the model multiplies its output by {:.3g}, as heads of cosines do, and L_v would not. Pass "
    "features and a callable that multiplies, too, to MVSCRegularizer."
)


def classes_second(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the output of a linear layer as ``(batch, classes, *spatial)``, a view."""
    last = output.ndim > 2 and is_channels_last(layer, output.shape, widths(layer)[1])
    return output.movedim(-1, 1) if last else output


def difference(answers: list[Tensor], logits: Tensor) -> str:
    """Say why the answers of a layer are not the logits; '' if they are, up to a resize."""
    if len(answers) != 1:
        return f"called {len(answers)} times in one forward"
    pairs = [_readable(*pair) for pair in _pairs(answers[0], logits)]
    if not pairs:
        return f"gives {tuple(answers[0].shape)}, the logits are {tuple(logits.shape)}"
    if any(_is_resized(a, b) or _padded_by(a, b) is not None for a, b in pairs):
        return ""
    for a, b in pairs:
        if (factor := _factor(a, b)) is not None and abs(factor - 1) > _SAME:
            return f"the model multiplies its output by {factor:.3g}; pass a callable that does so"
    return "its output is not the logits"


class Verdict(NamedTuple):
    """What a forward tells of a classifier."""

    padded: tuple[tuple[int, ...], tuple[int, ...]] | None
    """The size that the model pads its images to and that of the logits, if it crops these."""
    reason: str = ""
    """Why the answer is not what is returned; '' if, resized, it is."""
    certain: bool = False
    """Whether the reason holds whatever an earlier forward has shown."""


def compare(answer: Tensor, output: Any) -> Verdict | None:
    """Compare a classifier's answer with what the model returns.

    Args:
        answer: what left the classifier in a forward, in training mode or not; classes second.
        output: what left the model: a tensor, or tensors in lists, mappings and data classes.

    Returns:
        The verdict; None if it is open: nothing that is returned has its batch, classes and axes,
        or an activation made it.
    """
    maps = [each for each in tensors_in(output) if each.ndim > 2 and len(each) == len(answer)]
    pairs = [pair for each in tensors_in(output) for pair in _pairs(answer, each)]
    # One image tells it: in full size, and in float64, a batch may be larger than all the rest.
    first = [_readable(a[:1], b[:1]) for a, b in pairs]
    if not pairs:
        for each in maps:
            for made, text in _MADE:
                if made(*_readable(answer[:1], each[:1])):
                    classes = each.shape[1]
                    return Verdict(None, text.format(answer.shape[1], classes, classes))
        return _of_other_classes(answer, output)
    exact = [pair for a, b in first for pair in _without_activation(a, b)]
    if any(_is_resized(a, b) for a, b in exact):
        return Verdict(None)
    for a, b in exact:
        if (padded := _padded_by(a, b)) is not None:
            return Verdict((padded, tuple(b.shape[2:])))
    for a, b in first:
        factor = _factor(a, b)
        if factor is not None and not 1 / _MUCH < factor < _MUCH:
            return Verdict(None, _SCALED.format(factor), certain=True)
    finite = all(bool(each.isfinite().all()) for each in first[0])
    if not finite or any(_alike(a, b) for a, b in first):
        return None
    a, b = pairs[0]
    reason = (
        f"it gives {tuple(a.shape)} and the model returns {tuple(b.shape)}, which is not a resize "
        "of that: a residual or a layer with weights follows. Name the last linear layer "
        "(classifier=...; example= proves it), or pass features and classifier to MVSCRegularizer. "
        "If only a mask, a clamp or a fixed prior follows, all is well."
    )
    return Verdict(None, reason)


def _of_other_classes(answer: Tensor, output: Any) -> Verdict | None:
    """Judge an answer where no part of an output has its classes: is the first a map of others?"""
    main = next((each for each in tensors_in(logits_in(output)) if each.ndim > 2), None)
    if main is None or main.ndim != answer.ndim or len(main) != len(answer):
        return None
    if answer.shape[1] == 1 or 0 in main.shape:
        return None  # One logit may be returned as the chances of both classes.
    return Verdict(None, _OTHER.format(answer.shape[1], tuple(main.shape)))


def is_one_of_several(answer: Tensor, output: Any) -> bool:
    """Return whether an output, in which an answer is, has a map of other classes before it.

    Among names of which none is known, that is any other map of its size.
    """
    part = logits_in(output)
    maps = [each for each in tensors_in(output if part is None else part) if each.ndim > 2]
    sizes = {each.shape[2:] for each in maps if _pairs(answer, each)}
    others = maps if part is None else maps[:1]
    return any(
        each.ndim == answer.ndim and each.shape[2:] in sizes and not _pairs(answer, each)
        for each in others
    )


def logits_in(output: Any) -> Any:
    """Return the part of a model's output whose name is that of logits; all of it without names."""
    if isinstance(output, Mapping):
        return next((output[name] for name in _LOGITS if name in output), None)
    named = getattr(output, "logits", None)
    return output if named is None else named


def sizes_of(answer: Tensor, output: Any) -> tuple[torch.Size, ...]:
    """Return the sizes on which it depends whether a model pads; no values are read."""
    return answer.shape[2:], *(each.shape[2:] for each in tensors_in(output))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Go through all floating tensors of an output; scales stacked in the second axis, apart."""
    if isinstance(output, Tensor):
        strided = output.layout == torch.strided and not output.is_nested
        if output.is_floating_point() and strided and not hasattr(output, "full_tensor"):
            yield output.detach()
            if output.ndim == 6 or (output.ndim == 5 and output.shape[1] < 6):
                yield from output.detach().unbind(1)
        return
    if isinstance(output, Mapping):
        output = output.values()
    elif isinstance(output, SimpleNamespace):
        output = vars(output).values()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    elif not isinstance(output, tuple | list):
        return
    for value in output:
        yield from tensors_in(value)


def _pairs(answer: Tensor, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Read an answer as the logits, whose classes are second or last; all that fits its classes.

    Tokens are unfolded to the logits' grid, and logits in a row to that of a map. Of two dates
    the logits may be stacked, or belong to the first half of the answer. One logit may have no axis
    of classes.
    """
    if logits.ndim == answer.ndim + 1 and answer.shape[0] == logits.shape[:2].numel():
        logits = logits.flatten(0, 1)
    elif logits.ndim == answer.ndim and answer.shape[0] == 2 * logits.shape[0]:
        answer = answer[: logits.shape[0]]
    elif logits.ndim == answer.ndim - 1 and answer.shape[1] == 1:
        logits = logits.unsqueeze(1)
    if not (3 <= answer.ndim <= 5 and 3 <= logits.ndim <= 5):
        return []
    pairs = []
    for each in (logits, logits.movedim(-1, 1)):
        if each.shape[:2] != answer.shape[:2]:
            continue
        if each.ndim == 3 < answer.ndim:
            grid = grid_of_ratio(each.shape[2], tuple(answer.shape[2:]))
            each = each if grid is None else each.reshape(*each.shape[:2], *grid)
        try:
            unfolded = on_grid(answer, tuple(each.shape[2:]), None)
        except ValueError:
            continue
        if unfolded.ndim == each.ndim:
            pairs.append((unfolded, each))
    return pairs


def _readable(answer: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps where float64 is: Apple's GPUs have none."""
    return (answer.cpu(), logits.cpu()) if answer.device.type == "mps" else (answer, logits)


def _without_activation(answer: Tensor, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Make logits of probabilities, or of their logarithms, and an answer to compare with these.

    A softmax forgets the mean over the classes; a linear resize keeps it apart. What lies between
    0 and 1 may be what a sigmoid gives, or logits.
    """
    for logs in (logits.clamp_min(1e-30).log(), logits):
        if answer.shape[1] > 1 and sums_to_one(logs.exp(), 1, SOFTMAX):
            return [(answer - answer.mean(1, keepdim=True), logs - logs.mean(1, keepdim=True))]
    if bool((logits < 0).any() or (logits > 1).any()):
        return [(answer, logits)]
    return [(answer, logits), (answer, logits.double().logit(1e-12).to(answer.dtype))]


_RESIZES: dict[int, list[dict[str, Any]]] = {
    axes: [
        *({"mode": modes[0], "align_corners": corners} for corners in (False, True)),
        *({"mode": mode} for mode in ("nearest", "nearest-exact")),
        *({"mode": mode, "align_corners": c} for mode in modes[1:] for c in (False, True)),
    ]
    for axes, modes in ((1, ["linear"]), (2, ["bilinear", "bicubic"]), (3, ["trilinear"]))
}


def _is_resized(answer: Tensor, logits: Tensor, tolerance: float = _SAME) -> bool:
    """Return whether logits are a resized answer, up to a share of their length."""
    # The tolerance is relative: at random weights all logits of some models are tiny.
    tolerance = max(tolerance, _rounding(answer, logits))
    answer, logits = answer.double(), logits.double()
    if answer.shape == logits.shape:
        return _relative(answer, logits) <= tolerance
    ways = _RESIZES[answer.ndim - 2]
    size = logits.shape[2:]
    return any(_relative(F.interpolate(answer, size, **way), logits) <= tolerance for way in ways)


def _factor(answer: Tensor, logits: Tensor) -> float | None:
    """Return what a resized answer is multiplied by in the logits; None if it is not."""
    same = _rounding(answer, logits)
    answer, logits = answer.double(), logits.double()
    for way in _RESIZES[answer.ndim - 2]:
        resized = F.interpolate(answer, logits.shape[2:], **way)
        factor = float((resized * logits).sum() / resized.square().sum().clamp_min(1e-30))
        if abs(factor) > _SAME and _relative(factor * resized, logits) <= same:
            return factor
    return None


def _rounding(answer: Tensor, logits: Tensor) -> float:
    """Return up to which distance maps of their dtypes are the same: bfloat16 rounds more."""
    return max(_SAME, *(torch.finfo(each.dtype).eps for each in (answer, logits)))


def _relative(answer: Tensor, logits: Tensor) -> float:
    return float((answer - logits).norm() / logits.norm().clamp_min(1e-30))


def _alike(answer: Tensor, logits: Tensor) -> bool:
    """Return whether logits, or what an activation made of them, are a resized answer."""
    answer = answer.double()
    for activation in (answer, answer.softmax(1), answer.sigmoid(), answer.log_softmax(1)):
        if _is_resized(activation, logits, _ALIKE):
            return True
    if answer.shape[1] == 1:
        return False
    best = logits.argmax(1)
    ways = _RESIZES[answer.ndim - 2]
    resized = (F.interpolate(answer, logits.shape[2:], **way) for way in ways)
    return any(float((each.argmax(1) == best).double().mean()) >= 0.9 for each in resized)


def _is_rearranged(answer: Tensor, output: Tensor) -> bool:
    """Return whether an output holds nothing but most values of an answer, in other classes."""
    classes = answer.shape[1]
    if classes == 1 or classes in output.shape[1:] or 2 * output.numel() <= answer.numel():
        return False
    return bool(torch.isin(output, answer).all())


def _is_cut(answer: Tensor, output: Tensor) -> bool:
    """Return whether an output is a resized answer without its first or its last classes."""
    more = answer.shape[1] - output.shape[1]
    if output.ndim != answer.ndim or more < 1 or output.shape[1] < 2:
        return False
    return any(_is_resized(part, output) for part in (answer[:, more:], answer[:, :-more]))


def _is_folded(answer: Tensor, output: Tensor) -> bool:
    """Return whether an output is of the largest, or the sum or mean, of several values a class."""
    classes = output.shape[1]
    if output.ndim != answer.ndim or classes < 2:
        return False
    several, rest = divmod(answer.shape[1], classes)
    if several < 2 or rest:
        return False
    # Before the resize, or after it.
    resizes = _RESIZES[answer.ndim - 2] if answer.shape[2:] != output.shape[2:] else []
    wholes = (F.interpolate(answer, output.shape[2:], **way) for way in resizes)
    for whole in (answer, *wholes):
        for axis, sizes in ((2, (classes, several)), (1, (several, classes))):
            values = whole.reshape(len(whole), *sizes, *whole.shape[2:])
            for fold in (Tensor.amax, Tensor.logsumexp, Tensor.sum, Tensor.mean):
                if _is_resized(fold(values, axis), output):
                    return True
    return False


_MADE = ((_is_cut, _CUT), (_is_folded, _FOLDED), (_is_rearranged, _REARRANGED))
"""What is made of an answer in other classes, and what is said of it."""


def _padded_by(answer: Tensor, logits: Tensor) -> tuple[int, ...] | None:
    """Return the size of an answer that was resized by a whole stride and cropped to the logits.

    None if it was not.
    """
    same = _rounding(answer, logits)
    answer, logits, size = answer.double(), logits.double(), logits.shape[2:]
    for stride in _strides(answer.shape[2:], size):
        padded = tuple(stride * n for n in answer.shape[2:])
        if padded == tuple(size):
            continue
        for way in _RESIZES[answer.ndim - 2]:
            whole = F.interpolate(answer, padded, **way)
            # Each axis was padded at the end, on both sides, or at the beginning.
            more = [big - n for big, n in zip(padded, size, strict=True)]
            for starts in product(*(dict.fromkeys((0, n // 2, n)) for n in more)):
                part = whole
                for axis, (start, n) in enumerate(zip(starts, size, strict=True), start=2):
                    part = part.narrow(axis, start, n)
                if _relative(part, logits) <= same:
                    return padded
    return None


def _strides(answer: torch.Size, logits: torch.Size) -> list[int]:
    """Return by how much an answer may have been enlarged, before it was cropped to logits."""
    least = max(-(-big // small) for small, big in zip(answer, logits, strict=True))
    return [least, *(n for n in _STRIDES if least < n <= 2 * least)]
