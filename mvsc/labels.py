"""Label maps: what they must be, and for each other form that people have the line that mends it.

Followed literally, each remedy ends in right labels; where the values do not tell what is right,
it says so. Values are read on the way to an error, or where the device need not be waited for.
"""

import math

import torch
from torch import Tensor

from mvsc.checks import (
    axis_names,
    check_dense,
    check_device,
    describe,
    describe_sizes,
    grid_of_ratio,
    is_integer,
    sums_to_one,
)


def default_ignore_index(num_classes: int) -> int:
    """Return the label that means unlabelled if nobody says so: 255, unless that is a class."""
    return 255 if num_classes <= 255 else -100


def check_labels(
    labels: object,
    features: Tensor | None = None,
    tokens: bool | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Raise unless ``labels`` is an integer class map, ``(batch, *spatial)``; return it.

    With ``features``, ``(batch, dim, *spatial)``, it has to fit them. With ``tokens``, whose grid
    is open, it may have more spatial axes than they have; None if the caller takes no ``grid=``.
    ``num_classes`` says what a channel for each class is, to find the remedy.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {describe(labels)}. "
            f"{_of_no_tensor(labels, features)}"
        )
    check_dense("labels", labels)
    if features is None:
        if not 2 <= labels.ndim <= 4:
            raise ValueError(
                "labels must have shape (batch, *spatial) with one to three spatial axes, got "
                f"{tuple(labels.shape)}. Pass one class index for each pixel."
            )
    elif labels.ndim != features.ndim - 1 and not (
        tokens and labels.ndim in (3, 4) and is_integer(labels)
    ):
        expected = ["(batch, places)", "(batch, height, width)", "(batch, depth, height, width)"]
        raise ValueError(
            f"labels must have shape {expected[features.ndim - 3]} for features of the spatial "
            f"size {describe_sizes(features.shape[2:])}, got {tuple(labels.shape)}. "
            f"{_of_shape(labels, features, tokens, num_classes)}"
        )
    if not is_integer(labels):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {labels.dtype}. "
            f"{_of_values(labels, 'labels', num_classes)}"
        )
    if features is not None and labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels must have the batch size of the features, {features.shape[0]}, "
            f"got {labels.shape[0]}. {_of_batch(labels, features)}"
        )
    if 0 in labels.shape[1:]:
        raise ValueError(
            f"labels must have at least one place in each axis, got {tuple(labels.shape)}."
        )
    if features is not None:
        check_device("labels", labels, "features", features.device)
    return labels


def out_of_range(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the mask of labels that are neither a class nor ``ignore_index``."""
    labels = labels.long()  # Before any comparison: uint8 == -100 is true for class 156.
    return (labels.clamp(0, num_classes - 1) != labels) & (labels != ignore_index)


def check_no_channels(labels: Tensor, num_classes: int) -> None:
    """Raise if a map or volume of labels is one-hot labels of fewer axes; reads values."""
    # A few pixels may look so by chance.
    if labels.ndim > 2 and labels.numel() >= 16 * num_classes and _is_one_hot(labels, num_classes):
        raise ValueError(
            f"labels must be class indices, got {tuple(labels.shape)} with a channel for each of "
            f"the {num_classes} classes. {_of_channels(labels, num_classes)}"
        )


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise if a label is neither a class nor ``ignore_index``; reads values from the device."""
    bad = out_of_range(labels, num_classes, ignore_index)
    if not bool(bad.any()):
        return
    labels = labels.long()
    values, counts = torch.unique(labels[bad], return_counts=True)
    found = ", ".join(
        f"{value} ({count} px)"
        for value, count in zip(values[:5].tolist(), counts[:5].tolist(), strict=True)
    )
    more = f" and {len(values) - 5} more values" if len(values) > 5 else ""
    raise ValueError(
        f"labels must be in 0 .. {num_classes - 1} or ignore_index={ignore_index}, "
        f"got {found}{more}. The usual causes: class indices that start at 1 "
        "(reduce_zero_label), a wrong num_classes, or unlabelled pixels under another number "
        f"(ignore_index).{_of_marks(labels, values.tolist(), num_classes, ignore_index)}"
    )


def _of_marks(labels: Tensor, bad: list[int], num_classes: int, ignore_index: int) -> str:
    """Say what to do with values out of range that often mark unlabelled pixels."""
    marks = [mark for mark in (-100, 255, -1) if mark in bad]
    if not marks:
        return ""
    ignored = bool((labels == ignore_index).any())
    if ignored or len(marks) > 1:  # There is one ignore_index: the marks have to become one.
        kept = ignore_index if ignored else marks.pop(0)
        filled = "".join(f".masked_fill(labels == {mark}, {kept})" for mark in marks)
        pair = " and ".join(map(str, [*marks, kept]))
        return f" If {pair} mark unlabelled pixels, pass labels{filled} with ignore_index={kept}."
    (mark,) = marks
    mask = " For a mask of 0 and 255 pass labels // 255." * (mark == 255 and num_classes == 2)
    return (
        f" If {mark} marks unlabelled pixels, use attach(model, ignore_index={mark}) or "
        f"MVSCRegularizer(..., ignore_index={mark}).{mask}"
    )


def _of_no_tensor(labels: object, features: Tensor | None) -> str:
    """Say how labels that are no tensor become one."""
    maps = labels if isinstance(labels, list | tuple) else ()
    shapes = {each.shape for each in maps if isinstance(each, Tensor)}
    if len(shapes) > 1:
        return (
            "Pad the maps of several images to one size with ignore_index; of maps of one batch in "
            "several resolutions, as for deep supervision, pass the finest."
        )
    if (
        features is not None
        and shapes
        and all(len(shape) == features.ndim - 1 and shape[0] == len(features) for shape in shapes)
    ):
        return (
            "Of two label maps of one forward, as in MixUp, take the loss of each: pass features "
            "and classifier to MVSCRegularizer, once for each map."
        )
    if shapes:
        return "Use torch.stack(labels) for the maps of several images of one size."
    # Copied: torch takes neither PIL's nor one that is flipped.
    if _is_array(labels):
        return "Use torch.as_tensor(np.array(labels))."
    if maps and all(map(_is_array, maps)):
        return "Use torch.stack([torch.as_tensor(np.array(each)) for each in labels])."
    if isinstance(labels, list | tuple):
        return "Use torch.as_tensor(labels)."
    return "Pass the label map of the batch."


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _of_batch(labels: Tensor, features: Tensor) -> str:
    """Say what to do with the labels of another number of images."""
    count, wanted = len(labels), len(features)
    swapped = features.ndim == 3 and features.shape[2] == count
    if swapped and wanted == labels.shape[1:].numel():
        return (
            "If the features are (pixels, batch, dim), as transformers want them, use "
            "features.transpose(0, 1); in an attached model let the classifier read (batch, "
            "pixels, dim)."
        )
    times, rest = divmod(wanted, max(count, 1))
    views = (
        f"; of {times} views of each image labels.repeat_interleave({times}, 0) if they come one "
        f"after the other, torch.cat([labels] * {times}) if the whole batch comes again; of tiles "
        "the labels, cut as the images are"
    )
    views = views if times > 1 and not rest else ""
    unlabelled = "; of images without labels append maps of ignore_index" if times else ""
    return f"Pass the labels of the same images{views}{unlabelled}."


def _of_shape(
    labels: Tensor, features: Tensor, tokens: bool | None, num_classes: int | None
) -> str:
    """Say what to do with labels of another number of axes."""
    axes, shape = features.ndim - 2, tuple(labels.shape)
    if labels.ndim == axes + 2:
        for axis in (1, -1):
            if shape[axis] == 1:
                return _of_values(labels.squeeze(axis), f"labels.squeeze({axis})", num_classes)
    if labels.ndim - 1 > axes:
        size = tuple(features.shape[2:])
        for first in range(1, axes + 1):  # A map that was folded as the features were?
            last = first + labels.ndim - 1 - axes
            if tuple(labels.flatten(first, last).shape[1:]) == size:
                folded = f"labels.flatten({first}, {last})"
                return _of_values(labels.flatten(first, last), folded, num_classes)
        if shape[0] * shape[1] == features.shape[0] and labels.ndim == axes + 2:
            return _of_values(labels.flatten(0, 1), "labels.flatten(0, 1)", num_classes)
        # Not a channel for each class of each place.
        tokens_of_map = axes == 1 and is_integer(labels) and size[0] not in (shape[1], shape[-1])
        if tokens_of_map and not _is_one_hot(labels, num_classes):
            return _of_tokens(size[0], shape[1:], tokens)
    if labels.ndim == axes + 2 and not (_may_be_indices(labels) and 3 not in (shape[1], shape[-1])):
        return _of_channels(labels, num_classes)
    if labels.ndim == 2 < axes + 1 and shape[0] == features.shape[0]:
        # As many as the features have places? Else a single image, of a batch of one.
        grid = grid_of_ratio(shape[1], tuple(features.shape[2:]))
        if grid or shape[0] > 1 or labels.ndim != axes:
            sizes = grid or f"({axis_names(axes)})"
            return _of_values(labels, f"labels.unflatten(1, {sizes})", num_classes)
    places = (features.shape[0], *features.shape[2:])
    if labels.ndim == 1 and labels.numel() == math.prod(places):
        return _of_values(labels, f"labels.view{places}", num_classes)
    # A map of a volume is its labels, or those of one of its slices.
    if labels.ndim == axes and features.shape[0] == 1 and not (axes == 3 and shape[0] == 1):
        return _of_values(labels.unsqueeze(0), "labels.unsqueeze(0)", num_classes)
    if labels.ndim == axes and shape[0] == features.shape[0]:
        said = _of_values(labels, "labels.unsqueeze(1)", num_classes)
        return said[:-1] + " if all slices have these labels."
    if labels.ndim - 1 > axes:
        return (
            "Pass the features unfolded, with the axes of the labels, if they were folded; else "
            "one class index for each pixel."
        )
    return "Pass one class index for each pixel."


def _of_tokens(pixels: int, size: tuple[int, ...], tokens: bool | None) -> str:
    """Say what to do with the labels of a map for features in a row."""
    grid: object = grid_of_ratio(pixels, size)
    grid = grid or f"({axis_names(len(size))})"
    if tokens is None:
        return f"Use features.unflatten(2, {grid}) for tokens."
    return f"Pass grid={grid} for tokens."


def _may_be_indices(labels: Tensor) -> bool:
    """Return whether labels are integers that are more than a mask, of 0 and 1 or of 0 and 255."""
    if not is_integer(labels) or labels.is_meta or not labels.numel():
        return False
    labels = labels.long()
    return bool((labels > 1).any() and ((labels != 0) & (labels != 255)).any())


def _of_values(labels: Tensor, name: str, num_classes: int | None) -> str:
    """Say how labels of the right shape become integers that mean the same."""
    if is_integer(labels):
        return f"Use {name}."
    if labels.dtype == torch.bool or labels.is_complex() or labels.is_meta or not labels.numel():
        return f"Use {name}.long()."
    nan = labels.isnan()
    if bool(nan.any()) and not bool(nan.all()) and bool((labels == labels.round())[~nan].all()):
        return (
            f"If NaN marks what has no label, use {name}.nan_to_num(ignore_index).long() with the "
            "ignore_index of the regularizer."
        )
    if not bool(labels.any()):
        return (
            f"Use {name}.long(), or ({name} * 255).round().long() if ToTensor has made them: 0 "
            "does not show whether it was divided by 255."
        )
    if num_classes != 2 and bool(((labels == 0) | (labels == 1)).all()):
        return (
            f"Use {name}.long(); but if ToTensor has made them, 1 stands for 255: then "
            f"({name} * 255).round().long()."
        )
    if bool((labels == labels.round()).all()):
        return f"Use {name}.long()."
    scaled = 255 * labels.float()
    near = 0.2 if labels.element_size() == 2 else 1e-3  # in half precision all is rounded
    if (
        labels.min() >= 0
        and labels.max() <= 1
        and bool(((scaled - scaled.round()).abs() < near).all())
    ):
        return (
            f"Use ({name} * 255).round().long(): ToTensor has divided them by 255. "
            "pil_to_tensor, or v2.PILToTensor, does not."
        )
    if labels.min() >= 0 and labels.max() <= 1:
        return (
            f"For probabilities of the second of two classes use ({name} > 0.5).long(). "
            "Else pass one class index for each pixel."
        )
    return "They hold fractions, so they are no class indices. Pass one index for each pixel."


def _of_channels(labels: Tensor, num_classes: int | None) -> str:
    """Say what to do with a channel for each class, first or last, with one class or several."""
    if labels.is_meta or not labels.numel():
        return "Pass one class index for each pixel."
    for axis in (1, -1):
        # A grey picture that was read in colour.
        if labels.shape[axis] == 3 and bool((labels == labels.narrow(axis, 0, 1)).all()):
            return _of_values(labels.select(axis, 0), f"labels.select({axis}, 0)", num_classes)
    axes = [axis for axis in (1, -1) if num_classes in (None, labels.shape[axis])]
    if not axes:
        return (
            f"They have no axis with a channel for each of the {num_classes} classes: colours, or "
            "channels of which the background has none, have to be mapped to class indices. Pass "
            "one class index for each pixel."
        )
    values = labels.float()  # Apple's GPUs have no float64.
    if bool(((values == 0) | (values == 255)).all()):
        values = values / 255
    if not (values.min() >= 0 and values.max() <= 1):  # or not a number
        return (
            "They are neither indices nor one-hot; colours have to be mapped to class indices. "
            "Pass one class index for each pixel."
        )
    whole = [axis for axis in axes if sums_to_one(values, axis, _near(labels))]
    name = "labels.long()" if labels.dtype == torch.bool else "labels"
    if len(whole) == 2:
        return (
            f"For one-hot labels use {name}.argmax(1) if the classes come second, "
            f"{name}.argmax(-1) if they come last: both can be here."
        )
    if len(whole) == 1:
        word = "soft or one-hot labels" if labels.is_floating_point() else "one-hot labels"
        return f"For {word} use {name}.argmax({whole[0]})."
    marked = {axis: (values > 0.5).sum(axis) for axis in axes}
    single = [axis for axis in axes if not bool((marked[axis] > 1).any())]
    either = single or axes
    none, several = (int(n.sum()) for n in (marked[either[0]] == 0, marked[either[0]] > 1))
    where = [
        f"torch.where(marked.sum({axis}) == 1, marked.long().argmax({axis}), ignore_index)"
        for axis in either
    ]
    if len(where) == 2:
        where = [f"{where[0]} if the classes come second, {where[1]} if they come last,"]
    return (
        f"Read with a channel for each class, {none} pixels have no class and {several} have "
        "several, and MVSC needs one. To leave these pixels out use marked = labels > 0.5 and "
        f"{where[0]} with the ignore_index of the regularizer."
    )


def _is_one_hot(labels: Tensor, num_classes: int | None) -> bool:
    """Return whether integers are a channel for each class, exactly one of them 1."""
    axes = [axis for axis in (1, -1) if labels.shape[axis] == num_classes]
    if labels.is_meta or not axes or not bool(((labels == 0) | (labels == 1)).all()):
        return False
    return any(sums_to_one(labels.float(), axis, _near(labels)) for axis in axes)


def _near(labels: Tensor) -> float:
    """Return up to which distance chances of the dtype of labels sum to 1."""
    return 0.05 if labels.dtype in (torch.float16, torch.bfloat16) else 1e-3
