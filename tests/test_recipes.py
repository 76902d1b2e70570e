"""Training by recipe: what is written, that it resumes exactly, and that both arms are paired."""

import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
import yaml
from PIL import Image
from torch.testing import assert_close

import kill_and_resume
import tiny_data

pytest.importorskip("segmentation_models_pytorch")
SCRIPTS = Path(__file__).parents[1] / "examples" / "recipes"

import ablate  # noqa: E402
import commands  # noqa: E402
import evaluate  # noqa: E402
import loading  # noqa: E402
import models  # noqa: E402
import parallel  # noqa: E402
import predict  # noqa: E402
import train as training  # noqa: E402
import visualize  # noqa: E402
import weights  # noqa: E402
from data import open_split  # noqa: E402
from recipes import RECIPES, Recipe, RegularizerOptions, check_recipe  # noqa: E402
from train import train  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_data.make_folder(tmp_path_factory.mktemp("data") / "folder", train=5)


@pytest.fixture(autouse=True)
def one_thread():
    from accelerate.state import AcceleratorState

    # Accelerate keeps its first precision for the life of the process, that of other tests too.
    AcceleratorState._reset_state()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state()


def tiny(folder, out, **changes):
    settings = {
        "data_root": folder,
        "out": out,
        "model": "smp/Segformer/tu-test_resnet",
        "decoder_dim": 16,
        "pretrained": False,
        "steps": 6,
        "batch_size": 4,
        "warmup": 2,
        "lr": 1e-3,
        "scale": (64, 48),
        "crop": (32, 32),
        "workers": 0,
        "cpu": True,
        "log_every": 2,
        "save_every": 2,
        "eval_every": 4,
    }
    return Recipe(**settings | changes)


def interrupting(step):
    """A criterion that presses Ctrl-C while a step is computed."""
    calls = []

    def criterion(logits, labels):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return training.cross_entropy(logits, labels)

    return criterion


def state_of(out):
    return weights.load_state(out / "last.pt")


def assert_same_state(out, other):
    a, b = state_of(out), state_of(other)
    for name in ("model", "reg", "optimizer", "schedule"):
        assert_close(a.get(name), b.get(name), rtol=0, atol=0)


def test_a_run_leaves_metrics_weights_centroids_and_scores(folder, tmp_path):
    out = tmp_path / "new" / "run"
    scores = train(tiny(folder, out))
    files = {path.name for path in out.iterdir()}
    assert files == {
        "best.centroids.safetensors",
        "best.safetensors",
        "last.centroids.safetensors",
        "last.pt",
        "last.safetensors",
        "metrics.jsonl",
        "scores.json",
        "tensorboard",
    }
    lines = training.read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 6]
    shown = "loss cross_entropy align pull classify group_similarity alignment_accuracy lr"
    for name in shown.split():
        assert isinstance(lines[0][name], float)
    total = lines[0]["cross_entropy"] + 0.1 * lines[0]["align"] + lines[0]["pull"]
    assert_close(lines[0]["loss"], total + 0.05 * lines[0]["classify"], rtol=1e-5, atol=0)
    assert lines[-1]["val"] == scores
    assert len(scores["iou"]) == 3
    assert json.loads((out / "scores.json").read_text())["mIoU"] == scores["mIoU"]
    assert set(state_of(out)["reg"]) == {"regularizer.centroids", "regularizer.step"}


@pytest.mark.parametrize("model", ["smp/Segformer/tu-test_resnet", "segformer-b0"])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(folder, tmp_path, model):
    # SegFormer-B0 has dropout and stochastic depth.
    recipe = tiny(folder, tmp_path / "whole", model=model)
    train(recipe)
    parts = replace(recipe, out=tmp_path / "parts", resume=True)
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            train(parts, interrupting(step))
    assert state_of(parts.out)["step"] == 3
    train(parts)
    assert_same_state(recipe.out, parts.out)
    whole, resumed = (training.read_metrics(r.out / "metrics.jsonl") for r in (recipe, parts))
    assert [line.get("val") for line in whole] == [line.get("val") for line in resumed]


def test_what_was_logged_after_the_last_checkpoint_is_logged_once(folder, tmp_path):
    recipe = tiny(folder, tmp_path, resume=True)
    train(recipe)
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + '{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    train(recipe)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_the_parts_of_an_accumulated_batch_are_those_of_the_whole(folder, tmp_path):
    data = open_split("folder", folder, "train")
    recipe = tiny(folder, tmp_path)
    whole = loading.training_batches(data, recipe, models.HALF[0], step=1)
    halves = loading.training_batches(data, replace(recipe, accumulate=2), models.HALF[0], step=1)
    halves = list(halves)
    for number, (images, labels) in enumerate(whole):
        first, second = halves[2 * number : 2 * number + 2]
        assert_close(images, torch.cat([first[0], second[0]]), rtol=0, atol=0)
        assert_close(labels, torch.cat([first[1], second[1]]), rtol=0, atol=0)


def test_workers_and_processes_change_no_image(folder, tmp_path):
    data, recipe = open_split("folder", folder, "train"), tiny(folder, tmp_path, steps=3)
    alone = list(loading.training_batches(data, recipe, models.HALF[0], step=0))
    helped = list(
        loading.training_batches(data, replace(recipe, workers=2), models.HALF[0], step=0)
    )
    ranks = [
        list(loading.training_batches(data, recipe, models.HALF[0], 0, rank, 2)) for rank in (0, 1)
    ]
    for step, (images, labels) in enumerate(alone):
        assert_close((images, labels), tuple(helped[step]), rtol=0, atol=0)
        assert_close(images, torch.cat([ranks[0][step][0], ranks[1][step][0]]), rtol=0, atol=0)


def test_an_epoch_holds_every_image_once_in_another_order():
    draws = [draw for batch in loading.Batches(7, 3, 0, 14, seed=5) for draw in batch]
    epochs = [[d.index for d in draws if d.epoch == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    later = [draw for batch in loading.Batches(7, 3, 5, 14, seed=5) for draw in batch]
    assert later == draws[15:]


def test_the_two_arms_differ_by_the_regularizer_alone(folder, tmp_path):
    # With all weights 0 it adds exactly nothing: another draw of weights, order, augmentation or
    # dropout would show.
    idle = RegularizerOptions(align_weight=0.0, pull_weight=0.0, classify_weight=0.0)
    recipe = tiny(folder, tmp_path / "idle", model="segformer-b0", steps=2, reg=idle)
    train(recipe)
    baseline = replace(recipe, mvsc=False, out=tmp_path / "baseline")
    train(baseline)
    a, b = (state_of(r.out)["model"] for r in (recipe, baseline))
    assert_close(a, b, rtol=0, atol=0)
    assert "reg" not in state_of(baseline.out)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(folder, tmp_path):
    recipe = tiny(folder, tmp_path, steps=2)
    train(recipe)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already. Continue it with --resume"):
        train(recipe)
    other = replace(recipe, resume=True, lr=0.5, reg=RegularizerOptions(groups=2))
    with pytest.raises(ValueError, match=r"lr was 0.001, is 0.5.*Resume it with its own"):
        train(other)
    assert before == {path: path.read_bytes() for path in before}


def test_a_run_that_fails_at_its_first_batch_does_not_block_the_next(folder, tmp_path):
    def failing(logits, labels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny(folder, tmp_path), failing)
    broken = tiny_data.make_folder(tmp_path / "data", train=4)
    for image in (broken / "images" / "train").iterdir():
        image.write_text("no image")
    with pytest.raises(ValueError, match="cannot be read"):
        train(tiny(broken, tmp_path))
    train(tiny(folder, tmp_path, steps=2, batch_size=2))


def test_a_run_from_before_there_was_a_setting_had_its_default(folder, tmp_path):
    recipe = tiny(folder, tmp_path)
    before = recipe.to_dict()
    del before["reg"]["grid_label"]
    training.check_same(recipe, before)
    sparse = replace(recipe, reg=RegularizerOptions(grid_label="commonest"))
    with pytest.raises(ValueError, match="'grid_label': 'centre'.*, is .*'commonest'"):
        training.check_same(sparse, before)
    model = models.build(sparse, 3).model
    assert training.regularize(model, sparse).regularizer.grid_label == "commonest"


def test_a_finished_run_that_is_resumed_has_its_scores(folder, tmp_path):
    recipe = tiny(folder, tmp_path, steps=2, resume=True)
    assert train(recipe) == train(recipe)


def test_a_truncated_image_is_named_and_everything_before_it_is_saved(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data", train=4)
    recipe = tiny(root, tmp_path / "run", batch_size=1, workers=1, crop=(64, 64))
    order = [draw.index for draws in loading.Batches(4, 1, 0, 4, recipe.seed) for draw in draws]
    broken = sorted((root / "images" / "train").iterdir())[order[2]]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=broken.name) as kept:
        train(recipe)
    # Also while the exception is kept; at exit Python would wait for them for ever.
    assert multiprocessing.active_children() == []
    assert kept.traceback
    assert state_of(recipe.out)["step"] == 2
    broken.write_bytes(whole)
    train(replace(recipe, resume=True))
    train(replace(recipe, out=tmp_path / "whole"))
    assert_same_state(recipe.out, tmp_path / "whole")


def test_a_truncated_validation_image_costs_no_step(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data", train=4)
    broken = sorted((root / "images" / "val").iterdir())[1]
    whole = broken.read_bytes()
    recipe = tiny(root, tmp_path / "run", steps=4, eval_every=3, save_every=100)
    train(replace(recipe, out=tmp_path / "whole"))
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=broken.name):
        train(recipe)
    assert state_of(recipe.out)["step"] == 3
    broken.write_bytes(whole)
    train(replace(recipe, resume=True))
    assert_same_state(recipe.out, tmp_path / "whole")
    found = [
        training.read_metrics(out / "metrics.jsonl") for out in (recipe.out, tmp_path / "whole")
    ]
    assert [line for line in found[0] if "val" in line] == [
        line for line in found[1] if "val" in line
    ]


def test_labels_without_a_labelled_pixel_are_named(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data", val=1)
    (label,) = (root / "labels" / "val").iterdir()
    with Image.open(label) as image:
        empty = Image.new("L", image.size, 255)
    empty.save(label)
    with pytest.raises(ValueError, match=r"val must have a labelled pixel, found none"):
        train(tiny(root, tmp_path / "run", steps=1))


def test_training_labels_without_a_labelled_pixel_are_told(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data")
    for label in (root / "labels" / "train").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(label)), 255)).save(label)
    with pytest.warns(UserWarning, match="last 2 steps is labelled: all labels are 255"):
        train(tiny(root, tmp_path / "run", steps=2))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # What was not measured is null, not NaN.


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(folder, tmp_path):
    calls = []

    def diverging(logits, labels):
        calls.append(None)
        return training.cross_entropy(logits, labels) * (math.nan if len(calls) > 2 else 1.0)

    with pytest.raises(ValueError, match=r"loss must be finite, got nan in step 4. Take a smaller"):
        train(tiny(folder, tmp_path), diverging)
    state = state_of(tmp_path)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_run_goes_on_with_the_images_that_it_was_begun_with(tmp_path):
    roots = [tiny_data.make_folder(tmp_path / str(n), train=n) for n in (4, 5)]
    recipe = tiny(roots[0], tmp_path / "run", steps=2, resume=True)
    train(recipe)
    with pytest.raises(ValueError, match="holds a run on other images than those of .*5, by their"):
        train(replace(recipe, data_root=roots[1]))
    roots[0].rename(tmp_path / "moved")
    train(replace(recipe, data_root=tmp_path / "moved"))


def test_what_another_version_or_tool_wrote_is_named(folder, tmp_path):
    recipe = tiny(folder, tmp_path / "run", steps=2, resume=True)
    train(recipe)
    tensors, about = weights.load_weights(recipe.out / "last.safetensors")
    path = tmp_path / "x.safetensors"
    for changed, text in (
        ({"classes": about["classes"]}, "holds no recipe or no classes. Name best"),
        (about | {"recipe": about["recipe"] | {"later": 1}}, "settings of this version, got later"),
        (about | {"classes": ["a", "b"]}, "must hold the weights of its recipe.* with 2 classes"),
    ):
        weights.save_weights(path, tensors, **changed)
        with pytest.raises(ValueError, match=text):
            evaluate.load_segmenter(path, torch.device("cpu"))
    torch.save({"epoch": 3}, recipe.out / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is no state of train\.py"):
        train(recipe)


def test_sparse_labels_are_diagnosed_as_they_are_trained(folder, tmp_path):
    sparse = RegularizerOptions(grid_label="commonest")
    train(tiny(folder, tmp_path, steps=2, reg=sparse, scale_range=(1.0, 1.0)))
    (line, _) = training.read_metrics(tmp_path / "metrics.jsonl")
    assert 0 <= line["alignment_accuracy"] <= 1


def test_a_run_without_its_state_is_not_begun_anew_over_its_weights(folder, tmp_path):
    recipe = tiny(folder, tmp_path, steps=2, resume=True)
    train(recipe)
    (tmp_path / "last.pt").unlink()
    kept = (tmp_path / "best.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds best.safetensors of a run but no last.pt"):
        train(recipe)
    assert (tmp_path / "best.safetensors").read_bytes() == kept


def test_other_classes_are_refused(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data")
    recipe = tiny(root, tmp_path / "run", steps=2)
    train(recipe)
    (root / "classes.txt").write_text("class 1\nclass 0\nclass 2\n")
    with pytest.raises(
        ValueError, match=r"on the classes class 0, .* have class 1, class 0, class"
    ):
        train(replace(recipe, steps=2, resume=True))
    settings = evaluate.Settings(recipe.out / "last.safetensors", workers=0, device="cpu")
    with pytest.raises(ValueError, match=r"classes of the weights, class 0, .*, got class 1"):
        evaluate.main(settings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be finite and not negative, got -1"),
        ({"head_lr": -1.0}, "head_lr must be finite and not negative, got -1"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and not negative, got nan"),
        ({"lr": math.inf}, "^lr must be finite"),
        ({"crop": (100, 96)}, r"multiples of 32, got \(100, 96\)"),
        ({"scale": (48, 64)}, "longer and the shorter side"),
        ({"scale_range": (0.0, 1.0)}, "scale_range must be 0 < low <= high"),
        ({"seed": 2**63}, "seed must be an integer of 64 bits, got 9223372036854775808"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        check_recipe(Recipe(data_root=Path("data"), **changes))


def test_a_batch_that_cannot_be_split_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes x accumul"):
        train(tiny(folder, tmp_path, accumulate=3))


@pytest.mark.parametrize("model", ["unet", "smp/Nothing/resnet18", "segformer-b9", "deeplabv3"])
def test_an_unknown_model_is_refused(model):
    with pytest.raises(ValueError, match="model must"):
        models.build(Recipe(data_root=Path(), model=model, pretrained=False), 3)


def test_without_a_network_the_way_out_is_told(monkeypatch):
    import transformers

    def offline(name):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.SegformerModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"nvidia/mit-b0 could not be had .*--no-pretrained"):
        models.build(Recipe(data_root=Path(), model="segformer-b0"), 3)


def test_a_run_is_resumed_without_a_network(folder, tmp_path, monkeypatch):
    import transformers

    stored = transformers.SegformerModel(
        transformers.SegformerConfig(hidden_sizes=models.MIT["b0"][0])
    )
    monkeypatch.setattr(transformers.SegformerModel, "from_pretrained", lambda name: stored)
    recipe = tiny(folder, tmp_path, model="segformer-b0", pretrained=True, steps=2, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, interrupting(1))
    monkeypatch.setattr(
        transformers.SegformerModel, "from_pretrained", lambda name: pytest.fail("asked the hub")
    )
    train(recipe)


def test_pretrained_weights_of_segformer_land_in_the_encoder(monkeypatch):
    import transformers

    config = transformers.SegformerConfig(hidden_sizes=models.MIT["b0"][0])
    stored = transformers.SegformerModel(config)
    monkeypatch.setattr(transformers.SegformerModel, "from_pretrained", lambda name: stored)
    built = models.build(Recipe(data_root=Path(), model="segformer-b0"), 3)
    assert_close(built.encoder.state_dict(), stored.state_dict(), rtol=0, atol=0)


def test_the_head_learns_faster_and_norm_layers_do_not_decay():
    recipe = Recipe(data_root=Path(), model="segformer-b0", pretrained=False)
    segmenter = models.build(recipe, 3)
    groups = models.parameter_groups(segmenter, recipe)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(segmenter.model.parameters()))
    head, encoder = segmenter.model.decode_head, segmenter.encoder
    norm = next(m for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm))
    for parameter, lr, decay in [
        (head.classifier.weight, 6e-4, 0.01),
        (head.batch_norm.bias, 6e-4, 0.0),
        (norm.weight, 6e-5, 0.0),
    ]:
        group = of[id(parameter)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((lr, decay))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_on_a_data_set_in_its_layout(name, tmp_path):
    layout = RECIPES[name][1].layout
    root = tiny_data.MAKERS[layout][1](tmp_path / "data")
    small = "--steps 2 --batch-size 2 --crop 32 32 --scale 64 48 --workers 0 --cpu --no-pretrained"
    arguments = [name, "--data-root", str(root), "--out", str(tmp_path / "run"), *small.split()]
    recipe = tyro.extras.overridable_config_cli(RECIPES, args=arguments)
    assert (recipe.name, recipe.layout) == (name, layout)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    # The architecture's own size is tried by hand; here its smallest sibling stands for it.
    recipe = replace(recipe, model=recipe.model.replace("b4", "b0"), decoder_dim=16)
    if recipe.model.startswith("deeplabv3"):
        built = models.build(recipe, 171)
        output = built.model(torch.zeros(2, 3, 64, 64))
        logits, aux = models.logits_of(output, (64, 64))
        assert logits.shape == aux.shape == (2, 171, 64, 64)
        return
    scores = train(recipe)
    assert len(scores["iou"]) == len(open_split(layout, root, "val").classes)


def test_bf16_trains(folder, tmp_path):
    train(tiny(folder, tmp_path, steps=2, precision="bf16"))
    assert state_of(tmp_path)["reg"]["regularizer.centroids"].dtype == torch.float32


def test_the_exported_weights_load_where_mvsc_is_not_installed(folder, tmp_path):
    train(tiny(folder, tmp_path, steps=2))
    code = """
import sys
import time
sys.modules["mvsc"] = None  # importing it fails
import segmentation_models_pytorch as smp
from safetensors.torch import load_file
model = smp.Segformer("tu-test_resnet", encoder_weights=None, decoder_segmentation_channels=16,
                      classes=3)
model.load_state_dict(load_file(sys.argv[1]))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "best.safetensors"], check=True)


def test_evaluation_repeats_the_scores_of_the_run(folder, tmp_path, capsys):
    scores = train(tiny(folder, tmp_path))
    device = torch.device("cpu")
    segmenter, recipe, classes = evaluate.load_segmenter(tmp_path / "last.safetensors", device)
    data = open_split("folder", folder, "val")
    assert evaluate.evaluate(segmenter, data, recipe, device) == scores
    settings = evaluate.Settings(tmp_path / "last.safetensors", workers=0, device="cpu")
    evaluate.main(settings)
    assert f"mIoU {scores['mIoU']:.2f}" in capsys.readouterr().out
    assert list(classes) == list(data.classes)


def test_a_window_larger_than_the_image_is_the_whole_image(folder, tmp_path):
    recipe = tiny(folder, tmp_path)
    segmenter = models.build(recipe, 3)
    segmenter.model.eval()
    image, label = open_split("folder", folder, "val")[0]
    size = tuple(label.shape)
    whole = evaluate.logits_at(segmenter, image, size, recipe.scale)
    window = evaluate.logits_at(segmenter, image, size, recipe.scale, window=96)
    assert_close(window, whole, rtol=0, atol=0)
    slid = evaluate.logits_at(segmenter, image, size, recipe.scale, window=32, stride=16)
    assert slid.shape == whole.shape
    assert not torch.equal(slid, whole)


@pytest.mark.parametrize(
    ("window", "stride", "text"),
    [
        (0, None, "window must be at least 1, got 0"),
        (32, 33, "stride must be in 1 .. window, which is 32, got 33"),
        (32, 0, "got 0"),
        (None, 20, "got 20"),
    ],
)
def test_windows_that_leave_pixels_out_are_refused(window, stride, text):
    with pytest.raises(ValueError, match=text):
        evaluate.check_window(window, stride)


def test_windows_cover_every_pixel_and_stay_inside():
    for length, window, stride in [(64, 32, 16), (65, 32, 20), (30, 32, 21), (32, 32, 5)]:
        starts = evaluate._starts(length, window, stride)
        seen = {p for s in starts for p in range(s, min(s + window, length))}
        assert seen == set(range(length))
        assert starts[-1] == max(length - window, 0)


def test_scores_are_those_of_a_matrix_worked_by_hand():
    # Class 2 is neither labelled nor predicted, class 3 predicted only.
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = evaluate.scores(confusion)
    iou = [100 * 6 / 9, 100 * 3 / 7, None, 0.0]
    assert found["iou"] == pytest.approx(iou)
    assert found["mIoU"] == pytest.approx(sum(v for v in iou if v is not None) / 3)
    assert found["mAcc"] == pytest.approx(100 * (6 / 8 + 3 / 5) / 2)
    assert found["aAcc"] == pytest.approx(100 * 9 / 13)


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.safetensors is missing"):
        weights.load_weights(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"is a folder. Name .* runs/NAME/best.safetensors"):
        weights.load_weights(tmp_path)
    (tmp_path / "bad.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"bad.safetensors must be a .safetensors file"):
        weights.load_weights(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("model", ["smp/FPN/tu-nope", "smp/Nope/tu-test_resnet"])
def test_a_model_that_the_library_does_not_know_is_named(folder, tmp_path, model):
    with pytest.raises(ValueError, match=rf"model must name.*decoder_dim=32, got '{model}'"):
        models.build(tiny(folder, tmp_path, model=model, decoder_dim=32), 3)


@pytest.mark.parametrize(
    ("model", "crop", "size"),
    [
        ("smp/PAN/tu-test_resnet", 32, "32 x 32"),
        ("smp/DPT/tu-vit_tiny_patch16_224", 224, "256 x 288"),
    ],
)
def test_a_model_that_takes_images_of_one_size_is_named(folder, tmp_path, model, crop, size):
    with pytest.raises(ValueError, match=rf"model must .*, got {model}, which fails at {size}"):
        train(tiny(folder, tmp_path, model=model, crop=(crop, crop)))


@pytest.mark.parametrize("pools", [True, False])
def test_a_model_that_normalises_pooled_images_needs_two_at_a_time(folder, tmp_path, pools):
    model = f"smp/{'DeepLabV3Plus' if pools else 'FPN'}/tu-test_resnet"
    sizes = {"scale": (96, 72), "crop": (64, 64), "batch_size": 2, "accumulate": 2}
    recipe = tiny(folder, tmp_path, model=model, decoder_dim=32, steps=1, **sizes)
    if not pools:
        train(recipe)
        return
    with pytest.raises(ValueError, match=r"at least 2 x processes x accum.*got 1 image at a time"):
        train(recipe)


def test_float16_on_a_cpu_is_refused_and_not_silently_float32(folder, tmp_path):
    with pytest.raises(ValueError, match="precision must be no or bf16 on a CPU, got fp16"):
        train(tiny(folder, tmp_path, precision="fp16"))


def test_a_device_that_is_not_there_is_named():
    assert evaluate.pick_device("cpu") == torch.device("cpu")
    missing = ["foo", "meta", *([] if torch.cuda.is_available() else ["cuda"])]
    for name in missing:
        with pytest.raises(ValueError, match=f"device must be one of this machine, got '{name}'"):
            evaluate.pick_device(name)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(partial):
        partial.write_text("ne")
        raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save says it

    with pytest.raises(OSError, match=rf"{path} cannot be written: unexpected pos.*disk full"):
        weights.write_whole(path, write)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_crops_hold_what_the_label_says(folder, tmp_path):
    """Colour and class must move together through scale, crop and flip."""
    from torchvision import tv_tensors

    label = torch.zeros(48, 64, dtype=torch.uint8)
    label[:, 20:40], label[30:] = 1, 2
    shades = torch.tensor([0, 120, 240], dtype=torch.uint8)
    image = tv_tensors.Image(shades[label.long()].expand(3, -1, -1).clone())
    recipe = tiny(folder, tmp_path, cat_max_ratio=1.0, crop=(64, 64))
    augmented = loading.Augmented([(image, tv_tensors.Mask(label))], recipe, (0.5, 0.5, 0.5))
    loading_photometric, loading.PHOTOMETRIC = loading.PHOTOMETRIC, lambda image: image
    try:
        for epoch in range(20):
            pixels, classes = augmented[loading.Draw(epoch, 0)]
            assert pixels.shape == (3, 64, 64)
            known = classes != 255
            assert (pixels[:, ~known] == 128).all()
            # Pixels on a border are blended.
            right = (pixels[0][known].int() - shades[classes[known].long()].int()).abs() < 60
            assert right.float().mean() > 0.9
    finally:
        loading.PHOTOMETRIC = loading_photometric


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path):
    # Twenty kills are a script of their own; two here, one of them while a file is written.
    kill_and_resume.kill_and_resume(tmp_path, 2, random.Random(1))


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d "
    "--rdzv-endpoint 127.0.0.1:0",
    "torchrun, two nodes": "torch.distributed.run --nnodes 2 --nproc-per-node 1 "
    "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port}",
    # On CPUs it starts several processes through MPI only.
    "accelerate launch": "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no",
}


def in_two_processes(script, *arguments, **environment):
    """Run a script under torchrun, with the recipes' modules."""
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"].split(), script, *arguments]
    paths = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", **environment}
    subprocess.run([str(part) for part in command], check=True, timeout=300, env=env)


TWO_PROCESSES = """
import json
import sys
import time
from pathlib import Path
import torch
import train as training
from recipes import Recipe

recipe, kept = Recipe.from_dict(json.loads(sys.argv[1])), []
start = training.Run.start

def start_late(run):
    # The second process must not take what the first has begun for an older run.
    time.sleep(run.accelerator.process_index)
    return start(run)

training.Run.start = start_late

def regularize(model, recipe):
    kept.extend([model, training.regularize(model, recipe)])
    return kept[1]

training.train(recipe, regularize=regularize)
rank = torch.distributed.get_rank()
states = [part.state_dict() for part in kept]
torch.save(states, Path(sys.argv[2]) / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_and_end_with_the_same_parameters(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    recipe = tiny(folder, tmp_path / "run", accumulate=2, crop=(64, 64))
    in_two_processes(script, json.dumps(recipe.to_dict()), tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first[0], state_of(tmp_path / "run")["model"], rtol=0, atol=0)
    steps = [line["step"] for line in training.read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [2, 4, 4, 6, 6]


UNDER_AN_ENGINE = """
import json
import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

kind = sys.argv[2]
if kind != "MULTI_CPU":  # over gloo; Accelerate looks for a device
    found = "MULTI_GPU" if kind == "FSDP" else "MULTI_CPU"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType(found))

import train as training
from recipes import Recipe

recipe = json.loads(sys.argv[1])
training.train(Recipe.from_dict(recipe))
assert training.Accelerator().distributed_type == kind
if kind != "MULTI_CPU":
    recipe |= {"out": recipe["out"] + "-stopped"}
    calls = []

    def stopping(logits, labels):
        calls.append(None)
        if len(calls) == 6:  # after the state of step 4
            raise KeyboardInterrupt
        return training.cross_entropy(logits, labels)

    try:
        training.train(Recipe.from_dict(recipe), stopping)
    except KeyboardInterrupt:
        training.train(Recipe.from_dict(recipe | {"resume": True}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["fsdp2.yaml", "zero2.yaml"])
def test_a_recipe_under_an_engine_is_that_of_ddp_and_resumes_exactly(file, tmp_path):
    config = yaml.safe_load((SCRIPTS / file).read_text())
    engine, shipped = config["distributed_type"], {"ACCELERATE_TORCH_DEVICE": "cpu"}
    if engine == "DEEPSPEED":
        pytest.importorskip("deepspeed")
        of_engine = config["deepspeed_config"]
        shipped |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(of_engine["zero_stage"]),
            "ACCELERATE_GRADIENT_CLIPPING": str(of_engine["gradient_clipping"]),
            "DS_ACCELERATOR": "cpu",
            "DS_BUILD_OPS": "0",
        }
    else:
        if torch.__version__ < "2.7":
            pytest.skip("torch 2.6 shards on devices only")
        shipped |= {key.upper(): str(value).lower() for key, value in config["fsdp_config"].items()}
        # As shipped, but for shards inside of the model, too: these are gathered in each forward.
        shipped["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
        shipped["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "MLP"
        shipped["ACCELERATE_USE_FSDP"] = "true"
    # Three images to validate: the processes do not call the model equally often.
    folder = tiny_data.make_folder(tmp_path / "data", train=5, val=3)
    script = tmp_path / "script.py"
    script.write_text(UNDER_AN_ENGINE)
    for name, kind, environment in (("ddp", "MULTI_CPU", {}), ("engine", engine, shipped)):
        recipe = tiny(folder, tmp_path / name, crop=(64, 64), cpu=name == "ddp")
        in_two_processes(script, json.dumps(recipe.to_dict()), kind, **environment)
    files = ("last.safetensors", "best.safetensors", "last.centroids.safetensors")
    for file in files:
        sharded, about = weights.load_weights(tmp_path / "engine" / file)
        again, _ = weights.load_weights(tmp_path / "engine-stopped" / file)
        assert about["step"] == 6 or file.startswith("best")
        assert_close(again, sharded, rtol=0, atol=0)
    for file in files[::2]:
        expected, _ = weights.load_weights(tmp_path / "ddp" / file)
        sharded, _ = weights.load_weights(tmp_path / "engine" / file)
        own = "optimizer" if "centroids" in file else "none"  # the centroids' moments
        sharded = {name: value for name, value in sharded.items() if own not in name}
        assert_close(sharded, expected, rtol=0, atol=1e-5)
    scores = [
        json.loads((tmp_path / name / "scores.json").read_text())["mIoU"]
        for name in ("ddp", "engine", "engine-stopped")
    ]
    assert_close(scores, 3 * scores[:1], rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("stage", "options", "told"),
    [
        (None, {}, "got FSDP1. Use accelerate launch --config_file"),
        (3, {}, "must be at most 2, got 3,"),
        (2, {"precision": "fp16"}, "no or bf16 under DeepSpeed, got fp16"),
        (2, {"batch_size": 3, "accumulate": 2}, "processes x accumulate, 1 x 2, got 3"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(
    stage, options, told, folder, tmp_path, monkeypatch
):
    class Accelerator:
        num_processes, is_fsdp2 = 1, False
        distributed_type = parallel.DistributedType("FSDP" if stage is None else "DEEPSPEED")
        state = SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(
                deepspeed_config={"zero_optimization": {"stage": stage}}
            )
        )

    monkeypatch.setattr(parallel, "Accelerator", lambda **_: Accelerator)
    with pytest.raises(ValueError, match=re.escape(told)):
        train(tiny(folder, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_state_of_deepspeed_is_not_taken_for_a_whole_one(folder, tmp_path):
    recipe = tiny(folder, tmp_path / "run", steps=2)
    train(recipe)
    state = state_of(tmp_path / "run")
    weights.save_state(tmp_path / "run" / "last.pt", {**state, "files": 8})
    told = "DeepSpeed in 8 processes, this is one of DDP or FSDP2. Go on with that"
    with pytest.raises(ValueError, match=told):
        train(replace(recipe, resume=True))


@pytest.mark.slow
def test_a_job_of_ray_goes_on_when_a_worker_died_and_ends_as_one_under_torchrun(folder, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")  # Ray Train needs it, and "ray" alone does not bring it.
    import psutil

    recipe = "folder-segformer-lite0 --steps 12 --batch-size 4 --crop 64 64 --scale 64 48 --cpu "
    recipe += f"--workers 0 --no-pretrained --save-every 2 --data-root {folder}"
    paths = os.pathsep.join([str(SCRIPTS.parents[1]), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"}
    command = f"{sys.executable} -m {LAUNCHERS['torchrun']} {SCRIPTS / 'train.py'} {recipe}"
    command += f" --out {tmp_path / 'torchrun'}"
    subprocess.run(command.split(), check=True, env=env)
    script = f"{sys.executable} {SCRIPTS / 'ray_train.py'} {recipe.replace('--', '--recipe.')}"
    command = f"{script} --recipe.out {tmp_path / 'ray'} --processes 2"
    with subprocess.Popen(command.split(), env=env, stdout=subprocess.PIPE, text=True) as job:
        until = time.monotonic() + 200
        while not (tmp_path / "ray" / "last.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        workers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        ]
        workers[0].kill()
        printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0
    assert "mIoU" in printed
    for file in ("last.safetensors", "last.centroids.safetensors"):
        expected, _ = weights.load_weights(tmp_path / "torchrun" / file)
        found, about = weights.load_weights(tmp_path / "ray" / file)
        assert about["step"] == 12
        assert_close(found, expected, rtol=0, atol=0)


def test_predictions_are_masks_of_the_images_size_and_overlays(folder, tmp_path, capsys):
    train(tiny(folder, tmp_path / "run", steps=2))
    settings = predict.Settings(
        tmp_path / "run" / "best.safetensors",
        (folder / "images" / "val", next((folder / "images" / "train").iterdir())),
        out=tmp_path / "out",
        device="cpu",
    )
    predict.main(settings)
    for path in predict.find_images(settings.images):
        with Image.open(path) as image, Image.open(tmp_path / "out" / f"{path.stem}_mask.png") as m:
            assert (m.size, m.mode) == (image.size, "P")
            assert set(np.unique(np.array(m))) <= {0, 1, 2}
        with Image.open(tmp_path / "out" / f"{path.stem}_overlay.jpg") as overlay:
            assert overlay.mode == "RGB"
    assert "wrote 3 masks" in capsys.readouterr().out


def test_an_overlay_that_no_jpeg_holds_is_a_png(folder, tmp_path):
    train(tiny(folder, tmp_path / "run", steps=1))
    path = tmp_path / "wide.png"
    Image.new("RGB", (65_501, 1)).save(path)
    weights_of = tmp_path / "run" / "best.safetensors"
    predict.main(predict.Settings(weights_of, (path,), out=tmp_path / "out", device="cpu"))
    with Image.open(tmp_path / "out" / "wide_overlay.png") as overlay:
        assert overlay.size == (65_501, 1)


def test_a_broken_image_does_not_keep_the_others_from_being_predicted(folder, tmp_path, capsys):
    train(tiny(folder, tmp_path / "run", steps=1))
    (tmp_path / "broken.jpg").write_text("no image")
    images = (tmp_path / "broken.jpg", *sorted((folder / "images" / "val").iterdir()))
    path = tmp_path / "run" / "best.safetensors"
    settings = predict.Settings(path, images, out=tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read: it is no image"):
        predict.main(settings)
    assert {p.stem for p in (tmp_path / "out").glob("*_mask.png")} == {
        f"{image.stem}_mask" for image in images[1:]
    }
    assert "wrote 2 masks" in capsys.readouterr().out


def test_what_cannot_be_predicted_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.jpg is missing"):
        predict.find_images((tmp_path / "none.jpg",))
    with pytest.raises(ValueError, match="images must name at least one image"):
        predict.find_images((tmp_path,))
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="more than one a"):
        predict.find_images((tmp_path,))
    (tmp_path / "a.png").unlink()
    (tmp_path / "._a.png").touch()
    (tmp_path / "b.jpg").mkdir()
    assert predict.find_images((tmp_path,)) == [tmp_path / "a.jpg"]
    for images in (tmp_path, tmp_path / "a.jpg"):
        with pytest.raises(ValueError, match="out must not be the folder of the images"):
            predict.main(predict.Settings(tmp_path / "none", (images,), out=tmp_path))


@pytest.mark.parametrize("mvsc", [True, False])
def test_a_report_shows_every_picture_and_needs_no_other_file(folder, tmp_path, mvsc, capsys):
    train(tiny(folder, tmp_path / "run", steps=2, mvsc=mvsc))
    # Weights whose prior was shifted have the centroids that they were trained with.
    weights_file = tmp_path / "run" / "last.shifted.safetensors"
    (tmp_path / "run" / "last.safetensors").rename(weights_file)
    visualize.main(visualize.Settings(weights_file, count=2, device="cpu"))
    said = "No heat maps, since .*last.centroids.safetensors is not there"
    assert bool(re.search(said, capsys.readouterr().out)) != mvsc
    report = tmp_path / "run" / "report"
    stems = sorted(path.stem for path in (folder / "images" / "val").iterdir())
    kinds = ["heatmaps", "prediction"] if mvsc else ["prediction"]
    expected = {f"{stem}_{kind}.png" for stem in stems[:2] for kind in kinds} | {"training.png"}
    expected |= {"centroid_similarity.png"} if mvsc else set()
    assert {path.name for path in report.glob("*.png")} == expected
    text = (report / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(expected)
    assert "http" not in text
    photo = folder / "images" / "train"
    visualize.main(visualize.Settings(weights_file, (photo,), out=tmp_path / "own", device="cpu"))
    assert len(list((tmp_path / "own").glob("*_prediction.png"))) == 5


def test_an_ablation_keeps_its_cells_and_names_the_papers_numbers(folder, tmp_path, capsys):
    recipe = tiny(folder, None, steps=1)
    settings = ablate.Settings(recipe, table="groups", seeds=(0, 1), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stop_after(ablate, cells=3, settings=settings)
    report = ablate.report(settings, ablate.TABLES["groups"])
    assert "| MVSC | not run | not run | 0 | 32.6 / 44.0 |" in report
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("scores.json")}
    assert len(kept) == 3
    ablate.main(settings)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(list(tmp_path.rglob("scores.json"))) == 10
    printed = capsys.readouterr().out
    assert "paper (ADE20K, MiT-B0, one run)" in printed
    assert "±" in printed
    scores = json.loads((tmp_path / "g8" / "seed1" / "scores.json").read_text())
    state = weights.load_state(tmp_path / "g8" / "seed1" / "last.pt")
    assert scores["mIoU"] == state["scores"]["mIoU"]
    assert state["reg"]["regularizer.centroids"].shape == (8, 3, 16)
    path = tmp_path / "g8" / "seed1" / "scores.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"scores.json must be the scores .* Remove it: the same"):
        ablate.main(replace(settings, report=True))
    path.unlink()
    ablate.main(settings)
    assert json.loads(path.read_text())["mIoU"] == scores["mIoU"]
    other = replace(settings, recipe=replace(recipe, lr=0.5), report=True)
    with pytest.raises(ValueError, match=r"other settings: lr was 0.001, is 0.5"):
        ablate.main(other)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("out", Path("x"), "Use --out"), ("seed", 3, "Use --seeds"), ("mvsc", False, "baseline")],
)
def test_an_ablation_refuses_what_each_of_its_cells_is_given(folder, tmp_path, name, value, remedy):
    recipe = replace(tiny(folder, None), **{name: value})
    with pytest.raises(ValueError, match=rf"recipe.{name} must be left to each .*{remedy}"):
        ablate.main(ablate.Settings(recipe, out=tmp_path))
    assert not [*tmp_path.iterdir()]


def stop_after(module, cells, settings):
    """Run an ablation that is interrupted after some cells."""
    done, original = [], module.train

    def train(recipe):
        if len(done) == cells:
            raise KeyboardInterrupt
        done.append(original(recipe))

    module.train = train
    try:
        module.main(settings)
    finally:
        module.train = original


def press_ctrl_c(command, metrics, lines):
    """Run a command until its file has so many lines, interrupt it, and return what it says."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    while len(training.read_metrics(metrics)) < lines:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    return errors


@pytest.mark.slow
def test_ctrl_c_on_the_whole_process_group_finishes_the_step_and_saves(folder, tmp_path):
    shape = "--steps 2000 --batch-size 2 --crop 32 32 --scale 64 48 --workers 2 --cpu"
    saving = "--no-pretrained --log-every 1 --save-every 5000 --eval-every 5000 --resume"
    command = [sys.executable, SCRIPTS / "train.py", "folder-segformer-lite0", *shape.split()]
    command += [*saving.split(), "--data-root", folder, "--out", tmp_path]
    errors = press_ctrl_c(command, tmp_path / "metrics.jsonl", 3)
    assert f"Stopped and saved in {tmp_path}; go on with --resume." in errors
    steps = [line["step"] for line in training.read_metrics(tmp_path / "metrics.jsonl")]
    assert state_of(tmp_path)["step"] == steps[-1] >= 3


SMALL = "--steps 1 --batch-size 2 --crop 32 32 --scale 64 48 --workers 0 --cpu --no-pretrained"


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process, which has its imports; its status, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return SimpleNamespace(status=done.value.code, **capsys.readouterr()._asdict())

    return run


def assert_one_line(run, expected):
    assert run.status == 1, run.err
    lines = [line for line in run.err.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in run.err
    assert re.search(expected, lines[-1]), run.err


def test_what_is_wrong_with_data_or_disk_is_one_line(script, folder, tmp_path):
    broken = tiny_data.make_folder(tmp_path / "broken")
    (broken / "classes.txt").write_bytes("cl\u00e9\n".encode("latin-1"))
    train_it = ["folder-segformer-lite0", *SMALL.split(), "--data-root"]
    run = script("train.py", *train_it, broken, "--out", tmp_path / "run")
    assert_one_line(run, r"classes\.txt must be text in UTF-8")
    (tmp_path / "file").touch()
    run = script("train.py", *train_it, folder, "--out", tmp_path / "file" / "run")
    assert_one_line(run, r"out must be a folder, got .*file/run, but .*file is a file")
    run = script("evaluate.py", broken / "classes.txt")
    assert_one_line(run, r"must be a \.safetensors file that train\.py wrote")
    run = script("prepare_data.py", "folder", "--data-root", tmp_path / "none", "--check")
    assert run.status == 1
    assert run.out.splitlines()[-1] == "2 problems"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as done:
        commands.run(
            lambda: weights.write_whole(tmp_path / "file", lambda path: path.write_text("a"))
        )
    assert done.value.code == 1
    assert f"{tmp_path / 'file'} cannot be written: No space left on dev" in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_state_is_named(folder, tmp_path, kept):
    recipe = tiny(folder, tmp_path, steps=2, resume=True)
    train(recipe)
    state = tmp_path / "last.pt"
    state.write_bytes(state.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{state} must be a state that train\.py wrote, but"):
        train(recipe)


def test_pictures_of_other_classes_are_refused(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data")
    recipe = tiny(root, tmp_path / "run", steps=2)
    train(recipe)
    (root / "classes.txt").write_text("class 1\nclass 0\nclass 2\n")
    settings = visualize.Settings(recipe.out / "last.safetensors", device="cpu")
    with pytest.raises(ValueError, match=r"classes of the weights, class 0, .*, got class 1"):
        visualize.main(settings)


def test_a_validation_of_a_single_class_warns_of_masks_of_0_and_255(tmp_path):
    root = tiny_data.make_folder(tmp_path / "data", classes=2)
    for path in root.glob("labels/*/*.png"):
        with Image.open(path) as image:
            numbers = np.array(image)
        Image.fromarray(np.where(numbers == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.warns(UserWarning, match="show a single class; .* Masks of 0 and 255 must have"):
        train(tiny(root, tmp_path / "run", steps=1))


def test_a_prediction_lies_as_its_image_is_shown(folder, tmp_path):
    train(tiny(folder, tmp_path / "run", steps=2))
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # taken upright: stored on its side
    with Image.open(next((folder / "images" / "val").iterdir())) as image:
        image.save(photo, exif=exif)
        width, height = image.size
    weights_file = tmp_path / "run" / "last.safetensors"
    predict.main(predict.Settings(weights_file, (photo,), out=tmp_path / "out", device="cpu"))
    for name in ("photo_mask.png", "photo_overlay.jpg"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (height, width)
            assert picture.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "name",
    ["train", "evaluate", "predict", "visualize", "ablate", "operating_point", "prepare_data"],
)
@pytest.mark.slow
def test_every_script_runs_from_any_folder(name, tmp_path):
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_recipe_is_trained_by_the_launchers_of_the_docs(folder, tmp_path, name):
    out = tmp_path / "run"
    launchers = [LAUNCHERS[name]]
    if "nnodes" in LAUNCHERS[name]:  # as on two machines, which meet at one address
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launchers = 2 * [launchers[0].format(port=free.getsockname()[1])]
    recipe = ["folder-segformer-lite0", *SMALL.split(), "--batch-size", 4, "--crop", 64, 64]
    recipe += ["--data-root", folder, "--out", out]
    nodes = []
    for launcher in launchers:
        command = [sys.executable, "-m", *launcher.split(), SCRIPTS / "train.py", *recipe]
        nodes.append(subprocess.Popen([str(part) for part in command]))
    assert [node.wait(timeout=300) for node in nodes] == [0] * len(nodes)
    assert {"best.safetensors", "last.pt", "scores.json"} <= {path.name for path in out.iterdir()}
