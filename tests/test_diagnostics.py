"""Numbers by hand, against NumPy with plain loops, and what happens at the edges."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import mvsc
import oracle
from batches import IGNORE, Batch, NoHostReads, batches
from mvsc import diagnostics, equations

cosine = oracle.cosine  # that of Eq. (2); 0 if one vector is 0


def average(values):
    return sum(values) / len(values) if values else math.nan


def measure(step: Batch, groups: int):
    """Means and mask of a step, in one group or in as many as the centroids have."""
    return diagnostics.cell_means(step.features, step.labels, step.reg.num_classes, groups)


def close(found, expected, rtol=1e-10):
    assert_close(found.item(), float(expected), rtol=rtol, atol=1e-12, equal_nan=True)


@given(step=batches())
@settings(max_examples=60, deadline=None)
def test_similarities_and_norms_of_centroids_are_numpys(step):
    centroids = step.reg.centroids.detach()
    v = centroids.numpy()
    groups, num_classes, _ = v.shape
    pairs = [
        cosine(v[g, c], v[h, c])
        for c in range(num_classes)
        for g, h in itertools.combinations(range(groups), 2)
    ]
    close(diagnostics.group_similarity(centroids), average(pairs) if pairs else 1.0)
    each = [(c, g) for c in range(num_classes) for g in range(groups)]
    expected = [[cosine(v[g, c], v[h, k]) for k, h in each] for c, g in each]
    assert_close(diagnostics.centroid_similarity(centroids), torch.tensor(expected).double())
    assert_close(
        diagnostics.centroid_norms(centroids), torch.from_numpy(np.sqrt((v**2).sum(axis=-1)))
    )


@given(step=batches(), align_to=st.sampled_from(["global", "group"]), split=st.booleans())
@settings(max_examples=80, deadline=None)
def test_alignment_of_any_batch_is_numpys(step, align_to, split):
    reg = step.reg
    groups = reg.groups if split or align_to == "group" else 1
    means, present = measure(step, groups)
    r, there, v = means.numpy(), present.numpy(), reg.centroids.detach().numpy()
    in_batch = [c for c in range(reg.num_classes) if there[:, c].any()]
    hits, own, others = [], [], []
    for g, c in np.argwhere(there):
        target = v[g] if align_to == "group" else v.mean(axis=0)
        positive = cosine(r[g, c], target[c])
        negatives = [cosine(r[g, c], target[k]) for k in in_batch if k != c]
        # Within rounding a tie may fall on either side.
        if negatives and abs(positive - max(negatives)) < 1e-9:
            return
        hits.append(all(positive > each for each in negatives))
        own.append(positive)
        others += negatives
    arguments = means, reg.centroids, present
    accuracy = diagnostics.alignment_accuracy(*arguments, align_to=align_to)
    close(accuracy, average(hits), rtol=1e-6)  # a share is float32
    positive, negative = diagnostics.alignment_cosines(*arguments, align_to=align_to)
    close(positive, average(own))
    close(negative, average(others))


@given(step=batches(), groups=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_means_of_any_split_average_to_those_of_the_class(step, groups):
    grid = oracle.labels_on_grid(
        step.labels.numpy(), step.features.shape[2:], step.reg.num_classes, IGNORE
    )
    features = step.features.detach().numpy()
    one_group = np.zeros(grid.shape, dtype=int)
    (expected,) = oracle.means(features, grid, one_group, 1, step.reg.num_classes)
    means, present = measure(step, groups)
    whole, there = measure(step, 1)
    for c, mean in enumerate(expected):
        pixels = int((grid == c).sum())
        assert present[:, c].sum() == min(groups, pixels)
        assert bool(there[0, c]) == (mean is not None)
        assert_close(whole[0, c].numpy(), np.zeros(means.shape[-1]) if mean is None else mean)
        if pixels and pixels % groups == 0:  # equal cells: their plain mean is that of the class
            assert_close(means[:, c].mean(dim=0).numpy(), mean)


def test_a_zero_centroid_is_like_nothing():
    centroids = torch.randn(3, 2, 4)
    centroids[:, 0] = 0
    alone = diagnostics.group_similarity(centroids[:, 1:])
    assert_close(diagnostics.group_similarity(centroids), alone / 2)
    assert (diagnostics.centroid_similarity(centroids)[:3] == 0).all()


def test_the_split_does_not_change_from_call_to_call():
    step = example()
    assert_close(measure(step, 3), measure(step, 3), rtol=0, atol=0)


@given(step=batches())
@settings(max_examples=60, deadline=None)
def test_compactness_and_separation_of_any_map_are_numpys(step):
    num_classes = step.reg.num_classes
    means, counts = diagnostics.unit_means(step.features, step.labels, num_classes)
    grid = oracle.labels_on_grid(step.labels.numpy(), step.features.shape[2:], num_classes, IGNORE)
    pixels = {c: [] for c in range(num_classes)}
    for b, i, j in np.ndindex(grid.shape):
        if grid[b, i, j] is not None:
            pixels[grid[b, i, j]].append(step.features.detach()[b, :, i, j].numpy())
    unit = {
        c: [x / math.sqrt(sum(x * x) + oracle.EPS**2) for x in each]
        for c, each in pixels.items()
        if each
    }
    direction = {c: sum(each) / len(each) for c, each in unit.items()}
    own = [math.sqrt(sum(mean * mean)) for mean in direction.values()]
    apart = [1 - cosine(direction[a], direction[b]) for a, b in itertools.permutations(unit, 2)]
    assert counts.tolist() == [len(each) for each in pixels.values()]
    close(diagnostics.compactness(means, counts), average(own))
    # Directions that cancel out leave a mean of rounding, whose own direction is that of noise.
    close(diagnostics.separation(means, counts), average(apart), rtol=1e-7)


def test_unit_means_of_batches_add_up_to_those_of_all_images():
    step = example()
    whole, pixels = diagnostics.unit_means(step.features, step.labels, 5)
    sums = torch.zeros_like(whole)
    for features, labels in zip(step.features.split(1), step.labels.split(1), strict=True):
        means, counts = diagnostics.unit_means(features, labels, 5)
        sums += means * counts[:, None]
    assert_close(sums / pixels.clamp_min(1)[:, None], whole)


@given(step=batches())
@settings(max_examples=60, deadline=None)
def test_heat_maps_are_cosines_pixel_by_pixel(step):
    v = step.reg.centroids.detach().numpy()
    for c in range(step.reg.num_classes):
        for group in (None, *range(step.reg.groups)):
            centroid = v[:, c].mean(axis=0) if group is None else v[group, c]
            found = diagnostics.centroid_heatmap(step.features, step.reg.centroids, c, group)
            for b, i, j in np.ndindex(found.shape):
                pixel = step.features.detach()[b, :, i, j].numpy()
                close(found[b, i, j], cosine(pixel, centroid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heat_maps_keep_within_their_range(dtype):
    centroids = torch.randn(2, 3, 64)
    features = centroids[0, 1, :, None, None] * torch.logspace(-3, 2, 2500).reshape(1, 1, 50, 50)
    for sign in (1, -1):
        found = diagnostics.centroid_heatmap((sign * features).to(dtype), centroids, 1, 0)
        assert found.dtype == torch.float32
        assert found.abs().max() <= 1
        assert_close(found, torch.full_like(found, sign), rtol=0, atol=1e-3)
    zero = diagnostics.centroid_heatmap(torch.zeros(1, 64, 1, 1), centroids, 1)
    assert zero.item() == 0


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ages_count_the_steps_since_a_class_was_seen(data):
    num_classes = data.draw(st.integers(1, 4))
    labels = st.lists(st.sampled_from([*range(-1, num_classes + 2), IGNORE]), min_size=1)
    steps = data.draw(st.lists(labels, max_size=6))
    ages = torch.zeros(num_classes, dtype=torch.int64)
    for seen in steps:
        before = ages.clone()
        older, ages = ages, diagnostics.class_ages(ages, torch.tensor(seen).reshape(1, 1, -1))
        assert torch.equal(older, before)
    for c in range(num_classes):
        since = [age for age, seen in enumerate(reversed(steps)) if c in seen]
        assert ages[c] == (since[0] if since else len(steps))


def test_ages_of_one_hot_labels_are_refused():
    hot = torch.nn.functional.one_hot(torch.full((2, 6, 6), 3), 4).movedim(-1, 1)
    with pytest.raises(ValueError, match=r"labels must be class indices.*labels\.argmax\(1\)"):
        diagnostics.class_ages(torch.zeros(4, dtype=torch.int64), hot)


def test_a_tie_is_a_miss_and_a_single_class_is_a_hit():
    same = torch.ones(1, 2, 3)
    both, one = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    assert diagnostics.alignment_accuracy(same, same, both).item() == 0
    assert diagnostics.alignment_accuracy(same, same, one).item() == 1


def test_a_cosine_that_is_nan_is_no_miss():
    same, spoilt = torch.eye(3).unsqueeze(0), torch.eye(3).unsqueeze(0)
    spoilt[0, 1, 1] = torch.nan
    present = torch.ones(1, 3, dtype=torch.bool)
    for arguments in ((spoilt, same), (same, spoilt)):
        assert diagnostics.alignment_accuracy(*arguments, present).isnan()
    absent = torch.tensor([[True, False, True]])
    assert diagnostics.alignment_accuracy(spoilt, spoilt, absent).item() == 1


def test_what_was_not_measured_is_nan():
    centroids, nothing = torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)
    one = torch.tensor([[True, False, False]])
    assert diagnostics.alignment_accuracy(centroids, centroids, nothing).isnan()
    assert torch.stack(diagnostics.alignment_cosines(centroids, centroids, nothing)).isnan().all()
    positive, negative = diagnostics.alignment_cosines(centroids, centroids, one)
    assert positive.isfinite()
    assert negative.isnan()
    means, counts = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    assert diagnostics.compactness(means, counts).isnan()
    assert diagnostics.separation(centroids[0], torch.tensor([0, 0, 5])).isnan()


def test_nan_in_a_measured_cell_stays_visible_and_elsewhere_does_not_matter():
    centroids = torch.randn(1, 3, 4)
    means, present = centroids.clone(), torch.tensor([[True, True, False]])
    means[0, 2] = torch.nan
    assert diagnostics.alignment_accuracy(means, centroids, present).item() == 1
    assert torch.stack(diagnostics.alignment_cosines(means, centroids, present)).isfinite().all()
    means[0, 1] = torch.nan
    assert torch.stack(diagnostics.alignment_cosines(means, centroids, present)).isnan().all()


def test_strokes_that_miss_the_centres_are_measured_as_they_are_trained():
    step = example()
    strokes = torch.full_like(step.labels, IGNORE)
    strokes[:, ::4, ::4] = step.labels[:, ::4, ::4]  # One label of each pixel's 4 x 4, at a corner.
    at_corners = strokes[:, ::4, ::4]
    options = {"num_classes": 5, "grid_label": "commonest"}
    for measured in (diagnostics.cell_means, diagnostics.unit_means):
        found = measured(step.features, strokes, **options)
        assert_close(found, measured(step.features, at_corners, 5))
        assert not measured(step.features, strokes, 5)[1].any()
    with pytest.raises(ValueError, match="grid_label must be 'centre' or 'commonest', got 'mode'"):
        diagnostics.cell_means(step.features, strokes, 5, grid_label="mode")


def test_what_lies_under_an_ignored_label_does_not_matter():
    step = example()
    means = measure(step, 2)
    unit = diagnostics.unit_means(step.features, step.labels, 5)
    grid = mvsc.sampling.labels_on_grid(step.labels, (7, 5), 5, IGNORE)
    with torch.no_grad():
        step.features.masked_fill_((grid == 5)[:, None], torch.nan)
    assert_close(measure(step, 2), means, rtol=0, atol=0)
    assert_close(diagnostics.unit_means(step.features, step.labels, 5), unit, rtol=0, atol=0)


def example():
    features = torch.randn(2, 6, 7, 5).requires_grad_()
    labels = torch.randint(0, 4, (2, 28, 20))
    labels[0, :6] = IGNORE
    reg = mvsc.MVSCRegularizer(5, 6, 3)
    return Batch(reg, features, labels, nn.Conv2d(6, 5, 1))


def every_number(step: Batch):
    """Everything that a training loop may log at each step."""
    features, labels, centroids = step.features, step.labels, step.reg.centroids
    means, present = measure(step, step.reg.groups)
    unit, counts = diagnostics.unit_means(features, labels, step.reg.num_classes)
    return {
        "means": means,
        "group similarity": diagnostics.group_similarity(centroids),
        "similarity": diagnostics.centroid_similarity(centroids),
        "norms": diagnostics.centroid_norms(centroids),
        "accuracy": diagnostics.alignment_accuracy(means, centroids, present),
        "own group": diagnostics.alignment_accuracy(means, centroids, present, align_to="group"),
        "positive": diagnostics.alignment_cosines(means, centroids, present)[0],
        "negative": diagnostics.alignment_cosines(means, centroids, present)[1],
        "unit means": unit,
        "compactness": diagnostics.compactness(unit, counts),
        "separation": diagnostics.separation(unit, counts),
        "heat": diagnostics.centroid_heatmap(features, centroids, 2),
        "heat of a group": diagnostics.centroid_heatmap(features, centroids, 2, 1),
        "ages": diagnostics.class_ages(torch.zeros(5, dtype=torch.int64), labels),
    }


def test_the_diagnostics_read_nothing_back(monkeypatch):
    step = example()
    # As on a device, where values of labels are masked and not read.
    monkeypatch.setattr("mvsc.diagnostics.check_label_values", lambda *args: None)
    with NoHostReads():
        every_number(step)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="would wait"), NoHostReads():
        every_number(step)


def test_a_label_out_of_range_is_ignored_where_it_cannot_be_read(monkeypatch):
    step = example()
    ignored = step.labels.clone()
    ignored[0, 10:20], step.labels[0, 10:20] = IGNORE, 77
    expected = diagnostics.cell_means(step.features, ignored, 5)
    monkeypatch.setattr("mvsc.diagnostics.check_label_values", lambda *args: None)
    assert_close(diagnostics.cell_means(step.features, step.labels, 5), expected)


def test_the_diagnostics_have_no_gradient_and_change_nothing():
    step = example()
    before = [tensor.detach().clone() for tensor in (*step.leaves(), step.labels)]
    state = torch.get_rng_state()
    assert not any(value.requires_grad for value in every_number(step).values())
    after = [tensor.detach() for tensor in (*step.leaves(), step.labels)]
    assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.reg.step.item() == 0


def test_autocast_is_off_inside_the_diagnostics():
    step = example()
    expected = every_number(step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = every_number(step)
    assert_close(found, expected, rtol=0, atol=0)


def test_half_precision_is_widened():
    step = example()
    expected = every_number(step)
    found = every_number(Batch(step.reg, step.features.bfloat16(), step.labels, step.classifier))
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    for name in ("positive", "negative", "compactness", "separation", "heat"):
        assert_close(found[name], expected[name], rtol=0, atol=2e-2)


def test_a_training_that_aligns_shows_in_the_numbers():
    # 'The loss hardly decreases, is it working?' These answer.
    step = example()
    optimizer = torch.optim.Adam([step.features, step.reg.centroids], lr=0.05)
    first = every_number(step)
    for _ in range(60):
        optimizer.zero_grad()
        step.loss().backward()
        optimizer.step()
    last = every_number(step)
    assert last["accuracy"] == 1 > first["accuracy"]
    for name in ("positive", "compactness", "separation", "group similarity"):
        assert last[name] > first[name] + 0.1


V = torch.zeros(3, 5, 6)
R, PRESENT = torch.zeros(1, 5, 6), torch.ones(1, 5, dtype=torch.bool)
MAP, LABELS = torch.zeros(2, 6, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)
AGES = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: diagnostics.group_similarity([1.0]),
            TypeError,
            "centroids must be a floating-point tensor, got list [1.0]. Pass for example",
        ),
        (
            lambda: diagnostics.centroid_norms(V.long()),
            TypeError,
            "centroids must be a floating-point tensor, got torch.int64. Pass for example",
        ),
        (
            lambda: diagnostics.centroid_similarity(V[0]),
            ValueError,
            "centroids must have shape (groups, num_classes, dim) with at least one of each, "
            "got (5, 6). Use centroids.unsqueeze(0) for a single group.",
        ),
        (
            lambda: diagnostics.cell_means(MAP, LABELS + 7, 5),
            ValueError,
            "labels must be in 0 .. 4 or ignore_index=255, got 7 (128 px)",
        ),
        (
            lambda: diagnostics.unit_means(MAP, LABELS[:1], 5),
            ValueError,
            "labels must have the batch size of the features, 2, got 1.",
        ),
        (
            lambda: diagnostics.cell_means(MAP, LABELS, 5, groups=0),
            ValueError,
            "groups must be at least 1, got 0.",
        ),
        (
            lambda: diagnostics.alignment_accuracy(R[..., :4], V, PRESENT),
            ValueError,
            "means must have the num_classes and dim of the centroids, (5, 6), got (5, 4).",
        ),
        (
            lambda: diagnostics.alignment_accuracy(R, V, PRESENT, align_to="group"),
            ValueError,
            "means must have the groups of the centroids, 3, with align_to='group', got 1. "
            "Use cell_means(..., groups=3).",
        ),
        (
            lambda: diagnostics.alignment_accuracy(R, V, PRESENT, align_to="mean"),
            ValueError,
            "align_to must be 'global' or 'group', got 'mean'.",
        ),
        (
            lambda: diagnostics.alignment_cosines(R, V, PRESENT.int()),
            TypeError,
            "present must be a bool tensor, got torch.int32. Use counts > 0.",
        ),
        (
            lambda: diagnostics.alignment_cosines(R, V, PRESENT[0]),
            ValueError,
            "present must have shape (groups, num_classes), (1, 5), got (5,).",
        ),
        (
            lambda: diagnostics.compactness(None, AGES),
            TypeError,
            "means must be a floating-point tensor, got NoneType None. Use unit_means.",
        ),
        (
            lambda: diagnostics.separation(R, AGES),
            ValueError,
            "means must have shape (num_classes, dim) with at least one of each, got (1, 5, 6).",
        ),
        (
            lambda: diagnostics.separation(R[0], AGES[:2]),
            ValueError,
            "counts must have one entry for each of the 5 classes, got shape (2,).",
        ),
        (
            lambda: diagnostics.class_ages(AGES.float(), LABELS),
            TypeError,
            "ages must be an int64 tensor, got torch.float32. Start with torch.zeros(",
        ),
        (
            lambda: diagnostics.class_ages(AGES[None], LABELS),
            ValueError,
            "ages must have shape (num_classes,), got (1, 5). Keep one age for each class.",
        ),
        (
            lambda: diagnostics.class_ages(AGES, LABELS.flatten()),
            ValueError,
            "labels must have shape (batch, *spatial) with one to three spatial axes, got (",
        ),
        (
            lambda: diagnostics.class_ages(AGES, LABELS.float()),
            TypeError,
            "labels must be an integer tensor of class indices, got torch.float32.",
        ),
        (
            lambda: diagnostics.class_ages(AGES, LABELS.to("meta")),
            ValueError,
            "labels must be on the device of the ages, cpu, got meta. Use labels.to('cpu').",
        ),
        (
            lambda: diagnostics.centroid_heatmap(MAP[:, :4], V, 0),
            ValueError,
            "features must have shape (batch, dim, *spatial) with dim=6, the width of the "
            "centroids, got (2, 4, 4, 4).",
        ),
        (
            lambda: diagnostics.centroid_heatmap(MAP.to("meta"), V, 0),
            ValueError,
            "features must be on the device of the centroids, cpu, got meta.",
        ),
        (
            lambda: diagnostics.centroid_heatmap(MAP, V, 5),
            ValueError,
            "class_index must be in 0 .. 4, got 5.",
        ),
        (
            lambda: diagnostics.centroid_heatmap(MAP, V, 0, -1),
            ValueError,
            "group must be in 0 .. 2, got -1.",
        ),
        (
            lambda: diagnostics.centroid_heatmap(MAP, V, "road"),
            TypeError,
            "class_index must be an int, got str 'road'.",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_the_remedy(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_the_accuracy_is_of_what_eq_2_aligns():
    # One where the loss is near 0, whatever the target.
    centroids = torch.randn(3, 5, 16)
    for align_to, targets in (("global", centroids.mean(dim=0)), ("group", centroids)):
        means, present = targets.expand(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
        assert equations.alignment_loss(means, targets, present, 0.01) < 1e-6
        found = diagnostics.alignment_accuracy(means, centroids, present, align_to=align_to)
        assert found.item() == 1


@pytest.mark.parametrize("length", [1e20, 3e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_features_have_the_numbers_of_small_ones(length, dtype):
    centroids = torch.randn(2, 3, 4).to(dtype)
    features, labels = torch.randn(1, 4, 6, 6).to(dtype), torch.randint(0, 3, (1, 6, 6))

    def numbers(scale):
        means, present = diagnostics.cell_means(scale * features, labels, 3)
        return (
            diagnostics.group_similarity(scale * centroids),
            diagnostics.centroid_similarity(scale * centroids),
            diagnostics.centroid_norms(scale * centroids) / scale,
            diagnostics.compactness(*diagnostics.unit_means(scale * features, labels, 3)),
            *diagnostics.alignment_cosines(means, scale * centroids, present),
        )

    for huge, small in zip(numbers(length), numbers(1.0), strict=True):
        assert_close(huge, small, rtol=1e-2, atol=1e-2)


def test_means_and_centroids_on_two_devices_are_refused():
    means, present = torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"means must be on the device of the centroids, meta"):
        diagnostics.alignment_accuracy(means, torch.randn(2, 3, 4, device="meta"), present)
