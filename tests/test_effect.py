"""The study of the effect: its arms train, its cells are kept, its tables are right."""

import functools
import importlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import mvsc
import tiny_data
from mvsc.regularizer import CellMeans

pytest.importorskip("pytorch_metric_learning")
ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "effect"

arms = importlib.import_module("arms")
candidates = importlib.import_module("candidates")
frontier = importlib.import_module("frontier")
judge = importlib.import_module("judge")
kept = importlib.import_module("kept")
report = importlib.import_module("report")
study = importlib.import_module("study")
variants = importlib.import_module("variants")
views = importlib.import_module("views")
from data import open_split  # noqa: E402
from models import build  # noqa: E402
from recipes import Recipe  # noqa: E402
from rivals import ClassMeans  # noqa: E402
from test_recipes import press_ctrl_c  # noqa: E402
from train import losses, read_metrics  # noqa: E402
from weights import load_state, load_weights  # noqa: E402


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
    assert (name in ("ce", "longer")) == torch.isclose(found["loss"], plain, rtol=1e-6).item()


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
    both = loss("lovasz@4") + loss("dice@4")
    torch.testing.assert_close(loss("lovasz-dice@4") + loss("ce"), both)


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


def test_smoothed_labels_are_as_by_hand(folder):
    criterion = arms.smoothed(0.3, open_split("folder", folder, "train"))
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 1] = torch.log(torch.tensor(2.0))  # chances 1/4, 1/2, 1/4
    loss = criterion(logits, torch.tensor([[[1, 255]]]))
    torch.testing.assert_close(loss, torch.log(torch.tensor(2.0)) * (0.8 + 0.2 * 2))


def test_class_means_are_classified_as_by_hand():
    features = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 2.0]])[None, :, None]  # means (2,0), (0,2)
    classifier = torch.nn.Conv2d(2, 2, 1, bias=False)
    torch.nn.init.eye_(classifier.weight.data[:, :, 0, 0])
    rival = ClassMeans(2, 2, 1.0)
    loss = rival.terms(features, torch.tensor([[[0, 0, 1]]]), classifier).rival
    torch.testing.assert_close(loss, torch.log1p(torch.tensor(-2.0).exp()))


GRID = torch.tensor([[[0, 0, 1, 3], [1, 2, 2, 2]], [[0, 3, 1, 1], [1, 1, 2, 0]]])  # 3: no class


@pytest.fixture
def cells():
    """Features, the grid of three classes, and a classifier."""
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.Conv2d(4, 3, 1)
    torch.nn.init.normal_(classifier.weight, generator=generator)
    torch.nn.init.normal_(classifier.bias, generator=generator)
    features = torch.randn(2, 4, 2, 4, generator=generator, requires_grad=True)
    return features, GRID, classifier


def of_pixels(features, grid, classifier):
    """Return the logits of the labelled pixels, and their labels."""
    known = grid < 3
    return classifier(features).movedim(1, 3)[known], grid[known]


def alike(losses, labels):
    """Average the losses of each class, then the classes."""
    return torch.stack([losses[labels == label].mean() for label in labels.unique()]).mean()


def test_cells_of_one_pixel_are_class_balanced_cross_entropy(cells):
    logits, labels = of_pixels(*cells)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = candidates.CellMeansOfPixels(3, 4, 1.0).loss(*cells)
    torch.testing.assert_close(found, alike(losses, labels))


def test_cells_without_end_are_class_means(cells):
    of_all = candidates.CellMeans(3, 4, 1.0)
    of_all.k = 10**6
    torch.testing.assert_close(of_all.loss(*cells), ClassMeans(3, 4, 1.0).loss(*cells))


def test_iou_of_single_pixels_is_the_log_of_the_soft_jaccard_index(cells, folder):
    logits, labels = of_pixels(*cells)
    chances, own = logits.softmax(dim=1), torch.nn.functional.one_hot(labels, 3)
    hit = (chances * own).sum(dim=0)
    by_hand = -(hit / (chances.sum(dim=0) + own.sum(dim=0) - hit)).log().mean()
    found = candidates.CellIoUOfPixels(3, 4, 1.0).loss(*cells)
    torch.testing.assert_close(found, by_hand)
    # The same of the logits, beside cross-entropy.
    criterion = arms.jaccard(2.0, open_split("folder", folder, "train"))
    whole, target = cells[2](cells[0]), torch.where(GRID == 3, 255, GRID)
    plain = torch.nn.functional.cross_entropy(whole, target, ignore_index=255)
    torch.testing.assert_close(criterion(whole, target), plain + 2 * by_hand)


def test_iou_of_whole_classes_is_lv_and_a_price_for_what_others_spill(cells):
    features, grid, classifier = cells
    iou = candidates.CellIoU(3, 4, 1.0)
    iou.k = 10**6
    means, counts = mvsc.segment_mean(features, grid, 3)
    chances = classifier(means[..., None, None]).flatten(1).softmax(dim=1)
    spilled = (counts[:, None] * chances).fill_diagonal_(0).sum(dim=0)
    price = (1 + spilled / counts).log().mean()
    expected = ClassMeans(3, 4, 1.0).loss(*cells) + price
    torch.testing.assert_close(iou.loss(*cells), expected)


def test_a_cell_holds_at_most_k_pixels_of_one_class():
    grid = torch.randint(0, 4, (3, 9, 7))
    for k in (1, 5, 1000):
        cell, owner = candidates.pixel_cells(grid, 3, k)
        known = grid < 3
        assert torch.equal(owner[cell[known]], grid[known])
        assert (cell[~known] == len(owner)).all()
        sizes = torch.bincount(cell[known], minlength=len(owner))
        assert 1 <= sizes.min() <= sizes.max() <= k
    cell, owner = candidates.image_cells(grid, 3)
    images = torch.arange(3)[:, None, None].expand_as(grid)[known]
    assert torch.equal(cell[known], images * 3 + grid[known])


def test_cells_become_single_pixels_by_the_last_step():
    finer = candidates.FinerCellIoU(3, 4, 1.0)
    finer.steps = 4
    sizes = []
    for step in range(5):
        finer.step.fill_(step)
        sizes.append(finer.size())
    assert sizes == [4096, 512, 64, 8, 1]


def test_without_spread_the_cumulant_is_class_means_and_spread_only_adds(cells):
    features, grid, classifier = cells
    plain = ClassMeans(3, 4, 1.0).loss(*cells)
    assert candidates.Cumulant(3, 4, 1.0).loss(*cells) > plain
    means, _ = mvsc.segment_mean(features, grid, 3)
    flat = torch.cat([means, means.new_zeros(1, 4)])[grid].movedim(3, 1)
    found = candidates.Cumulant(3, 4, 1.0).loss(flat, grid, classifier)
    torch.testing.assert_close(found, plain)
    ramp = candidates.RampedCumulant(3, 4, 1.0)  # in step 0
    torch.testing.assert_close(ramp.loss(*cells), plain)


def test_a_classifier_that_knows_the_shares_has_nothing_to_shift(cells):
    classifier = cells[2]
    rival = candidates.PriorConsistent(3, 4, 1.0)
    rival.log_shares = torch.tensor([0.7, 0.2, 0.1]).log()
    plain = ClassMeans(3, 4, 1.0).loss(*cells)
    with torch.no_grad():
        classifier.bias += rival.log_shares
    torch.testing.assert_close(rival.loss(*cells), plain)


def test_a_frozen_classifier_learns_nothing_and_the_features_the_same(cells):
    features, _, classifier = cells
    grads = []
    for kind in (ClassMeans, candidates.Frozen):
        features.grad = classifier.weight.grad = classifier.bias.grad = None
        loss = kind(3, 4, 1.0).loss(*cells)
        loss.backward()
        grads.append((loss, features.grad))
    torch.testing.assert_close(*grads)
    assert classifier.weight.grad is classifier.bias.grad is None


def test_the_corners_of_the_simplex_are_equally_far_apart():
    corners = candidates.Simplex(5, 8, 1.0).corners
    expected = torch.full((5, 5), -0.25).fill_diagonal_(1)
    torch.testing.assert_close(corners @ corners.T, expected)


def test_a_pixel_is_worth_what_it_adds_to_the_ious(cells):
    features, grid, classifier = cells
    rival = candidates.RivalCells(3, 4, 1.0)
    found = rival.loss(*cells)
    logits, labels = of_pixels(*cells)
    hits = torch.stack([((logits.argmax(1) == c) & (labels == c)).sum() for c in range(3)])
    unions = torch.stack([((logits.argmax(1) == c) | (labels == c)).sum() for c in range(3)])
    others = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    top, total = 0.0, 0.0
    for c, k in itertools.permutations(range(3), 2):
        mine = (labels == c) & (others == k)
        if mine.any():
            vectors = features.movedim(1, 3)[grid < 3][mine].mean(dim=0)
            logit = classifier(vectors[None, :, None, None]).flatten()
            weight = mine.sum() * (1 / unions[c] + hits[k] / unions[k] ** 2)
            top = top - weight * logit.log_softmax(dim=0)[c]
            total = total + weight
    torch.testing.assert_close(found, top / total)


def test_an_arm_that_trains_longer_has_more_steps(folder):
    data = open_split("folder", folder, "train")
    recipe = Recipe(data_root=folder, steps=396)
    assert arms.ingredients(arms.find("longer@1.5"), recipe, data)[0].steps == 594
    assert arms.ingredients(arms.find("ce"), recipe, data)[0].steps == 396


def test_deviations_of_the_groups_stay_in_the_value():
    reg = variants.Deviation(num_classes=2, dim=1, groups=2)
    means = torch.tensor([[[4.0]], [[1.0]]], requires_grad=True)  # of 1 and 2 pixels: 2 in all
    enhanced = reg.enhanced(of_cells([[1], [2]], means), torch.tensor([[[10.0]], [[20.0]]]))
    assert enhanced.flatten().tolist() == [12.0, 19.0]
    enhanced.sum().backward()
    assert means.grad.flatten().tolist() == [1.0, 1.0]


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
    for kind in (mvsc.MVSCRegularizer, variants.Variant):
        reg = kind(**options)
        batch = draw(reg)
        for _ in range(2):
            terms = reg.terms(*batch)
        reg.total(terms).backward()
        found.append([*terms, batch[0].grad, reg.centroids.grad, batch[2].weight.grad, reg.step])
    for ours, library in zip(*found, strict=True):
        assert torch.equal(ours, library)


def of_cells(counts, means=None):
    """Make what Eq. (1) gives, of given counts."""
    counts = torch.tensor(counts)
    return CellMeans(means, counts, counts > 0)


def test_a_cell_counts_as_its_pixels_do():
    reg = variants.ByCount(num_classes=3, dim=2, groups=1)
    vectors = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [9.0, 0.0, 0.0]]])
    loss = reg.classify(vectors, of_cells([[3, 1, 0]]), lambda v: v)
    e = torch.tensor([2.0, 1.0]).exp()
    by_hand = (3 * ((e[0] + 2) / e[0]).log() + (e[1] + 2).log()) / 4
    torch.testing.assert_close(loss, by_hand)


def test_absent_classes_are_classified_too():
    reg = variants.AllClasses(num_classes=2, dim=2, groups=1)
    vectors = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])
    loss = reg.classify(vectors, of_cells([[5, 0]]), lambda v: v)
    by_hand = (torch.log1p(torch.tensor(-2.0).exp()) + torch.log1p(torch.tensor(3.0).exp())) / 2
    torch.testing.assert_close(loss, by_hand)


def test_groups_that_are_apart_cost_nothing():
    reg = variants.Apart(num_classes=2, dim=3, groups=3)
    with torch.no_grad():
        reg.centroids.copy_(torch.tensor([2.0, 3.0, 0.5])[:, None, None] * torch.eye(3)[:, None])
        assert reg.pull(reg.centroids) == 0
        reg.centroids[2] = reg.centroids[1]  # one pair of three is one
        torch.testing.assert_close(reg.pull(reg.centroids), torch.tensor(1.0))


def test_weights_fade_to_nothing():
    reg = variants.Fading(num_classes=3, dim=2, groups=2)
    reg.steps = 4
    terms = mvsc.MVSCTerms(*torch.tensor([1.0, 2.0, 3.0]))
    whole = mvsc.MVSCRegularizer(3, 2, 2).total(terms)
    for step, share in ((0, 1.0), (1, 0.75), (4, 0.0), (5, 0.0)):
        reg.step.fill_(step)
        torch.testing.assert_close(reg.total(terms), whole * share)


def test_slow_centroids_have_a_tenth_of_the_rate():
    group = variants.Slow(num_classes=3, dim=2, groups=2).param_group(lr=0.5)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.05, 0.0, 1)


def test_the_memory_is_the_first_mean_and_then_follows():
    reg = variants.Memory(num_classes=2, dim=1, groups=2)
    means = torch.tensor([[[4.0], [7.0]], [[1.0], [0.0]]], requires_grad=True)
    enhanced = reg.enhanced(of_cells([[1, 0], [2, 0]], means), reg.centroids)
    assert reg.memory.flatten().tolist() == [2.0, 0.0]
    assert enhanced.flatten().tolist() == [2.0, 0.0, 2.0, 0.0]
    enhanced.sum().backward()
    assert means.grad.flatten().tolist() == [1.0] * 4
    reg.enhanced(of_cells([[0, 3], [1, 0]], means * 0 + 7), reg.centroids)
    assert reg.memory.flatten().tolist() == [2.5, 7.0]
    copy = variants.Memory(num_classes=2, dim=1, groups=2)
    copy.load_state_dict(reg.state_dict())
    assert torch.equal(copy.memory, reg.memory)
    assert copy.seen.all()


def test_a_margin_lowers_the_cosine_to_the_own_class():
    reg = variants.Margin(num_classes=3, dim=2, groups=1, temperature=0.5)
    means = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    centroids = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [1.0, 1.0]]])
    loss = reg.align(of_cells([[2, 1, 0]], means), centroids)
    e = torch.tensor([0.9, 0.6, 0.0, 0.7]).div(0.5).exp()
    by_hand = -((e[0] / (e[0] + e[1])).log() + (e[3] / (e[2] + e[3])).log()) / 2
    torch.testing.assert_close(loss, by_hand)


def test_a_learned_temperature_begins_as_the_given_one_and_moves():
    reg = variants.LearnedTemperature(num_classes=4, dim=6, temperature=0.2)
    fixed = variants.Variant(num_classes=4, dim=6, temperature=0.2)
    optimizer = torch.optim.SGD([reg.param_group(lr=0.1)])
    terms = reg.terms(*draw(reg))
    torch.testing.assert_close(terms.align, fixed.terms(*draw(fixed)).align)
    reg.total(terms).backward()
    optimizer.step()
    assert reg.log_temperature.exp().item() != pytest.approx(0.2)


def test_whole_images_are_dealt_evenly_to_the_groups():
    reg = variants.ByImage(num_classes=3, dim=2, groups=4)
    label = torch.tensor([0, 1, 2, 3]).expand(8, 2, 4)
    seen = set()
    for step in range(5):
        reg.step.fill_(step)
        cells = reg.split(label, torch.zeros(8, 2, 2, 4))
        of_image = cells[:, 0, 0] // 3
        assert torch.equal(cells == 12, label == 3)
        assert torch.equal((cells % 3)[label < 3], label[label < 3])
        assert torch.equal((cells // 3)[..., :3], of_image[:, None, None].expand(8, 2, 3))
        assert torch.bincount(of_image).tolist() == [2, 2, 2, 2]
        seen.add(tuple(of_image.tolist()))
    assert len(seen) > 1


def test_the_hardest_pixels_of_a_class_come_first():
    reg = variants.ByDifficulty(num_classes=2, dim=2, groups=2)
    with torch.no_grad():
        reg.centroids.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 2, 2))
    angle = torch.tensor([0.1, 3.0, 1.0, 0.2, 2.0, 0.5, 0.0])
    features = torch.stack([angle.cos(), angle.sin()])[None, :, None]
    grid = torch.tensor([[[0, 0, 0, 0, 1, 1, 2]]])
    # Angles from class 0: .1 and .2 are near, 1 and 3 far; from class 1: 2 is nearer than .5.
    assert reg.split(grid, features).flatten().tolist() == [2, 0, 0, 2, 3, 1, 4]


def judged(shares, *images):
    found = judge.Judge(torch.tensor(shares).log(), torch.device("cpu"))
    for logits, label in images:
        found.look(logits, label)
    return found.scores()


def test_a_shift_takes_tau_times_the_log_of_the_share_off_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 30, generator=generator)
    label = torch.randint(0, 3, (20, 30), generator=generator)
    label[3] = 255
    shares = [0.7, 0.2, 0.1]
    log_shares = torch.tensor(shares).log()[:, None, None]
    curve = judged(shares, (logits, label))["frontier"]
    for tau, accuracy in zip(curve["tau"], curve["aAcc"], strict=True):
        shifted = logits - tau * log_shares
        hit = (shifted.argmax(dim=0) == label)[label != 255].double().mean()
        assert accuracy == pytest.approx(100 * hit.item())
    assert len(set(curve["mIoU"])) == len(judge.TAUS) == 9
    # A constant of a class can be added before or after the logits are resized.
    small = torch.randn(3, 5, 7, generator=generator)
    resize = functools.partial(torch.nn.functional.interpolate, size=(20, 30), mode="bilinear")
    torch.testing.assert_close(resize((small - log_shares)[None]), resize(small[None]) - log_shares)


def test_calibration_is_as_by_hand():
    # Four pixels are looked at; three of them sure of class 0 at 0.8, one at 0.6 of class 1.
    chances = torch.tensor([[0.8, 0.8, 0.8, 0.4], [0.2, 0.2, 0.2, 0.6]])
    logits = chances.log().view(2, 1, 4).repeat_interleave(judge.EVERY, dim=2)
    label = torch.tensor([[0, 0, 1, 1]]).repeat_interleave(judge.EVERY, dim=1)
    found = judged([0.5, 0.5], (logits, label))["calibration"]
    plain = found["temperature"].index(1.0)
    of_0, of_1 = -math.log(0.8), -(math.log(0.2) + math.log(0.6)) / 2
    assert found["nll"][plain] == pytest.approx((of_0 + of_1) / 2, rel=1e-5)
    assert found["balanced_nll"][plain] == pytest.approx((of_0 + of_1) / 2, rel=1e-5)
    by_hand = 100 * (abs(3 * 0.8 - 2) + abs(0.6 - 1)) / 4
    assert found["ece"][plain] == pytest.approx(by_hand, rel=1e-5)
    twice = found["temperature"].index(2.0)
    softer = chances.sqrt() / chances.sqrt().sum(dim=0)
    expected = -softer[label[0, :: judge.EVERY], range(4)].log().mean().item()
    assert found["nll"][twice] == pytest.approx(expected, rel=1e-5)


def test_images_are_dealt_to_two_halves():
    image = torch.tensor([[[9.0, 9.0]], [[0.0, 0.0]]])
    right, wrong = torch.tensor([[0, 0]]), torch.tensor([[1, 1]])
    found = judged([0.5, 0.5], (image, right), (image, wrong), (image, right))
    first, second = found["frontier"]["halves"]
    assert (first["aAcc"][1], second["aAcc"][1]) == (100, 0)
    assert found["frontier"]["aAcc"][1] == pytest.approx(200 / 3)


def curve(accuracy, miou):
    whole = {"tau": [-0.5, 0.0, 0.5], "aAcc": accuracy, "mIoU": miou}
    return {**whole, "halves": [{"aAcc": accuracy, "mIoU": miou}] * 2}


BASE = {"frontier": curve([49.0, 50.0, 46.0], [9.0, 10.0, 11.0])}


def test_a_curve_is_read_at_the_accuracy_of_cross_entropy_and_a_bit_below():
    run = {"frontier": curve([52.0, 51.0, 47.0], [10.0, 12.0, 16.0])}
    assert frontier.gain_at(run, BASE, 0) == pytest.approx(3.0)  # a quarter of the way
    assert frontier.gain_at(run, BASE, 2) == pytest.approx(5.0)
    assert frontier.gain_at(run, BASE, 9) == pytest.approx(6.0)
    assert frontier.gain_at(BASE, BASE, 0) == 0
    lower = {"frontier": curve([40.0, 40.0, 40.0], [10.0, 12.0, 16.0])}
    assert frontier.gain_at(lower, BASE, 2) is None


def test_a_tau_is_chosen_on_images_that_do_not_judge_it():
    run = {"frontier": curve([52.0, 51.0, 47.0], [10.0, 12.0, 16.0])}
    # The first half would take the last tau for it, the second the first.
    run["frontier"]["halves"] = [
        {"aAcc": [50.0, 50.0, 50.0], "mIoU": [0.0, 0.0, 1.0]},
        {"aAcc": [50.0, 49.0, 47.0], "mIoU": [30.0, 20.0, 10.0]},
    ]
    assert frontier.chosen(run, BASE, 0) == ((10 + 0) / 2 - 10, (47 + 50) / 2 - 50)
    run["frontier"]["halves"][0]["aAcc"] = [40.0, 40.0, 40.0]
    assert frontier.chosen(run, BASE, 2) is None


def test_a_temperature_is_chosen_on_images_that_do_not_judge_it():
    halves = [
        {"nll": [1.0, 2.0], "balanced_nll": [3.0, 4.0], "ece": [5.0, 6.0]},
        {"nll": [9.0, 8.0], "balanced_nll": [7.0, 6.0], "ece": [5.0, 4.0]},
    ]
    run = {"calibration": {"temperature": [1.0, 2.0], **halves[0], "halves": halves}}
    assert frontier.untempered(run) == {"nll": 1.0, "balanced_nll": 3.0, "ece": 5.0}
    assert frontier.tempered(run) == {"nll": 5.5, "balanced_nll": 5.5, "ece": 5.5}


def test_the_table_of_frontiers_has_the_best_first_and_says_what_is_not_reached():
    found = {"calibration": {"temperature": [1.0], "nll": [1.0], "balanced_nll": [2.0]}}
    found["calibration"] |= {"ece": [3.0]}
    found["calibration"]["halves"] = [found["calibration"]] * 2
    better, lower = curve([52.0, 51.0, 47.0], [10.0, 12.0, 16.0]), curve([9.0] * 3, [9.0] * 3)
    runs = {"ce": {0: BASE | found, 1: BASE | found}}
    runs["mvsc"] = dict.fromkeys((0, 1), {"frontier": better} | found)
    runs["low"] = {0: {"frontier": lower} | found}
    runs["unpaired"] = {7: runs["mvsc"][0]}
    rows = report.frontiers(runs).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| mvsc", "| ce", "| low"]
    assert rows[2].startswith("| mvsc | 2 | +3.00 [+3.00, +3.00] | +3.50")
    assert "| low | 1 | not reached" in rows[4]
    assert "| mvsc | 2 | 1.000 | 2.000 | 3.000 |" in report.calibration(runs)


def test_curves_of_seeds_are_averaged_where_all_were_judged():
    run = curve([49.0, 50.0, 46.0], [9.0, 10.0, 11.0])
    longer = {"tau": [-1.0, *run["tau"]], "aAcc": [9.0] * 4, "mIoU": [8.0, 7.0, 6.0, 5.0]}
    found = frontier.mean_curve([({"frontier": longer}, BASE), ({"frontier": run}, BASE)])
    assert found == {-0.5: (-21.0, -2.0), 0.0: (-20.5, -2.0), 0.5: (-22.5, -2.0)}


def test_a_curve_is_held_against_those_of_the_rivals_seed_by_seed():
    better = {"frontier": curve([52.0, 51.0, 47.0], [10.0, 12.0, 16.0])}
    far = {"frontier": curve([9.0] * 3, [9.0] * 3)}
    runs = {"ce": dict.fromkeys((0, 1, 2), BASE), "lovasz@4": dict.fromkeys((0, 1, 3), BASE)}
    runs |= {"lovasz@4+mvsc": {0: better, 1: better, 2: better}}
    runs |= {"low": {0: far, 1: far}, "once": {0: BASE}}
    rows = report.above_rivals(runs)
    assert rows[0][:4] == ["lovasz@4+mvsc", "lovasz@4", "2", "+3.00 [+3.00, +3.00]"]
    assert rows[0][4].startswith("+3.38")
    assert rows[1:] == [["low", "lovasz@4", "2", *["not reached"] * 3]]
    assert report.above_rivals({"ce": runs["ce"]}) == []


def test_the_page_shows_differences_of_three_seeds_and_more():
    runs = {arm: dict.fromkeys(range(3), BASE) for arm in ("ce", "lovasz@4", "mvsc")}
    runs["few"] = {0: BASE, 1: BASE}
    told = report.above({("short", "segformer"): runs}).splitlines()[2:]
    assert told == [f"| short | segformer | mvsc | lovasz@4 | 3 |{' +0.00 [+0.00, +0.00] |' * 3}"]


def test_the_band_around_a_border_has_its_width_and_no_unlabelled_pixel():
    label = torch.zeros(1, 40, dtype=torch.uint8)
    label[:, 20:] = 7
    label[:, 22] = 255
    near = judge.near_border(label)[0].nonzero().flatten().tolist()
    assert near == [p for p in range(20 - judge.BAND, 20 + judge.BAND) if p != 22]
    assert not judge.near_border(torch.full((9, 9), 255, dtype=torch.uint8)).any()


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
    (run,) = kept.read(tmp_path / "results", "frontier")
    assert run["cell"] == "short/segformer/mvsc/0"
    assert {"mIoU", "mAcc", "aAcc", "boundary_mIoU", "iou", "log", "peak_mib"} <= set(run)
    assert not any((tmp_path / "work" / "frontier").iterdir())
    monkeypatch.setattr(subprocess, "Popen", lambda command: pytest.fail("ran again"))
    study.main(settings)
    shares = json.loads((tmp_path / "results" / "classes.json").read_text())
    assert tuple(shares) == open_split("folder", folder, "train").classes
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


def test_a_classifier_is_trained_anew_and_alone_on_kept_weights(folder, tmp_path, monkeypatch):
    AcceleratorState._reset_state()  # of other tests in this process
    places = {"results": tmp_path / "results", "work": tmp_path / "work"}
    settings = study.Settings(
        data_root=folder, **places, steps=2, size=(32, 32), retrain=True, keep_weights=True
    )
    cell = "short/segformer/mvsc/0"
    with pytest.raises(ValueError, match="is missing. Run the cell with --keep-weights first"):
        study.run(settings, cell)
    study.run(replace(settings, retrain=False), cell)
    path = study.weights_of(settings, cell)
    before, _ = load_weights(path)
    after = {}
    monkeypatch.setattr(study.shutil, "rmtree", lambda run: after.update(last_weights(run)))
    study.run(settings, cell)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    counted = {name for name in changed if name.endswith("num_batches_tracked")}
    assert changed - counted == {"segmentation_head.0.weight", "segmentation_head.0.bias"}
    (run,) = kept.read(settings.results, "retrained")
    assert "rival" not in run["log"]
    assert "align" not in run["log"]


def test_kept_weights_are_judged_again_as_they_were(folder, tmp_path):
    AcceleratorState._reset_state()  # of other tests in this process
    places = {"results": tmp_path / "results", "work": tmp_path / "work"}
    settings = study.Settings(data_root=folder, **places, steps=2, size=(32, 32), keep_weights=True)
    cell = "short/segformer/mvsc/0"
    study.run(settings, cell)
    (run,) = kept.read(settings.results, "frontier")
    kept.add(settings.results, "frontier", {**run, "mIoU": -1.0, "frontier": {}})
    study.run(replace(settings, judge_again=True), cell)
    assert kept.read(settings.results, "frontier") == [run]
    study.weights_of(settings, cell).unlink()
    with pytest.raises(ValueError, match="is missing. Run the cell with --keep-weights first"):
        study.run(replace(settings, judge_again=True), cell)
    with pytest.raises(ValueError, match="judge_again must be used without retrain"):
        study.check(replace(settings, judge_again=True, retrain=True))


def last_weights(folder):
    return load_weights(folder / "last.safetensors")[0]


@pytest.mark.slow
def test_a_cell_is_a_process_of_its_own(folder, tmp_path):
    command = [
        *(sys.executable, str(STUDY / "study.py"), "--data-root", str(folder)),
        *("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")),
        *("--seeds", "0", "--heads", "segformer", "--arms", "ce", "--steps", "1"),
        *("--size", "32", "32", "--hold-out"),
    ]
    subprocess.run(command, check=True)
    (run,) = kept.read(tmp_path / "results", "hold_out")
    assert (run["cell"], run["steps"]) == ("short/segformer/ce/0", 1)
    links = (tmp_path / "work" / "data" / "hold_out" / "images").glob("*/*")
    assert sorted(link.parent.name for link in links) == ["train"] * 4 + ["val"]


def test_few_images_are_others_with_another_seed_and_the_judges_stay(folder, tmp_path):
    data = open_split("folder", folder, "train")
    names = [image.name for image, _ in data.pairs]
    for first in (0, 1, 2):
        root = views.few(folder, tmp_path / str(first), 2, first)
        few, val = (open_split("folder", root, split) for split in ("train", "val"))
        assert [image.name for image, _ in few.pairs] == names[first % 2 :: 2]
        assert torch.equal(few[0][1], data[first % 2][1])
        assert len(val) == len(open_split("folder", folder, "val"))
        assert few.classes == data.classes


def test_a_region_gets_another_class_of_its_image_as_a_whole():
    label = np.full((60, 60), 255, np.uint8)
    for row, column in itertools.product(range(0, 60, 3), repeat=2):  # 400 regions, all apart
        label[row : row + 2, column : column + 2] = (row + column) // 3 % 3
    wrong = views.relabel(label, 0.2, random.Random(0))
    assert np.array_equal(wrong == 255, label == 255)
    regions = [each[::3, ::3] for each in (label, wrong)]
    for shift in itertools.product((0, 1), repeat=2):
        assert np.array_equal(wrong[shift[0] :: 3, shift[1] :: 3], regions[1])
    assert set(regions[1].flat) == {0, 1, 2}
    changed = (regions[0] != regions[1]).sum()
    assert 80 - 30 < changed < 80 + 30  # of 400, a fifth: within 3.75 standard deviations
    assert np.array_equal(views.relabel(label, 0.0, random.Random(0)), label)
    flipped = views.relabel(label, 1.0, random.Random(0))
    assert ((flipped != label) | (label == 255)).all()
    alone = np.where(label == 255, label, 1)
    assert np.array_equal(views.relabel(alone, 1.0, random.Random(0)), alone)


def test_wrong_labels_are_for_training_only_and_depend_on_the_seed(folder, tmp_path):
    roots = [
        views.noisy(folder, tmp_path / name, 0.5, seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = ([label for _, label in open_split("folder", r, "train")] for r in roots)
    clean = [label for _, label in open_split("folder", folder, "train")]
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert not all(map(torch.equal, first, clean))
    for (_, label), (_, clean) in zip(
        open_split("folder", roots[0], "val"), open_split("folder", folder, "val"), strict=True
    ):
        assert torch.equal(label, clean)


@pytest.mark.parametrize("schedule", ["eighth", "noisy"])
def test_a_cell_trains_on_the_view_of_its_schedule(folder, tmp_path, monkeypatch, schedule):
    seen = []
    monkeypatch.setattr(study, "open_split", lambda *place: seen.append(place) or pytest.skip())
    settings = study.Settings(data_root=folder, results=tmp_path, work=tmp_path / "work")
    with pytest.raises(pytest.skip.Exception):
        study.run(settings, f"{schedule}/segformer/ce/1")
    assert seen == [("folder", tmp_path / "work" / "data" / f"{schedule}-1", "train")]
    assert (seen[0][1] / "classes.txt").exists()


def test_strengths_are_not_chosen_on_altered_images(folder):
    settings = study.Settings(data_root=folder, hold_out=True, schedules=("short", "noisy"))
    with pytest.raises(ValueError, match=r"all images as they are, got \['noisy'\]"):
        study.check(settings)


@pytest.mark.slow
def test_ctrl_c_saves_the_cell_that_runs_and_starts_no_other(folder, tmp_path):
    command = [
        *(sys.executable, str(STUDY / "study.py"), "--data-root", str(folder)),
        *("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")),
        *("--heads", "segformer", "--arms", "ce", "--steps", "3000", "--batch-size", "2"),
        *("--size", "32", "32"),
    ]
    cell = tmp_path / "work" / "frontier" / "short-segformer-ce-0"
    errors = press_ctrl_c(command, cell / "metrics.jsonl", 1)
    assert errors.endswith("Stopped and saved; the same command goes on from here.\n")
    assert "Traceback" not in errors
    assert load_state(cell / "last.pt")["step"] >= read_metrics(cell / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in cell.parent.iterdir()] == [cell.name]


def test_a_run_is_a_line_in_the_order_of_the_cells_and_replaces_its_own(tmp_path):
    for cell, score in (("a/h/x/1", 1), ("b/h/x/0", 2), ("a/h/x/0", 3), ("a/g/x/0", 4)):
        kept.add(tmp_path, "val", {"cell": cell, "mIoU": score})
    kept.add(tmp_path, "val", {"cell": "a/h/x/1", "mIoU": 5})
    kept.add(tmp_path, "hold_out", {"cell": "a/h/x/2"})
    assert [run["mIoU"] for run in kept.read(tmp_path, "val")] == [4, 3, 5, 2]
    assert kept.cells(tmp_path, "hold_out") == {"a/h/x/2"}
    names = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert names == {"val-a.jsonl": 3, "val-b.jsonl": 1, "hold_out-a.jsonl": 1}


ADD = """
import sys
from pathlib import Path
import kept
for seed in range(40):
    kept.add(Path(sys.argv[1]), "val", {"cell": f"a/h/{sys.argv[2]}/{seed}"})
"""


def test_studies_that_finish_at_once_lose_no_run(tmp_path):
    command = [sys.executable, "-c", ADD, str(tmp_path)]
    both = [subprocess.Popen([*command, arm], cwd=STUDY) for arm in ("ce", "mvsc")]
    assert [process.wait() for process in both] == [0, 0]
    assert len(kept.cells(tmp_path, "val")) == 80


def test_every_run_of_the_study_is_kept():
    runs = {kind: kept.read(report.RESULTS, kind) for kind in ("val", "hold_out")}
    # None may be lost when they are held in another way.
    assert len(runs["val"]) >= 219
    assert len(runs["hold_out"]) >= 35
    for kind, found in runs.items():
        assert len({run["cell"] for run in found}) == len(found)
        for path in report.RESULTS.glob(f"{kind}-*.jsonl"):
            of_file = map(json.loads, path.read_text("utf-8").splitlines())
            schedules = {run["cell"].split("/")[0] for run in of_file}
            assert schedules == {path.stem.removeprefix(f"{kind}-")} <= set(study.SCHEDULES)


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert report.interval([1.0]) == (1.0, float("inf"))


def test_the_table_pairs_seeds_and_leaves_the_others_out(tmp_path):
    def keep(arm, seed, miou, kind="val", device="a machine", schedule="short"):
        log = {"step": [1, 2], "seconds_per_step": [0.5, 0.75]}
        log |= {"group_similarity": [0.1, 0.9]} if arm == "mvsc" else {}
        rest = {"mAcc": 1.0, "aAcc": 50.0, "boundary_mIoU": 3.0, "iou": [miou, None], "log": log}
        about = {"steps": 2, "batch_size": 8, "size": [160, 120], "peak_mib": 7.0}
        machine = {"device": device, "torch": "2"}
        about["cell"] = f"{schedule}/segformer/{arm}/{seed}"
        kept.add(tmp_path, kind, {"mIoU": miou, "machine": machine, **rest, **about})

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
    for name, text in report.pages(report.RESULTS).items():
        assert (report.RESULTS / name).read_text("utf-8") == text
