"""What the pictures show, read from the artists; that nothing is cut; and what is refused."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.testing import assert_close

from mvsc import diagnostics, plotting

torch.manual_seed(0)
NAMES = ["road", "sky", "a class with a rather long name", "car", "tree"]
IMAGES = torch.rand(2, 3, 24, 32)
LABELS = torch.randint(0, 4, (2, 24, 32))
LABELS[:, :4] = 255
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
    for limits in (1.0, (1.0, -1.0)):
        with pytest.raises(ValueError, match="limits must be the lowest and the highest cosine"):
            plotting.draw_heatmap(panel(), cosines, limits=limits)


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


def test_plotting_leaves_pyplot_alone():
    code = (
        "import io, sys, torch\nfrom mvsc import plotting\n{extra}\n"
        "maps = torch.rand(3, 4, 4), torch.rand(1, 5, 4, 4), torch.rand(2, 3, 5)\n"
        "figure = plotting.heatmaps(*maps, [0])\n"
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
            lambda: plotting.draw_heatmap(panel(), torch.rand(4, 4), torch.full((3, 8, 8), 128.0)),
            ValueError,
            "image must be in [0, 1] if it is floating, got values from 128 to 128. Undo the norm",
        ),
        (
            lambda: plotting.heatmaps(torch.full((3, 8, 8), -0.5), FEATURES, CENTROIDS, [0]),
            ValueError,
            "image must be in [0, 1] if it is floating, got values from -0.5 to -0.5.",
        ),
        (
            lambda: plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, 1),
            TypeError,
            "classes must be a sequence of indices, got 1. Use [1].",
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
            lambda: plotting.draw_similarity(panel(), CENTROIDS[0]),
            ValueError,
            "centroids must have shape (groups, num_classes, dim) with at least one of each",
        ),
    ],
)
def test_a_wrong_argument_of_a_picture_is_named(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_a_dollar_in_a_name_begins_no_formula():
    names = ["co$t^$", "$", "two $ of $_", "plain", "_"]
    ax = panel()
    plotting.draw_similarity(ax, CENTROIDS, names)
    for figure in (
        ax.figure,
        plotting.heatmaps(IMAGES[0], FEATURES, CENTROIDS, [0, 1, 2], names=names),
    ):
        figure.draw_without_rendering()


@pytest.mark.parametrize("names", [[0, 1, 2], "abc"])
def test_names_are_strings(names):
    with pytest.raises(TypeError, match=r"names must be strings, got .*\[str\(name\)"):
        plotting.draw_similarity(Figure().subplots(), torch.randn(2, 3, 4), names)


def test_a_narrow_image_makes_no_gigantic_figure():
    image, features = torch.rand(3, 4000, 2), torch.randn(1, 4, 40, 2)
    figure = plotting.heatmaps(image, features, torch.randn(2, 3, 4), [0])
    assert figure.get_size_inches()[1] < 5


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"classes": ["b"]}, TypeError, r"classes must be indices.*names\.index\(name\)"),
        ({"names": dict(enumerate(NAMES))}, TypeError, r"for name in names\.values\(\)"),
        ({"features": FEATURES[0]}, ValueError, r"Without a batch, use features\.unsqueeze\(0\)"),
    ],
)
def test_what_a_config_or_a_single_image_gives_is_told_how_to_be_passed(options, error, match):
    given = {"features": FEATURES, "classes": [1]} | options
    with pytest.raises(error, match=match):
        plotting.heatmaps(IMAGES[0], centroids=CENTROIDS, **given)
