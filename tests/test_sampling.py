import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import oracle
from mvsc import sampling
from mvsc.sampling import (
    cells_of_classes,
    commonest_on_grid,
    draw_groups,
    draw_halves,
    draw_order,
    labels_on_grid,
)

INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def split(labels, groups, num_classes, step=0, seed=0, rank=0):
    cells = draw_groups(labels, groups, num_classes, torch.tensor(step), seed, rank)
    return torch.where(cells < groups * num_classes, cells // num_classes, -1), cells


@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 4),
    ignore_index=st.sampled_from([255, -1, -100, 300, 0]),
)
@settings(max_examples=60, deadline=None)
def test_labels_are_taken_at_the_exact_centre(sizes, ignore_index):
    height, width, target_height, target_width = sizes
    labels = torch.randint(0, 5, (2, height, width))
    labels[0, 0, 0] = ignore_index
    grid = labels_on_grid(labels, (target_height, target_width), 5, ignore_index)
    expected = oracle.labels_on_grid(labels.numpy(), (target_height, target_width), 5, ignore_index)
    expected[expected == None] = 5  # noqa: E711
    assert_close(grid, torch.from_numpy(expected.astype(np.int64)))


def commonest(labels, size, num_classes, ignore_index):
    """Let each label pixel vote in the feature pixel that its centre lies in, one by one."""
    spatial = labels.shape[1:]
    votes, reached = defaultdict(Counter), set()
    for place in itertools.product(*map(range, labels.shape)):
        inside = [
            int(Fraction(2 * i + 1, 2 * source) * target)
            for i, source, target in zip(place[1:], spatial, size, strict=True)
        ]
        own, label = (place[0], *inside), int(labels[place])
        reached.add(own)
        if 0 <= label < num_classes and label != ignore_index:
            votes[own][label] += 1
    grid = labels_on_grid(labels, size, num_classes, ignore_index)
    for own in itertools.product(range(len(labels)), *map(range, size)):
        if own in reached:
            counted = votes[own]
            most = max(counted.values(), default=0)
            grid[own] = min((c for c, n in counted.items() if n == most), default=num_classes)
    return grid


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    batch=st.integers(0, 2),
    ignore_index=st.sampled_from([255, -1, -100, 0, 2]),
    dtype=st.sampled_from([torch.int64, torch.int16, torch.uint16]),
    sparse=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None)
def test_the_commonest_label_is_the_one_that_a_plain_loop_counts(
    sizes, batch, ignore_index, dtype, sparse, seed
):
    generator = torch.Generator().manual_seed(seed)
    source, target = [a for a, _ in sizes], tuple(b for _, b in sizes)
    labels = torch.randint(0, 5, (batch, *source), generator=generator)  # 4 is out of range.
    if sparse:
        labels[torch.rand(labels.shape, generator=generator) < 0.8] = 255
    if dtype != torch.uint16 and ignore_index < 0:
        labels[labels == 3] = ignore_index
    expected = commonest(labels, target, 4, ignore_index)
    found = commonest_on_grid(labels.to(dtype), target, 4, ignore_index)
    assert_close(found, expected, rtol=0, atol=0)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=3),
    ignore_index=st.sampled_from([255, 0, -1]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_feature_pixels_of_a_class_are_those_that_a_plain_loop_counts(
    sizes, ignore_index, seed
):
    source, target = [a for a, _ in sizes], tuple(b for _, b in sizes)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 5, (2, *source), generator=generator)
    there = defaultdict(set)
    for place in itertools.product(*map(range, labels.shape)):
        label = int(labels[place])
        if 0 <= label < 4 and label != ignore_index:
            inside = (
                int(Fraction(2 * i + 1, 2 * a) * b)
                for i, a, b in zip(place[1:], source, target, strict=True)
            )
            own = (place[0], *inside)
            there[label].add(own)
            there["any"].add(own)
    expected = [len(there[key]) for key in (*range(4), "any")]
    assert cells_of_classes(labels, target, 4, ignore_index).tolist() == expected


def test_the_commonest_label_of_equal_sizes_is_the_label():
    labels = torch.randint(0, 9, (2, 5, 7))
    assert_close(commonest_on_grid(labels, (5, 7), 9, 255), labels)


@pytest.mark.parametrize("size", [(23, 31), (47, 63), (24, 32)])
def test_the_commonest_label_of_a_real_size_counts_every_labelled_cell(size):
    labels = torch.full((2, 375, 500), 255)
    labels[torch.rand(labels.shape) < 0.01] = 3
    found = commonest_on_grid(labels, size, 5, 255)
    rows = ((2 * torch.arange(375) + 1) * size[0]) // (2 * 375)
    columns = ((2 * torch.arange(500) + 1) * size[1]) // (2 * 500)
    hit = torch.zeros(2, *size, dtype=torch.bool)
    for image, row, column in (labels == 3).nonzero().tolist():
        hit[image, rows[row], columns[column]] = True
    assert_close(found, torch.where(hit, 3, 5))


def test_labels_of_the_grids_own_size_are_kept():
    labels = torch.randint(0, 9, (2, 5, 7))
    assert_close(labels_on_grid(labels, (5, 7), 9, 255), labels)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 300, 0])
def test_every_integer_dtype_gives_the_same_grid(dtype, ignore_index):
    # uint8 == -100 is true for class 156, uint8 == 256 for class 0, unless labels are widened.
    top = 120 if dtype == torch.int8 else 200
    labels = torch.arange(top).reshape(1, 10, -1)
    if torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        labels[:, ::3] = ignore_index
    grid = labels_on_grid(labels.to(dtype), (10, labels.shape[2]), top, ignore_index)
    expected = torch.where(labels == ignore_index, top, labels)
    assert_close(grid, expected)


@pytest.mark.parametrize("label", [-1, 5, 254, 2**40])
def test_labels_out_of_range_do_not_count(label):
    assert labels_on_grid(torch.tensor([[[label]]]), (1, 1), 5, 255).item() == 5


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    groups=st.integers(1, 9),
    step=st.integers(0, 2**62),
)
@settings(max_examples=100, deadline=None)
def test_the_split_is_a_balanced_partition_of_each_class(labels, groups, step):
    num_classes = 4  # so 4 marks the pixels that do not count
    labels = torch.tensor(labels).reshape(1, 1, -1)
    cells = draw_groups(labels, groups, num_classes, torch.tensor(step))
    sizes = torch.bincount(cells.flatten(), minlength=groups * num_classes + 1)
    assert sizes[-1] == (labels == num_classes).sum()
    sizes = sizes[:-1].reshape(groups, num_classes)
    assert_close(sizes.sum(0), torch.bincount(labels.flatten(), minlength=5)[:4])
    assert (sizes.amax(0) - sizes.amin(0) <= 1).all()
    counted = labels < num_classes
    assert_close(cells[counted] % num_classes, labels[counted])


def test_the_split_is_the_same_on_any_number_of_threads():
    labels = torch.randint(0, 20, (2, 192, 192))

    def on(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return split(labels, 4, 20)[0]
        finally:
            torch.set_num_threads(before)

    alone = on(1)
    for threads in (2, 3):
        assert_close(on(threads), alone, rtol=0, atol=0)


def test_the_split_changes_with_seed_step_and_rank_and_with_nothing_else():
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    base, _ = split(labels, 4, 1)
    assert_close(split(labels, 4, 1)[0], base)
    for change in ({"seed": 1}, {"step": 1}, {"rank": 1}, {"seed": 2**40}, {"step": 2**40}):
        agreement = (split(labels, 4, 1, **change)[0] == base).double().mean().item()
        assert 0.1 < agreement < 0.4, change  # 1/4 by chance


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, 2**32, 2**62])
def test_large_steps_draw_anew(step):
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    one, two = split(labels, 4, 1, step=step)[0], split(labels, 4, 1, step=step + 1)[0]
    assert (one == two).double().mean() < 0.4


def test_groups_are_uniform_over_steps_for_each_pixel():
    # 8 pixels of one class, 4 groups, many steps: every (pixel, group) pair 1/4 of the time.
    labels = torch.zeros(1, 1, 8, dtype=torch.int64)
    steps = 4000
    hits = torch.zeros(8, 4)
    for step in range(steps):
        hits += torch.nn.functional.one_hot(split(labels, 4, 1, step=step)[0].flatten(), 4)
    chi_square = ((hits - steps / 4) ** 2 / (steps / 4)).sum().item()
    assert chi_square < 60  # 24 degrees of freedom: 99.99 % of fair draws lie below 59


def test_pairs_of_pixels_share_a_group_as_often_as_in_a_random_partition():
    # In a balanced partition of 8 pixels into 4 pairs any two meet with probability 1/7.
    labels = torch.zeros(1, 1, 8, dtype=torch.int64)
    steps = 4000
    together = torch.zeros(8, 8)
    for step in range(steps):
        group = split(labels, 4, 1, step=step)[0].flatten()
        together += group[:, None] == group[None, :]
    pairs = together[~torch.eye(8, dtype=torch.bool)] / steps
    assert_close(pairs, torch.full_like(pairs, 1 / 7), rtol=0, atol=0.025)


def test_which_group_a_single_pixel_fills_is_random_too():
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    groups = torch.stack([split(labels, 4, 1, step=s)[0].flatten() for s in range(2000)])
    shares = torch.bincount(groups.flatten(), minlength=4) / 2000
    assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.05)


def test_classes_and_consecutive_steps_are_split_independently():
    labels = torch.arange(2).repeat_interleave(512).reshape(1, 2, 512)
    for other in ((split(labels, 4, 2, step=0)[0][:, 1]), (split(labels, 4, 2, step=1)[0][:, 0])):
        first = split(labels, 4, 2, step=0)[0][:, 0]
        table = torch.bincount((first * 4 + other).flatten(), minlength=16).double()
        chi_square = ((table - 32) ** 2 / 32).sum().item()
        assert chi_square < 38  # 9 to 15 degrees of freedom


def test_steps_are_split_independently_however_far_apart():
    # A step enters as a multiple of the golden ratio, which after Fibonacci's numbers comes nearly
    # back to where it was.
    labels, fibonacci = torch.zeros(1, 64, 64, dtype=torch.int64), [1, 2]
    while len(fibonacci) < 60:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    first = split(labels, 4, 1, step=7)[0]
    for lag in fibonacci:
        agreement = (split(labels, 4, 1, step=7 + lag)[0] == first).double().mean().item()
        assert abs(agreement - 0.25) < 0.03, lag  # four standard deviations


def test_neighbouring_pixels_are_split_independently():
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    group, _ = split(labels, 4, 1, step=3)
    for neighbour in (group[:, :, 1:] == group[:, :, :-1], group[:, 1:] == group[:, :-1]):
        assert abs(neighbour.double().mean().item() - 0.25) < 0.03


def test_the_halves_part_the_groups_and_every_pair_of_halves_is_drawn():
    drawn = [draw_halves(4, torch.tensor(step)) for step in range(300)]
    seen = Counter(tuple(half_a.nonzero().flatten().tolist()) for half_a, _ in drawn)
    assert_close(torch.stack(drawn).sum(1), torch.full((300, 4), 0.5))
    assert sorted(seen) == list(itertools.combinations(range(4), 2))
    assert min(seen.values()) > 25  # 50 by chance


def test_the_halves_of_an_odd_number_of_groups_are_means():
    halves = draw_halves(5, torch.tensor(3), dtype=torch.float64)
    expected = torch.tensor([[0, 0, 0, 3, 3], [0, 0, 2, 2, 2]], dtype=torch.float64) / 6
    assert_close(halves.sort().values, expected, rtol=0, atol=1e-16)


def test_what_each_step_needs_is_made_once_however_many_sizes_come(monkeypatch):
    made, make = [], sampling._halves
    sampling._made.cache_clear()
    monkeypatch.setattr(sampling, "_halves", lambda *sizes: made.append(sizes) or make(*sizes))
    for size in range(40):
        draw_groups(torch.zeros(1, 1, 1 + size, dtype=torch.int64), 4, 1, torch.tensor(0))
        draw_halves(4, torch.tensor(0))
    assert len(made) == 1
    assert sampling._made.cache_info().currsize <= 16


def test_draws_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    draw_groups(torch.zeros(1, 8, 8, dtype=torch.int64), 4, 1, torch.tensor(0))
    draw_halves(4, torch.tensor(0))
    assert_close(torch.get_rng_state(), before)


def test_the_draw_of_version_0_1_is_drawn_for_ever():
    # A resumed run has to continue with the splits it would have drawn: this table is frozen.
    labels = torch.tensor([[[0, 0, 0, 0, 0, 1, 1, 2]]])
    cells = draw_groups(labels, 3, 2, torch.tensor(11), seed=7, rank=1)
    assert cells.flatten().tolist() == [2, 2, 4, 0, 0, 3, 5, 6]
    assert draw_order(5, torch.tensor(11), seed=7).tolist() == [3, 4, 2, 0, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of inductor's own
def test_the_default_compiler_draws_what_is_drawn_without_it():
    labels = torch.randint(0, 20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    step = torch.tensor(3)
    compiled = torch.compile(draw_groups, fullgraph=True)
    expected = draw_groups(labels, 4, 19, step)
    assert_close(compiled(labels, 4, 19, step), expected, rtol=0, atol=0)
