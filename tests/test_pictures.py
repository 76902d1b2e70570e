"""What the recipes' pictures show, read from the artists; and what of a run's metrics is drawn."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.testing import assert_close

import metrics
import pictures
from test_plotting import assert_nothing_is_cut, panel, shown

torch.manual_seed(0)
NAMES = ["road", "sky", "a class with a rather long name", "car", "tree"]
IMAGES = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
LABELS = torch.randint(0, 4, (2, 24, 32))
LABELS[:, :4] = 255
PREDICTED = {"one": LABELS.clamp_max(3), "two": torch.zeros_like(LABELS)}


def test_every_class_has_a_colour_of_its_own_and_unlabelled_is_black():
    colors = pictures.class_colors()
    assert len({tuple(color) for color in colors.tolist()}) == 256
    assert (colors[255] == 0).all()
    assert colors[:255].max(axis=1).min() > 0.2  # none is taken for black
    with pytest.raises(ValueError, match="read-only"):
        colors[0] = 0


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_colours_differ_for_every_kind_of_eye(kind):
    seen = pictures._as_seen(pictures.class_colors())[kind]

    def nearest(count):
        pairs = itertools.combinations([*range(count), 255], 2)
        return min(np.linalg.norm(seen[a] - seen[b]) for a, b in pairs)

    # In OKLab 0.02 is just noticed. (Matplotlib's tab20 has two at 0.007 for a protanope.)
    assert nearest(20) > 0.065
    assert nearest(40) > 0.045
    assert nearest(150) > 0.02


def test_a_map_of_classes_has_each_pixel_in_its_colour():
    ax = panel()
    pictures.draw_classes(ax, LABELS[0].byte())
    assert_close(shown(ax), pictures.class_colors()[LABELS[0].numpy()])


def test_the_difference_is_grey_where_right_orange_where_wrong_black_where_unlabelled():
    ax = panel()
    labels, prediction = torch.tensor([[0, 1, 255, 2]]), torch.tensor([[0, 2, 0, 2]])
    pictures.draw_difference(ax, labels, prediction)
    grey, orange, black = (to_rgb(name) for name in ("#E4E4E4", "#D55E00", "black"))
    assert_close(shown(ax), np.array([[grey, orange, black, grey]]))
    assert ax.get_xlabel() == "33.3 % wrong"
    pictures.draw_difference(ax := panel(), torch.tensor([[255]]), torch.tensor([[0]]))
    assert ax.get_xlabel() == ""


def test_predictions_stand_beside_labels_with_their_difference():
    figure = pictures.predictions(IMAGES, LABELS, PREDICTED, names=NAMES)
    axes = np.array(figure.axes).reshape(2, 6)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ["image", "label", "one", "difference", "two", "difference"]
    colors = pictures.class_colors()
    for i, row in enumerate(axes):
        assert_close(shown(row[0]), IMAGES[i].permute(1, 2, 0).numpy())
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
    images = IMAGES[:1, :, :6, :10]
    figure = pictures.predictions(images, labels, {"model": labels}, names=names)
    assert_nothing_is_cut(figure)
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 < min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert legend.width < figure.bbox.width


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
    found = metrics.by_name(metrics.read_metrics(path))
    assert found["loss"] == {50: 2.0, 1050: 1.0}
    assert found["mIoU"] == {1000: 31.5}
    assert found.keys() == {"loss", "cross_entropy", "lr", "mIoU", "mAcc", "aAcc"}


@pytest.mark.parametrize("half", ['{"step": 100, "lo', "{", "1", '"', '{"st\ufffd'])
def test_the_half_line_of_a_killed_run_is_left_out(tmp_path, recwarn, half):
    path = write(tmp_path / "metrics.jsonl", training(50), end=half)
    assert metrics.by_name(metrics.read_metrics(str(path)))["loss"] == {50: 2.0}
    assert not recwarn.list


def test_a_resumed_run_counts_once_and_its_broken_line_is_named(tmp_path):
    path = write(tmp_path / "metrics.jsonl", training(50), training(100), training(150), end='{"st')
    with path.open("a") as file:
        file.write(json.dumps(training(100, loss=3.0)) + "\n")
        file.write(json.dumps(training(100, loss=4.0)) + "\n")
        file.write(json.dumps(training(125)) + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 4 is not whole: left out\."):
        found = metrics.by_name(metrics.read_metrics(path))
    assert found["loss"] == {50: 2.0, 100: 4.0, 125: 2.0, 150: 2.0}
    assert list(found["loss"]) == [50, 100, 125, 150]


def test_the_report_draws_what_was_logged(tmp_path):
    plain = write(tmp_path / "plain.jsonl", training(50), training(100), VAL)
    ours = write(tmp_path / "mvsc.jsonl", training(50, **TERMS, **MEASURED), VAL)
    figure = pictures.training_report({"plain": plain, "with MVSC": ours})
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
    figure = pictures.training_report({"": write(tmp_path / "metrics.jsonl", training(50))})
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [[], ["not logged"], ["not logged"], ["not logged"]]
    assert_nothing_is_cut(figure)


def test_a_file_without_metrics_is_named(tmp_path):
    path = write(tmp_path / "metrics.jsonl", end='{"step"')
    expected = re.escape(f'{path} must hold a JSON object with a "step" and numbers on each line')
    with pytest.raises(ValueError, match=expected):
        pictures.training_report({"": path})


def test_a_dollar_in_a_name_begins_no_formula():
    names = ["co$t^$", "$", "two $ of $_", "plain", "_"]
    pictures.predictions(IMAGES, LABELS, PREDICTED, names=names).draw_without_rendering()
