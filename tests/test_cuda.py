"""What only a GPU can show: its numbers are the CPU's, and nothing waits for it."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import mvsc
from batches import IGNORE, Batch
from mvsc import MVSCRegularizer, segment_mean

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # What torch says of its own parts: of this very mode, and as the compiler starts.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]

DEVICE = "cuda"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CELLS = 4 * 19


@pytest.fixture
def no_waiting():
    """Return a switch: after it, a call that waits for the GPU is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def example(device=DEVICE, dtype=torch.float32, **options):
    """Make a step of more than one block of pixels: absent class, ignored pixels, finer labels."""
    torch.manual_seed(0)
    features = torch.randn(3, 24, 96, 80).to(device, dtype).requires_grad_()
    labels = torch.randint(0, 18, (3, 24, 20)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :6] = IGNORE
    classifier = nn.Conv2d(24, 19, 1).to(device, dtype)
    reg = MVSCRegularizer(19, 24, **options).to(device)
    return Batch(reg, features, labels.to(device), classifier)


def settle(step):
    """Take the first steps, in which labels on a device are read and checked."""
    for _ in range(3):
        step.loss().backward()
    for leaf in step.leaves():
        leaf.grad = None


def a_map(layout, dtype, shape=(2, 40, 200, 180)):
    torch.manual_seed(0)
    features = torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
    blocks = torch.randint(0, CELLS + 1, (shape[0], shape[2] // 4, shape[3] // 4), device=DEVICE)
    return features, blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)


def by_matmul(features, cells):
    """Average by a product with one-hot rows, in float64."""
    rows = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    one_hot = nn.functional.one_hot(cells.flatten(), CELLS + 1)[:, :CELLS].double()
    return one_hot.T @ rows / one_hot.sum(0).clamp_min(1)[:, None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_means_and_gradients_are_those_of_float64(layout, dtype, no_waiting):
    features, cells = a_map(layout, dtype)
    exact = features.double().requires_grad_()
    expected = by_matmul(exact, cells)
    sent = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, exact, sent)
    features.requires_grad_()

    no_waiting()
    means, counts = segment_mean(features, cells, CELLS)
    (gradient,) = torch.autograd.grad(means, features, sent.to(means.dtype))
    torch.cuda.set_sync_debug_mode("default")

    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(counts, cells.flatten().bincount(minlength=CELLS + 1)[:CELLS])
    assert gradient.dtype == dtype
    assert gradient.stride() == features.stride()
    assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_of_the_spare_cell_never_matter(layout):
    features, cells = a_map(layout, torch.float32)
    expected, _ = segment_mean(features, cells, CELLS)
    features.masked_fill_((cells == CELLS)[:, None], float("nan"))
    assert_close(segment_mean(features, cells, CELLS)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_of_more_than_two_billion_values_is_summed_whole(layout):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    shape = (2, 520, 1024, 2048)
    features = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    features = features.contiguous(memory_format=LAYOUTS[layout])
    features[:, :, :512], features[:, :, 512:] = 1.0, 3.0
    features.requires_grad_()
    cells = torch.zeros(2, 1024, 2048, dtype=torch.int64, device=DEVICE)
    cells[:, 512:] = 1
    means, counts = segment_mean(features, cells, 2)
    assert counts.tolist() == [2**21, 2**21]
    assert_close(means, means.new_tensor([[1.0], [3.0]]).expand(2, 520))
    (gradient,) = torch.autograd.grad(means[1, 7] * 2**21, features)
    assert gradient.double().sum().item() == 2**21
    assert gradient[1, 7, 600, 5].item() == 1
    assert gradient[1, 8, 600, 5].item() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_needs_the_gradients_memory_and_little_else(layout, dtype):
    features, cells = a_map(layout, dtype, (16, 256, 128, 128))
    features.requires_grad_()
    segment_mean(features, cells, CELLS)[0].sum().backward()
    features.grad = None
    size = features.numel() * features.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    means, _ = segment_mean(features, cells, CELLS)
    assert torch.cuda.memory_allocated() - before < 0.02 * size
    # 65,536 pixels are copied and widened at a time; the map has four times as many.
    limit = 0.8 if dtype == torch.bfloat16 else 0.6
    assert torch.cuda.max_memory_allocated() - before < limit * size
    means.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size


@pytest.mark.parametrize("options", [{}, {"align_to": "group"}, {"enhance": False}, {"groups": 1}])
def test_losses_and_gradients_are_the_cpus_step_after_step(options):
    ours, theirs = example(**options), example("cpu", **options)
    for _ in range(3):
        losses = [step.loss() for step in (ours, theirs)]
        assert_close(losses[0].cpu(), losses[1], rtol=1e-5, atol=1e-6)
        gradients = [
            torch.autograd.grad(loss, step.leaves())
            for loss, step in zip(losses, (ours, theirs), strict=True)
        ]
        for on_gpu, on_cpu in zip(*gradients, strict=True):
            assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-6)


def test_gradients_of_second_order_are_the_cpus():
    found = []
    for device in (DEVICE, "cpu"):
        step = example(device)
        gradients = torch.autograd.grad(step.loss(), step.leaves()[:2], create_graph=True)
        slope = sum(gradient.square().sum() for gradient in gradients)
        found.append([each.cpu() for each in torch.autograd.grad(slope, step.leaves())])
    for on_gpu, on_cpu in zip(*found, strict=True):
        assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
def test_a_step_waits_for_nothing(labels, no_waiting):
    step = example()
    step.labels = step.labels.to(labels)
    optimizer = torch.optim.AdamW([step.reg.centroids, *step.classifier.parameters()])
    settle(step)
    optimizer.step()
    no_waiting()
    step.loss().backward()
    terms = step.reg.terms(step.features, step.labels, step.classifier)
    step.reg.total(terms).backward()
    optimizer.step()


def test_an_attached_step_under_autocast_waits_for_nothing(no_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 7, 1)).to(DEVICE)
    reg = mvsc.attach(model)
    assert reg.regularizer.centroids.device.type == DEVICE
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.add_param_group(reg.param_group())
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    labels = torch.randint(0, 7, (2, 32, 32), device=DEVICE)

    def step(dtype):
        with torch.autocast(DEVICE, dtype):
            loss = nn.functional.cross_entropy(model(images), labels) + reg(labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = [step(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float16)]
    no_waiting()
    losses += [step(dtype) for dtype in (torch.float16, torch.bfloat16)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_with_a_gradient_scaler_moves_the_centroids(dtype):
    step = example(dtype=dtype)
    scaler = torch.amp.GradScaler(DEVICE)
    optimizer = torch.optim.AdamW([step.reg.centroids], lr=0.1)
    before = step.reg.centroids.detach().clone()
    loss = step.loss()
    assert_close(loss, example().loss(), rtol=2e-2, atol=1e-2)
    scaler.scale(loss).backward()
    assert step.features.grad.isfinite().all()
    assert step.features.grad.dtype == dtype
    scaler.step(optimizer)
    assert not torch.equal(step.reg.centroids, before)


def test_labels_out_of_range_raise_at_first_and_are_masked_and_counted_later(no_waiting):
    step = example()
    good, wrong = step.labels, step.labels.clone()
    wrong[1, 3, :4] = 77
    step.labels = wrong
    for _ in range(3):
        with pytest.raises(ValueError, match=r"77 \(4 px\)"):
            step.loss()
    no_waiting()
    found = step.loss()
    torch.cuda.set_sync_debug_mode("default")
    assert step.reg.invalid_count.item() == 4
    twin = example()
    twin.labels = torch.where(wrong == 77, IGNORE, good)
    assert_close(found, twin.loss(), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_run_bitwise_with_deterministic_algorithms(deterministic):
    def run():
        step = example()
        optimizer = torch.optim.AdamW(step.leaves(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            step.loss().backward()
            optimizer.step()
        return [leaf.detach() for leaf in step.leaves()]

    with warnings.catch_warnings():
        # Of cuBLAS, if CUBLAS_WORKSPACE_CONFIG is not set; it takes one stream here.
        warnings.simplefilter("ignore")
        assert_close(run(), run(), rtol=0, atol=0)


def test_a_captured_graph_draws_anew_in_each_replay():
    step, twin = example(), example()
    settle(step), settle(twin)
    leaves = step.leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(step.loss(), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    twin.loss()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.loss()
        gradients = torch.autograd.grad(loss, leaves)
    seen = []
    for _ in range(3):
        graph.replay()
        expected = twin.loss()
        assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for found, each in zip(
            gradients, torch.autograd.grad(expected, twin.leaves()), strict=True
        ):
            assert_close(found, each, rtol=1e-3, atol=1e-6)
        seen.append(loss.item())
    assert len(set(seen)) == 3
    assert step.reg.step.item() == twin.reg.step.item()


# torch's own pool of graphs begins by capturing an empty one.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_numbers_are_the_eager_ones(mode):
    torch.compiler.reset()
    eager = example()
    compiled = torch.compile(copy.deepcopy(eager.reg), fullgraph=True, mode=mode)
    for _ in range(4):
        expected = eager.loss()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(eager.features, eager.labels, eager.classifier)
        assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        leaves = [eager.features, *eager.classifier.parameters()]
        for found, each in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            assert_close(found, each, rtol=1e-3, atol=1e-6)


def test_a_state_goes_from_one_device_to_the_other():
    step, other = example(), example("cpu")
    step.loss()
    other.reg.load_state_dict(step.reg.state_dict())
    assert_close(step.loss().cpu(), other.loss(), rtol=1e-5, atol=1e-6)


def test_features_and_centroids_on_two_devices_are_named():
    step = example()
    with pytest.raises(ValueError, match="device"):
        step.reg.cpu()(step.features, step.labels, step.classifier)


def test_segformer_and_deeplab_train_with_mvsc_in_half_precision():
    transformers = pytest.importorskip("transformers")
    segmentation = pytest.importorskip("torchvision").models.segmentation
    config = transformers.SegformerConfig(num_labels=7, depths=[1, 1, 1, 1])
    deeplab = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=7)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    labels = torch.randint(0, 7, (2, 64, 64), device=DEVICE)
    for model in (transformers.SegformerForSemanticSegmentation(config), deeplab):
        model.to(DEVICE)
        reg = mvsc.attach(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        optimizer.add_param_group(reg.param_group())
        before = reg.regularizer.centroids.detach().clone()
        scaler = torch.amp.GradScaler(DEVICE)
        for _ in range(5):
            with torch.autocast(DEVICE, torch.float16):
                output = model(images)
                logits = output["logits" if "logits" in output else "out"]
                logits = nn.functional.interpolate(logits.float(), labels.shape[1:])
                loss = nn.functional.cross_entropy(logits, labels) + reg(labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert loss.isfinite()
        assert not torch.equal(reg.regularizer.centroids, before)


def test_a_recipe_trains_and_resumes_on_a_gpu(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("segmentation_models_pytorch")
    from accelerate.state import AcceleratorState

    from test_recipes import interrupting, replace, tiny, tiny_data, train, training

    # Accelerate keeps its first device and precision for the life of the process.
    AcceleratorState._reset_state(reset_partial_state=True)
    data = tiny_data.make_folder(tmp_path / "data")
    recipe = tiny(data, tmp_path / "whole", cpu=False, precision="bf16", log_every=1)
    train(recipe)
    parts = replace(recipe, out=tmp_path / "parts", resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(parts, interrupting(2))
    train(parts)
    AcceleratorState._reset_state(reset_partial_state=True)
    whole, resumed = (training.read_metrics(each.out / "metrics.jsonl") for each in (recipe, parts))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, resumed)]
    assert len(losses[0]) == recipe.steps
    # Sums on a GPU are in no certain order.
    assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-2)
