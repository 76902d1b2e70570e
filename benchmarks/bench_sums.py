"""Which way to sum the pixels of each cell, and to spread a table over them, is fastest on a GPU?

    python benchmarks/bench_sums.py            # on a GPU: writes benchmarks/results/
    python benchmarks/bench_sums.py --quick    # tiny: checks equality, writes nothing

The kernel's two halves apart, which bench_segment_mean.py times together: this is what the ways in
mvsc/kernel.py are chosen by, and its first table says which way wins where. Each way is first
compared with float64, and twice with itself where it is said to be deterministic. Medians of
triton's do_bench, which empties the cache before each run.

A way in cell order is given what the sort of the split leaves: the pixels cell by cell. The sort
is timed on its own, since with more than one group the split has to sort anyway.
"""

import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import command_line, medians, noted, write
from mvsc import kernel

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = 4
MAPS = tuple(
    (batch, 256, side, classes)
    for batch, side, classes in itertools.product((2, 16), (64, 128, 256), (19, 171, 1000))
)
"""Batch, D, side and classes."""
ON_A_CPU = ((2, 256, 64, 19), (2, 256, 128, 171))
QUICK = ((2, 8, 8, 3), (3, 8, 16, 40))


class Order(NamedTuple):
    """The pixels, numbered through the batch, cell by cell.

    Attributes:
        pixels: number of the pixel at each place.
        ends: the place after the last pixel of each cell.
        counts: pixels of each cell.
    """

    pixels: Tensor
    ends: Tensor
    counts: Tensor


Sum = Callable[[Tensor, Tensor, int], Tensor]
OrderedSum = Callable[[Tensor, Order], Tensor]
Spread = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def cell_order(cells: Tensor, num_cells: int, generator: torch.Generator | None = None) -> Order:
    """Sort the pixels by cell; with a generator at random in each, as the split does."""
    flat = cells.flatten()
    counts = torch.bincount(flat, minlength=num_cells)
    if generator is not None:
        numbers = torch.randint(2**31, flat.shape, generator=generator, device=flat.device)
        flat = numbers.add(flat, alpha=2**31)
    return Order(flat.sort(stable=True).indices, counts.cumsum(0), counts)


def rows_of(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2).reshape(-1, features.shape[1])


def wide(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def todays(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    sums: Tensor = kernel._sum(features, cells, num_cells)
    return sums


def todays_deterministic(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return todays(features, cells, num_cells)
    finally:
        torch.use_deterministic_algorithms(before)


def index_add_rows(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).to(wide(features))
    return rows.new_zeros(num_cells, rows.shape[1]).index_add_(0, cells.flatten(), rows)


def scatter_add_rows(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    rows = rows_of(features).float()
    index = cells.flatten()[:, None].expand_as(rows)
    return rows.new_zeros(num_cells, rows.shape[1]).scatter_add_(0, index, rows)


def scatter_add_images(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Add the rows of one image after the other, read in the layout that it has."""
    sums = features.new_zeros(num_cells, features.shape[1], dtype=torch.float32)
    for image, index in zip(features, cells, strict=True):
        sums.scatter_add_(0, index[:, None].expand(-1, len(image)), image.t().float())
    return sums


def scatter_add_pixels(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    columns = features.flatten(2).to(wide(features))
    index = cells.flatten(1).unsqueeze(1).expand_as(columns)
    sums = columns.new_zeros(*columns.shape[:2], num_cells).scatter_add_(2, index, columns)
    return sums.sum(0).t()


_ONE_HOT = 2**24
"""Numbers of a one-hot matrix at once: 32 MiB, which stay in the cache of a large GPU."""


def one_hot_product(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Multiply with one-hot matrices on tensor cores, in the layout that the map has.

    The other factor is 0 or 1 and sums are float32, so nothing of 16 bits is rounded. That takes
    finite maps: 0 times infinity would reach every cell.
    """
    batch, dim, pixels = features.shape
    images = max(1, _ONE_HOT // (pixels * num_cells))
    length = min(pixels, max(1, _ONE_HOT // num_cells))
    # A row of 16 bytes times a whole number, or tensor cores take a slower way.
    columns = torch.arange(-(-num_cells // 8) * 8, device=cells.device)
    sums = features.new_zeros(dim, len(columns), dtype=torch.float32)
    for first, start in itertools.product(range(0, batch, images), range(0, pixels, length)):
        block = features[first : first + images, :, start : start + length]
        index = cells[first : first + images, start : start + length, None]
        parts = exact_parts(block)
        one_hot = (index == columns).to(parts[0].dtype)
        for part in parts:
            sums += product(part, one_hot).sum(0)
    return sums[:, :num_cells].t()


def exact_parts(values: Tensor) -> list[Tensor]:
    """Cut float32 into three numbers of bfloat16, whose sum it is; leave 16 bits as they are."""
    if values.dtype != torch.float32:
        return [values]
    high = values.bfloat16()
    rest = values - high
    middle = rest.bfloat16()
    return [high, middle, (rest - middle).bfloat16()]


def product(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


SUMS: dict[str, Sum] = {
    "today's": todays,
    "today's, deterministic algorithms": todays_deterministic,
    "index_add by blocks, as on a CPU": kernel._index_add_sum,
    "index_add of rows": index_add_rows,
    "scatter_add of rows": scatter_add_rows,
    "scatter_add of an image's rows, not copied": scatter_add_images,
    "scatter_add along the pixels": scatter_add_pixels,
    "one-hot products": one_hot_product,
}


def ordered_index_add(features: Tensor, order: Order) -> Tensor:
    rows = rows_of(features)[order.pixels].float()
    cells = torch.searchsorted(order.ends, places(order), right=True)
    return rows.new_zeros(len(order.ends), rows.shape[1]).index_add_(0, cells, rows)


def ordered_embedding_bag(features: Tensor, order: Order) -> Tensor:
    rows = rows_of(features).to(wide(features))
    return F.embedding_bag(order.pixels, rows, order.ends - order.counts, mode="sum")


def ordered_segment_reduce(features: Tensor, order: Order) -> Tensor:
    rows = rows_of(features)[order.pixels].float()
    return torch.segment_reduce(rows, "sum", lengths=order.counts, initial=0)


def sparse_product(features: Tensor, order: Order) -> Tensor:
    rows = rows_of(features).float()
    starts = F.pad(order.ends, (1, 0))
    ones, shape = rows.new_ones(len(rows)), (len(order.ends), len(rows))
    return torch.sparse_csr_tensor(starts, order.pixels, ones, shape, check_invariants=False) @ rows


class Bags(NamedTuple):
    """The order cut into bags of at most ``size`` pixels of one cell; their number is fixed.

    Attributes:
        size: the most that a bag holds.
        starts: the place where each bag starts; those that are not needed hold nothing.
        ends: the bag after the last one of each cell.
        counts: bags of each cell.
    """

    size: int
    starts: Tensor
    ends: Tensor
    counts: Tensor


def places(order: Order) -> Tensor:
    return torch.arange(len(order.pixels), device=order.pixels.device)


def bags_of(order: Order, size: int) -> Bags:
    num_cells, pixels = len(order.ends), len(order.pixels)
    counts = (order.counts + (size - 1)) // size
    ends = counts.cumsum(0)
    bags = torch.arange(pixels // size + num_cells, device=ends.device)
    cell = torch.searchsorted(ends, bags, right=True).clamp_(max=num_cells - 1)
    # A bag's number in its own cell; one past the last bag starts, as it ends, at the end.
    number = bags - (ends - counts)[cell]
    starts = torch.minimum((order.ends - order.counts)[cell] + size * number, order.ends[cell])
    return Bags(size, starts, ends, counts)


def bagged_embedding_bag(size: int) -> OrderedSum:
    def add(features: Tensor, order: Order) -> Tensor:
        """Sum the rows of each bag, then the bags of each cell: two passes without atomics."""
        bags = bags_of(order, size)
        rows = rows_of(features).to(wide(features))
        sums = F.embedding_bag(order.pixels, rows, bags.starts, mode="sum")
        return sum_of_bags(sums, bags)

    return add


def bagged_slots(size: int) -> OrderedSum:
    def add(features: Tensor, order: Order) -> Tensor:
        """Write each row to its own slot in its bag, then sum the slots, widened as they are read.

        No map is copied: embedding_bag needs rows, and of half precision in float32.
        """
        bags = bags_of(order, size)
        place = places(order)
        cell = torch.searchsorted(order.ends, place, right=True)
        slot = place + ((bags.ends - bags.counts) * size - (order.ends - order.counts))[cell]
        slots = torch.empty_like(slot).scatter_(0, order.pixels, slot)
        batch, dim, pixels = features.shape
        filled = features.new_zeros(len(bags.starts) * size, dim)
        filled[slots.view(batch, pixels)] = features.transpose(1, 2)
        sums = filled.view(-1, size, dim).sum(1, dtype=wide(features))
        return sum_of_bags(sums, bags)

    return add


def bagged_segment_reduce(size: int) -> OrderedSum:
    def add(features: Tensor, order: Order) -> Tensor:
        bags = bags_of(order, size)
        rows = rows_of(features)[order.pixels].float()
        starts = F.pad(bags.starts, (0, 1), value=len(rows))
        sums = torch.segment_reduce(rows, "sum", lengths=starts.diff(), initial=0)
        return sum_of_bags(sums, bags)

    return add


def sum_of_bags(sums: Tensor, bags: Bags) -> Tensor:
    numbers = torch.arange(len(sums), device=sums.device)
    # A last, unasked cell takes the bags that were not needed.
    starts = F.pad(bags.ends, (1, 0))
    return F.embedding_bag(numbers, sums, starts, mode="sum")[:-1]


ORDERED: dict[str, OrderedSum] = {
    "in order: index_add": ordered_index_add,
    "in order: embedding_bag": ordered_embedding_bag,
    "in order: segment_reduce": ordered_segment_reduce,
    "in order: sparse product": sparse_product,
    "bags of 16: embedding_bag": bagged_embedding_bag(16),
    "bags of 64: embedding_bag": bagged_embedding_bag(64),
    "bags of 64: segment_reduce": bagged_segment_reduce(64),
    "bags of 16: slots": bagged_slots(16),
    "bags of 64: slots": bagged_slots(64),
}

DETERMINISTIC = {
    "today's, deterministic algorithms",
    "one-hot products",
    "in order: embedding_bag",
    "in order: segment_reduce",
    *(name for name in ORDERED if name.startswith("bags")),
}
"""Sums that are the same, bit by bit, each time."""


def gather_pixels(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel._spread(table, cells, dtype, channels_last=False)


def select_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return kernel._spread(table, cells, dtype, channels_last=True)


def copied_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return select_rows(table, cells, dtype).contiguous()


def select_columns(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Select the columns of one image after the other."""
    columns = as_bits(table.to(dtype).t().contiguous())
    found = columns.new_empty(len(cells), len(columns), cells.shape[1])
    for image, index in zip(found, cells.int(), strict=True):
        torch.index_select(columns, 1, index, out=image)
    return found.view(dtype)


def product_to_pixels(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply the table with one-hot matrices on tensor cores: one number of each sum is not 0."""
    found = table.new_empty(len(cells), table.shape[1], cells.shape[1], dtype=dtype)
    return spread_by_products(table, cells, found)


def product_to_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    rows = table.new_empty(*cells.shape, table.shape[1], dtype=dtype)
    return spread_by_products(table, cells, rows.transpose(1, 2))


def spread_by_products(table: Tensor, cells: Tensor, found: Tensor) -> Tensor:
    parts = exact_parts(table.to(found.dtype).t())
    numbers = torch.arange(len(table), device=cells.device)[:, None]
    images = max(1, _ONE_HOT // (cells.shape[1] * len(table)))
    rows = found.stride(1) == 1
    for into, index in zip(found.split(images), cells.split(images), strict=True):
        one_hot = (index[:, None] == numbers).to(parts[0].dtype)
        # The smallest first: each sum is exact.
        for number, part in enumerate(reversed(parts)):
            each = part.expand(len(index), -1, -1)
            # The product is written in the layout that is asked for.
            one = product(one_hot.mT, each.mT).mT if rows else product(each, one_hot)
            if number:
                into += one
            else:
                into.copy_(one)
    return found


def index_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return table.to(dtype)[cells].transpose(1, 2)


def embedding_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(cells.int(), table.to(dtype)).transpose(1, 2)


def select_wide_rows(table: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Select rows of 16 bytes at once, which to a GPU are one number."""
    rows = table.to(dtype).view(torch.complex128).index_select(0, cells.flatten())
    return rows.view(dtype).view(*cells.shape, -1).transpose(1, 2)


def as_bits(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.element_size() == 2 else values


SPREADS: dict[str, dict[str, Spread]] = {
    "contiguous": {
        "today's": gather_pixels,
        "index_select of rows, copied": copied_rows,
        "index_select of an image's columns": select_columns,
        "one-hot products": product_to_pixels,
    },
    "channels_last": {
        "today's": select_rows,
        "index": index_rows,
        "embedding": embedding_rows,
        "index_select of 16 bytes": select_wide_rows,
        "one-hot products": product_to_rows,
    },
}


def int32_keys(labels: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """Put the class above as many bits of the number as an int32 has left."""
    bits = 31 - num_classes.bit_length()
    return (labels << bits).add(numbers & (2**bits - 1)).int()


# From the labels, flattened, random numbers of 32 bits and the number of classes to an order of
# the pixels by class and, but for the last, at random in it.
SORTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "today's: int64, stable": lambda labels, numbers, _: (
        numbers.add(labels, alpha=2**32).sort(stable=True).indices
    ),
    "int64, not stable": lambda labels, numbers, _: numbers.add(labels, alpha=2**32).sort().indices,
    "int64, argsort": lambda labels, numbers, _: numbers.add(labels, alpha=2**32).argsort(),
    "int32, stable": lambda *split: int32_keys(*split).sort(stable=True).indices,
    "int32, not stable": lambda *split: int32_keys(*split).sort().indices,
    "float64, stable": lambda labels, numbers, _: (
        numbers.add(labels, alpha=2**32).double().sort(stable=True).indices
    ),
    "the classes alone, int16, stable": lambda labels, *_: labels.short().sort(stable=True).indices,
}

Times = dict[str, float | str]


def main() -> None:
    device, quick = command_line(__doc__)
    warnings.filterwarnings("ignore", "Sparse")  # torch calls its own sparse tensors a beta
    maps = QUICK if quick else MAPS if device.type == "cuda" else ON_A_CPU
    winners, sorts, every = [], [], {}
    for shape in maps:
        batch, dim, side, classes = shape
        size = f"{batch} x {dim} x {side} x {side}"
        sorts.append({"map": size, "C": classes, **compare_sorts(device, shape)})
        columns: dict[str, Times] = {}
        for layout, dtype in itertools.product(LAYOUTS, DTYPES):
            name = str(dtype).removeprefix("torch.")
            times = compare(device, shape, layout, dtype, strict=quick)
            columns[f"{layout}, {name}"] = times
            head = {"map": size, "C": classes, "layout": layout, "dtype": name}
            winners.append(head | fastest(times))
        ways = dict.fromkeys(way for times in columns.values() for way in times)
        every[f"{size}, {classes} classes: ms"] = [
            {"way": way, **{title: times.get(way, "") for title, times in columns.items()}}
            for way in ways
        ]
        first = {"Which way wins": winners, "The sort of the split: ms": sorts}
        if not quick:  # Written again for each map: what is measured stays if the run is stopped.
            write("bench_sums", device, first | every)


def fastest(times: Times) -> dict[str, object]:
    """Say which way wins, and how far it is from today's and from the memory's limit."""
    found: dict[str, object] = {}
    for kind, limit in (("sum", "a plain read"), ("gradient", "a plain write")):
        measured = {
            way.removeprefix(f"{kind}: "): time
            for way, time in times.items()
            if way.startswith(f"{kind}: ") and isinstance(time, float)
        }
        best = min(measured, key=lambda way: measured[way])
        found |= {kind: best, f"{kind}: ms": measured[best]}
        found[f"{kind}: over {limit}"] = measured[best] / float(times[limit])
        if "today's" in measured:
            found[f"{kind}: today's over it"] = measured["today's"] / measured[best]
        repeatable = {way: time for way, time in measured.items() if way in DETERMINISTIC}
        if kind == "sum" and repeatable:
            steady = min(repeatable, key=lambda way: repeatable[way])
            found |= {
                "deterministic sum": steady,
                "deterministic over fastest": repeatable[steady] / measured[best],
            }
    return found


def compare(
    device: torch.device,
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    strict: bool = True,
) -> Times:
    """Check that all ways agree, then time them on one map, in milliseconds.

    A way that is wrong or does not run raises if ``strict``, else the table says so.
    """
    _, dim, _, classes = shape
    num_cells = GROUPS * classes + 1
    features, labels, generator = a_map(device, shape)
    cells = labels + classes * torch.randint(
        0, GROUPS, labels.shape, generator=generator, device=device
    )
    # As the kernel flattens them: (batch, D, pixels), whatever the layout.
    features = features.to(dtype).contiguous(memory_format=LAYOUTS[layout]).flatten(2)
    cells = cells.flatten(1)
    order = cell_order(cells, num_cells, generator)
    exact = features.new_zeros(num_cells, dim, dtype=torch.float64)
    for image, index in zip(features, cells, strict=True):
        exact.index_add_(0, index, image.t().double())
    table = torch.randn(num_cells, dim, generator=generator, device=device)
    spread_exactly = table.to(dtype)[cells].transpose(1, 2)

    ways: dict[str, Callable[[], Tensor]] = {
        "a plain read": features.sum,
        "a plain write": lambda: torch.full_like(features, 1.0),
    }
    sums = {name: lambda add=add: add(features, cells, num_cells) for name, add in SUMS.items()}
    sums |= {name: lambda add=add: add(features, order) for name, add in ORDERED.items()}
    failed: dict[str, str] = {}
    for name, add in sums.items():
        ways[f"sum: {name}"] = add
        with noted(failed, f"sum: {name}", strict):
            found = add()
            error = float((found.double() - exact).norm() / exact.norm())
            assert error < 1e-5, f"{name} is wrong by {error:.1e}"
            again = name not in DETERMINISTIC or torch.equal(add(), found)
            assert again, f"{name} is not deterministic"
    for name, spread in SPREADS[layout].items():
        ways[f"gradient: {name}"] = lambda spread=spread: spread(table, cells, dtype)
        with noted(failed, f"gradient: {name}", strict):
            found = spread(table, cells, dtype)
            assert found.stride() == features.stride(), f"{name} has another layout"
            assert torch.equal(found, spread_exactly), f"{name} is wrong"
    times = timed({name: way for name, way in ways.items() if name not in failed}, device)
    return times | failed


def compare_sorts(device: torch.device, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Check that all sorts give an order by class, then time them, in milliseconds."""
    classes = shape[3]
    _, labels, generator = a_map(device, shape, dim=1)
    labels = labels.flatten()
    numbers = torch.randint(-(2**31), 2**31, labels.shape, generator=generator, device=device)
    by_class, every = labels.sort().values, torch.arange(len(labels), device=device)
    for name, sort in SORTS.items():
        order = sort(labels, numbers, classes)
        assert torch.equal(labels[order], by_class), f"{name} is not by class"
        assert torch.equal(order.sort().values, every), f"{name} is no order"
    ways = {name: lambda sort=sort: sort(labels, numbers, classes) for name, sort in SORTS.items()}
    return timed(ways, device)


def a_map(
    device: torch.device, shape: tuple[int, int, int, int], dim: int | None = None
) -> tuple[Tensor, Tensor, torch.Generator]:
    """Draw features, labels in blocks of 8 x 8 of at most 20 classes an image, and a generator."""
    batch, width, side, classes = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator, device=device)

    blocks = draw(classes, batch, 20).gather(1, draw(20, batch, (side // 8) ** 2))
    labels = blocks.view(batch, side // 8, side // 8)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    size = (batch, dim or width, side, side)
    return torch.randn(size, generator=generator, device=device), labels, generator


def timed(ways: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return medians(ways, 1)
    from triton.testing import do_bench  # part of torch for GPUs

    return {
        name: do_bench(way, warmup=5, rep=30, return_mode="median") for name, way in ways.items()
    }


if __name__ == "__main__":
    main()
