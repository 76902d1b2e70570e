"""Pictures of a run: predictions beside labels, and what the training logged.

A class has the same colour in every picture, and black means unlabelled. Colours are chosen to
differ for readers with each kind of colour blindness, as far as the number of classes allows.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from decoding import IGNORE
from metrics import by_name, read_metrics
from mvsc.plotting import STYLE, TALLEST, WIDTH

_RIGHT, _WRONG = "#E4E4E4", "#D55E00"
# Okabe and Ito's colours, which were chosen for colour-blind readers.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@functools.cache
def class_colors() -> np.ndarray:
    """Return the colour of each class index; it depends on nothing else.

    The first seven are Okabe and Ito's. Each further one is, of a grid of colours, the one
    farthest from all before it and from black and white, in the eyes of the reader with normal
    vision, protanopia, deuteranopia or tritanopia who tells it apart worst.

    Returns:
        RGB in [0, 1], shape ``(256, 3)``, all rows different; row 255 is black: unlabelled.
    """
    levels = np.linspace(0, 1, 14)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _as_seen(grid)[0, :, 0]
    grid = grid[(lightness > 0.4) & (lightness < 0.96)]  # near black is taken for unlabelled
    chosen = [np.zeros(3), np.ones(3), *(np.array(to_rgb(name)) for name in _OKABE_ITO)]
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
    """Draw class indices, ``(height, width)``, each in its colour; 255 is black."""
    return _show(ax, class_colors()[labels.cpu().numpy()])


def draw_difference(ax: Axes, labels: Tensor, prediction: Tensor) -> AxesImage:
    """Draw where a prediction is wrong: orange; right is grey, unlabelled black.

    The share of labelled pixels that are wrong is written below.
    """
    labelled = (labels != IGNORE).cpu()
    wrong = (labels.long() != prediction.long()).cpu() & labelled
    colors = np.array([to_rgb(name) for name in ("black", _RIGHT, _WRONG)])
    image = _show(ax, colors[(labelled.long() + wrong.long()).numpy()])
    if labelled.any():
        share = 100 * wrong.sum().item() / labelled.sum().item()
        ax.set_xlabel(f"{share:.1f} % wrong", labelpad=2)
    return image


def predictions(
    images: Tensor,
    labels: Tensor,
    predicted: Mapping[str, Tensor],
    *,
    names: Sequence[str],
) -> Figure:
    """Draw predictions beside images and labels, and where they are wrong: the paper's Fig. 6.

    Args:
        images: uint8, shape ``(N, 3, H, W)``; a row each.
        labels: class indices, shape ``(N, H, W)``; 255 is unlabelled.
        predicted: class indices of each model, shape ``(N, H, W)``, by the model's name.
        names: of all classes, for the legend, which holds those that are seen.

    Returns:
        A figure with columns for image, label and, for each model, prediction and difference.
    """
    seen = [np.unique(values.cpu().numpy()) for values in (labels, *predicted.values())]
    shown = sorted(set(np.concatenate(seen).tolist()) - {IGNORE})
    columns = 2 + 2 * len(predicted)
    legend_columns = 7
    with rc_context(STYLE):
        panel = WIDTH / columns
        tall = min(images.shape[2] / images.shape[3], TALLEST)
        below = 0.1 + 0.17 * math.ceil(len(shown) / legend_columns)
        height = 0.25 + len(images) * (panel * tall + 0.17) + below
        # Narrow gaps, and room for the legend below.
        free = below / height
        layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, rect=(0, free, 1, 1 - free))
        figure = Figure((WIDTH, height), layout=layout)
        axes = figure.subplots(len(images), columns, squeeze=False)
        for i, row in enumerate(axes):
            _show(row[0], images[i].movedim(0, -1).cpu().numpy())
            draw_classes(row[1], labels[i])
            for k, values in enumerate(predicted.values()):
                draw_classes(row[2 + 2 * k], values[i])
                draw_difference(row[3 + 2 * k], labels[i], values[i])
        titles = ["image", "label", *(text for name in predicted for text in (name, "difference"))]
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        # A dollar in a name must not begin a formula.
        patches = [
            Patch(facecolor=class_colors()[c], label=names[c].replace("$", r"\$")) for c in shown
        ]
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


def training_report(runs: Mapping[str, str | PathLike[str]]) -> Figure:
    """Draw what a training logged: terms, similarity of the groups, accuracy and mIoU by step.

    Args:
        runs: the metrics.jsonl of each run by its name; to compare, one without MVSC among them.

    Returns:
        A figure of four panels. A panel that no run has numbers for says so.

    Raises:
        ValueError: if a file holds no line that can be used.
    """
    metrics = {name: by_name(read_metrics(path)) for name, path in runs.items()}
    for name, path in runs.items():
        if not metrics[name]:
            raise ValueError(
                f'{path} must hold a JSON object with a "step" and numbers on each line, found '
                "none. Name the metrics.jsonl of a run that has logged at least once."
            )
    dashes = ["-", "--", ":", "-."]
    colors = [_OKABE_ITO[i] for i in (4, 5, 2, 6, 0, 1)]
    terms = {"cross_entropy": "#000000"}
    terms.update(
        zip(("align", "pull", "classify"), (_OKABE_ITO[i] for i in (4, 5, 2)), strict=True)
    )
    with rc_context(STYLE):
        figure = Figure((WIDTH, 4.4), layout="constrained")
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


def _line(ax: Axes, values: Mapping[int, float], **style: Any) -> None:
    if values:
        ax.plot(list(values), list(values.values()), linewidth=1.2, markersize=3, **style)


def _show(ax: Axes, pixels: np.ndarray) -> AxesImage:
    image = ax.imshow(pixels, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    return image


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


def _as_seen(colors: np.ndarray) -> np.ndarray:
    """Turn sRGB (..., 3) into OKLab as each of the four kinds of eyes sees it, (4, ..., 3)."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    seen = np.stack([np.clip(linear @ np.array(kind).T, 0, 1) for kind in _VISION])
    lab: np.ndarray = np.cbrt(seen @ np.array(_TO_CONES).T) @ np.array(_TO_LAB).T
    return lab


def _contrast(seen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distance of many colours to one, in the eyes that tell them apart worst."""
    apart = seen - (other[:, None] if seen.ndim > other.ndim else other)
    distance: np.ndarray = np.sqrt((apart**2).sum(axis=-1)).min(axis=0)
    return distance
