"""Pictures of centroids, features and predictions, with matplotlib: ``pip install "mvsc[plot]"``.

A function that draws one panel takes the ``ax`` to draw on; one that draws several returns a
:class:`matplotlib.figure.Figure` for ``figure.savefig(path, dpi=200)``. Nothing is shown, and
pyplot's state is not touched. Figures are as wide as two columns of a paper.

A class has the same colour in every picture, and black means unlabelled. Colours are chosen to
differ for readers with each kind of colour blindness, as far as the number of classes allows.
"""

import functools
import json
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
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
    from matplotlib.patches import Patch
    from numpy.typing import NDArray
except ImportError as error:
    raise ImportError(checks.missing_extra("mvsc.plotting", "matplotlib", "plot")) from error

IGNORE = 255
"""The index that is drawn black."""

_WIDTH = 7.0  # inches: two columns
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.6,
}
_COSINE_COLORS = "RdBu_r"  # white is 0; red and blue are told apart by everyone
_RIGHT, _WRONG = "#E4E4E4", "#D55E00"
# Okabe and Ito's colours, which were chosen for colour-blind readers.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Runs = str | PathLike[str] | Mapping[str, str | PathLike[str]]


@functools.cache
def class_colors() -> NDArray[np.float64]:
    """Return the colour of each class index; it depends on nothing else.

    The first seven are Okabe and Ito's. Each further one is, of a grid of colours, the one
    farthest from all before it and from black and white, in the eyes of the reader with normal
    vision, protanopia, deuteranopia or tritanopia who tells it apart worst.

    Returns:
        RGB in [0, 1], shape ``(256, 3)``, all rows different; row 255 is black: unlabelled.

    Example:
        >>> class_colors()[255].tolist(), class_colors().shape
        ([0.0, 0.0, 0.0], (256, 3))
    """
    levels = np.linspace(0, 1, 14)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _as_seen(grid)[0, :, 0]
    grid = grid[(lightness > 0.4) & (lightness < 0.96)]  # near black is taken for unlabelled
    chosen = [np.zeros(3), np.ones(3), *(np.array(_rgb(name)) for name in _OKABE_ITO)]
    seen = _as_seen(grid)
    distance = np.full(len(grid), np.inf)
    for color in chosen:
        distance = np.minimum(distance, _contrast(seen, _as_seen(color)))
    while len(chosen) < IGNORE + 2:  # black and white are among them
        best = int(distance.argmax())
        chosen.append(grid[best])
        distance = np.minimum(distance, _contrast(seen, seen[:, best]))
    colors = np.concatenate([chosen[2:], np.zeros((1, 3))])
    colors.setflags(write=False)  # It is cached.
    return colors


def draw_classes(ax: Axes, labels: Tensor) -> AxesImage:
    """Draw a map of classes, each in its colour.

    Args:
        ax: the axes to draw on; their ticks are removed.
        labels: class indices, shape ``(height, width)``, any integer dtype; 255 is black.

    Returns:
        What ``ax.imshow`` returns.

    Raises:
        TypeError: if labels are not integers.
        ValueError: if their shape is another or a value is outside 0 .. 255.
    """
    _check_class_map("labels", labels)
    return _show(ax, class_colors()[labels.detach().cpu().numpy()])


def draw_difference(ax: Axes, labels: Tensor, prediction: Tensor) -> AxesImage:
    """Draw where a prediction is wrong: orange; right is grey, unlabelled black.

    Args:
        ax: the axes to draw on; their ticks are removed, and the share of labelled pixels that
            are wrong is written below.
        labels: class indices, shape ``(height, width)``; 255 is unlabelled.
        prediction: class indices, same shape.

    Returns:
        What ``ax.imshow`` returns.

    Raises:
        TypeError: if either does not hold integers.
        ValueError: if the shapes differ or a value is outside 0 .. 255.
    """
    _check_class_map("labels", labels)
    _check_class_map("prediction", prediction, tuple(labels.shape))
    labelled = (labels != IGNORE).cpu()
    wrong = (labels.long() != prediction.long()).cpu() & labelled
    colors = np.array([_rgb("#000000"), _rgb(_RIGHT), _rgb(_WRONG)])
    image = _show(ax, colors[(labelled.long() + wrong.long()).numpy()])
    if labelled.any():
        share = 100 * wrong.sum().item() / labelled.sum().item()
        ax.set_xlabel(f"{share:.1f} % wrong", labelpad=2)
    return image


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
        ValueError: if a shape is another.
    """
    _check_cosines(cosines)
    height, width = cosines.shape
    if image is not None:
        _check_image(image)
        height, width = image.shape[1:]
        grey = _pixels(image) @ np.array([0.299, 0.587, 0.114])
        _show(ax, grey, cmap="gray", vmin=0, vmax=1)
    low, high = limits
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
    _check_not_empty("classes", classes)
    _check_one_image(features)
    if labels is not None:
        _check_class_map("labels", labels, tuple(image.shape[1:]))
    pixels = _pixels(image)
    columns: list[int | None] = [None, *range(groups)] if groups > 1 else [None]
    with rc_context(_STYLE):
        panel = (_WIDTH - 1) / 6  # as for four groups, also where there are fewer
        panel_height = panel * image.shape[1] / image.shape[2]
        height = len(classes) * (panel_height + 0.05) + 0.3
        width = 1 + panel * (1 + len(columns))
        figure = Figure((width, height), layout=_tight())
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


def predictions(
    images: Tensor,
    labels: Tensor,
    predicted: Mapping[str, Tensor],
    *,
    names: Sequence[str],
) -> Figure:
    """Draw predictions beside images and labels, and where they are wrong: the paper's Fig. 6.

    Args:
        images: shape ``(N, 3, H, W)``, uint8 or floating in [0, 1]; a row each.
        labels: class indices, shape ``(N, H, W)``; 255 is unlabelled.
        predicted: class indices of each model, shape ``(N, H, W)``, by the model's name.
        names: of all classes, for the legend, which holds those that are seen.

    Returns:
        A figure with columns for image, label and, for each model, prediction and difference.

    Raises:
        TypeError: if class maps are not integers, or images of another dtype.
        ValueError: if shapes do not fit, a class has no name, or there is no image.
    """
    maps = {"label": labels, **predicted}
    for name, values in maps.items():
        _check_class_map(name, values, (len(images), *images.shape[2:]), axes=3)
    _check_not_empty("images", images)
    _check_image(images[0])
    seen = [np.unique(values.cpu().numpy()) for values in maps.values()]
    shown = sorted(set(np.concatenate(seen).tolist()) - {IGNORE})
    _check_names(names, max(shown, default=-1) + 1)

    columns = 2 + 2 * len(predicted)
    legend_columns = 7
    with rc_context(_STYLE):
        panel = _WIDTH / columns
        below = 0.1 + 0.17 * math.ceil(len(shown) / legend_columns)
        height = 0.25 + len(images) * (panel * images.shape[2] / images.shape[3] + 0.17) + below
        figure = Figure((_WIDTH, height), layout=_tight(below / height))
        axes = figure.subplots(len(images), columns, squeeze=False)
        for i, row in enumerate(axes):
            _show(row[0], _pixels(images[i]))
            draw_classes(row[1], labels[i])
            for k, values in enumerate(predicted.values()):
                draw_classes(row[2 + 2 * k], values[i])
                draw_difference(row[3 + 2 * k], labels[i], values[i])
        titles = ["image", "label", *(text for name in predicted for text in (name, "difference"))]
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        patches = [Patch(facecolor=class_colors()[c], label=_plain(names[c])) for c in shown]
        figure.legend(
            handles=patches,
            loc="lower center",
            ncols=legend_columns,
            frameon=False,
            handlelength=1,
            handleheight=1,
            columnspacing=1.2,
            borderaxespad=0,
        )
    return figure


def read_metrics(path: str | PathLike[str]) -> dict[str, dict[int, float]]:
    """Read the ``metrics.jsonl`` of a training run.

    One JSON object a line with its ``"step"``; what is under ``"val"`` counts as if it stood
    beside. If a step comes twice, as in a run that was killed and resumed, the later line holds.
    A line that is not whole is left out, with a warning unless it is the last.

    Args:
        path: of the file.

    Returns:
        For each name the values by step, in the order of the steps.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if no line of it can be used.
    """
    metrics: dict[str, dict[int, float]] = {}
    lines = Path(path).read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
            numbers = {**entry, **entry.get("val", {})}
        except (ValueError, KeyError, TypeError):
            if line.strip() and number < len(lines):
                warnings.warn(f"{path}, line {number} is not whole: left out.", stacklevel=2)
            continue
        for name, value in numbers.items():
            if isinstance(value, int | float) and name != "step":
                metrics.setdefault(name, {})[step] = float(value)
    if not metrics:
        raise ValueError(
            f'{path} must hold a JSON object with a "step" and numbers on each line, found none. '
            "Pass the metrics.jsonl of a run that has logged at least once."
        )
    return {name: dict(sorted(values.items())) for name, values in metrics.items()}


def training_report(runs: Runs) -> Figure:
    """Draw what a training logged: terms, similarity of the groups, accuracy and mIoU by step.

    Args:
        runs: the path of a ``metrics.jsonl``, see :func:`read_metrics`; or several by name, to
            compare them, a run without MVSC among them.

    Returns:
        A figure of four panels. A panel that no run has numbers for says so.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file holds no line that can be used, or no run is given.
    """
    paths = runs if isinstance(runs, Mapping) else {"": runs}
    _check_not_empty("runs", paths)
    metrics = {name: read_metrics(path) for name, path in paths.items()}
    dashes = ["-", "--", ":", "-."]
    colors = [_OKABE_ITO[i] for i in (4, 5, 2, 6, 0, 1)]
    terms = {"cross_entropy": "#000000"}
    terms.update(
        zip(("align", "pull", "classify"), (_OKABE_ITO[i] for i in (4, 5, 2)), strict=True)
    )
    with rc_context(_STYLE):
        figure = Figure((_WIDTH, 4.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        top = axes[0, 0]
        for k, values in enumerate(metrics.values()):
            for name, color in terms.items():
                label, known = name.replace("_", "-"), top.get_legend_handles_labels()[1]
                _line(
                    top,
                    values.get(name, {}),
                    label=None if label in known else label,
                    color=color,
                    linestyle=dashes[k % 4],
                )
        top.set_yscale("log")
        top.set_title("Terms of the loss, unweighted")
        top.set_ylabel("nats (pull: 1 - cosine)")
        panels = [
            (axes[0, 1], "group_similarity", "Similarity of the groups", "mean cosine", 1),
            (
                axes[1, 0],
                "alignment_accuracy",
                "Cells nearest to their own centroid",
                "share [%]",
                100,
            ),
            (axes[1, 1], "mIoU", "Validation", "mIoU [%]", 1),
        ]
        for ax, key, title, unit, factor in panels:
            for k, (run, values) in enumerate(metrics.items()):
                scaled = {step: factor * value for step, value in values.get(key, {}).items()}
                _line(
                    ax,
                    scaled,
                    label=run or None,
                    color=colors[k % len(colors)],
                    linestyle=dashes[k % 4],
                    marker="o" if key == "mIoU" else None,
                )
            ax.set_title(title)
            ax.set_ylabel(unit)
        for ax in axes[1]:
            ax.set_xlabel("step")
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
            if not ax.lines:
                ax.set_yscale("linear")
                ax.set_yticks([])
                ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color="0.5")
            elif any(ax.get_legend_handles_labels()):
                ax.legend(frameon=False)
    return figure


def _plain(name: str) -> str:
    """Keep a dollar in a class's name from beginning a formula."""
    return name.replace("$", r"\$")


def _line(ax: Axes, values: Mapping[int, float], **style: Any) -> None:
    if values:
        ax.plot(list(values), list(values.values()), linewidth=1.2, markersize=3, **style)


def _tight(below: float = 0.0) -> ConstrainedLayoutEngine:
    """Make a layout of narrow gaps that leaves a share of the height free below."""
    return ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, rect=(0, below, 1, 1 - below))


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


def _rgb(name: str) -> tuple[float, ...]:
    return tuple(int(name[i : i + 2], 16) / 255 for i in (1, 3, 5))


# Colours as the eye sees them, for class_colors. Machado, Oliveira and Fernandes (2009), severity
# 1, on linear RGB: nothing, protanopia, deuteranopia, tritanopia.
_VISION = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
)
# Ottosson's OKLab (2020), in which distance is difference to the eye.
_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _as_seen(colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn sRGB (..., 3) into OKLab as each of the four kinds of eyes sees it, (4, ..., 3)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = np.stack([np.clip(linear @ np.array(kind).T, 0, 1) for kind in _VISION])
    lab: NDArray[np.float64] = np.cbrt(seen @ np.array(_TO_CONES).T) @ np.array(_TO_LAB).T
    return lab


def _contrast(seen: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of many colours to one, in the eyes that tell them apart worst."""
    apart = seen - (other[:, None] if seen.ndim > other.ndim else other)
    distance: NDArray[np.float64] = np.sqrt((apart**2).sum(axis=-1)).min(axis=0)
    return distance


def _check_class_map(
    name: str, labels: object, shape: tuple[int, ...] | None = None, axes: int = 2
) -> None:
    """Raise unless ``labels`` can be drawn: class indices in 0 .. 255 of the given shape."""
    if not isinstance(labels, Tensor) or not checks.is_integer(labels):
        raise TypeError(
            f"{name} must be an integer tensor of class indices, got {checks.kind(labels)}. "
            "Use argmax over the classes for logits, or .long()."
        )
    if labels.ndim != axes or shape not in (None, tuple(labels.shape)):
        expected = shape or ("(height, width)" if axes == 2 else "(images, height, width)")
        slices = (
            f" For a slice of a volume, {name}[{len(labels) // 2}]." if labels.ndim == 3 else ""
        )
        raise ValueError(
            f"{name} must have shape {expected}, got {tuple(labels.shape)}. "
            f"Resize or index it to the image.{slices}"
        )
    if labels.numel():
        low, high = (int(value) for value in labels.long().aminmax())
        if low < 0 or high > 255:
            raise ValueError(
                f"{name} must be in 0 .. 255 to have a colour, got values from {low} to {high}. "
                "Set what is unlabelled to 255."
            )


def _check_cosines(cosines: object) -> None:
    """Raise unless ``cosines`` is one floating heat map."""
    if not isinstance(cosines, Tensor) or not cosines.is_floating_point():
        raise TypeError(
            f"cosines must be a floating-point tensor, got {checks.kind(cosines)}. "
            "Use centroid_heatmap."
        )
    if cosines.ndim != 2:
        raise ValueError(
            f"cosines must have shape (height, width), got {tuple(cosines.shape)}. "
            f"Index the image{', and a slice of a volume' * (cosines.ndim == 4)}: cosines[0"
            f"{f', {cosines.shape[1] // 2}' * (cosines.ndim == 4)}]."
        )


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


def _check_one_image(features: object) -> None:
    """Raise unless ``features`` is the map of a single image."""
    features = checks.check_feature_map(features)
    if len(features) != 1:
        raise ValueError(
            "features must be those of one image, (1, dim, height, width), "
            f"got {tuple(features.shape)}. Index the batch: features[:1]."
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


def _check_names(names: Sized | None, count: int) -> None:
    """Raise if there are names but not one for each of ``count`` classes."""
    if names is not None and len(names) < count:
        raise ValueError(
            f"names must hold one name for each of the {count} classes, got {len(names)}. "
            "Name the classes in the order of their indices."
        )


def _check_not_empty(name: str, values: Sized) -> None:
    """Raise if there is nothing to draw."""
    if len(values) == 0:
        raise ValueError(f"{name} must hold at least one entry, got none.")
