"""What the pictures show, read from the artists; that nothing is cut; and what is refused."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch.testing import assert_close

from mvsc import diagnostics, plotting

torch.manual_seed(0)
NAMES = ["road", "sky", "a class with a rather long name", "car", "tree"]
IMAGES = torch.rand(2, 3, 24, 32)
LABELS = torch.randint(0, 4, (2, 24, 32))
LABELS[:, :4] = 255
PREDICTED = {"one": LABELS.clamp_max(3), "two": torch.zeros_like(LABELS)}
FEATURES, CENTROIDS = torch.randn(1, 6, 6, 8), torch.randn(3, 5, 6)


def panel(**options):
    return Figure((3, 3), layout="constrained").subplots(**options)


def shown(ax):
    return np.asarray(ax.images[-1].get_array())


def assert_nothing_is_cut(figure):
    """Everything lies inside the figure, and no title runs into the next."""
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width + 0.01
    assert box.y1 < height + 0.01
    titles = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(titles, 2))


def test_every_class_has_a_colour_of_its_own_and_unlabelled_is_black():
    colors = plotting.class_colors()
    assert len({tuple(color) for color in colors.tolist()}) == 256
    assert (colors[255] == 0).all()
    assert colors[:255].max(axis=1).min() > 0.2  # none is taken for black
    with pytest.raises(ValueError, match="read-only"):
        colors[0] = 0


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_colours_differ_for_every_kind_of_eye(kind):
    seen = plotting._as_seen(plotting.class_colors())[kind]

    def nearest(count):
        pairs = itertools.combinations([*range(count), 255], 2)
        return min(np.linalg.norm(seen[a] - seen[b]) for a, b in pairs)

    # In OKLab 0.02 is just noticed. (Matplotlib's tab20 has two at 0.007 for a protanope.)
    assert nearest(20) > 0.065
    assert nearest(40) > 0.045
    assert nearest(150) > 0.02


def test_a_map_of_classes_has_each_pixel_in_its_colour():
    ax = panel()
    plotting.draw_classes(ax, LABELS[0].byte())
    assert_close(shown(ax), plotting.class_colors()[LABELS[0].numpy()])


def test_the_difference_is_grey_where_right_orange_where_wrong_black_where_unlabelled():
    ax = panel()
    labels, prediction = torch.tensor([[0, 1, 255, 2]]), torch.tensor([[0, 2, 0, 2]])
    plotting.draw_difference(ax, labels, prediction)
    grey, orange, black = (to_rgb(name) for name in ("#E4E4E4", "#D55E00", "black"))
    assert_close(shown(ax), np.array([[grey, orange, black, grey]]))
    assert ax.get_xlabel() == "33.3 % wrong"
    plotting.draw_difference(ax := panel(), torch.tensor([[255]]), torch.tensor([[0]]))
    assert ax.get_xlabel() == ""


def test_a_heat_map_lies_over_the_whole_image():
    ax = panel()
    cosines = torch.linspace(-1, 1, 48).reshape(6, 8)
    heat = plotting.draw_heatmap(ax, cosines, IMAGES[0])
    assert len(ax.images) == 2
    assert ax.images[0].get_extent() == pytest.approx(heat.get_extent())
    assert heat.get_clim() == (-1, 1)
    assert_close(shown(ax), cosines.numpy())
    (plain,) = (plotting.draw_heatmap(ax := panel(), cosines, limits=(0, 1)),)
    assert (len(ax.images), plain.get_clim()) == (1, (0, 1))


def test_heat_maps_stand_in_a_row_for_each_class_and_a_column_for_each_group():
    classes = [3, 2]
    figure = plotting.heatmaps(
        IMAGES[0], FEATURES, CENTROIDS, classes, names=NAMES, labels=LABELS[0]
    )
    axes = np.array(figure.axes[:-1]).reshape(2, 5)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ["pixels of the class", "global centroid", "group 0", "group 1", "group 2"]
    assert [row[0].get_ylabel().split() for row in axes] == [["car"], NAMES[2].split()]
    for row, c in zip(axes, classes, strict=True):
        for ax, group in zip(row[1:], (None, 0, 1, 2), strict=True):
            expected = diagnostics.centroid_heatmap(FEATURES, CENTROIDS, c, group)[0]
            assert_close(shown(ax), expected.numpy())
        own = (LABELS[0] == c).numpy()
        pixels = IMAGES[0].permute(1, 2, 0).double().numpy()
        assert_close(shown(row[0])[own], pixels[own])
        assert shown(row[0])[~own].min() >= 0.85
    assert figure.axes[-1].get_ylabel() == "cosine"
    assert_nothing_is_cut(figure)


def test_a_single_group_is_the_global_centroid_and_has_one_column():
    figure = plotting.heatmaps((255 * IMAGES[0]).byte(), FEATURES, CENTROIDS[:1], [1])
    assert [ax.get_title() for ax in figure.axes[:-1]] == ["image", "global centroid"]
    assert figure.axes[0].get_ylabel() == "1"
    assert_nothing_is_cut(figure)


def test_predictions_stand_beside_labels_with_their_difference():
    figure = plotting.predictions(IMAGES, LABELS, PREDICTED, names=NAMES)
    axes = np.array(figure.axes).reshape(2, 6)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ["image", "label", "one", "difference", "two", "difference"]
    colors = plotting.class_colors()
    for i, row in enumerate(axes):
        assert_close(shown(row[0]), IMAGES[i].permute(1, 2, 0).double().numpy())
        for ax, values in zip(row[[1, 2, 4]], (LABELS, *PREDICTED.values()), strict=True):
            assert_close(shown(ax), colors[values[i].numpy()])
        wrong = (LABELS[i] != 0)[4:].float().mean()
        assert [row[3].get_xlabel(), row[5].get_xlabel()] == [
            "0.0 % wrong",
            f"{100 * wrong:.1f} % wrong",
        ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES[:4]  # no tree is seen
    assert_nothing_is_cut(figure)


def test_the_legend_leaves_the_panels_free():
    labels = torch.arange(60).reshape(1, 6, 10)
    names = [f"class {c}" for c in range(60)]
    images = torch.rand(1, 3, 6, 10)
    figure = plotting.predictions(images, labels, {"model": labels}, names=names)
    assert_nothing_is_cut(figure)
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 < min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert legend.width < figure.bbox.width


@pytest.mark.parametrize("num_classes", [1, 14, 40, 171])
@pytest.mark.parametrize("named", [False, True])
def test_the_similarity_matrix_is_ordered_by_class(num_classes, named):
    centroids = torch.randn(3, num_classes, 6)
    names = [f"class {c}" for c in range(num_classes)] if named else None
    figure = Figure((3.4, 3), layout="constrained")
    ax = figure.subplots()
    matrix = plotting.draw_similarity(ax, centroids, names)
    figure.colorbar(matrix, label="cosine")
    assert_close(shown(ax), diagnostics.centroid_similarity(centroids).numpy())
    assert matrix.get_clim() == (-1, 1)
    assert ax.get_xticks()[0] == 1  # the middle of class 0
    assert ax.get_yticklabels()[-1].get_text() == {
        (1, False): "0",
        (1, True): "class 0",
        (14, False): "13",
        (14, True): "class 13",
        (40, False): "39",
        (40, True): "class 39",
    }.get((num_classes, named), "160")


def write(path, *entries, end=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
    return path


def training(step, **changes):
    return {"step": step, "loss": 2.0, "cross_entropy": 1.5, "lr": 1e-4, **changes}


TERMS = {"align": 1.0, "pull": 0.1, "classify": 0.5}
MEASURED = {"group_similarity": 0.9, "alignment_accuracy": 0.25}
VAL = {"step": 1000, "val": {"mIoU": 31.5, "mAcc": 40.0, "aAcc": 70.0, "iou": [1.0, None]}}


def test_metrics_are_read_by_name_and_step(tmp_path):
    path = write(tmp_path / "metrics.jsonl", training(50), VAL, training(1050, loss=1.0))
    metrics = plotting.read_metrics(path)
    assert metrics["loss"] == {50: 2.0, 1050: 1.0}
    assert metrics["mIoU"] == {1000: 31.5}
    assert metrics.keys() == {"loss", "cross_entropy", "lr", "mIoU", "mAcc", "aAcc"}


@pytest.mark.parametrize("half", ['{"step": 100, "lo', "{", "1", '"', '{"st\ufffd'])
def test_the_half_line_of_a_killed_run_is_left_out(tmp_path, recwarn, half):
    path = write(tmp_path / "metrics.jsonl", training(50), end=half)
    assert plotting.read_metrics(str(path))["loss"] == {50: 2.0}
    assert not recwarn.list


def test_a_resumed_run_counts_once_and_its_broken_line_is_named(tmp_path):
    path = write(tmp_path / "metrics.jsonl", training(50), training(100), training(150), end='{"st')
    with path.open("a") as file:
        file.write(json.dumps(training(100, loss=3.0)) + "\n")
        file.write(json.dumps(training(100, loss=4.0)) + "\n")
        file.write(json.dumps(training(125)) + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 4 is not whole: left out\."):
        metrics = plotting.read_metrics(path)
    assert metrics["loss"] == {50: 2.0, 100: 4.0, 125: 2.0, 150: 2.0}
    assert list(metrics["loss"]) == [50, 100, 125, 150]


def test_the_report_draws_what_was_logged(tmp_path):
    plain = write(tmp_path / "plain.jsonl", training(50), training(100), VAL)
    ours = write(tmp_path / "mvsc.jsonl", training(50, **TERMS, **MEASURED), VAL)
    figure = plotting.training_report({"plain": plain, "with MVSC": ours})
    terms, groups, accuracy, miou = figure.axes
    assert [line.get_ydata()[0] for line in terms.lines] == [1.5, 1.5, 1.0, 0.1, 0.5]
    legend = [text.get_text() for text in terms.get_legend().get_texts()]
    assert legend == ["cross-entropy", "align", "pull", "classify"]
    assert list(groups.lines[0].get_ydata()) == [0.9]
    assert list(accuracy.lines[0].get_ydata()) == [25.0]
    assert [list(line.get_xdata()) for line in miou.lines] == [[1000], [1000]]
    assert [line.get_label() for line in miou.lines] == ["plain", "with MVSC"]
    assert len({(line.get_color(), line.get_linestyle()) for line in miou.lines}) == 2
    assert_nothing_is_cut(figure)


def test_a_panel_without_numbers_says_so(tmp_path):
    figure = plotting.training_report(write(tmp_path / "metrics.jsonl", training(50)))
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [[], ["not logged"], ["not logged"], ["not logged"]]
    assert_nothing_is_cut(figure)


def test_plotting_leaves_pyplot_alone():
    code = (
        "import io, sys, torch\nfrom mvsc import plotting\n{extra}\n"
        "labels = torch.zeros(1, 4, 4, dtype=torch.int64)\n"
        "figure = plotting.predictions(torch.rand(1, 3, 4, 4), labels, {{}}, names=['a'])\n"
        "figure.savefig(io.BytesIO())\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    # The check can fail:
    for extra, expected in (("", "False"), ("import matplotlib.pyplot", "True")):
        command = [sys.executable, "-c", code.format(extra=extra)]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        assert output.stdout.split() == [expected]


def test_a_missing_matplotlib_is_named_with_the_extra():
    code = "import sys\nsys.modules['matplotlib'] = None\nimport mvsc\nimport mvsc.plotting"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.returncode == 1
    text = 'ImportError: mvsc.plotting needs matplotlib. Run pip install "mvsc[plot]".'
    assert text in output.stderr


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: plotting.draw_classes(panel(), LABELS.float()[0]),
            TypeError,
            "labels must be an integer tensor of class indices, got torch.float32. Use argmax",
        ),
        (
            lambda: plotting.draw_classes(panel(), LABELS),
            ValueError,
            "labels must have shape (height, width), got (2, 24, 32). Resize or index",
        ),
        (
            lambda: plotting.draw_classes(panel(), LABELS[0] + 1),
            ValueError,
            "labels must be in 0 .. 255 to have a colour, got values from 1 to 256. Set what",
        ),
        (
            lambda: plotting.draw_difference(panel(), LABELS[0], LABELS[0, :9]),
            ValueError,
            "prediction must have shape (24, 32), got (9, 32).",
        ),
        (
            lambda: plotting.draw_heatmap(panel(), LABELS[0]),
            TypeError,
            "cosines must be a floating-point tensor, got torch.int64. Use centroid_heatmap.",
        ),
        (
            lambda: plotting.draw_heatmap(panel(), torch.rand(1, 4, 4)),
            ValueError,
            "cosines must have shape (height, width), got (1, 4, 4). Index the image: cosines[0].",
        ),
        (
            lambda: plotting.draw_heatmap(panel(), torch.rand(4, 4), IMAGES),
            ValueError,
            "image must have shape (3, height, width), got (2, 3, 24, 32). Index the batch",
        ),
        (
            lambda: plotting.draw_heatmap(panel(), torch.rand(4, 4), LABELS),
            TypeError,
            "image must be a uint8 or floating-point tensor, got torch.int64. Undo the norm",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, []),
            ValueError,
            "classes must hold at least one entry, got none.",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, [5]),
            ValueError,
            "class_index must be in 0 .. 4, got 5.",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, [0], names=["sky"]),
            ValueError,
            "names must hold one name for each of the 5 classes, got 1. Name the classes in",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, [0], labels=LABELS[0, 1:]),
            ValueError,
            "labels must have shape (24, 32), got (23, 32).",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES.repeat(2, 1, 1, 1), CENTROIDS, [0]),
            ValueError,
            "features must be those of one image, (1, dim, height, width), got (2, 6, 6, 8).",
        ),
        (
            lambda: plotting.predictions(IMAGES, LABELS, {"one": LABELS[:1]}, names=NAMES),
            ValueError,
            "one must have shape (2, 24, 32), got (1, 24, 32).",
        ),
        (
            lambda: plotting.predictions(IMAGES, LABELS, PREDICTED, names=NAMES[:2]),
            ValueError,
            "names must hold one name for each of the 4 classes, got 2.",
        ),
        (
            lambda: plotting.predictions(IMAGES[:0], LABELS[:0], {}, names=NAMES),
            ValueError,
            "images must hold at least one entry, got none.",
        ),
        (
            lambda: plotting.draw_similarity(panel(), CENTROIDS[0]),
            ValueError,
            "centroids must have shape (groups, num_classes, dim) with at least one of each",
        ),
        (
            lambda: plotting.training_report({}),
            ValueError,
            "runs must hold at least one entry, got none.",
        ),
    ],
)
def test_a_wrong_argument_of_a_picture_is_named(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_a_file_without_metrics_is_named(tmp_path):
    path = write(tmp_path / "metrics.jsonl", end='{"step"')
    expected = re.escape(f'{path} must hold a JSON object with a "step" and numbers on each line')
    with pytest.raises(ValueError, match=expected):
        plotting.training_report(path)
    with pytest.raises(FileNotFoundError):
        plotting.training_report(tmp_path / "other.jsonl")


def test_a_dollar_in_a_name_begins_no_formula():
    names = ["co$t^$", "$", "two $ of $_", "plain", "_"]
    ax = panel()
    plotting.draw_similarity(ax, CENTROIDS, names)
    for figure in (
        ax.figure,
        plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, [0, 1, 2], names=names),
        plotting.predictions(IMAGES, LABELS, PREDICTED, names=names),
    ):
        figure.draw_without_rendering()
