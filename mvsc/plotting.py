"""Pictures of centroids and of features beside them, with matplotlib: ``pip install "mvsc[plot]"``.

A function that draws one panel takes the ``ax`` to draw on; one that draws several returns a
:class:`matplotlib.figure.Figure` for ``figure.savefig(path, dpi=200)``. Nothing is shown, and
pyplot's state is not touched. A figure of four groups is as wide as two columns of a paper.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mvsc import checks, diagnostics

try:
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from numpy.typing import NDArray
except ImportError as error:
    raise ImportError(checks.missing_extra("mvsc.plotting", "matplotlib", "plot")) from error

WIDTH = 7.0
"""Width of a figure in inches, that of two columns."""

TALLEST = 4
"""Of a narrow image, how many times as high as wide a panel is at most."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.6,
}
"""Settings of every figure, for ``matplotlib.rc_context``."""

_OVERSHOOT = 0.2
"""By how much a bicubic resize may leave [0, 1]."""

_COSINE_COLORS = "RdBu_r"  # white is 0; red and blue are told apart by everyone


def draw_heatmap(
    ax: Axes,
    cosines: Tensor,
    image: Tensor | None = None,
    *,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> AxesImage:
    """Draw cosines as a heat map, over the image if there is one.

    Args:
        ax: the axes to draw on; their ticks are removed.
        cosines: shape ``(h, w)``, as :func:`mvsc.diagnostics.centroid_heatmap` returns them for
            each image.
        image: shape ``(3, H, W)``, uint8 or floating in [0, 1]; drawn grey below the heat.
        limits: the cosines at the two ends of the colours.

    Returns:
        The heat, for ``figure.colorbar(heat, label="cosine")``.

    Raises:
        TypeError: if cosines are not floating or the image is of another dtype.
        ValueError: if a shape is another, or limits are no two that ascend.
    """
    _check_cosines(cosines)
    low, high = _check_limits(limits)
    height, width = cosines.shape
    if image is not None:
        _check_image(image)
        height, width = image.shape[1:]
        grey = _pixels(image) @ np.array([0.299, 0.587, 0.114])
        _show(ax, grey, cmap="gray", vmin=0, vmax=1)
    return _show(
        ax,
        cosines.detach().float().cpu().numpy(),
        cmap=_COSINE_COLORS,
        vmin=low,
        vmax=high,
        alpha=1.0 if image is None else 0.7,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def draw_similarity(ax: Axes, centroids: Tensor, names: Sequence[str] | None = None) -> AxesImage:
    """Draw the cosine of each two centroids, ordered by class.

    The groups of a class are a square on the diagonal: all red where the groups hold the same
    prototype. What is red elsewhere are classes that the features confuse.

    Args:
        ax: the axes to draw on.
        centroids: V, shape ``(groups, num_classes, dim)``.
        names: of the classes; beyond 40 classes their indices are shown.

    Returns:
        The matrix, for ``figure.colorbar(matrix, label="cosine")``.

    Raises:
        TypeError: if centroids are not floating.
        ValueError: if they do not have three axes, or there are fewer names than classes.
    """
    cosines = diagnostics.centroid_similarity(centroids)
    groups, num_classes, _ = centroids.shape
    _check_names(names, num_classes)
    matrix = ax.imshow(cosines.cpu().numpy(), cmap=_COSINE_COLORS, vmin=-1, vmax=1)
    many = num_classes > 40
    shown = range(0, num_classes, 20 if many else 1)
    ticks = [groups * c + (groups - 1) / 2 for c in shown]
    texts = [str(c) if names is None or many else _plain(names[c]) for c in shown]
    upright = 0 if many or (names is None and num_classes <= 20) else 90
    ax.set_xticks(ticks, texts, rotation=upright)
    ax.set_yticks(ticks, texts)
    ax.tick_params(length=2 if many else 0)
    if not many:
        for c in range(1, num_classes):
            ax.axhline(groups * c - 0.5, color="white", linewidth=0.4)
            ax.axvline(groups * c - 0.5, color="white", linewidth=0.4)
    ax.set_title(f"Cosine between centroids, {groups} for each class")
    if names is None or many:
        ax.set_xlabel("class")
        ax.set_ylabel("class")
    return matrix


def heatmaps(
    image: Tensor,
    features: Tensor,
    centroids: Tensor,
    classes: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    labels: Tensor | None = None,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """Draw where an image is like the centroids of some classes: the paper's Figs. 4 and 5.

    Args:
        image: shape ``(3, H, W)``, uint8 or floating in [0, 1].
        features: of this image, the dense map that enters the classifier, shape
            ``(1, dim, h, w)``.
        centroids: V, shape ``(groups, num_classes, dim)``.
        classes: indices of the classes to draw, a row each.
        names: of all classes; without them their indices are shown.
        labels: shape ``(H, W)``; given, the first column shows the pixels of the row's class
            in their colours, and all others faded.
        limits: the cosines at the two ends of the colours.

    Returns:
        A figure with a row for each class and columns for the image, the global centroid and
        each group.

    Raises:
        TypeError: if a tensor is of a wrong dtype or an index is not an int.
        ValueError: if shapes do not fit, a class is out of range, or none is given.
    """
    _check_image(image)
    checks.check_centroids("centroids", centroids)
    groups, num_classes, _ = centroids.shape
    _check_names(names, num_classes)
    if isinstance(classes, int):
        raise TypeError(f"classes must be a sequence of indices, got {classes}. Use [{classes}].")
    if any(isinstance(each, str) for each in classes):
        raise TypeError(
            f"classes must be indices, got {checks.describe(classes)}. Of names use "
            "[names.index(name) for name in classes]."
        )
    if len(classes) == 0:
        raise ValueError("classes must hold at least one entry, got none.")
    _check_one_image(features)
    if labels is not None:
        _check_labels(labels, tuple(image.shape[1:]))
    pixels = _pixels(image)
    columns: list[int | None] = [None, *range(groups)] if groups > 1 else [None]
    with rc_context(STYLE):
        panel = (WIDTH - 1) / 6  # as for four groups, whatever their number
        panel_height = panel * min(image.shape[1] / image.shape[2], TALLEST)
        height = len(classes) * (panel_height + 0.05) + 0.3
        width = 1 + panel * (1 + len(columns))
        figure = Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
        axes = figure.subplots(len(classes), 1 + len(columns), squeeze=False)
        for row, c in zip(axes, classes, strict=True):
            shown = pixels
            if labels is not None:
                elsewhere = (labels.long() != c).cpu().numpy()[..., None]
                shown = np.where(elsewhere, 0.85 + 0.15 * pixels, pixels)
            _show(row[0], shown)
            name = str(c) if names is None else _plain(names[c])
            row[0].set_ylabel(textwrap.fill(name, max(6, int(panel_height / 0.065))))
            for ax, group in zip(row[1:], columns, strict=True):
                (cosines,) = diagnostics.centroid_heatmap(features, centroids, c, group)
                heat = draw_heatmap(ax, cosines, image, limits=limits)
        axes[0, 0].set_title("image" if labels is None else "pixels of the class")
        for ax, group in zip(axes[0, 1:], columns, strict=True):
            ax.set_title("global centroid" if group is None else f"group {group}")
        figure.colorbar(heat, ax=axes, label="cosine", fraction=0.05, pad=0.01, aspect=30)
    return figure


def _plain(name: str) -> str:
    """Keep a dollar in a class's name from beginning a formula."""
    return name.replace("$", r"\$")


def _show(ax: Axes, pixels: NDArray[Any], **options: Any) -> AxesImage:
    """Show an array without ticks; the frame stays, so that white borders have an end."""
    image = ax.imshow(pixels, interpolation="nearest", **options)
    ax.set_xticks([])
    ax.set_yticks([])
    return image


def _pixels(image: Tensor) -> NDArray[np.float64]:
    """Turn (3, H, W) into (H, W, 3) in [0, 1]."""
    scale = 1 if image.is_floating_point() else 255
    array: NDArray[np.float64] = image.detach().movedim(0, -1).cpu().to(torch.float64).numpy()
    return np.clip(array / scale, 0, 1)


def _check_labels(labels: object, shape: tuple[int, ...]) -> None:
    """Raise unless ``labels`` holds the class indices of an image of this shape."""
    if not isinstance(labels, Tensor) or not checks.is_integer(labels):
        raise TypeError(
            f"labels must be an integer tensor of class indices, got {checks.kind(labels)}. "
            "Use argmax over the classes for logits, or .long()."
        )
    if tuple(labels.shape) != shape:
        middle = len(labels) // 2 if labels.ndim == 3 else None
        of_volume = "" if middle is None else f" For a slice of a volume, labels[{middle}]."
        raise ValueError(
            f"labels must have shape {shape}, got {tuple(labels.shape)}. "
            f"Resize or index it to the image.{of_volume}"
        )


def _check_cosines(cosines: object) -> None:
    """Raise unless ``cosines`` is one floating heat map."""
    cosines = checks.check_floating("cosines", cosines, "Use centroid_heatmap.")
    if cosines.ndim != 2:
        raise ValueError(
            f"cosines must have shape (height, width), got {tuple(cosines.shape)}. "
            f"Index the image{', and a slice of a volume' * (cosines.ndim == 4)}: cosines[0"
            f"{f', {cosines.shape[1] // 2}' * (cosines.ndim == 4)}]."
        )


def _check_limits(limits: Any) -> tuple[float, float]:
    """Raise unless ``limits`` are two numbers, the lower one first; return them."""
    numbers = tuple(limits) if isinstance(limits, Sequence) else ()
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError(
            f"limits must be the lowest and the highest cosine, as (-1.0, 1.0), got {limits!r}."
        )
    return numbers


def _check_image(image: object) -> None:
    """Raise unless ``image`` is a (3, height, width) picture."""
    if not isinstance(image, Tensor) or not (
        image.is_floating_point() or image.dtype == torch.uint8
    ):
        raise TypeError(
            f"image must be a uint8 or floating-point tensor, got {checks.kind(image)}. "
            "Undo the normalisation first."
        )
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image must have shape (3, height, width), got {tuple(image.shape)}. "
            "Index the batch, and use image.permute(2, 0, 1) for channels that come last."
        )
    if image.is_floating_point() and image.numel():
        low, high = (value.item() for value in image.aminmax())
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise ValueError(
                f"image must be in [0, 1] if it is floating, got values from {low:.3g} to "
                f"{high:.3g}. Undo the normalisation, or divide by 255."
            )


def _check_one_image(features: object) -> None:
    """Raise unless ``features`` is the map of a single image."""
    features = checks.check_feature_map(features)
    if len(features) != 1:
        remedy = "Index the batch: features[:1]."
        if features.ndim == 3:
            remedy = "Without a batch, use features.unsqueeze(0)."
        raise ValueError(
            "features must be those of one image, (1, dim, height, width), "
            f"got {tuple(features.shape)}. {remedy}"
        )
    if features.ndim != 4:
        slices = features.shape[2]
        remedy = "Unfold them: features.unflatten(2, (height, width))."
        if features.ndim == 5:
            remedy = f"Draw a slice of a volume: features[:, :, {slices // 2}]."
        raise ValueError(
            "features must have two spatial axes to be drawn, (1, dim, height, width), "
            f"got {tuple(features.shape)}. {remedy}"
        )


def _check_names(names: Sequence[str] | None, count: int) -> None:
    """Raise if there are names but not one for each of ``count`` classes."""
    if names is None:
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        values = "names.values()" if isinstance(names, Mapping) else "names"
        raise TypeError(
            f"names must be strings, got {checks.describe(names)}. "
            f"Use [str(name) for name in {values}]."
        )
    if len(names) < count:
        raise ValueError(
            f"names must hold one name for each of the {count} classes, got {len(names)}. "
            "Name the classes in the order of their indices."
        )
