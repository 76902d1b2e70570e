"""How fast is ``mvsc.segment_mean``, beside every other way to average pixels by cell?

    python benchmarks/bench_segment_mean.py            # writes benchmarks/results/
    python benchmarks/bench_segment_mean.py --quick    # tiny: checks equality, writes nothing

Every way is first compared with a float64 reference. Times are medians of interleaved runs. The
memory's limits, a plain read and a plain write of the same map, are measured in the same run:
forward has to read the map once, backward to write its gradient once.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bench_sums import (
    LAYOUTS,
    OrderedSum,
    Sum,
    bagged_embedding_bag,
    cell_order,
    index_add_rows,
    ordered_embedding_bag,
    rows_of,
    scatter_add_pixels,
    wide,
)
from measure import command_line, medians, write
from mvsc import segment_mean

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMMON = (torch.float32, torch.bfloat16)
"""Dtypes for which the slow ways are timed too."""
PAPER = (171, 4)
"""Classes of COCO-Stuff and the paper's best number of groups."""

Way = Callable[[Tensor, Tensor, int], Tensor]


def ours(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    return segment_mean(features, cells, num_cells)[0]


def divided(add: Sum) -> Way:
    """Turn a way to sum into one to average."""
    return lambda features, cells, num_cells: (
        add(features, cells, num_cells + 1)[:num_cells] / _counts(cells, num_cells)
    )


def in_order(add: OrderedSum) -> Sum:
    """Sort first, for a way to sum that takes the pixels cell by cell."""
    return lambda features, cells, num_cells: add(features, cell_order(cells, num_cells))


rows_index_add = divided(index_add_rows)


def python_loop(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Index the map by a mask for each cell, as research code does."""
    rows, index = rows_of(features), cells.flatten()
    means = [
        rows[mask].float().mean(0)
        if (mask := index == cell).any()
        else rows.new_zeros(rows.shape[1])
        for cell in range(num_cells)
    ]
    return torch.stack(means)


def one_hot_matmul(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).to(wide(features))
    one_hot = F.one_hot(cells.flatten(), num_cells + 1)[:, :num_cells].to(rows.dtype)
    return (one_hot.T @ rows) / _counts(cells, num_cells)


def rows_scatter_reduce(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).to(wide(features))
    index = cells.flatten().unsqueeze(1).expand_as(rows)
    means = rows.new_zeros(num_cells + 1, rows.shape[1])
    return means.scatter_reduce(0, index, rows, "mean", include_self=False)[:num_cells]


def sort_segment_reduce(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    index, order = cells.flatten().sort()
    rows = rows_of(features).to(wide(features))[order]
    lengths = torch.bincount(index, minlength=num_cells + 1)
    return torch.segment_reduce(rows, "mean", lengths=lengths, initial=0)[:num_cells]


WAYS: dict[str, Way] = {
    "mvsc.segment_mean": ours,
    "Python loop over cells": python_loop,
    "one-hot matmul": one_hot_matmul,
    "rows + index_add": rows_index_add,
    "rows + scatter_reduce": rows_scatter_reduce,
    "pixel axis + scatter_add": divided(scatter_add_pixels),
    "sort + segment_reduce": sort_segment_reduce,
    "sort + embedding_bag": divided(in_order(ordered_embedding_bag)),
    "sort + bags of 64": divided(in_order(bagged_embedding_bag(64))),
}
# Timed forward only: backward, the loop zeroes a map of gradients for each cell.
SLOW = ("Python loop over cells", "one-hot matmul", "sort + segment_reduce")

try:
    from torch_scatter import scatter_mean
except ImportError:
    pass
else:

    def torch_scatter_mean(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
        rows = rows_of(features).to(wide(features))
        return scatter_mean(rows, cells.flatten(), dim=0, dim_size=num_cells + 1)[:num_cells]

    WAYS["torch_scatter.scatter_mean"] = torch_scatter_mean


def main() -> None:
    device, quick = command_line(__doc__)

    size = 8 if quick else 128
    rounds, few = (1, 1) if quick else (7, 3)
    fast = {name: way for name, way in WAYS.items() if name not in SLOW}
    tables: dict[str, list[dict[str, object]]] = {
        "Every way, layout and dtype (B=4, D=256, 128 x 128, C=171, G=4)": [],
        "Number of cells (float32, the ways that are not hopeless)": [],
        "Size of the map (float32, C=171, G=4)": [],
    }
    every_way, cells, sizes = tables.values()
    for layout in LAYOUTS:
        for dtype in DTYPES:
            ways = WAYS if dtype in COMMON else fast
            every_way += compare(device, layout, dtype, size, *PAPER, rounds, ways)
        # Written again as each part is done: what is measured stays if the run is stopped.
        finish(tables, device, quick)
    for classes, groups in itertools.product((19, 150, 171, 1000), (1, 4, 8)):
        for layout in LAYOUTS:
            cells += compare(device, layout, torch.float32, size, classes, groups, few, fast)
    finish(tables, device, quick)
    for each, layout in itertools.product((4, 8) if quick else (64, 128, 256), LAYOUTS):
        sizes += compare(device, layout, torch.float32, each, *PAPER, few, fast)
    finish(tables, device, quick)


def finish(tables: dict[str, list[dict[str, object]]], device: torch.device, quick: bool) -> None:
    if not quick:
        write("bench_segment_mean", device, tables)


def compare(
    device: torch.device,
    layout: str,
    dtype: torch.dtype,
    size: int,
    classes: int,
    groups: int,
    rounds: int,
    ways: dict[str, Way],
) -> list[dict[str, object]]:
    """Check that all ways agree, then time them on one map; one row for each."""
    generator = torch.Generator().manual_seed(0)
    dim, num_cells = (8, classes * groups) if size < 64 else (256, classes * groups)
    features = torch.randn(4, dim, size, size, generator=generator).to(device, dtype)
    features = features.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    # Regions of 8 x 8 pixels of a class, each pixel in a random group, as in training.
    blocks = torch.randint(0, classes, (4, size // 4, size // 4), generator=generator)
    labels = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    group = torch.randint(0, groups, labels.shape, generator=generator)
    cells = (group * classes + labels).to(device)

    reference = rows_index_add(features.detach().double(), cells, num_cells)
    sent = torch.randn(reference.shape, generator=generator).to(device)
    exact = features.detach().double().requires_grad_()
    rows_index_add(exact, cells, num_cells).backward(sent.double())
    forward, both = {}, {}
    for name, way in ways.items():
        means = way(features, cells, num_cells)
        assert_close(means.double(), reference, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        forward[name] = partial(way, features.detach(), cells, num_cells)
        if name in SLOW:
            continue
        (gradient,) = torch.autograd.grad(means, features, sent.to(means.dtype))
        close = (
            {"rtol": 2e-2, "atol": 1e-4} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-6}
        )
        assert_close(gradient.double(), exact.grad, **close, msg=lambda m, n=name: n + m)
        both[name] = partial(_forward_backward, way, features, cells, num_cells, sent)
    limits = {"read": features.detach().sum, "write": partial(torch.full_like, features, 1.0)}
    times = medians({**limits, **both}, rounds)
    limit = times["read"] + times["write"]
    quick = {name: way for name, way in forward.items() if name not in SLOW}
    slow = {name: way for name, way in forward.items() if name in SLOW}
    forward_times = medians(quick, rounds) | medians(slow, 1 + rounds // 5)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            "C": classes,
            "G": groups,
            "map": f"{size} x {size}",
            "way": name,
            "forward ms": forward_times[name],
            "forward + backward ms": times.get(name, "not timed"),
            "over read + write": times[name] / limit if name in times else "",
            "read ms": times["read"],
            "write ms": times["write"],
        }
        for name in ways
    ]


def _forward_backward(
    way: Way, features: Tensor, cells: Tensor, num_cells: int, sent: Tensor
) -> None:
    means = way(features, cells, num_cells)
    torch.autograd.grad(means, features, sent.to(means.dtype))


def _counts(cells: Tensor, num_cells: int) -> Tensor:
    counts = torch.bincount(cells.flatten(), minlength=num_cells + 1)[:num_cells]
    return counts.clamp_min(1).unsqueeze(1)


if __name__ == "__main__":
    main()
