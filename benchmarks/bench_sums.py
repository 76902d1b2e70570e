"""Which way to sum the pixels of each cell, and to spread a table over them, is fastest on a GPU?

    python benchmarks/bench_sums.py            # on a GPU: writes benchmarks/results/
    python benchmarks/bench_sums.py --quick    # tiny: checks equality, writes nothing

The kernel's two halves apart, which bench_segment_mean.py times together: this is what the ways in
mvsc/kernel.py were chosen by. Each is first compared with float64. Medians of triton's do_bench,
which empties the cache before each run.
"""

import itertools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import command_line, medians, write
from mvsc import kernel

Sum = Callable[[Tensor, Tensor, int], Tensor]
Spread = Callable[[Tensor, Tensor, torch.dtype], Tensor]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MAPS = ((4, 256, 128, 171), (16, 256, 128, 171), (16, 128, 96, 39), (16, 256, 64, 19))
"""Batch, D, side and classes; four groups."""


def rows_of(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2).reshape(-1, features.shape[1])


def wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def index_add_rows(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).to(wide(features))
    return rows.new_zeros(num_cells, rows.shape[1]).index_add_(0, cells.flatten(), rows)


def scatter_add_rows(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).float()
    index = cells.flatten()[:, None].expand_as(rows)
    return rows.new_zeros(num_cells, rows.shape[1]).scatter_add_(0, index, rows)


def scatter_add_pixels(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    columns = features.flatten(2).to(wide(features))
    index = cells.flatten(1).unsqueeze(1).expand_as(columns)
    sums = columns.new_zeros(*columns.shape[:2], num_cells).scatter_add_(2, index, columns)
    return sums.sum(0).t()


def one_hot_product(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features)
    one_hot = rows.new_zeros(len(rows), num_cells).scatter_(1, cells.flatten()[:, None], 1)
    if features.is_cuda and rows.dtype != torch.float32:
        return torch.mm(one_hot.t(), rows, out_dtype=torch.float32)
    return one_hot.float().t() @ rows.float()


def sorted_index_add(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    index, order = cells.flatten().sort()
    rows = rows_of(features)[order].float()
    return rows.new_zeros(num_cells, rows.shape[1]).index_add_(0, index, rows)


def sorted_embedding_bag(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    index, order = cells.flatten().sort()
    starts = torch.searchsorted(index, torch.arange(num_cells, device=index.device))
    rows = rows_of(features).to(wide(features))
    return F.embedding_bag(order, rows, starts, mode="sum")


def sorted_segment_reduce(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    index, order = cells.flatten().sort()
    lengths = torch.bincount(index, minlength=num_cells)
    rows = rows_of(features).float()[order]
    return torch.segment_reduce(rows, "sum", lengths=lengths, initial=0)


def sparse_product(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    index, order = cells.flatten().sort()
    starts = torch.searchsorted(index, torch.arange(num_cells + 1, device=index.device))
    rows = rows_of(features).float()
    ones, shape = rows.new_ones(len(rows)), (num_cells, len(rows))
    return torch.sparse_csr_tensor(starts, order, ones, shape, check_invariants=False) @ rows


SUMS: dict[str, Sum] = {
    "index_add by blocks, as on a CPU": kernel._index_add_sum,
    "index_add of rows": index_add_rows,
    "scatter_add of rows": scatter_add_rows,
    "scatter_add along the pixels": scatter_add_pixels,
    "one-hot product": one_hot_product,
    "sort + index_add": sorted_index_add,
    "sort + embedding_bag": sorted_embedding_bag,
    "sort + segment_reduce": sorted_segment_reduce,
    "sort + sparse product": sparse_product,
}


def gather_pixels(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel._spread(table, cells, dtype, channels_last=False)


def select_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel._spread(table, cells, dtype, channels_last=True)


def copied_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return select_rows(table, cells, dtype).contiguous()


SPREADS: dict[str, dict[str, Spread]] = {
    "contiguous": {"gather": gather_pixels, "index_select of rows, copied": copied_rows},
    "channels_last": {"index_select of rows": select_rows},
}


def main() -> None:
    device, quick = command_line(__doc__)
    warnings.filterwarnings("ignore", "Sparse")  # torch calls its own sparse tensors a beta
    tables: dict[str, list[dict[str, object]]] = {}
    for shape in ((2, 8, 8, 3),) if quick else MAPS:
        batch, dim, side, classes = shape
        columns = {
            f"{layout}, {str(dtype).removeprefix('torch.')}": compare(device, shape, layout, dtype)
            for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16))
        }
        ways = dict.fromkeys(way for times in columns.values() for way in times)
        tables[f"{batch} x {dim} x {side} x {side}, {classes} classes: ms"] = [
            {"way": way, **{title: times.get(way, "") for title, times in columns.items()}}
            for way in ways
        ]
    if not quick:
        write("bench_sums", device, tables)


def compare(
    device: torch.device, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> dict[str, float]:
    """Check that all ways agree, then time them on one map, in milliseconds."""
    batch, dim, side, classes = shape
    num_cells = 4 * classes + 1
    generator = torch.Generator(device).manual_seed(0)

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator, device=device)

    # Blocks of 8 x 8 pixels out of at most 20 classes an image, each pixel in a random group.
    blocks = draw(classes, batch, 20).gather(1, draw(20, batch, (side // 8) ** 2))
    labels = blocks.view(batch, side // 8, side // 8).repeat_interleave(8, 1)
    labels = labels.repeat_interleave(8, 2)
    cells = labels + classes * draw(4, *labels.shape)
    features = torch.randn(batch, dim, side, side, generator=generator, device=device).to(dtype)
    # As the kernel flattens them: (batch, D, pixels), whatever the layout.
    features = features.contiguous(memory_format=LAYOUTS[layout]).flatten(2)
    cells = cells.flatten(1)
    exact = rows_of(features).double()
    exact = exact.new_zeros(num_cells, dim).index_add_(0, cells.flatten(), exact)
    table = torch.randn(num_cells, dim, generator=generator, device=device)

    ways: dict[str, Callable[[], Tensor]] = {
        "a plain read": features.sum,
        "a plain write": lambda: torch.full_like(features, 1.0),
    }
    for name, add in SUMS.items():
        error = (add(features, cells, num_cells).double() - exact).norm() / exact.norm()
        assert error < 1e-5, f"{name} is wrong by {error:.1e}"
        ways[f"sum: {name}"] = lambda add=add: add(features, cells, num_cells)
    for name, spread in SPREADS[layout].items():
        found = spread(table, cells, dtype)
        assert torch.equal(found, table.to(dtype)[cells].transpose(1, 2)), f"{name} is wrong"
        ways[f"gradient: {name}"] = lambda spread=spread: spread(table, cells, dtype)
    return timed(ways, device)


def timed(ways: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return medians(ways, 1)
    from triton.testing import do_bench  # part of torch for GPUs

    return {
        name: do_bench(way, warmup=5, rep=30, return_mode="median") for name, way in ways.items()
    }


if __name__ == "__main__":
    main()
