"""Any dense map: points, images, volumes, tokens, channel-last; what is said of other shapes."""

import copy
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import oracle
from batches import CONVOLUTIONS, FORMS, IGNORE, Batch, Net, check_by_oracle, relative_error
from mvsc import MVSCRegularizer, attach, diagnostics, segment_mean
from mvsc.plotting import draw_heatmap, heatmaps

CLASSES, DIM, GROUPS = 4, 3, 3


def last_to_second(features):
    """Read a channel-last map, an array or a tensor, as (batch, dim, *spatial)."""
    return np.moveaxis(features, -1, 1) if isinstance(features, np.ndarray) else features.mT


def channel_last(features):
    moved = np.moveaxis if isinstance(features, np.ndarray) else torch.movedim
    return moved(features, -1, 1)


def step_of(size, label_size, *, rows=False, kernel=1, grid=None, dtype=torch.float64, **options):
    """Make a step with features of one size and labels of another."""
    axes = len(size)
    shape = (2, *size, DIM) if rows else (2, DIM, *size)
    features = torch.randn(shape, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, CLASSES - 1, (2, *label_size))
    labels[0, :1] = IGNORE
    if rows:
        classifier = nn.Linear(DIM, CLASSES, dtype=dtype)
    else:
        classifier = CONVOLUTIONS[axes - 1](DIM, CLASSES, kernel, padding=kernel // 2, dtype=dtype)
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS, **options).to(dtype)

    def as_map(features):
        features = channel_last(features) if rows else features
        return features if grid is None else features.reshape(*features.shape[:2], *grid)

    return Batch(reg, features, labels, classifier, as_map)


SHAPES = {
    "points": ((7,), (7,)),
    "points, labels up": ((5,), (13,)),
    "points, labels down": ((7,), (3,)),
    "image": ((4, 5), (4, 5)),
    "image, labels up": ((5, 2), (7, 9)),
    "image, labels down": ((5, 4), (2, 3)),
    "volume": ((2, 5, 2), (2, 5, 2)),
    "volume, labels up": ((5, 2, 2), (7, 5, 3)),
    "volume, labels down": ((5, 4, 2), (2, 3, 1)),
}


@pytest.mark.parametrize("rows", [False, True], ids=["channels second", "channels last"])
@pytest.mark.parametrize(("size", "label_size"), SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_of_any_shape_are_the_oracles(size, label_size, rows):
    check_by_oracle(step_of(size, label_size, rows=rows))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_wide_kernel_answers_as_inside_a_uniform_region_in_every_axis(axes):
    step = step_of((5, 4, 2)[:axes], (5, 4, 2)[:axes], kernel=3)
    check_by_oracle(step)
    inside = nn.Sequential(copy.deepcopy(step.classifier))  # asked by a call
    twin = replace(step, reg=copy.deepcopy(step.reg), classifier=inside)
    assert_close(twin.loss(), step.loss(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_plain_callable_is_asked_with_one_place_for_each_axis(axes):
    step = step_of((5, 4, 2)[:axes], (5, 4, 2)[:axes])
    twin = replace(step, reg=copy.deepcopy(step.reg), classifier=lambda v: step.classifier(v))
    assert_close(twin.loss(), step.loss(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["tokens", "map", "volume"])
@pytest.mark.parametrize("given", [False, True], ids=["inferred", "given"])
def test_tokens_find_the_grid_of_their_labels(layout, given):
    grid, label_size = {
        "tokens": ((2, 3), (8, 12)),
        "map": ((3, 3), (7, 7)),
        "volume": ((2, 3, 1), (4, 6, 2)),
    }[layout]
    step = step_of((np.prod(grid),), label_size, rows=True, grid=grid)
    if given:
        step.options["grid"] = grid
    check_by_oracle(step)


def test_a_given_grid_may_have_another_ratio_than_the_labels():
    step = step_of((6,), (7, 5), rows=True, grid=(3, 2))
    with pytest.raises(ValueError, match="6 tokens have no grid of the ratio of the labels, 7 x 5"):
        step.loss()
    step.options["grid"] = (3, 2)
    check_by_oracle(step)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("size", [(36,), (48, 48)], ids=["rows", "maps"])
def test_one_hot_labels_of_tokens_are_no_map_of_0_and_1(size, axis):
    # 36 tokens and 4 classes can be read as a map, 16 classes and 16 x 16 patches as a volume.
    classes = 4 if len(size) == 1 else 16
    labels = torch.randint(0, classes, (2, *size))
    hot = F.one_hot(labels, classes).movedim(-1, axis)
    reg, linear = MVSCRegularizer(classes, DIM), nn.Linear(DIM, classes)
    tokens = torch.randn(2, 36 if len(size) == 1 else 9, DIM)
    with pytest.raises(ValueError, match=rf"a channel for each of the .*labels.argmax\({axis}\)"):
        reg(tokens, hot, linear)
    with pytest.raises(ValueError, match=rf"labels.argmax\({axis}\)"):
        reg(tokens, hot, linear, grid=(1, 6, 6))
    assert reg.step == 0
    assert reg(tokens, labels, linear) > 0


def margin_of(kernel, padding, dilation=1, kind=nn.Conv2d):
    layer = kind(DIM, CLASSES, kernel, padding=padding, dilation=dilation).double()
    return layer, layer(torch.zeros(1, DIM, *[16] * len(layer.kernel_size)).double()).shape[2]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("kind", "kernel", "padding", "dilation"),
    [
        (nn.Conv2d, 3, 0, 1),
        (nn.Conv2d, 7, "valid", 1),
        (nn.Conv2d, 3, 1, 2),
        (nn.Conv2d, 4, 1, 1),
        (nn.Conv2d, 4, "same", 1),
        (nn.Conv2d, 3, 2, 1),
        (nn.Conv1d, 5, 0, 1),
        (nn.Conv3d, 3, 0, 1),
    ],
)
def test_labels_belong_to_the_features_at_which_logits_have_their_centre(
    kind, kernel, padding, dilation
):
    layer, places = margin_of(kernel, padding, dilation, kind)
    axes = len(layer.kernel_size)
    # A feature holds its place along each axis, and a label the place of its logit's centre.
    first = max((16 - places) // 2, 0)
    features = torch.randn(2, DIM, *[16] * axes, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (2, *[places] * axes))
    cut = features[(..., *[slice(first, first + places)] * axes)]
    found = MVSCRegularizer(CLASSES, DIM, 1).cell_means  # of whatever is left
    seen = []
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    reg.cell_means = lambda features, labels: seen.append(features) or found(features, labels)
    reg(features, labels, layer)
    assert_close(seen[0], cut, rtol=0, atol=0)


def test_a_convolution_that_pads_by_itself_has_no_margin():
    class Same(nn.Conv2d):
        def forward(self, features):
            return super().forward(F.pad(features, (1, 1, 1, 1)))

    torch.manual_seed(0)
    features, labels = torch.randn(2, DIM, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
    own, padded = Same(DIM, CLASSES, 3), nn.Conv2d(DIM, CLASSES, 3, padding=1)
    losses = [MVSCRegularizer(CLASSES, DIM).terms(features, labels, c).align for c in (own, padded)]
    assert_close(*losses)


def test_tokens_whose_channels_come_second_take_a_grid_too():
    step = step_of((6,), (6, 4), grid=(3, 2))
    assert isinstance(step.classifier, nn.Conv1d)
    step.options["grid"] = (3, 2)
    check_by_oracle(step)
    # A Conv2d reads the same tokens unfolded.
    unfolded = nn.Conv2d(DIM, CLASSES, 1, dtype=torch.float64)
    unfolded.load_state_dict(
        {"weight": step.classifier.weight[..., None], "bias": step.classifier.bias}
    )
    twin = replace(step, reg=copy.deepcopy(step.reg), classifier=unfolded)
    assert_close(twin.loss(), step.loss(), rtol=1e-12, atol=0)


def test_the_frames_of_videos_are_taken_as_the_error_says():
    reg, conv = MVSCRegularizer(CLASSES, DIM), nn.Conv2d(DIM, CLASSES, 1)
    features = torch.randn(2, 5, DIM, 6, 7)
    labels = torch.randint(0, CLASSES, (2, 5, 6, 7))
    with pytest.raises(ValueError, match=r"features\.flatten\(0, 1\) and labels\.flatten\(0, 1\)"):
        reg(features, labels, conv)
    assert reg(features.flatten(0, 1), labels.flatten(0, 1), conv) > 0


def test_an_image_folded_by_hand_gives_the_same_bits():
    step = step_of((6, 4), (6, 4), dtype=torch.float32)
    flat = nn.Conv1d(DIM, CLASSES, 1)
    state = {"weight": step.classifier.weight[..., 0], "bias": step.classifier.bias}
    flat.load_state_dict(state)
    folded = replace(
        step,
        reg=copy.deepcopy(step.reg),
        features=step.features.flatten(2),
        labels=step.labels.flatten(1),
        classifier=flat,
    )
    loss, by_hand = step.loss(), folded.loss()
    assert torch.equal(by_hand, loss)
    leaves = [step.features, step.reg.centroids, *step.classifier.parameters()]
    theirs = [step.features, folded.reg.centroids, *flat.parameters()]
    own, hand = torch.autograd.grad(loss, leaves), torch.autograd.grad(by_hand, theirs)
    assert all(torch.equal(a, b.view_as(a)) for a, b in zip(own, hand, strict=True))


def test_a_volume_folded_by_hand_gives_the_same_loss():
    step = step_of((4, 3, 2), (4, 3, 2))
    folded = replace(
        step,
        reg=copy.deepcopy(step.reg),
        features=step.features.flatten(2, 3),
        labels=step.labels.flatten(1, 2),
        classifier=lambda v: step.classifier(v[..., None]).flatten(1),
    )
    assert_close(folded.loss(), step.loss(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_memory_layout_changes_no_number(axes):
    step = step_of((5, 4, 2)[:axes], (5, 4, 2)[:axes])
    features = step.features.detach().movedim(1, -1).contiguous().movedim(-1, 1)
    other = replace(step, reg=copy.deepcopy(step.reg), features=features.requires_grad_())
    losses = step.loss(), other.loss()
    assert_close(*losses, rtol=1e-12, atol=0)
    own = torch.autograd.grad(losses[0], step.features)[0]
    theirs = torch.autograd.grad(losses[1], other.features)[0]
    assert_close(own, theirs, rtol=1e-11, atol=1e-14)
    assert theirs.stride(1) == 1  # written in the layout of its map


@pytest.mark.parametrize("rows", [False, True], ids=["channels second", "channels last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_lies_in_padded_places_never_matters_bitwise(rows, value):
    """Clouds and sequences of unequal length: what is padded carries ignore_index."""
    step = step_of((7,), (7,), rows=rows, dtype=torch.float32)
    lengths = torch.tensor([5, 3])
    padded = torch.arange(7) >= lengths[:, None]
    step.labels[padded] = IGNORE
    results = []
    for filling in (0.0, value):
        mask = padded[..., None] if rows else padded[:, None]
        features = step.features.detach().masked_fill(mask, filling).requires_grad_()
        reg = copy.deepcopy(step.reg)
        loss = reg(features, step.labels, step.classifier)
        results.append([loss, *torch.autograd.grad(loss, [features, reg.centroids])])
    assert all(map(torch.equal, *results))
    assert (results[0][1][mask.expand_as(features)] == 0).all()


def test_a_longer_padding_gives_the_same_means():
    features, labels = torch.randn(2, DIM, 6), torch.randint(0, CLASSES, (2, 6))
    longer = torch.cat([features, torch.full((2, DIM, 3), torch.nan)], dim=2)
    padded = F.pad(labels, (0, 3), value=CLASSES)
    assert_close(segment_mean(longer, padded, CLASSES), segment_mean(features, labels, CLASSES))


of_each_form = pytest.mark.parametrize(
    ("axes", "rows"), FORMS, ids=[f"{axes}-D{', rows' * rows}" for axes, rows in FORMS]
)


def inputs_of(axes, label_size=None):
    size = (5, 4, 2)[:axes]
    labels = torch.randint(0, CLASSES, (2, *(label_size or size)))
    labels[0, 0] = IGNORE
    return torch.randn(2, 2, *size), labels


@of_each_form
def test_compiled_whole_the_numbers_are_the_eager_ones(axes, rows):
    model, reg = Net(axes, rows, DIM, CLASSES), MVSCRegularizer(CLASSES, DIM, GROUPS)
    inputs, labels = inputs_of(axes)
    torch.compiler.reset()
    results = []
    for wrap in (lambda f: f, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        twin, net = copy.deepcopy(reg), copy.deepcopy(model)

        @wrap
        def loss(inputs, labels, net=net, twin=twin):
            features, logits = net(inputs)
            return twin(features, labels, net.classifier) + logits.square().mean()

        for _ in range(2):
            loss(inputs, labels).backward()
        results.append([p.grad for p in [*net.parameters(), *twin.parameters()]])
    assert_close(*results, rtol=1e-5, atol=1e-7)


def test_tokens_compile_with_their_grid_inferred():
    step = step_of((6,), (4, 6), rows=True, grid=(2, 3), dtype=torch.float32)
    twin = copy.deepcopy(step.reg)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert_close(compiled(step.features, step.labels, step.classifier), step.loss())


@of_each_form
def test_under_autocast_the_loss_is_float32_and_nearly_the_same(axes, rows):
    model, reg = Net(axes, rows, DIM, CLASSES), MVSCRegularizer(CLASSES, DIM, GROUPS)
    inputs, labels = inputs_of(axes)
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = model(inputs)
        loss = copy.deepcopy(reg)(features, labels, model.classifier)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    features, _ = model(inputs)
    assert_close(loss, reg(features, labels, model.classifier), rtol=2e-2, atol=2e-2)


@of_each_form
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(axes, rows, reentrant):
    model, reg = Net(axes, rows, DIM, CLASSES), MVSCRegularizer(CLASSES, DIM, GROUPS)
    inputs, labels = inputs_of(axes)
    results = []
    for within in (lambda f, *args: f(*args), partial(checkpoint, use_reentrant=reentrant)):
        net, twin = copy.deepcopy(model), copy.deepcopy(reg)
        features, _ = net(inputs)
        within(lambda f, net=net, twin=twin: twin(f, labels, net.classifier), features).backward()
        results.append([p.grad for p in [*net.parameters(), *twin.parameters()]])
        assert twin.step == 1
    assert_close(*results, rtol=0, atol=0)


class Remembering(Tensor):
    """A tensor subclass, as MONAI's MetaTensor is one: it survives operations."""


# The compiler looks at a gradient that is not there.
no_gradient_yet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.mark.parametrize(
    ("axes", "rows", "compiled"), [*[(*form, False) for form in FORMS], (2, False, True)]
)
@no_gradient_yet
def test_a_subclass_of_another_library_is_a_plain_tensor_here(axes, rows, compiled):
    model, reg = Net(axes, rows, DIM, CLASSES), MVSCRegularizer(CLASSES, DIM, GROUPS)
    inputs, labels = inputs_of(axes)
    results = []
    for wrap in (lambda t: t, lambda t: t.as_subclass(Remembering)):
        torch.compiler.reset()
        twin = copy.deepcopy(reg)
        # The compiler breaks its graph where it meets one.
        call = torch.compile(twin, backend="aot_eager") if compiled else twin
        features = model(inputs)[0].detach().requires_grad_()
        loss = call(wrap(features), wrap(labels), model.classifier)
        assert type(loss) is Tensor
        results.append([loss, *torch.autograd.grad(loss, [features, *twin.parameters()])])
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@no_gradient_yet
def test_tv_tensors_are_plain_tensors_here(compiled):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    model, reg = Net(2, False, DIM, CLASSES), MVSCRegularizer(CLASSES, DIM, GROUPS)
    inputs, labels = inputs_of(2)
    features, _ = model(inputs)
    expected = copy.deepcopy(reg)(features, labels, model.classifier)
    torch.compiler.reset()
    call = torch.compile(reg, backend="aot_eager") if compiled else reg
    loss = call(tv_tensors.Image(features.detach()), tv_tensors.Mask(labels), model.classifier)
    assert type(loss) is Tensor
    assert_close(loss, expected, rtol=0, atol=0)


@of_each_form
def test_attach_trains_any_form(axes, rows):
    class Segmenter(Net):
        def forward(self, inputs):
            return super().forward(inputs)[1]

    model = Segmenter(axes, rows, DIM, CLASSES)
    inputs, labels = inputs_of(axes)
    reg = attach(model, example=inputs)
    assert reg.classifier_path == "classifier"
    model(inputs)
    reg(labels).backward()
    assert reg.features.shape == (2, DIM, *labels.shape[1:])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_segment_mean_and_diagnostics_take_any_number_of_axes(axes):
    size, label_size = (5, 4, 2)[:axes], (9, 6, 3)[:axes]
    step = step_of(size, label_size)
    features, labels = step.features.detach(), step.labels
    grid = oracle.labels_on_grid(labels.numpy(), size, CLASSES, IGNORE)
    (expected,) = oracle.means(features.numpy(), grid, np.zeros(grid.shape, int), 1, CLASSES)
    empty = np.zeros(DIM)
    expected = np.stack([empty if mean is None else mean for mean in expected])

    cells = torch.tensor([CLASSES if c is None else c for c in grid.flat]).view(2, *size)
    means, counts = segment_mean(features, cells, CLASSES)
    assert relative_error(means.numpy(), expected) < 1e-12
    assert counts.tolist() == [int((cells == c).sum()) for c in range(CLASSES)]
    (means,), (present,) = diagnostics.cell_means(features, labels, CLASSES)
    assert relative_error(means.numpy(), expected) < 1e-12
    assert_close(present, counts > 0)

    unit, counted = diagnostics.unit_means(features, labels, CLASSES)
    lengths = np.sqrt((features.numpy() ** 2).sum(1, keepdims=True) + oracle.EPS**2)
    (directions,) = oracle.means(
        features.numpy() / lengths, grid, np.zeros(grid.shape, int), 1, CLASSES
    )
    directions = np.stack([empty if mean is None else mean for mean in directions])
    assert relative_error(unit.numpy(), directions) < 1e-12
    assert_close(counted, counts)

    heat = diagnostics.centroid_heatmap(features, step.reg.centroids, 1, group=0)
    assert heat.shape == (2, *size)
    place = (1, *[n - 1 for n in size])
    pixel = features.movedim(1, -1)[place].numpy()
    centroid = step.reg.centroids[0, 1].detach().numpy()
    assert relative_error(heat[place].item(), oracle.cosine(pixel, centroid)) < 1e-12

    ages = diagnostics.class_ages(torch.zeros(CLASSES, dtype=torch.int64), labels)
    assert ages.tolist() == [int(not (labels == c).any()) for c in range(CLASSES)]


def test_diagnostics_of_tokens_say_how_to_unfold_them():
    features, labels = torch.randn(2, DIM, 6), torch.randint(0, CLASSES, (2, 8, 12))
    with pytest.raises(ValueError, match=r"Use features.unflatten\(2, \(2, 3\)\) for tokens."):
        diagnostics.cell_means(features, labels, CLASSES)
    means, _ = diagnostics.cell_means(features.unflatten(2, (2, 3)), labels, CLASSES)
    assert means.shape == (1, CLASSES, DIM)
    centroids = torch.randn(GROUPS, CLASSES, DIM)
    with pytest.raises(ValueError, match=r"Use features.movedim\(-1, 1\)."):
        diagnostics.centroid_heatmap(features.mT, centroids, 0)


def test_plotting_is_of_two_axes_and_says_so():
    from matplotlib.figure import Figure

    ax, centroids = Figure().subplots(), torch.randn(GROUPS, CLASSES, DIM)
    image, volume = torch.rand(3, 8, 8), torch.randn(1, DIM, 5, 4, 4)
    labels = torch.randint(0, CLASSES, (1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"Draw a slice of a volume: features\[:, :, 2\]."):
        heatmaps(image, volume, centroids, [0])
    heatmaps(image, volume[:, :, 2], centroids, [0])
    with pytest.raises(ValueError, match=r"Unfold them: features.unflatten\(2, \(height, width\)"):
        heatmaps(image, volume[:, :, :, 0, 0], centroids, [0])
    cosines = diagnostics.centroid_heatmap(volume, centroids, 0)
    with pytest.raises(ValueError, match=r"and a slice of a volume: cosines\[0, 2\]."):
        draw_heatmap(ax, cosines)
    draw_heatmap(ax, cosines[0, 2])
    with pytest.raises(ValueError, match=r"For a slice of a volume, labels\[2\]."):
        heatmaps(image, volume[:, :, 2], centroids, [0], labels=labels[0])
    heatmaps(image, volume[:, :, 2], centroids, [0], labels=labels[0][2])


def maps(*shape):
    return torch.randn(2, *shape, requires_grad=True)


def labels_of(*size):
    labels = torch.randint(0, CLASSES, (2, *size))
    labels[(0,) * labels.ndim] = CLASSES - 1  # more than a mask
    return labels


def head(axes, kernel=1):
    return CONVOLUTIONS[axes - 1](DIM, CLASSES, kernel, padding=kernel // 2)


BAD = {
    # features, labels, classifier, options, what is named, the line that is followed
    "volume, labels of an image": (
        maps(DIM, 4, 5, 6),
        labels_of(5, 6),
        head(3),
        {},
        ["(batch, depth, height, width)", "4 x 5 x 6", "(2, 5, 6)"],
        {"labels": "labels.unsqueeze(1)"},
    ),
    "volume, labels in a row": (
        maps(DIM, 4, 5, 6),
        labels_of(120),
        head(3),
        {},
        ["4 x 5 x 6", "(2, 120)"],
        {"labels": "labels.unflatten(1, (4, 5, 6))"},
    ),
    "volume, finer labels in a row": (
        maps(DIM, 4, 5, 6),
        labels_of(960),
        head(3),
        {},
        ["4 x 5 x 6", "(2, 960)"],
        {"labels": "labels.unflatten(1, (8, 10, 12))"},
    ),
    "image, labels in a row": (
        maps(DIM, 4, 5),
        labels_of(20),
        head(2, 3),
        {},
        ["(batch, height, width)", "4 x 5", "(2, 20)"],
        {"labels": "labels.unflatten(1, (4, 5))"},
    ),
    "image, labels of a volume": (
        maps(DIM, 4, 5),
        labels_of(7, 8, 10),
        head(2),
        {},
        ["(batch, height, width)", "4 x 5", "(2, 7, 8, 10)", "Pass the features unfolded"],
        {"features": "maps(DIM, 7, 4, 5)", "classifier": "head(3)"},
    ),
    "folded volume, labels of a volume": (
        maps(DIM, 20, 6),
        labels_of(4, 5, 6),
        head(2),
        {},
        ["20 x 6", "(2, 4, 5, 6)"],
        {"labels": "labels.flatten(1, 2)"},
    ),
    "points, labels of an image of as many pixels": (
        maps(DIM, 20),
        labels_of(4, 5),
        head(1),
        {},
        ["(batch, places)", "20", "(2, 4, 5)"],
        {"labels": "labels.flatten(1, 2)"},
    ),
    "tokens in the second axis, labels of a finer image": (
        maps(DIM, 20),
        labels_of(8, 10),
        head(1),
        {},
        ["20", "(2, 8, 10)"],
        {"options": "grid=(4, 5)"},
    ),
    "two dates": (
        maps(DIM, 4, 5),
        labels_of(4, 5)[None],
        head(2),
        {},
        ["4 x 5", "(1, 2, 4, 5)"],
        {"labels": "labels.flatten(0, 1)"},
    ),
    "labels of MONAI": (
        maps(DIM, 4, 5, 6),
        labels_of(1, 4, 5, 6).float(),
        head(3),
        {},
        ["4 x 5 x 6", "(2, 1, 4, 5, 6)"],
        {"labels": "labels.squeeze(1).long()"},
    ),
    "no axis": (
        maps(DIM),
        labels_of(),
        head(1),
        {},
        ["one to three spatial axes", "(2, 3)"],
        {"features": "features.unsqueeze(-1)", "labels": "labels.flatten().unsqueeze(-1)"},
    ),
    "no axis, Linear": (
        maps(DIM),
        labels_of(),
        nn.Linear(DIM, CLASSES),
        {},
        ["one to three spatial axes", "(2, 3)"],
        {"features": "features.unsqueeze(1)", "labels": "labels.flatten().unsqueeze(-1)"},
    ),
    "four axes": (
        maps(DIM, 2, 3, 4, 5),
        labels_of(2, 3, 4, 5),
        lambda v: v[:, [0, 1, 2, 0]],
        {},
        ["one to three spatial axes", "(2, 3, 2, 3, 4, 5)"],
        {"features": "features.flatten(2, 3)", "labels": "labels.flatten(1, 2)"},
    ),
    "four axes, Linear": (
        maps(2, 3, 4, 5, DIM),
        labels_of(2, 3, 4, 5),
        nn.Linear(DIM, CLASSES),
        {},
        ["one to three spatial axes", "(2, 2, 3, 4, 5, 3)"],
        {"features": "features.flatten(1, 2)", "labels": "labels.flatten(1, 2)"},
    ),
    "tokens with a class token": (
        maps(21, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {},
        ["21 tokens", "8 x 10"],
        {"features": "features[:, 1:]"},
    ),
    "tokens with a class token and four registers": (
        maps(25, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {},
        ["25 tokens", "8 x 10"],
        {"features": "features[:, 5:]"},
    ),
    "tokens with an open grid": (
        maps(18, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {},
        ["18 tokens", "8 x 10", "Pass grid=(height, width)"],
        {"options": "grid=(3, 6)"},
    ),
    "a class token and a grid": (
        maps(19, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {"grid": (3, 6)},
        ["19", "(3, 6)"],
        {"features": "features[:, 1:]"},
    ),
    "a class token and a grid, channels second": (
        maps(DIM, 19),
        labels_of(8, 10),
        head(1),
        {"grid": (3, 6)},
        ["19", "(3, 6)"],
        {"features": "features[..., 1:]"},
    ),
    "a grid too large": (
        maps(18, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {"grid": (4, 5)},
        ["18", "(4, 5)", "Pass height, width of the tokens"],
        {"options": "grid=(3, 6)"},
    ),
    "a grid of too few axes": (
        maps(18, DIM),
        labels_of(8, 10),
        nn.Linear(DIM, CLASSES),
        {"grid": (18,)},
        ["2 axes", "8 x 10", "(18,)", "Pass grid=(height, width) of the 18 tokens"],
        {"options": "grid=(3, 6)"},
    ),
    "a grid for a map": (
        maps(DIM, 4, 5),
        labels_of(8, 10),
        head(2),
        {"grid": (4, 5)},
        ["4 x 5", "8 x 10", "Leave it out"],
        {"options": ""},
    ),
    "a grid for labels in a row": (
        maps(18, DIM),
        labels_of(18),
        nn.Linear(DIM, CLASSES),
        {"grid": (3, 6)},
        ["18", "Leave it out"],
        {"options": ""},
    ),
    "either axis may be the channels": (
        maps(DIM, 4, DIM),
        labels_of(DIM, 4),
        nn.Linear(DIM, CLASSES),
        {},
        ["(2, 3, 4, 3)", "channels_last=True"],
        {"options": "channels_last=True"},
    ),
    "a Linear told of channels last, which come second": (
        maps(DIM, 4, 5),
        labels_of(4, 5),
        nn.Linear(DIM, CLASSES),
        {"channels_last": True},
        ["(2, 3, 4, 5)", "(batch, *spatial, dim)"],
        {"options": "channels_last=False"},
    ),
    "a convolution, channels last": (
        maps(4, 5, DIM),
        labels_of(4, 5),
        head(2),
        {},
        ["(2, 4, 5, 3)", "(batch, dim, *spatial)"],
        {"options": "channels_last=True"},
    ),
    "Conv3d, a map of an image": (
        maps(DIM, 4, 5),
        labels_of(4, 5),
        head(3),
        {},
        ["as many spatial axes as the features, 2,", "Conv3d"],
        {"features": "features[:, :, None]", "labels": "labels[:, None]"},
    ),
    "Conv3d, points": (
        maps(DIM, 4),
        labels_of(4),
        head(3),
        {},
        ["as many spatial axes as the features, 1,", "Conv3d"],
        {"features": "features[:, :, None, None]", "labels": "labels[:, None, None]"},
    ),
    "Conv2d, a volume": (
        maps(DIM, 4, 5, 6),
        labels_of(4, 10, 12),
        head(2),
        {},
        ["as many spatial axes as the features, 3,", "Conv2d"],
        {
            "features": "features.permute(0, 2, 1, 3, 4).flatten(0, 1)",
            "labels": "labels.flatten(0, 1)",
        },
    ),
    "Conv1d, a volume": (
        maps(DIM, 4, 5, 6),
        labels_of(4, 5, 6),
        head(1),
        {},
        ["as many spatial axes as the features, 3,", "Conv1d"],
        {
            "features": "features.permute(0, 2, 3, 1, 4).flatten(0, 2)",
            "labels": "labels.flatten(0, 2)",
        },
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_the_line_that_an_error_says_ends_in_a_loss(case):
    """Followed literally, it never leads into another error."""
    features, labels, classifier, options, named, lines = case
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
    with pytest.raises(ValueError, match=re.escape(named[0])) as raised:
        reg(features, labels, classifier, **options)
    message = str(raised.value)
    for part in named[1:]:
        assert part in message
    for line in lines.values():
        if not any(name in line for name in ("maps(", "head(", "grid=(3, 6)")):  # the user's own
            assert line in message
    mended = {"features": features, "labels": labels, "classifier": classifier}
    names = {**globals(), **mended}
    for name, line in lines.items():
        if name == "options":
            options = eval(f"dict({line})", names)
        else:
            mended[name] = eval(line, names)
    loss = reg(**mended, **options)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("grid", [4, (4, -5), (4.0, 5.0), "4x5"])
def test_a_grid_is_whole_numbers(grid):
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
    with pytest.raises(TypeError, match=r"grid must be sizes, whole numbers of at least 1, got"):
        reg(maps(20, DIM), labels_of(8, 10), nn.Linear(DIM, CLASSES), grid=grid)
