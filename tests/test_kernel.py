import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mvsc import kernel, segment_mean

LAYOUTS = ["contiguous", "channels_last", "channel slice", "row slice", "permuted"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def in_layout(features, layout):
    """Return the same values in another place of memory."""
    batch, dim, height, width = features.shape
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "channel slice":
        wide = features.new_zeros(batch, 2 * dim, height, width)
        wide[:, ::2] = features
        return wide[:, ::2]
    if layout == "row slice":
        tall = features.new_zeros(batch, dim, 2 * height, width)
        tall[:, :, ::2] = features
        return tall[:, :, ::2]
    if layout == "permuted":
        return features.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return features


def by_loop(features, cells, num_cells):
    means = torch.zeros(num_cells, features.shape[1], dtype=torch.float64)
    counts = torch.zeros(num_cells, dtype=torch.int64)
    for b, i, j in torch.cartesian_prod(*[torch.arange(n) for n in cells.shape]).tolist():
        if (cell := int(cells[b, i, j])) < num_cells:
            means[cell] += features[b, :, i, j].double()
            counts[cell] += 1
    return means / counts.clamp_min(1)[:, None], counts


def test_the_table_by_hand():
    features = torch.tensor([[[[1.0, 2.0, 30.0]], [[10.0, 20.0, 300.0]]]])
    means, counts = segment_mean(features, torch.tensor([[[2, 2, 0]]]), num_cells=4)
    assert means.tolist() == [[30.0, 300.0], [0.0, 0.0], [1.5, 15.0], [0.0, 0.0]]
    assert counts.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_dtype_gives_the_loops_means(layout, dtype):
    features = in_layout(torch.randn(3, 5, 4, 6).to(dtype), layout)
    cells = torch.randint(0, 8, (3, 4, 6))
    means, counts = segment_mean(features, cells, 7)
    expected, expected_counts = by_loop(features, cells, 7)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(counts, expected_counts, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_gradients_are_bitwise_those_of_one_thread(layout, dtype):
    # Large enough for torch to share the work out.
    features = in_layout(torch.randn(2, 64, 96, 96).to(dtype), layout).requires_grad_()
    cells = torch.randint(0, 40, (2, 96, 96))
    upstream = torch.randn(39, 64)

    def on(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            means, _ = segment_mean(features, cells, 39)
            return means, torch.autograd.grad(means, features, upstream.to(means.dtype))
        finally:
            torch.set_num_threads(before)

    alone = on(1)
    for threads in (2, 3):
        assert_close(on(threads), alone, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_pixel_is_its_cells_over_n(layout, dtype):
    features = in_layout(torch.randn(2, 3, 4, 5).to(dtype), layout).requires_grad_()
    cells = torch.randint(0, 6, (2, 4, 5))
    means, counts = segment_mean(features, cells, 5)
    sent = torch.randn(5, 3, dtype=means.dtype)
    means.backward(sent)
    table = torch.cat([sent / counts.clamp_min(1)[:, None], sent.new_zeros(1, 3)])
    expected = table[cells].permute(0, 3, 1, 2).to(dtype)
    assert features.grad is not None
    assert features.grad.dtype == dtype
    assert_close(features.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_layout_of_the_map(layout, dtype):
    features = in_layout(torch.randn(2, 3, 4, 5).to(dtype), layout).requires_grad_()
    sums, _ = kernel.segment_sum(features, torch.zeros(2, 4, 5, dtype=torch.int64), 1)
    (grad,) = torch.autograd.grad(sums.sum(), features)
    assert grad.stride() == features.stride()


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    num_cells=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_agrees_in_both_layouts(shape, num_cells, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    cells = torch.randint(
        0, num_cells + 1, (shape[0], *shape[2:]), generator=generator, dtype=torch.int16
    )
    expected, counts = by_loop(features, cells, num_cells)
    for layout in ("contiguous", "channels_last"):
        means, found = segment_mean(in_layout(features, layout), cells, num_cells)
        assert_close(means, expected)
        assert_close(found, counts)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_pixels_of_the_spare_cell_never_matter(layout, value):
    cells = torch.tensor([[[0, 1, 2], [1, 2, 0]]])
    features = torch.randn(1, 4, 2, 3)
    spoilt = torch.where(cells.unsqueeze(1) == 2, value, features)
    results = []
    for each in (features, spoilt):
        leaf = in_layout(each, layout).requires_grad_()
        means, _ = segment_mean(leaf, cells, 2)
        (grad,) = torch.autograd.grad(means.square().sum(), leaf)
        results.append((means.detach(), grad))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][1][:, :, 0, 2] == 0).all()


def test_nan_in_a_counted_pixel_stays_visible():
    features = torch.zeros(1, 1, 1, 2)
    features[..., 0] = torch.nan
    means, _ = segment_mean(features, torch.tensor([[[0, 1]]]), 2)
    assert means.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(layout, dtype):
    # In float16 the sum would be infinite, in bfloat16 it would stop at 256 ones.
    features = in_layout(torch.ones(1, 3, 256, 512, dtype=dtype), layout)
    means, counts = segment_mean(features, torch.zeros(1, 256, 512, dtype=torch.int64), 1)
    assert means.tolist() == [[1.0, 1.0, 1.0]]
    assert counts.item() == 2**17


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mean_of_ten_million_pixels_keeps_its_digits(layout):
    # In one float32 sum 1.3 would count as 1 above 2^23.
    features = in_layout(torch.full((1, 1, 3163, 3163), 1.3).expand(-1, 2, -1, -1), layout)
    means, counts = segment_mean(features, torch.zeros(1, 3163, 3163, dtype=torch.int64), 1)
    assert counts.item() == 3163**2
    assert_close(means, torch.full((1, 2), 1.3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_larger_than_a_block_are_summed_whole(layout, monkeypatch):
    features = in_layout(torch.randn(2, 5, 6, 7).bfloat16(), layout)
    cells = torch.randint(0, 4, (2, 6, 7))
    expected, _ = by_loop(features, cells, 3)
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    monkeypatch.setattr(kernel, "_LONGEST_SUM", 40)
    means, _ = segment_mean(features, cells, 3)
    assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [2**16, 84, 40])
def test_the_way_of_a_gpu_gives_the_same_sums(layout, dtype, longest, monkeypatch):
    # All images at once, two at a time, or less than one.
    features = in_layout(torch.randn(3, 5, 6, 7).to(dtype), layout)
    features, cells = features.flatten(2), torch.randint(0, 4, (3, 42))
    expected = kernel._sum(features, cells, 4)
    monkeypatch.setattr(kernel, "_LONGEST_SUM", longest)
    sums = kernel._scatter_sum(features, cells, 4)
    assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    assert sums.stride() == expected.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_cells_and_nothing_else(layout, dtype):
    features = in_layout(torch.randn(2, 64, 16, 16).to(dtype), layout).requires_grad_()
    cells = torch.randint(0, 9, (2, 16, 16))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        segment_mean(features, cells, 8)
    kept.pop(cells.untyped_storage().data_ptr())
    features_bytes = features.untyped_storage().nbytes()
    assert features.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) < 0.01 * features_bytes + 9 * 8 * 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_as_large_as_the_map_lives_on_between_forward_and_backward(layout):
    # What a function keeps on its context escapes the hooks of the test above.
    features = in_layout(torch.randn(2, 64, 16, 16).bfloat16(), layout).requires_grad_()
    cells = torch.randint(0, 9, (2, 16, 16))
    means, _ = segment_mean(features, cells, 8)
    gc.collect()
    large = [
        each
        for each in gc.get_objects()
        if type(each) is torch.Tensor and each.numel() >= features.numel() and each is not features
    ]
    assert large == []
    means.sum().backward()


def test_gradients_of_first_and_second_order_are_those_of_finite_differences():
    for layout in ("contiguous", "channels_last"):
        features = in_layout(torch.randn(2, 2, 3, 2, dtype=torch.float64), layout).requires_grad_()
        cells = torch.randint(0, 4, (2, 3, 2))

        def loss(features, cells=cells):
            return segment_mean(features, cells, 3)[0].pow(3)

        assert torch.autograd.gradcheck(loss, features)
        assert torch.autograd.gradgradcheck(loss, features)


# torch knows no faster way to batch an operator of one's own than one at a time.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_transforms_agree_with_autograd():
    features, cells = torch.randn(3, 2, 4, 4, 5), torch.randint(0, 4, (2, 4, 5))

    def loss(features):
        return segment_mean(features, cells, 3)[0].square().sum()

    leaf = features.clone().requires_grad_()
    sum(loss(each) for each in leaf).backward()
    assert_close(torch.func.vmap(torch.func.grad(loss))(features), leaf.grad)
    jacobian = torch.func.jacrev(lambda each: segment_mean(each, cells, 3)[0])(features[0])
    expected = torch.autograd.functional.jacobian(
        lambda each: segment_mean(each, cells, 3)[0], features[0]
    )
    assert_close(jacobian, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_operators_fit_what_the_compiler_is_told_of_them(layout):
    features = in_layout(torch.randn(2, 3, 4, 5), layout).flatten(2)
    cells = torch.randint(0, 4, (2, 20))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._sum, (features, cells, 4), test_utils=tests)
    for channels_last in (True, False):
        args = (torch.randn(4, 3), cells, torch.bfloat16, channels_last)
        torch.library.opcheck(kernel._spread, args, test_utils=tests)


def test_inputs_are_not_modified():
    features, cells = torch.randn(1, 2, 3, 3), torch.randint(0, 3, (1, 3, 3))
    before = features.clone(), cells.clone()
    segment_mean(features, cells, 2)
    assert_close((features, cells), before, rtol=0, atol=0)


def test_wrong_arguments_are_named_with_the_remedy():
    features, cells = torch.randn(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_cells must be at least 1, got 0"):
        segment_mean(features, cells, 0)
    with pytest.raises(TypeError, match=r"cells must be an integer tensor, got torch.float32. Use"):
        segment_mean(features, cells.float(), 1)
    with pytest.raises(TypeError, match="cells must be an integer tensor, got list"):
        segment_mean(features, [0], 1)
    with pytest.raises(ValueError, match=r"cells must have the shape .* \(1, 3, 3\), got \(1, 9\)"):
        segment_mean(features, cells.flatten(1), 1)
    with pytest.raises(ValueError, match=r"cells must be in 0 \.\. 1 .* got values from 0 to 2"):
        segment_mean(features, cells + torch.tensor([0, 1, 2]), 1)
    with pytest.raises(ValueError, match="Put pixels that do not count into cell 1"):
        segment_mean(features, cells - 1, 1)
    with pytest.raises(ValueError, match=r"cells must be on the device of the features, cpu"):
        segment_mean(features, cells.to("meta"), 1)
