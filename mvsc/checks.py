"""Every error text of the public door. Inside, the code trusts its inputs."""

import math
import warnings
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

ONE_LOGIT = (
    "One logit stands for two classes: pass the features to MVSCRegularizer with num_classes=2 "
    "and, for a layer conv, lambda v: torch.cat([torch.zeros_like(conv(v)), conv(v)], dim=1)."
)

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
    """Raise unless ``value`` is a finite number that float32 can divide a cosine by."""
    if _number("temperature", value) < 1e-30:
        raise ValueError(
            f"temperature must be at least 1e-30, got {value}. The paper's value is 0.07."
        )


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


def check_labels(labels: object, features: Tensor | None = None) -> Tensor:
    """Raise unless ``labels`` is an integer (batch, height, width) map; return it.

    With ``features``, it has to fit them.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {_describe(labels)}. "
            "Use torch.as_tensor(labels)."
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
        elif labels.ndim == 4 and labels.shape[3] == 1:
            remedy = "Use labels.squeeze(3)."
        elif labels.ndim == 4:
            remedy = "For one-hot labels use labels.argmax(1)."
        elif labels.ndim == 2:
            remedy = "For a single image use labels.unsqueeze(0)."
        raise ValueError(
            f"labels must have shape (batch, height, width), got {tuple(labels.shape)}. {remedy}"
        )
    if features is not None and labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels must have the batch size of the features, {features.shape[0]}, "
            f"got {labels.shape[0]}. Pass the labels of the same images."
        )
    if 0 in labels.shape[1:]:
        raise ValueError(
            f"labels must have at least one row and one column, got {tuple(labels.shape)}."
        )
    if features is not None and labels.device != features.device:
        raise ValueError(
            f"labels must be on the device of the features, {features.device}, "
            f"got {labels.device}. Use labels.to({str(features.device)!r})."
        )
    return labels


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


def check_sizes_of_classifier(path: str, sizes: dict[str, int], given: dict[str, Any]) -> None:
    """Raise unless the layer at ``path`` has a logit for each class and the sizes given."""
    if sizes["num_classes"] == 1:
        raise ValueError(
            f"classifier must return a logit for each class, got {path!r}, which returns one. "
            f"{ONE_LOGIT}"
        )
    for name, found in sizes.items():
        if given.get(name, found) != found:
            raise ValueError(
                f"{name} must be that of the classifier, {found} of {path!r}, got {given[name]}. "
                "Name another layer, classifier=..., or leave it away."
            )


def is_sharded(module: object) -> bool:
    """Return whether a module's weight is spread over processes (a DTensor of FSDP2)."""
    return hasattr(getattr(module, "weight", None), "full_tensor")


def check_logits(logits: object, count: int, num_classes: int) -> None:
    """Raise unless a classifier's answer to ``count`` vectors has one logit for each class."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"classifier must return a tensor of logits, got {_describe(logits)}.")
    shape = tuple(logits.shape)
    if len(shape) in (2, 4) and shape[0] == count and shape[1] != num_classes:
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
        "not know them. Add optimizer.add_param_group(reg.param_group()). (If it does, then "
        "gradients are accumulated for longer than that, or a fused optimizer keeps them.)",
        stacklevel=6,
    )


def check_cells(features: object, cells: object, num_cells: int) -> None:
    """Raise unless the arguments of ``segment_mean`` fit each other."""
    check_positive_int("num_cells", num_cells)
    features = _check_feature_map(features)
    if not isinstance(cells, Tensor) or not _is_integer(cells):
        raise TypeError(f"cells must be an integer tensor, got {_kind(cells)}. Use cells.long().")
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


def check_centroids(name: str, centroids: object) -> Tensor:
    """Raise unless ``centroids`` is a floating (groups, num_classes, dim) tensor; return it."""
    if not isinstance(centroids, Tensor) or not centroids.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {_kind(centroids)}. "
            "Pass for example reg.centroids."
        )
    if centroids.ndim != 3 or 0 in centroids.shape:
        raise ValueError(
            f"{name} must have shape (groups, num_classes, dim) with at least one of each, "
            f"got {tuple(centroids.shape)}. Use {name}.unsqueeze(0) for a single group."
        )
    return centroids


def check_map_and_labels(
    features: object, labels: object, num_classes: int, ignore_index: int
) -> None:
    """Raise unless ``labels`` fit the map ``features``; their values are read on the CPU only."""
    features = _check_feature_map(features)
    labels = check_labels(labels, features)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_label_values(labels, num_classes, ignore_index)


def check_alignment(means: object, centroids: object, present: object, align_to: object) -> None:
    """Raise unless means, centroids and mask of the cells fit each other."""
    means = check_centroids("means", means)
    centroids = check_centroids("centroids", centroids)
    check_choice("align_to", align_to, ("global", "group"))
    if means.shape[1:] != centroids.shape[1:]:
        raise ValueError(
            "means must have the num_classes and dim of the centroids, "
            f"{tuple(centroids.shape[1:])}, got {tuple(means.shape[1:])}. "
            "Take them from the map that enters the classifier."
        )
    if align_to == "group" and len(means) != len(centroids):
        raise ValueError(
            f"means must have the groups of the centroids, {len(centroids)}, with "
            f"align_to='group', got {len(means)}. Use cell_means(..., groups={len(centroids)})."
        )
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(f"present must be a bool tensor, got {_kind(present)}. Use counts > 0.")
    if present.shape != means.shape[:2]:
        raise ValueError(
            f"present must have shape (groups, num_classes), {tuple(means.shape[:2])}, "
            f"got {tuple(present.shape)}. Pass the mask that cell_means returns with the means."
        )


def check_unit_means(means: object, counts: object) -> None:
    """Raise unless ``means`` is (num_classes, dim) and ``counts`` fits it."""
    if not isinstance(means, Tensor) or not means.is_floating_point():
        raise TypeError(
            f"means must be a floating-point tensor, got {_kind(means)}. Use unit_means."
        )
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(
            "means must have shape (num_classes, dim) with at least one of each, "
            f"got {tuple(means.shape)}. Use unit_means."
        )
    if not isinstance(counts, Tensor) or counts.shape != means.shape[:1]:
        came = f"shape {tuple(counts.shape)}" if isinstance(counts, Tensor) else _describe(counts)
        raise ValueError(
            f"counts must have one entry for each of the {len(means)} classes, got {came}. "
            "Pass what unit_means returns with the means."
        )


def check_ages(ages: object, labels: object) -> None:
    """Raise unless ``ages`` is a (num_classes,) int64 tensor and ``labels`` a map of classes."""
    if not isinstance(ages, Tensor) or ages.dtype != torch.int64:
        raise TypeError(
            f"ages must be an int64 tensor, got {_kind(ages)}. "
            "Start with torch.zeros(num_classes, dtype=torch.int64)."
        )
    if ages.ndim != 1 or len(ages) == 0:
        raise ValueError(
            f"ages must have shape (num_classes,), got {tuple(ages.shape)}. "
            "Keep one age for each class."
        )
    labels = check_labels(labels)
    if labels.device != ages.device:
        raise ValueError(
            f"labels must be on the device of the ages, {ages.device}, got {labels.device}. "
            f"Use labels.to({str(ages.device)!r})."
        )


def check_heatmap(features: object, centroids: object, class_index: object, group: object) -> None:
    """Raise unless the class and group exist and the map has the width of the centroids."""
    centroids, features = check_centroids("centroids", centroids), _check_feature_map(features)
    groups, num_classes, dim = centroids.shape
    if features.shape[1] != dim:
        raise ValueError(
            f"features must have shape (batch, dim, height, width) with dim={dim}, the width of "
            f"the centroids, got {tuple(features.shape)}. Pass the map that enters the classifier."
        )
    if features.device != centroids.device:
        raise ValueError(
            f"features must be on the device of the centroids, {centroids.device}, "
            f"got {features.device}. Use features.to({str(centroids.device)!r})."
        )
    _check_index("class_index", class_index, num_classes)
    if group is not None:
        _check_index("group", group, groups)


def check_class_map(labels: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``labels`` holds the class indices of an image of this shape."""
    if not isinstance(labels, Tensor) or not _is_integer(labels):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {_kind(labels)}. "
            "Use argmax over the classes for logits, or .long()."
        )
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"labels must have shape {shape}, got {tuple(labels.shape)}. "
            "Resize or index it to the image."
        )


def check_cosines(cosines: object) -> None:
    """Raise unless ``cosines`` is one floating heat map."""
    if not isinstance(cosines, Tensor) or not cosines.is_floating_point():
        raise TypeError(
            f"cosines must be a floating-point tensor, got {_kind(cosines)}. Use centroid_heatmap."
        )
    if cosines.ndim != 2:
        raise ValueError(
            f"cosines must have shape (height, width), got {tuple(cosines.shape)}. "
            "Index the image: cosines[0]."
        )


def check_image(image: object) -> None:
    """Raise unless ``image`` is a (3, height, width) picture."""
    if not isinstance(image, Tensor) or not (
        image.is_floating_point() or image.dtype == torch.uint8
    ):
        raise TypeError(
            f"image must be a uint8 or floating-point tensor, got {_kind(image)}. "
            "Undo the normalisation first."
        )
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image must have shape (3, height, width), got {tuple(image.shape)}. "
            "Index the batch, and use image.permute(2, 0, 1) for channels that come last."
        )


def check_one_image(features: object) -> None:
    """Raise unless ``features`` is the map of a single image."""
    features = _check_feature_map(features)
    if len(features) != 1:
        raise ValueError(
            "features must be those of one image, (1, dim, height, width), "
            f"got {tuple(features.shape)}. Index the batch: features[:1]."
        )


def check_names(names: Sized | None, count: int) -> None:
    """Raise if there are names but not one for each of ``count`` classes."""
    if names is not None and len(names) < count:
        raise ValueError(
            f"names must hold one name for each of the {count} classes, got {len(names)}. "
            "Name the classes in the order of their indices."
        )


def check_not_empty(name: str, values: Sized) -> None:
    """Raise if there is nothing to draw."""
    if len(values) == 0:
        raise ValueError(f"{name} must hold at least one entry, got none.")


def missing_extra(module: str, package: str, extra: str) -> str:
    """Say which extra of the package brings what an optional module needs."""
    return f'{module} needs {package}. Run pip install "mvsc[{extra}]".'


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
            remedy = (
                "Reshape tokens of shape (batch, pixels, dim) to a map first, and pass it to "
                "MVSCRegularizer."
            )
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


def _check_index(name: str, value: object, count: int) -> None:
    if not 0 <= check_int(name, value) < count:
        raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value}.")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_describe(value)}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)


def _wrong_classes(num_classes: int, got: int) -> str:
    if got == 1:
        return f"classifier must return num_classes={num_classes} logits, got one. {ONE_LOGIT}"
    return (
        f"classifier must return num_classes={num_classes} logits, got {got}. "
        f"Build MVSCRegularizer with num_classes={got} or pass the classifier of these classes."
    )


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else _describe(value)


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__
