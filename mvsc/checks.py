"""Every error text of the public door. Inside, the code trusts its inputs."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_CHANNEL_DROPOUTS_AND_NORMS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def check_positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an int, at least 1."""
    if check_int(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_int(name: str, value: object) -> int:
    """Raise unless ``value`` is an int; return it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_describe(value)}. Pass a whole number.")
    return value


def check_temperature(value: object) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if _number("temperature", value) <= 0:
        raise ValueError(f"temperature must be above 0, got {value}. The paper's value is 0.07.")


def check_weight(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number, at least 0."""
    if _number(name, value) < 0:
        raise ValueError(f"{name} must be at least 0, got {value}. Use 0 to switch the term off.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not any(value is choice or value == choice for choice in choices):
        options = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {options}, got {value!r}.")


def check_features(features: object, dim: int, device: torch.device) -> None:
    """Raise unless ``features`` is a floating (batch, dim, height, width) map on ``device``."""
    features = _check_feature_map(features)
    if features.shape[1] != dim:
        raise ValueError(
            f"features must have shape (batch, dim, height, width) with dim={dim}, "
            f"got {tuple(features.shape)}. "
            f"Build MVSCRegularizer with dim={features.shape[1]} or project the features first."
        )
    if features.device != device:
        raise ValueError(
            f"features must be on the device of the centroids, {device}, got {features.device}. "
            f"Move the regularizer with .to({str(features.device)!r})."
        )


def check_labels(labels: object, features: Tensor) -> None:
    """Raise unless ``labels`` is an integer (batch, height, width) map that fits ``features``."""
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {_describe(labels)}."
        )
    if not _is_integer(labels):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {labels.dtype}. "
            "Use labels.long()."
        )
    if labels.ndim != 3:
        remedy = "Pass one class index for each pixel."
        if labels.ndim == 4 and labels.shape[1] == 1:
            remedy = "Use labels.squeeze(1)."
        elif labels.ndim == 4:
            remedy = "For one-hot labels use labels.argmax(1)."
        elif labels.ndim == 2:
            remedy = "For a single image use labels.unsqueeze(0)."
        raise ValueError(
            f"labels must have shape (batch, height, width), got {tuple(labels.shape)}. {remedy}"
        )
    if labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels must have the batch size of the features, {features.shape[0]}, "
            f"got {labels.shape[0]}. Pass the labels of the same images."
        )
    if 0 in labels.shape[1:]:
        raise ValueError(
            f"labels must have at least one row and one column, got {tuple(labels.shape)}."
        )
    if labels.device != features.device:
        raise ValueError(
            f"labels must be on the device of the features, {features.device}, "
            f"got {labels.device}. Use labels.to({str(features.device)!r})."
        )


def out_of_range(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the mask of labels that are neither a class nor ``ignore_index``."""
    labels = labels.long()  # Before any comparison: uint8 == -100 is true for class 156.
    return ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise if a label is neither a class nor ``ignore_index``; reads values from the device."""
    bad = out_of_range(labels, num_classes, ignore_index)
    if not bool(bad.any()):
        return
    values, counts = torch.unique(labels.long()[bad], return_counts=True)
    found = ", ".join(
        f"{value} ({count} px)"
        for value, count in zip(values[:5].tolist(), counts[:5].tolist(), strict=True)
    )
    more = f" and {len(values) - 5} more values" if len(values) > 5 else ""
    raise ValueError(
        f"labels must be in 0 .. {num_classes - 1} or ignore_index={ignore_index}, "
        f"got {found}{more}. The usual causes: class indices that start at 1 "
        "(reduce_zero_label), a wrong num_classes, or unlabelled pixels under another number "
        "(ignore_index)."
    )


def check_classifier(classifier: object, dim: int, num_classes: int) -> None:
    """Raise unless ``classifier`` can turn ``dim`` features into ``num_classes`` logits."""
    if not callable(classifier):
        raise TypeError(
            "classifier must be the model's last layer, a Conv2d, a Linear or a callable, "
            f"got {_describe(classifier)}. Pass for example model.decode_head.classifier."
        )
    if isinstance(classifier, nn.Conv2d):
        width, classes = classifier.in_channels, classifier.out_channels
    elif isinstance(classifier, nn.Linear):
        width, classes = classifier.in_features, classifier.out_features
    else:
        return  # Its output is checked when it has been called.
    if width != dim:
        raise ValueError(
            f"classifier must take dim={dim} features, got one that takes {width}. "
            "Pass the layer that reads the features you pass."
        )
    if classes != num_classes:
        raise ValueError(_wrong_classes(num_classes, classes))
    if isinstance(classifier, nn.Conv2d) and classifier.groups != 1:
        raise ValueError(
            f"classifier must read all features at once, got a Conv2d with "
            f"groups={classifier.groups}. Pass a callable that maps (N, {dim}, 1, 1) to logits."
        )
    if isinstance(classifier, nn.Conv2d) and is_sharded(classifier):
        kernel = classifier.kernel_size
        if kernel != (1, 1):
            raise ValueError(
                f"classifier must not be sharded on its own if its kernel is larger than 1 x 1, "
                f"got a sharded Conv2d with kernel_size={kernel}. "
                "Leave it to the root's fully_shard."
            )


def is_sharded(module: object) -> bool:
    """Return whether a module's weight is spread over processes (a DTensor of FSDP2)."""
    return hasattr(getattr(module, "weight", None), "full_tensor")


def check_logits(logits: object, count: int, num_classes: int) -> None:
    """Raise unless a classifier's answer to ``count`` vectors has one logit for each class."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"classifier must return a tensor of logits, got {_describe(logits)}.")
    shape = tuple(logits.shape)
    if len(shape) >= 2 and shape[0] == count and shape[1] != num_classes:
        raise ValueError(_wrong_classes(num_classes, shape[1]))
    if shape not in ((count, num_classes), (count, num_classes, 1, 1)):
        raise ValueError(
            f"classifier must map ({count}, dim, 1, 1) to ({count}, {num_classes}, 1, 1), "
            f"got {shape}. Pass the model's last linear layer alone, without upsampling."
        )


def warn_of_dropout_and_norm(classifier: object) -> bool:
    """Warn if the classifier holds a dropout or a batch norm; return whether it did."""
    if not isinstance(classifier, nn.Module):
        return False
    found = [
        f"{name or type(module).__name__} ({type(module).__name__})"
        for name, module in classifier.named_modules()
        if isinstance(module, _CHANNEL_DROPOUTS_AND_NORMS)
    ]
    if found:
        warnings.warn(
            f"classifier contains {', '.join(found)}: a dropout would drop parts of the "
            "centroids, and a batch norm would mix the centroids into its running statistics. "
            "Pass the last linear layer alone.",
            stacklevel=4,
        )
    return bool(found)


def warn_of_idle_centroids(steps: int) -> None:
    """Warn that the centroids get a gradient and no optimizer uses it."""
    warnings.warn(
        f"the centroids have a gradient but have not changed in {steps} steps: the optimizer does "
        "not know them. Add optimizer.add_param_group(reg.param_group()).",
        stacklevel=6,
    )


def check_cells(features: object, cells: object, num_cells: int) -> None:
    """Raise unless the arguments of ``segment_mean`` fit each other."""
    check_positive_int("num_cells", num_cells)
    features = _check_feature_map(features)
    if not isinstance(cells, Tensor) or not _is_integer(cells):
        came = cells.dtype if isinstance(cells, Tensor) else _describe(cells)
        raise TypeError(f"cells must be an integer tensor, got {came}. Use cells.long().")
    expected = (features.shape[0], *features.shape[2:])
    if cells.shape != expected:
        raise ValueError(
            f"cells must have the shape (batch, height, width) of the features, {expected}, "
            f"got {tuple(cells.shape)}. Bring them to the feature grid first."
        )
    if cells.device != features.device:
        raise ValueError(
            f"cells must be on the device of the features, {features.device}, "
            f"got {cells.device}. Use cells.to({str(features.device)!r})."
        )
    # Only where it costs no transfer: on a device a bad cell is the kernel's own error.
    if cells.device.type == "cpu" and cells.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in cells.long().aminmax())
        if low < 0 or high > num_cells:
            raise ValueError(
                f"cells must be in 0 .. {num_cells} with num_cells={num_cells} as the spare "
                f"cell, got values from {low} to {high}. "
                f"Put pixels that do not count into cell {num_cells}."
            )


def _check_feature_map(features: object) -> Tensor:
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a floating-point tensor, got {_describe(features)}.")
    if not features.is_floating_point():
        raise TypeError(
            f"features must be a floating-point tensor, got {features.dtype}. "
            "Pass the input of the classifier, not labels or predictions."
        )
    if features.ndim != 4:
        remedy = "Pass the dense map that enters the classifier."
        if features.ndim == 3:
            remedy = "Reshape tokens of shape (batch, pixels, dim) to a map first."
        raise ValueError(
            "features must have shape (batch, dim, height, width), "
            f"got {tuple(features.shape)}. {remedy}"
        )
    if 0 in features.shape[1:]:
        raise ValueError(
            f"features must have at least one channel, row and column, got {tuple(features.shape)}."
        )
    return features


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_describe(value)}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)


def _wrong_classes(num_classes: int, got: int) -> str:
    return (
        f"classifier must return num_classes={num_classes} logits, got {got}. "
        f"Build MVSCRegularizer with num_classes={got} or pass the classifier of these classes."
    )


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__
