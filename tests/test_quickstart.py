"""The quickstart as a newcomer runs it: what it prints, draws and leaves, and that it is fair."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import mvsc

quickstart = pytest.importorskip("quickstart")
ROOT = Path(__file__).parents[1]


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, options)])
    quickstart.main()


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory):
    return quickstart.make_mosaics(tmp_path_factory.mktemp("mosaics"), "train", 40)


def test_a_run_prints_both_arms_and_draws_their_predictions(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    run(monkeypatch, "--images", 8, "--epochs", 1, "--seeds", 0, 1, "--out", out)
    with Image.open(out / "predictions.png") as picture:
        assert picture.width > 500
    printed = capsys.readouterr().out
    for name in ("mIoU", "mAcc", "pixel accuracy", "ms a step"):
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert len(re.findall(r"-?[+]?\d+\.\d+ ± \d+\.\d+", row)) == 3
    assert printed.count("Cosine of the centroids") == 2


def test_the_help_shows_the_defaults(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert "(default: 240)" in capsys.readouterr().out


def test_both_arms_see_the_same_weights_and_batches(monkeypatch, tmp_path):
    # With all weights 0 the regularizer adds exactly nothing: one more or one other draw from
    # the global random state would show in the trained models.
    idle = dict.fromkeys(("align_weight", "pull_weight", "classify_weight"), 0.0)
    monkeypatch.setattr(mvsc, "attach", functools.partial(mvsc.attach, **idle))
    ends = []
    evaluate = quickstart.evaluate
    monkeypatch.setattr(
        quickstart, "evaluate", lambda model, *rest: ends.append(model) or evaluate(model, *rest)
    )
    run(monkeypatch, "--images", 16, "--epochs", 1, "--out", tmp_path)
    first, second = (model.state_dict() for model in ends)
    assert_close(first, second, rtol=0, atol=0)


def test_the_mosaics_are_deterministic_and_hold_every_class(mosaics, tmp_path):
    again = quickstart.make_mosaics(tmp_path, "train", 40)
    other = quickstart.make_mosaics(tmp_path, "val", 40)
    assert_close(mosaics, again, rtol=0, atol=0)
    assert not torch.equal(mosaics[1], other[1])
    images, labels = mosaics
    assert images.shape == (40, 3, 96, 96)
    pixels = torch.bincount(labels.flatten().long(), minlength=256)
    classes = pixels[: quickstart.CLASSES]
    assert quickstart.CLASSES >= 12
    assert classes.min() > 0
    assert classes.max() > 5 * classes.min()
    assert 0.02 < pixels[255] / pixels.sum() < 0.3
    assert pixels.sum() == classes.sum() + pixels[255]


def test_colour_alone_does_not_tell_the_classes(mosaics, tmp_path):
    def colours(images, labels):
        labelled = labels != 255
        return images.permute(0, 2, 3, 1)[labelled].float(), labels[labelled].long()

    train, train_labels = colours(*mosaics)
    val, val_labels = colours(*quickstart.make_mosaics(tmp_path, "val", 40))
    classes = range(quickstart.CLASSES)
    means = torch.stack([train[train_labels == c].mean(dim=0) for c in classes])
    predicted = torch.cdist(val, means).argmin(dim=1)
    recall = torch.stack([(predicted[val_labels == c] == c).float().mean() for c in classes])
    assert recall.mean() < 2 / len(classes)


def test_without_an_epoch_it_leaves_the_mosaics_as_the_recipes_read_them(monkeypatch, tmp_path):
    run(monkeypatch, "--epochs", 0, "--images", 30, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mosaics"}
    for split, count in (("train", 30), ("val", 15)):
        found = data.open_split("folder", tmp_path / "mosaics", split)
        assert len(found) == count
        assert list(found.classes) == list(quickstart.TEXTURES)
        assert data.check(found).problems == []
        drawn = quickstart.make_mosaics(tmp_path / "again", split, count)
        for number, (image, label) in enumerate(found):
            assert_close((image, label), (drawn[0][number], drawn[1][number]), rtol=0, atol=0)


def test_it_is_short_and_nobody_imports_it():
    path = ROOT / "examples" / "quickstart.py"
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert text.count("# MVSC\n") == 3
    for part in ("examples", "benchmarks", "docs", "mvsc"):
        for other in (ROOT / part).rglob("*.py"):
            assert "quickstart" not in imported(other), other


def test_its_extra_holds_all_that_it_imports():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (extra,) = re.findall(r"^quickstart = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r'"([\w-]+)', extra)) | {"torch", "mvsc", "matplotlib"}
    packages = {"PIL": "pillow"}
    for name in imported(ROOT / "examples" / "quickstart.py") - set(sys.stdlib_module_names):
        assert packages.get(name, name).replace("_", "-") in listed, name


def imported(path):
    """The modules that a script imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found
