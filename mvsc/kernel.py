"""The kernel: sums and means of the pixels of each cell, in the layout that the map has.

What touches the features of each pixel is in this file, and nothing else is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mvsc import checks
from mvsc.equations import divide


def segment_mean(features: Tensor, cells: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Average the features of the pixels of each cell.

    The mean of Eq. (1), section 3.2, on its own: a cell there is a (group, class) pair.

    Args:
        features: dense feature map, shape ``(batch, dim, *spatial)`` with one to three spatial
            axes, any floating dtype; contiguous and channels_last maps are both read in place (a
            GPU copies some images of a contiguous one at a time).
        cells: the cell of each pixel, shape ``(batch, *spatial)``, any integer dtype.
            ``num_cells`` itself is the spare cell of pixels that do not count: whatever
            they hold, NaN included, never matters.
        num_cells: number of cells, at least 1.

    Returns:
        ``(means, counts)``: means of shape ``(num_cells, dim)``, float32 (float64 for float64
        features), and the number of pixels of each cell, shape ``(num_cells,)``, int64. An
        empty cell has mean 0 and passes no gradient.

    Raises:
        ValueError: if shapes do not fit, or, on the CPU, if a cell is outside
            ``0 .. num_cells``.
        TypeError: if features are not floating or cells are not integers.

    Example:
        >>> features = torch.tensor([1.0, 3.0, 5.0, 100.0]).reshape(1, 1, 2, 2)
        >>> means, counts = segment_mean(features, torch.tensor([[[0, 0], [1, 3]]]), num_cells=3)
        >>> means.flatten().tolist(), counts.tolist()
        ([2.0, 5.0, 0.0], [2, 1, 0])
    """
    _check_cells(features, cells, num_cells)
    sums, counts = segment_sum(features, cells.long(), num_cells)
    return divide(sums, counts), counts


def _check_cells(features: object, cells: object, num_cells: int) -> None:
    """Raise unless the arguments of ``segment_mean`` fit each other."""
    checks.check_positive_int("num_cells", num_cells)
    features = checks.check_feature_map(features)
    if not isinstance(cells, Tensor) or not checks.is_integer(cells):
        raise TypeError(
            f"cells must be an integer tensor, got {checks.kind(cells)}. Use cells.long()."
        )
    expected = (features.shape[0], *features.shape[2:])
    if cells.shape != expected:
        raise ValueError(
            f"cells must have the shape (batch, *spatial) of the features, {expected}, "
            f"got {tuple(cells.shape)}. Bring them to the feature grid first."
        )
    checks.check_device("cells", cells, "features", features.device)
    # Only where it costs no transfer: on a device a bad cell is the kernel's own error.
    if cells.device.type == "cpu" and cells.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in cells.long().aminmax())
        if low < 0 or high > num_cells:
            raise ValueError(
                f"cells must be in 0 .. {num_cells} with num_cells={num_cells} as the spare "
                f"cell, got values from {low} to {high}. "
                f"Put pixels that do not count into cell {num_cells}."
            )


def segment_sum(features: Tensor, cells: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Sum and count the pixels of each cell; :func:`segment_mean` before the division.

    Inputs are trusted and ``cells`` are int64. Nothing but ``cells`` is kept for backward.
    """
    # One axis of pixels, whatever the map is: a view in every layout that is read in place.
    features, cells = features.flatten(2), cells.flatten(1)
    # The spare cell is cut off here, so whatever was summed there goes no further.
    sums = _Sum.apply(features, cells, num_cells + 1)[:num_cells]
    # Counts are integers: float32 loses units above 2^24, float16 above 2048.
    counts = cells.new_zeros(num_cells + 1).scatter_add_(
        0, cells.flatten(), cells.new_ones(()).expand(cells.numel())
    )
    return sums, counts[:num_cells]


# Two linear maps, each the other's derivative, so gradients of any order come for free:
# `_sum` adds the pixels of each cell up, `_spread` hands a row of a table to each pixel.
# They are opaque operators, for three reasons. Backward keeps `cells` and nothing else:
# autograd's own index_add would keep a float32 copy of the map. A gradient is written in
# the layout and dtype of its map. And the compiler leaves them alone: inductor would turn
# them into atomic additions, slower and summed in another order than in eager mode.
#
# Which way for which map, in milliseconds (2 Xeon cores, torch 2.14, B=4, D=256, 128 x 128,
# 684 cells; `benchmarks/bench_segment_mean.py` measures every way again):
#
#   map                    sums                                  gradient                with it
#   contiguous fp32        index_add along the pixels      6.7   gather, pixel axis         29.6
#   contiguous bf16        the same, block-wise float32    8.2   the same, as int16         21.5
#   channels_last fp32     index_add of rows               3.5   index_select               21.4
#   channels_last bf16     the same, block-wise float32    5.6   index_select               14.7
#
# A plain read of the float32 map took 2 ms and a plain write 15 ms in that run, in bf16 half of
# it. On a GPU (H200, torch 2.11, B=16) gradients go the same ways, sums by scatter_add of rows: in
# the same order of maps 0.69, 0.78, 0.19 and 0.38 ms; index_add took 1.01, 1.21, 0.54 and 0.70
# (`benchmarks/bench_sums.py`). Where the user asks for deterministic algorithms it is index_add
# again: that sorts the pixels, scatter_add would sort every value.

_BLOCK = 2**14
"""Pixels that are added at once: a half-precision map is widened by the block, never whole."""

_LONGEST_SUM = 2**16
"""Pixels after which a new sum is begun: a long float32 sum loses its small addends."""


@torch.library.custom_op("mvsc::segment_sum", mutates_args=())
def _sum(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Sum the pixels of each cell: ``(B, D, N)`` and ``(B, N)`` to ``(num_cells, D)``."""
    if features.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return _scatter_sum(features, cells, num_cells)
    return _index_add_sum(features, cells, num_cells)


def _index_add_sum(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Sum along the pixels, in the layout that the map has."""
    dim, dtype = features.shape[1], _sum_dtype(features)
    as_rows = _is_channels_last(features)
    shape = (num_cells, dim) if as_rows else (dim, num_cells)
    sums, total, added = features.new_zeros(shape, dtype=dtype), None, 0
    for block, index in _blocks(features, cells):
        if added + len(index) > _LONGEST_SUM:
            total = sums if total is None else total.add_(sums)
            sums, added = torch.zeros_like(sums), 0
        sums.index_add_(0 if as_rows else 1, index, block.to(dtype))
        added += len(index)
    total = sums if total is None else total.add_(sums)
    return total if as_rows else total.t().contiguous()


def _blocks(features: Tensor, cells: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the map into blocks of pixels, ``(pixels, D)`` if channels_last, else ``(D, pixels)``."""
    if _is_channels_last(features):
        rows = features.transpose(1, 2).reshape(-1, features.shape[1])
        pixels = torch.split(rows, _BLOCK), torch.split(cells.flatten(), _BLOCK)
        yield from zip(*pixels, strict=True)
        return
    for image, index in zip(features, cells, strict=True):
        pixels = torch.split(image, _BLOCK, dim=1), torch.split(index, _BLOCK)
        yield from zip(*pixels, strict=True)


def _scatter_sum(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    """Sum rows; a map that is not channels_last is copied, some images at a time.

    Blocks are longer here, since each costs a few launches.
    """
    dim, dtype = features.shape[1], _sum_dtype(features)
    images = max(_LONGEST_SUM // max(cells[:1].numel(), 1), 1)
    total = None
    parts = torch.split(features, images), torch.split(cells, images)
    for some, their_cells in zip(*parts, strict=True):
        rows = some.transpose(1, 2).reshape(-1, dim)
        pixels = torch.split(rows, _LONGEST_SUM), torch.split(their_cells.flatten(), _LONGEST_SUM)
        for block, index in zip(*pixels, strict=True):
            each = index.unsqueeze(1).expand_as(block)
            sums = block.new_zeros(num_cells, dim, dtype=dtype)
            sums.scatter_add_(0, each, block.to(dtype))
            total = sums if total is None else total.add_(sums)
    assert total is not None  # an empty map is one empty block
    return total


@torch.library.custom_op("mvsc::spread", mutates_args=())
def _spread(table: Tensor, cells: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Give each pixel the row of its cell: ``(num_cells, D)`` to ``(B, D, N)``."""
    batch, pixels = cells.shape
    num_cells, dim = table.shape
    table = table.to(dtype)  # Rounded before it is spread: the table is the smaller one.
    if channels_last:
        rows = table.index_select(0, cells.flatten())
        return rows.view(batch, pixels, dim).transpose(1, 2)
    table = table.t().contiguous()
    # Gathering bfloat16 is ten times slower than gathering the same bits as integers.
    bits = table.view(torch.int16) if table.element_size() == 2 else table
    index = cells.unsqueeze(1).expand(-1, dim, -1)
    return bits.expand(batch, dim, num_cells).gather(2, index).view(dtype)


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _is_channels_last(features: Tensor) -> bool:
    return features.stride(1) == 1


@_sum.register_fake
def _(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
    return features.new_empty(num_cells, features.shape[1], dtype=_sum_dtype(features))


@_spread.register_fake
def _(table: Tensor, cells: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    batch, pixels = cells.shape
    if channels_last:
        return table.new_empty(batch, pixels, table.shape[1], dtype=dtype).transpose(1, 2)
    return table.new_empty(batch, table.shape[1], pixels, dtype=dtype)


class _Sum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, cells: Tensor, num_cells: int) -> Tensor:
        sums: Tensor = _sum(features, cells, num_cells)
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        features, cells, _ = inputs
        ctx.save_for_backward(cells)
        ctx.dtype, ctx.channels_last = features.dtype, _is_channels_last(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return _Spread.apply(grad, cells, ctx.dtype, ctx.channels_last), None, None


class _Spread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, cells: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
        spread: Tensor = _spread(table, cells, dtype, channels_last)
        return spread

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype, bool], output: Tensor
    ) -> None:
        table, cells, _, _ = inputs
        ctx.save_for_backward(cells)
        ctx.num_cells, ctx.dtype = table.shape[0], table.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (cells,) = ctx.saved_tensors
        return _Sum.apply(grad, cells, ctx.num_cells).to(ctx.dtype), None, None, None
