"""The study of the effect: its arms train, its cells are kept, its tables are right."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import mvsc
import tiny_data

pytest.importorskip("pytorch_metric_learning")
ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "effect"
for each in (ROOT / "examples" / "recipes", ROOT / "benchmarks", STUDY):
    sys.path.insert(0, str(each))

arms = importlib.import_module("arms")
report = importlib.import_module("report")
study = importlib.import_module("study")
from data import open_split  # noqa: E402
from models import build  # noqa: E402
from recipes import Recipe  # noqa: E402
from test_recipes import press_ctrl_c  # noqa: E402
from train import losses, read_metrics  # noqa: E402
from weights import load_state  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_data.make_folder(tmp_path_factory.mktemp("data") / "folder", train=5)


@pytest.fixture(scope="module")
def batch(folder):
    image, label = open_split("folder", folder, "train")[0]
    images, labels = (each[..., :32, :32] for each in (image, label))
    return torch.stack([images, images.flip(2)]) / 255, torch.stack([labels, labels.flip(1)]).long()


@pytest.mark.parametrize("name", [*arms.ARMS, "lovasz@4+mvsc@4", "dice+class-means@0.2"])
def test_every_arm_has_a_finite_loss_that_reaches_the_encoder(name, folder, batch):
    data = open_split("folder", folder, "train")
    model = "smp/Segformer/tu-test_resnet"
    recipe = Recipe(data_root=folder, model=model, decoder_dim=16, pretrained=False)
    recipe, criterion, attach = arms.ingredients(arms.find(name), recipe, data)
    torch.manual_seed(0)
    segmenter = build(recipe, len(data.classes))
    before = torch.get_rng_state()
    reg = attach(segmenter.model, recipe)
    assert torch.equal(torch.get_rng_state(), before)
    found = losses(segmenter.model, reg, criterion, *batch)
    plain = torch.nn.functional.cross_entropy(segmenter.model(batch[0]), batch[1], ignore_index=255)
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in segmenter.model.parameters())
    assert (name == "ce") == torch.isclose(found["loss"], plain, rtol=1e-6).item()


def test_a_strength_follows_the_name():
    assert arms.find("dice@0.25").strength == 0.25
    assert arms.find("dice").strength == 0.5
    with pytest.raises(ValueError, match="arms must be among ce, mvsc"):
        arms.find("nothing")
    for wrong in ("mvsc+lovasz", "lovasz+dice", "lovasz+ce"):
        with pytest.raises(ValueError, match="must be a loss and what is attached"):
            arms.find(wrong)


def test_a_strength_multiplies_what_it_should(folder):
    data = open_split("folder", folder, "train")

    def weights(name):
        reg = arms.ingredients(arms.find(name), Recipe(data_root=folder), data)[0].reg
        return reg.align_weight, reg.pull_weight, reg.classify_weight

    assert weights("mvsc@4") == (0.4, 1.0, 0.2)
    assert weights("without-eq2@2") == (0.0, 1.0, 0.1)
    assert weights("balanced@0.25+mvsc") == weights("mvsc") == (0.1, 1.0, 0.05)
    assert weights("balanced@0.25+mvsc@4") == weights("mvsc@4")


def test_both_parts_of_a_pair_keep_their_strengths(folder, batch):
    data = open_split("folder", folder, "train")
    logits = torch.randn(2, 3, *batch[1].shape[1:])

    def loss(name):
        return arms.ingredients(arms.find(name), Recipe(data_root=folder), data)[1](
            logits, batch[1]
        )

    assert loss("lovasz@4+mvsc@2") == loss("lovasz@4") != loss("lovasz@2")


def test_balanced_weights_are_the_inverse_root_of_the_frequency(folder):
    data = open_split("folder", folder, "train")
    labels = torch.cat([data[i][1].flatten() for i in range(len(data))]).long()
    pixels = torch.bincount(labels[labels != 255], minlength=3).double()
    weight = pixels.rsqrt() * pixels.sum() / pixels.sqrt().sum()
    criterion = arms.balanced(0.5, data)
    logits = torch.zeros(1, 3, 1, 1)
    for label in range(3):
        loss = criterion(logits, torch.full((1, 1, 1), label)).double()
        torch.testing.assert_close(loss, weight[label] * torch.log(torch.tensor(3.0).double()))


def test_class_means_are_classified_as_by_hand():
    features = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 2.0]])[None, :, None]  # means (2,0), (0,2)
    classifier = torch.nn.Conv2d(2, 2, 1, bias=False)
    torch.nn.init.eye_(classifier.weight.data[:, :, 0, 0])
    rival = arms.ClassMeans(2, 2, 1.0)
    loss = rival.terms(features, torch.tensor([[[0, 0, 1]]]), classifier).rival
    torch.testing.assert_close(loss, torch.log1p(torch.tensor(-2.0).exp()))


def draw(reg):
    torch.manual_seed(0)
    classifier = torch.nn.Conv2d(reg.dim, reg.num_classes, 3)
    features = torch.randn(8, reg.dim, 6, 5, requires_grad=True)
    labels = torch.randint(0, reg.num_classes, (8, 12, 10))
    labels[labels == 1] = 255
    return features, labels, classifier


@pytest.mark.parametrize("align_to", ["global", "group"])
def test_a_variant_that_changes_nothing_is_the_library(align_to):
    options = {"num_classes": 4, "dim": 6, "seed": 3, "align_to": align_to}
    found = []
    for kind in (mvsc.MVSCRegularizer, arms.Variant):
        reg = kind(**options)
        batch = draw(reg)
        for _ in range(2):
            terms = reg.terms(*batch)
        reg.total(terms).backward()
        found.append([*terms, batch[0].grad, reg.centroids.grad, batch[2].weight.grad, reg.step])
    for ours, library in zip(*found, strict=True):
        torch.testing.assert_close(ours, library)


def test_a_cell_counts_as_its_pixels_do():
    reg = arms.ByCount(num_classes=3, dim=2, groups=1)
    counts = torch.tensor([[3.0, 1.0, 0.0]])
    vectors = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [9.0, 0.0, 0.0]]])
    loss = reg.classify(vectors, counts, lambda v: v)
    e = torch.tensor([2.0, 1.0]).exp()
    by_hand = (3 * ((e[0] + 2) / e[0]).log() + (e[1] + 2).log()) / 4
    torch.testing.assert_close(loss, by_hand)


def test_absent_classes_are_classified_too():
    reg = arms.AllClasses(num_classes=2, dim=2, groups=1)
    vectors = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])
    loss = reg.classify(vectors, torch.tensor([[5, 0]]), lambda v: v)
    by_hand = (torch.log1p(torch.tensor(-2.0).exp()) + torch.log1p(torch.tensor(3.0).exp())) / 2
    torch.testing.assert_close(loss, by_hand)


def test_groups_that_are_apart_cost_nothing():
    reg = arms.Apart(num_classes=1, dim=3, groups=3)
    with torch.no_grad():
        reg.centroids.copy_(torch.tensor([2.0, 3.0, 0.5])[:, None, None] * torch.eye(3)[:, None])
        assert reg.pull() == 0
        reg.centroids[2] = reg.centroids[1]  # one pair of three is one
        torch.testing.assert_close(reg.pull(), torch.tensor(1.0))


def test_weights_fade_to_nothing():
    reg = arms.Fading(num_classes=3, dim=2, groups=2)
    reg.steps = 4
    terms = mvsc.MVSCTerms(*torch.tensor([1.0, 2.0, 3.0]))
    whole = mvsc.MVSCRegularizer(3, 2, 2).total(terms)
    for step, share in ((0, 1.0), (1, 0.75), (4, 0.0), (5, 0.0)):
        reg.step.fill_(step)
        torch.testing.assert_close(reg.total(terms), whole * share)


def test_slow_centroids_have_a_tenth_of_the_rate():
    group = arms.Slow(num_classes=3, dim=2, groups=2).param_group(lr=0.5)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.05, 0.0, 1)


def test_the_memory_is_the_first_mean_and_then_follows():
    reg = arms.Memory(num_classes=2, dim=1, groups=2)
    means = torch.tensor([[[4.0], [7.0]], [[1.0], [0.0]]], requires_grad=True)
    enhanced = reg.enhanced(means, torch.tensor([[1, 0], [2, 0]]))
    assert reg.memory.flatten().tolist() == [2.0, 0.0]
    assert enhanced.flatten().tolist() == [2.0, 0.0, 2.0, 0.0]
    enhanced.sum().backward()
    assert means.grad.flatten().tolist() == [1.0] * 4
    reg.enhanced(means * 0 + 7, torch.tensor([[0, 3], [1, 0]]))
    assert reg.memory.flatten().tolist() == [2.5, 7.0]
    copy = arms.Memory(num_classes=2, dim=1, groups=2)
    copy.load_state_dict(reg.state_dict())
    assert torch.equal(copy.memory, reg.memory)
    assert copy.seen.all()


def test_a_margin_lowers_the_cosine_to_the_own_class():
    reg = arms.Margin(num_classes=3, dim=2, groups=1, temperature=0.5)
    means = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    targets = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    loss = reg.align(means, targets, torch.tensor([[True, True, False]]))
    e = torch.tensor([0.9, 0.6, 0.0, 0.7]).div(0.5).exp()
    by_hand = -((e[0] / (e[0] + e[1])).log() + (e[3] / (e[2] + e[3])).log()) / 2
    torch.testing.assert_close(loss, by_hand)


def test_a_learned_temperature_begins_as_the_given_one_and_moves():
    reg = arms.LearnedTemperature(num_classes=4, dim=6, temperature=0.2)
    fixed = arms.Variant(num_classes=4, dim=6, temperature=0.2)
    optimizer = torch.optim.SGD([reg.param_group(lr=0.1)])
    terms = reg.terms(*draw(reg))
    torch.testing.assert_close(terms.align, fixed.terms(*draw(fixed)).align)
    reg.total(terms).backward()
    optimizer.step()
    assert reg.log_temperature.exp().item() != pytest.approx(0.2)


def test_whole_images_are_dealt_evenly_to_the_groups():
    reg = arms.ByImage(num_classes=3, dim=2, groups=4)
    label = torch.tensor([0, 1, 2, 3]).expand(8, 2, 4)
    seen = set()
    for step in range(5):
        reg.step.fill_(step)
        cells = reg.split(torch.zeros(8, 2, 2, 4), label)
        of_image = cells[:, 0, 0] // 3
        assert torch.equal(cells == 12, label == 3)
        assert torch.equal((cells % 3)[label < 3], label[label < 3])
        assert torch.equal((cells // 3)[..., :3], of_image[:, None, None].expand(8, 2, 3))
        assert torch.bincount(of_image).tolist() == [2, 2, 2, 2]
        seen.add(tuple(of_image.tolist()))
    assert len(seen) > 1


def test_the_hardest_pixels_of_a_class_come_first():
    reg = arms.ByDifficulty(num_classes=2, dim=2, groups=2)
    with torch.no_grad():
        reg.centroids.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 2, 2))
    angle = torch.tensor([0.1, 3.0, 1.0, 0.2, 2.0, 0.5, 0.0])
    features = torch.stack([angle.cos(), angle.sin()])[None, :, None]
    grid = torch.tensor([[[0, 0, 0, 0, 1, 1, 2]]])
    # Angles from class 0: .1 and .2 are near, 1 and 3 far; from class 1: 2 is nearer than .5.
    assert reg.split(features, grid).flatten().tolist() == [2, 0, 0, 2, 3, 1, 4]


def test_the_band_around_a_border_has_its_width_and_no_unlabelled_pixel():
    label = torch.zeros(1, 40, dtype=torch.uint8)
    label[:, 20:] = 7
    label[:, 22] = 255
    near = study.near_border(label)[0].nonzero().flatten().tolist()
    assert near == [p for p in range(20 - study.BAND, 20 + study.BAND) if p != 22]
    assert not study.near_border(torch.full((9, 9), 255, dtype=torch.uint8)).any()


def test_a_cell_is_kept_and_not_run_again(folder, tmp_path, monkeypatch):
    AcceleratorState._reset_state()  # of other tests in this process
    settings = study.Settings(
        data_root=folder,
        results=tmp_path / "results",
        work=tmp_path / "work",
        seeds=(0,),
        heads=("segformer",),
        arms=("mvsc",),
        steps=1,
        size=(32, 32),
    )
    study.run(settings, "short/segformer/mvsc/0")
    path = tmp_path / "results" / "val" / "short" / "segformer" / "mvsc" / "seed0.json"
    kept = json.loads(path.read_text())
    assert {"mIoU", "mAcc", "aAcc", "boundary_mIoU", "iou", "log", "peak_mib"} <= set(kept)
    assert not any((tmp_path / "work" / "val").iterdir())
    monkeypatch.setattr(subprocess, "Popen", lambda command: pytest.fail("ran again"))
    study.main(settings)
    shares = json.loads((tmp_path / "results" / "classes.json").read_text())
    assert tuple(shares) == open_split("folder", folder, "train").classes
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_cell_is_a_process_of_its_own(folder, tmp_path):
    command = [
        *(sys.executable, str(STUDY / "study.py"), "--data-root", str(folder)),
        *("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")),
        *("--seeds", "0", "--heads", "segformer", "--arms", "ce", "--steps", "1"),
        *("--size", "32", "32", "--hold-out"),
    ]
    subprocess.run(command, check=True)
    path = tmp_path / "results" / "hold_out" / "short" / "segformer" / "ce" / "seed0.json"
    assert json.loads(path.read_text())["steps"] == 1
    links = (tmp_path / "work" / "hold_out_data" / "images").glob("*/*")
    assert sorted(link.parent.name for link in links) == ["train"] * 4 + ["val"]


@pytest.mark.slow
def test_ctrl_c_saves_the_cell_that_runs_and_starts_no_other(folder, tmp_path):
    command = [
        *(sys.executable, str(STUDY / "study.py"), "--data-root", str(folder)),
        *("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")),
        *("--heads", "segformer", "--arms", "ce", "--steps", "3000", "--batch-size", "2"),
        *("--size", "32", "32"),
    ]
    cell = tmp_path / "work" / "val" / "short-segformer-ce-0"
    errors = press_ctrl_c(command, cell / "metrics.jsonl", 1)
    assert errors.endswith("Stopped and saved; the same command goes on from here.\n")
    assert "Traceback" not in errors
    assert load_state(cell / "last.pt")["step"] >= read_metrics(cell / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in cell.parent.iterdir()] == [cell.name]


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert report.interval([1.0]) == (1.0, float("inf"))


def test_the_table_pairs_seeds_and_leaves_the_others_out(tmp_path):
    def keep(arm, seed, miou, kind="val", device="a machine", schedule="short"):
        path = tmp_path / kind / schedule / "segformer" / arm / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        log = {"step": [1, 2], "seconds_per_step": [0.5, 0.75]}
        log |= {"group_similarity": [0.1, 0.9]} if arm == "mvsc" else {}
        rest = {"mAcc": 1.0, "aAcc": 50.0, "boundary_mIoU": 3.0, "iou": [miou, None], "log": log}
        about = {"steps": 2, "batch_size": 8, "size": [160, 120], "peak_mib": 7.0}
        machine = {"device": device, "torch": "2"}
        path.write_text(json.dumps({"mIoU": miou, "machine": machine, **rest, **about}))

    for seed, (plain, ours) in enumerate([(10.0, 11.0), (20.0, 23.0)]):
        keep("ce", seed, plain)
        keep("mvsc", seed, ours)
        keep("dice", seed, ours)
        keep("dice+mvsc", seed, ours + 1)
        keep("dice@2", seed, ours + 2)
        keep("dice@2+mvsc", seed, ours + 5)
    keep("ce", 2, 99.0)
    keep("ce", 1, 1.0, schedule="long")
    keep("ce", 2, 4.0, schedule="long", device="another")
    keep("mvsc@4", 1, 2.0, schedule="long")
    keep("mvsc", 1, 3.0, schedule="quick")
    keep("ce", 0, 5.0, "hold_out")
    keep("dice@2", 0, 6.0, "hold_out")
    text = report.report(tmp_path, {"wall": 0.9, "floor": 0.1})
    first = report.overview(report.load(tmp_path))
    gained = "+2.00 [-10.71, +14.71] (2) | +0.00 [+0.00, +0.00]"
    assert f"| short | segformer | 43.00 ± 48.75 | {gained} |  |  |" in first
    assert "| long | segformer | 2.50 ± 2.12 |  |  | +1.00 (1) | +0.00 |" in first
    assert "| quick |" not in first
    long = text.partition("### segformer, long schedule")[2].partition("###")[0]
    assert "; a machine, torch 2 and another, torch 2; mean" in long
    assert re.search(r"\| ce \| 2 \|.*\|  \|  \|\n", long)
    assert re.search(r"\| mvsc@4 \| 1 \|.*\| 0.62 \| 7 \|\n", long)
    assert "| mvsc | 2 | 17.00 ± 8.49 |" in text
    assert "| +2.00 [-10.71, +14.71] | +0.00 [+0.00, +0.00] |" in text
    assert "| dice+mvsc | 2 | 18.00 ± 8.49 |" in text
    assert "| +1.00 [+1.00, +1.00] | 0.62 | 7 |" in text
    assert "mvsc on top of dice: mIoU +1.00 [+1.00, +1.00], mAcc +0.00" in text
    assert "dice on top of mvsc: mIoU +1.00" in text
    assert "mvsc on top of dice@2: mIoU +3.00" in text
    assert "dice@2 on top of mvsc: mIoU +5.00" in text
    assert "wall +2.0" in text
    chosen = text.partition("### Choice of strengths: segformer, short schedule")[2]
    assert "| dice@2 | 1 | 6.00 | 1.00 | 50.00 | 3.00 | +1.00 |" in chosen
    assert "0.1000 at step 1" in text


def test_gains_are_told_for_rare_and_common_classes():
    def run(*iou):
        return {"iou": list(iou)}

    cells = {
        "ce": {0: run(1, 1, 1, None), 1: run(2, 2, 2, None)},
        "mvsc": {0: run(4, 2, 1, None), 1: run(7, 3, 1, None)},
    }
    shares = {"rug": 0.1, "wall": 0.5, "bed": 0.3, "lamp": 0.1}
    told = report.class_gains(cells, shares, "mvsc")
    assert told.startswith("rarest 1 classes +4.00 [-8.71, +16.71], middle 1 classes -0.50 [")
    assert "commonest 1 classes +1.00 [+1.00, +1.00]; bed -0.5, wall +1.0, rug +4.0, ..." in told


def test_the_kept_tables_are_those_of_the_kept_scores():
    shares = json.loads((report.RESULTS / "classes.json").read_text("utf-8"))
    told = report.report(report.RESULTS, shares)
    assert (report.RESULTS / "report.md").read_text("utf-8") == told
    told = report.overview(report.load(report.RESULTS))
    assert (report.RESULTS / "overview.md").read_text("utf-8") == told + "\n"
