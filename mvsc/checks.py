"""Checks, and the words that errors share: numbers, choices, feature maps, tokens, centroids.

Those of labels have a file of their own. Inside, the code trusts its inputs.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_NO_MAP = "Pass the input of the classifier, not labels or predictions."


def check_positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an int, at least 1."""
    if check_int(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_int(name: str, value: object) -> int:
    """Raise unless ``value`` is an int; return it."""
    if isinstance(value, bool) or not isinstance(value, int):
        # NumPy's are refused, too: the compiler would make tensors of them.
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        remedy = f"Use int({name})." if whole else "Pass a whole number."
        raise TypeError(f"{name} must be an int, got {describe(value)}. {remedy}")
    return value


def check_number(name: str, value: Any) -> float:
    """Raise unless ``value`` is a finite number; return it."""
    if type(value) not in (int, float):
        # A tensor would be a device's to read; the compiler branches on neither it nor NumPy's.
        single = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        remedy = f" Use float({name})." if single and not isinstance(value, bool) else ""
        raise TypeError(f"{name} must be a number, got {describe(value)}.{remedy}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not any(value is choice or value == choice for choice in choices):
        options = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {options}, got {value!r}.")


def check_dense(name: str, value: object) -> None:
    """Raise if a tensor is nested or sparse."""
    if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
        remedy = f"Use {name}.to_dense()."
        if value.is_nested:
            padding = "ignore_index" if name == "labels" else "0.0"
            remedy = (
                f"Use torch.nested.to_padded_tensor({name}, {padding}); what is padded has to have "
                "labels of ignore_index."
            )
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one. {remedy}")


def check_floating(name: str, value: object, remedy: str) -> Tensor:
    """Raise unless ``value`` is a dense floating-point tensor; return it."""
    check_dense(name, value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind(value)}. {remedy}")
    if value.element_size() < 2:  # float8, on which torch adds and multiplies nothing
        raise TypeError(
            f"{name} must have 16 bits or more, got {value.dtype}. Use {name}.bfloat16()."
        )
    return value


def check_device(name: str, tensor: Tensor, owner: str, device: torch.device) -> None:
    """Raise unless a tensor is on the device of its owner."""
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of the {owner}, {device}, got {tensor.device}. "
            f"Use {name}.to({str(device)!r})."
        )


def check_feature_map(features: object) -> Tensor:
    """Raise unless ``features`` is a floating tensor with one to three spatial axes; return it."""
    features = check_floating("features", features, _NO_MAP)
    _check_axes(features, channels_last=False)
    return features


def _check_axes(features: Tensor, channels_last: bool) -> None:
    """Raise unless a map has one to three spatial axes, and something in each axis."""
    if not 3 <= features.ndim <= 5:
        raise ValueError(
            "features must have shape (batch, dim, *spatial) with one to three spatial axes, got "
            f"{tuple(features.shape)}. {_of_axes(features.ndim, channels_last)}"
        )
    if 0 in features.shape[1:]:
        raise ValueError(
            f"features must have at least one channel and one place in each spatial axis, got "
            f"{tuple(features.shape)}."
        )


def check_features(
    features: object,
    dim: int,
    device: torch.device,
    *,
    rows: bool = False,
    channels_last: bool | None = None,
) -> tuple[Tensor, bool]:
    """Raise unless ``features`` are ``dim`` wide and on ``device``; return them channels first.

    Args:
        features: what came.
        dim: D.
        device: of the centroids.
        rows: whether the classifier reads the last axis, as an nn.Linear does.
        channels_last: where the channels are; None to find out.

    Returns:
        A view of shape ``(batch, dim, *spatial)``, and whether the channels came last.
    """
    features = check_floating("features", features, _NO_MAP)
    shape = tuple(features.shape)
    last = rows and shape[-1:] == (dim,) if channels_last is None else bool(channels_last)
    _check_axes(features, last)
    if channels_last is None and last and shape[1] == dim:
        raise ValueError(
            f"features of shape {shape} can be read both as (batch, dim, *spatial) and as "
            f"(batch, *spatial, dim) with dim={dim}. Pass channels_last=True if a Linear reads "
            "them as they are, else channels_last=False."
        )
    if shape[-1 if last else 1] != dim:
        raise ValueError(_wrong_width(shape, dim, last))
    if device.type == "meta" and not features.is_meta:
        raise ValueError(
            "the regularizer must have values, and was attached to a model on the meta device. Use "
            f"reg.to_empty(device={str(features.device)!r}) and then, of the MVSCRegularizer, "
            "reset_parameters(); or attach when the model has its values."
        )
    if features.device != device:
        raise ValueError(
            f"features must be on the device of the centroids, {device}, got {features.device}. "
            f"Move the regularizer with .to({str(features.device)!r})."
        )
    return (features.movedim(-1, 1) if last else features), last


def on_grid(
    features: Tensor,
    size: tuple[int, ...],
    grid: tuple[int, ...] | None,
    channels_last: bool = True,
) -> Tensor:
    """Unfold tokens, ``(batch, dim, pixels)``, to the grid that labels of ``size`` need.

    Without ``grid`` it is the one that has the labels' ratio. ``channels_last`` says how the
    tokens came, for the error.
    """
    if grid is None and (features.ndim != 3 or len(size) < 2):
        return features
    pixels = features.shape[2:].numel()
    grid = grid_of_ratio(pixels, size) if grid is None else _checked_grid(features, size, grid)
    front = "features[:, {}:]" if channels_last else "features[..., {}:]"
    axes = axis_names(len(size))
    if grid is None:
        # Class token; class and distillation token; class token and four registers.
        cuts = [n for n in (1, 2, 5) if n < pixels and grid_of_ratio(pixels - n, size)]
        first = (
            f"Cut off class and register tokens: {front.format(cuts[0])}. Or pass"
            if cuts
            else "Pass"
        )
        raise ValueError(
            f"features of {pixels} tokens have no grid of the ratio of the labels, "
            f"{describe_sizes(size)}. {first} grid=({axes}) of the tokens. In an attached model "
            "the classifier has to read these tokens alone."
        )
    if (more := pixels - math.prod(grid)) != 0:
        remedy = f"Pass {axes} of the tokens."
        if 0 < more <= 8:  # class and register tokens
            remedy = f"Cut off what comes before them: {front.format(more)}. Or p{remedy[1:]}"
        raise ValueError(
            f"grid must have as many places as the features have tokens, {pixels}, got {grid}. "
            f"{remedy}"
        )
    unfolded: Tensor = features.reshape(*features.shape[:2], *grid)
    return unfolded


def grid_of_ratio(pixels: int, size: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the grid of so many pixels whose sides have exactly the ratio of ``size``, if any."""
    scale = (pixels / math.prod(size)) ** (1 / len(size))
    grid = tuple(round(n * scale) for n in size)
    exact = all(a * size[0] == b * grid[0] for a, b in zip(grid, size, strict=True))
    return grid if exact and math.prod(grid) == pixels else None


def check_centroids(name: str, centroids: object) -> Tensor:
    """Raise unless ``centroids`` is a floating (groups, num_classes, dim) tensor; return it."""
    centroids = check_floating(name, centroids, "Pass for example reg.centroids.")
    if centroids.ndim != 3 or 0 in centroids.shape:
        raise ValueError(
            f"{name} must have shape (groups, num_classes, dim) with at least one of each, "
            f"got {tuple(centroids.shape)}. Use {name}.unsqueeze(0) for a single group."
        )
    return centroids


def missing_extra(module: str, package: str, extra: str) -> str:
    """Say which extra of the package brings what an optional module needs."""
    return f'{module} needs {package}. Run pip install "mvsc[{extra}]".'


def is_integer(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers; a mask does not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def sums_to_one(values: Tensor, axis: int, near: float) -> bool:
    """Return whether an axis holds the chances of classes everywhere, or one class that is 1."""
    return bool(((values.sum(axis) - 1).abs() < near).all())


def kind(value: object) -> str:
    """Return the dtype of a tensor, or else what came."""
    return str(value.dtype) if isinstance(value, Tensor) else describe(value)


def describe(value: object) -> str:
    """Return the type of a value, and the value itself if it is short."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__


def axis_names(axes: int) -> str:
    """Return the names of two or three spatial axes, as an error writes sizes nobody knows."""
    return "height, width" if axes == 2 else "depth, height, width"


def describe_sizes(sizes: Any) -> str:
    """Return sizes as they are written: 12 x 16."""
    return " x ".join(str(size) for size in sizes)


def _checked_grid(features: Tensor, size: tuple[int, ...], grid: Any) -> tuple[int, ...]:
    """Raise unless ``grid`` is sizes of as many axes as the labels have; return it."""
    if not isinstance(grid, (tuple, list)) or not all(isinstance(n, int) and n > 0 for n in grid):
        raise TypeError(
            f"grid must be sizes, whole numbers of at least 1, got {describe(grid)}. "
            "Pass height and width of the tokens: grid=(14, 14)."
        )
    if features.ndim != 3 or len(size) == 1:
        raise ValueError(
            f"grid is for tokens whose labels are a map, got features of the spatial size "
            f"{describe_sizes(features.shape[2:])} and labels of {describe_sizes(size)}. Leave it "
            "out."
        )
    if len(grid) != len(size):
        raise ValueError(
            f"grid must have the {len(size)} axes of the labels, {describe_sizes(size)}, got "
            f"{tuple(grid)}. Pass grid=({axis_names(len(size))}) of the {features.shape[2]} tokens."
        )
    return tuple(grid)


def _of_axes(ndim: int, channels_last: bool) -> str:
    """Say what to do with features that have none or too many spatial axes."""
    if ndim == 2:
        axis = 1 if channels_last else -1
        return (
            f"For a row of each pixel use features.unsqueeze({axis}) and "
            "labels.flatten().unsqueeze(-1); in an attached model let the classifier read "
            "(batch, height, width, dim)."
        )
    if ndim > 5:
        # The first ones, so that labels on the grid of the features stay on it.
        first, more = 1 if channels_last else 2, ndim - 5
        return (
            "Fold the first ones, in labels of the same size too: "
            f"features.flatten({first}, {first + more}) and labels.flatten(1, {1 + more})."
        )
    return "Pass the dense map that enters the classifier."


def _wrong_width(shape: tuple[int, ...], dim: int, channels_last: bool) -> str:
    """Say that features are not ``dim`` wide, and what helps where they look like tokens."""
    expected = "(batch, *spatial, dim)" if channels_last else "(batch, dim, *spatial)"
    width = shape[-1 if channels_last else 1]
    remedy = f"Build MVSCRegularizer with dim={width} or project the features first."
    if channels_last and shape[1] == dim:
        remedy = "Pass channels_last=False."
    elif not channels_last and shape[-1] == dim:
        remedy = "Pass channels_last=True if the last axis holds the channels."
    elif not channels_last and len(shape) == 5 and shape[2] == dim:
        remedy = "Of the frames of videos use features.flatten(0, 1) and labels.flatten(0, 1)."
    elif shape[0] == dim and not channels_last:
        alone = "one image alone use images" if len(shape) == 3 else "one volume alone use volumes"
        remedy = f"Of {alone}.unsqueeze(0) and labels.unsqueeze(0)."
    return f"features must have shape {expected} with dim={dim}, got {shape}. {remedy}"
