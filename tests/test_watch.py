"""What a training loop may get wrong without an error: said once, and only where it is so."""

import copy
import dataclasses
import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mvsc import MVSCRegularizer, comparing
from mvsc.attach import ClassifierNotFoundError, attach
from mvsc.labels import check_labels
from mvsc.sampling import labels_on_grid

# The package has a function of the module's name.
attaching = importlib.import_module("mvsc.attach")
CLASSES, DIM = 4, 8


# A model that pads its images and crops its logits.


class Padding(nn.Module):
    """Pads to a multiple, at the end or elsewhere, and crops the resized logits."""

    def __init__(
        self,
        to=32,
        stride=4,
        both=False,
        pad="constant",
        square=False,
        first=False,
        after=lambda logits: logits,
        **resize,
    ):
        super().__init__()
        self.encoder, self.classifier = (
            nn.Conv2d(3, DIM, stride, stride),
            nn.Conv2d(DIM, CLASSES, 1),
        )
        self.to, self.stride, self.both, self.pad, self.square = to, stride, both, pad, square
        self.first, self.after = first, after
        self.resize = resize or {"mode": "bilinear"}

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[2:]
        down, right = (
            (max(h, w) - h, max(h, w) - w) if self.square else (-h % self.to, -w % self.to)
        )
        top, left = (down // 2, right // 2) if self.both else (0, 0)
        top, left = (down, right) if self.first else (top, left)
        images = F.pad(images, (left, right - left, top, down - top), mode=self.pad)
        logits = F.interpolate(
            self.classifier(self.encoder(images)), scale_factor=self.stride, **self.resize
        )
        return self.after(logits[..., top : top + h, left : left + w])


def step(model, images, labels, **options):
    reg = attach(model, classifier="classifier", **options)
    logits = model(images)
    logits = F.interpolate(logits, labels.shape[1:]) if logits.ndim > 3 else logits
    (F.cross_entropy(logits, labels, ignore_index=255) + reg(labels)).backward()
    return reg


@pytest.mark.parametrize(
    "model",
    [
        Padding(),
        Padding(both=True),
        Padding(pad="reflect"),
        Padding(to=16, stride=8, pad="replicate"),
        Padding(stride=16),
        Padding(stride=8, both=True, mode="nearest-exact"),
        Padding(stride=8, mode="bilinear", align_corners=True),
        Padding(square=True),
        Padding(square=True, both=True),
        Padding(first=True),
        Padding(mode="bicubic"),
    ],
    ids=[
        "end",
        "both",
        "reflect",
        "16",
        "stride 16",
        "nearest",
        "corners",
        "square",
        "square both",
        "first",
        "bicubic",
    ],
)
@pytest.mark.parametrize("size", [(72, 96), (50, 76), (100, 60), (48, 72)])
def test_a_model_that_pads_and_crops_is_told_to_pad_the_labels_too(model, size):
    images, labels = torch.randn(2, 3, *size), torch.randint(0, CLASSES, (2, *size))
    with pytest.warns(UserWarning, match=r"pads.*F\.pad\(labels") as seen:
        step(copy.deepcopy(model), images, labels)
    assert len(seen) == 1
    assert seen[0].filename == __file__  # the user's line, not one of ours


@pytest.mark.parametrize("size", [(50, 76), (100, 60)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_is_noticed_under_autocast_too(dtype, size):
    model = Padding(stride=8, mode="bilinear", align_corners=False)
    images, labels = torch.randn(2, 3, *size), torch.randint(0, CLASSES, (2, *size))
    with pytest.warns(UserWarning, match=r"pads.*F\.pad\(labels"), torch.autocast("cpu", dtype):
        step(model, images, labels)


class PaddingAtStride(nn.Module):
    """Pads to a multiple of 32 and returns logits of a quarter of the size, cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = nn.Conv2d(3, DIM, 4, 4), nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        h, w = images.shape[2:]
        padded = F.pad(images, (0, -w % 32, 0, -h % 32))
        return self.classifier(self.encoder(padded))[..., : h // 4, : w // 4]


@pytest.mark.parametrize(
    ("size", "padded"), [((72, 128), "96 x 128"), ((36, 36), "64 x 64"), ((48, 72), "64 x 96")]
)
def test_the_size_to_pad_labels_to_is_theirs_and_not_that_of_logits_at_a_stride(size, padded):
    model = PaddingAtStride()
    reg = attach(model, classifier="classifier", groups=1)
    labels = torch.randint(0, CLASSES, (1, *size))
    model(torch.randn(1, 3, *size))
    with pytest.warns(UserWarning, match=rf"over images of {padded}\..*F\.pad\(labels"):
        reg(labels)


@pytest.mark.parametrize("size", [(72, 128), (36, 36), (48, 72), (32, 32)])
def test_labels_that_are_padded_for_logits_at_a_stride_are_taken_in_silence(size):
    model = PaddingAtStride()
    reg = attach(model, classifier="classifier", groups=1)
    labels = torch.randint(0, CLASSES, (1, *size))
    padded = F.pad(labels, (0, -size[1] % 32, 0, -size[0] % 32), value=255)
    for each in (padded, padded[:, ::2, ::2], padded[:, 2::4, 2::4]):
        model(torch.randn(1, 3, *size))
        reg(each)


def test_images_that_are_padded_to_twice_their_size_are_noticed():
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    with pytest.warns(UserWarning, match=r"over images of 64 x 64\..*F\.pad\(labels"):
        step(Padding(to=64), images, labels)


def test_labels_of_a_quarter_are_stretched_too_where_a_square_is_padded():
    model = Padding()
    reg = attach(model, classifier="classifier", groups=1)
    model(torch.randn(1, 3, 36, 36))
    with pytest.warns(UserWarning, match=r"labels of 9 x 9 .* over images of 16 x 16\."):
        reg(torch.randint(0, CLASSES, (1, 9, 9)))


def test_a_model_may_pad_one_axis_on_both_sides_and_the_other_at_its_end():
    class Mixed(Padding):
        def forward(self, images: Tensor) -> Tensor:
            padded = F.pad(images, (0, 20, 7, 7))
            logits = self.classifier(self.encoder(padded))
            return F.interpolate(logits, scale_factor=4, mode="bilinear")[..., 7:-7, :-20]

    images, labels = torch.randn(2, 3, 50, 76), torch.randint(0, CLASSES, (2, 50, 76))
    with pytest.warns(UserWarning, match=r"over images of 64 x 96\..*F\.pad\(labels"):
        step(Mixed(), images, labels)


@dataclasses.dataclass
class Output:
    logits: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    logits: Tensor


@pytest.mark.parametrize(
    "after",
    [
        lambda z: SimpleNamespace(loss=None, logits=z),
        Output,
        Slots,
        lambda z: {"out": [z]},
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        torch.sigmoid,
    ],
)
def test_a_model_that_pads_is_noticed_whatever_it_returns(after):
    images, labels = torch.randn(2, 3, 72, 96), torch.randint(0, CLASSES, (2, 72, 96))
    model = Padding(after=after)
    reg = attach(model, classifier="classifier")
    model(images)
    with pytest.warns(UserWarning, match=r"pads.*F\.pad\(labels"):
        reg(labels)


def test_a_model_that_pads_is_noticed_when_the_first_images_need_no_padding():
    model = Padding()
    reg = attach(model, classifier="classifier", groups=1)

    def train(size):
        model(torch.randn(1, 3, *size))
        reg(torch.randint(0, CLASSES, (1, *size)))

    train((64, 64))
    train((96, 64))
    train((64, 64))
    with pytest.warns(UserWarning, match=r"images of 96 x 96\..*F\.pad\(labels"):
        train((72, 72))


def test_labels_that_are_padded_are_taken_in_silence_whatever_the_sizes():
    model = Padding()
    reg = attach(model, classifier="classifier", groups=1)
    for size in ((60, 60), (64, 64), (60, 90), (60, 60), (30, 33)):
        model(torch.randn(1, 3, *size))
        labels = torch.randint(0, CLASSES, (1, *size))
        reg(F.pad(labels, (0, -size[1] % 32, 0, -size[0] % 32), value=255))


def test_sizes_that_came_before_are_not_compared_again_and_only_some_at_all(monkeypatch):
    calls = []
    compare = attaching.compare
    monkeypatch.setattr(attaching, "compare", lambda *each: calls.append(1) or compare(*each))
    model = Plain()
    reg = attach(model, classifier="classifier")
    for number, size in enumerate([8, 8, 9, 8, 9, *range(10, 30)]):
        model(torch.randn(1 + number % 2, 3, size, size))
        reg.discard()
    assert len(calls) == 8


@pytest.mark.parametrize("model", [Padding(), Padding(both=True), Padding(square=True)])
def test_labels_that_are_padded_as_the_model_pads_are_taken_in_silence(model):
    size = (50, 76)
    model.resize = {"mode": "nearest"}
    images, labels = torch.randn(2, 3, *size), torch.randint(0, CLASSES, (2, *size))
    down, right = (26, 0) if model.square else (14, 20)
    top, left = (down // 2, right // 2) if model.both else (0, 0)
    padded = F.pad(labels, (left, right - left, top, down - top), value=255)
    reg = attach(model, classifier="classifier", groups=1, pull_weight=0.0)
    F.cross_entropy(model(images), labels)
    loss = reg(padded)
    # What is right: each feature pixel has the label of its own 4 x 4 pixels of the image.
    features = model.encoder(F.pad(images, (left, right - left, top, down - top)))
    explicit = MVSCRegularizer(CLASSES, DIM, 1, pull_weight=0.0)
    grid = F.pad(labels, (left, right - left, top, down - top), value=255)[:, 2::4, 2::4]
    assert_close(loss, explicit(features, grid, model.classifier))


def test_a_letterbox_is_noticed():
    class Letterbox(Padding):
        def forward(self, images: Tensor) -> Tensor:
            small = F.interpolate(images, (48, 64), mode="bilinear")
            logits = F.interpolate(
                self.classifier(self.encoder(F.pad(small, (0, 0, 8, 8)))),
                scale_factor=4,
                mode="bilinear",
            )
            return F.interpolate(logits[:, :, 8:-8], images.shape[2:], mode="bilinear")

    images, labels = torch.randn(2, 3, 90, 120), torch.randint(0, CLASSES, (2, 90, 120))
    with pytest.warns(UserWarning, match=r"F\.pad\(labels|not a resize"):
        step(Letterbox(), images, labels)


class Plain(nn.Module):
    """An encoder, a classifier, and perhaps something that comes after it."""

    def __init__(self, *encoder: nn.Module, after=lambda logits, size: logits) -> None:
        super().__init__()
        layers = encoder or (nn.Conv2d(3, DIM, 3, padding=1),)
        self.encoder, self.classifier = nn.Sequential(*layers), nn.Conv2d(DIM, CLASSES, 1)
        self.after = after

    def forward(self, images: Tensor):
        logits = self.classifier(self.encoder(images))
        return self.after(logits, images.shape[2:])


GRIDS = [(97, 131), (375, 500), (333, 500), (321, 481), (427, 640), (365, 500)]
"""Sizes of real images: Cityscapes and ADE20K crops, VOC, BSDS, COCO."""


def strided(*strides, kernel=3, dilation=1):
    widths = [3, *[DIM] * len(strides)]
    return [
        nn.Conv2d(a, b, kernel, s, padding=kernel // 2 * dilation, dilation=dilation)
        for a, b, s in zip(widths, widths[1:], strides, strict=False)
    ]


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize(
    "encoder",
    [
        lambda: strided(2, 2),
        lambda: strided(2, 2, 2),
        lambda: strided(4, 2, 2, 2, kernel=7),
        lambda: [nn.Conv2d(3, DIM, 14, 14)],
        lambda: [nn.Conv2d(3, DIM, 16, 16)],
        lambda: [*strided(2, 2), nn.Conv2d(DIM, DIM, 3, padding=4, dilation=4)],
        lambda: [nn.Conv2d(3, DIM, 3, 2), nn.MaxPool2d(2, ceil_mode=True)],
        lambda: [nn.Conv2d(3, DIM, 3), nn.Conv2d(DIM, DIM, 3)],
    ],
    ids=["os4", "os8", "os32", "patch14", "patch16", "dilated", "ceil", "valid"],
)
def test_models_that_do_not_pad_are_quiet_on_real_sizes(encoder, size):
    layers = encoder()
    if len(layers) == 2 and size == (97, 131) and layers[0].padding == (0, 0):
        size = (98, 134)
    images, labels = torch.randn(1, 3, *size), torch.randint(0, CLASSES, (1, *size))
    step(Plain(*layers, after=lambda logits, _: F.interpolate(logits, size)), images, labels)


def test_a_resize_that_changes_the_ratio_is_quiet():
    def resized(images):
        return F.interpolate(images, (64, 64), mode="bilinear")

    class Resizing(Plain):
        def forward(self, images: Tensor) -> Tensor:
            return F.interpolate(super().forward(resized(images)), images.shape[2:])

    images, labels = torch.randn(1, 3, 48, 96), torch.randint(0, CLASSES, (1, 48, 96))
    step(Resizing(*strided(2, 2)), images, labels)


# A gradient that nobody clears.


def train(clear, steps=4, optimizer=torch.optim.SGD, accumulate=1, model=None, **options):
    model = model or Plain()
    reg = attach(model, classifier="classifier")
    groups = [{"params": [*model.parameters()]}, reg.param_group()]
    made = optimizer(groups, lr=0.01, **options)
    for number in range(steps):
        images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
        loss = F.cross_entropy(model(images), labels) + reg(labels)
        if number % accumulate == 0:
            clear(model, made, reg)
        loss.backward()
        if number % accumulate == accumulate - 1:
            made.step()
    return reg


def test_a_gradient_that_model_zero_grad_leaves_is_noticed_once():
    with pytest.warns(UserWarning, match=r"model\.zero_grad\(\) does not know them") as seen:
        train(lambda model, optimizer, reg: model.zero_grad(), steps=6)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_accumulation_under_model_zero_grad_is_noticed_too():
    with pytest.warns(UserWarning, match=r"reg\.zero_grad\(\) beside"):
        train(lambda model, optimizer, reg: model.zero_grad(), steps=8, accumulate=3)


def test_it_is_noticed_under_a_fused_optimizer_too_which_autograd_does_not_count():
    with pytest.warns(UserWarning, match=r"model\.zero_grad\(\) does not know them") as seen:
        train(lambda model, optimizer, reg: model.zero_grad(), steps=210, fused=True)
    assert len(seen) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "clear",
    [
        lambda model, optimizer, reg: optimizer.zero_grad(),
        lambda model, optimizer, reg: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer, reg: (model.zero_grad(), reg.zero_grad()),
        lambda model, optimizer, reg: [setattr(p, "grad", None) for p in [*reg.parameters()]],
    ],
    ids=["none", "zeros", "both", "by hand"],
)
def test_a_gradient_that_is_cleared_is_quiet(clear, accumulate, fused):
    train(clear, steps=120 if fused else 7, accumulate=accumulate, fused=fused)


def test_a_scaler_that_leaves_steps_out_is_quiet():
    model = Plain()
    reg = attach(model, classifier="classifier")
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for number in range(8):
        images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(images), labels) + reg(labels)
        scaler.scale(loss * (float("inf") if number in (0, 4) else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**14  # Two steps were left out.


def test_two_backwards_of_sharpness_aware_minimisation_are_quiet():
    model = Plain()
    reg = attach(model, classifier="classifier")
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.01)
    for _ in range(4):
        images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + reg(labels)).backward()
        moved = [(p, 0.05 * p.grad) for p in [*model.parameters(), *reg.parameters()]]
        with torch.no_grad():
            for parameter, by in moved:
                parameter.add_(by)
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + reg(labels)).backward()
        with torch.no_grad():
            for parameter, by in moved:
                parameter.sub_(by)
        optimizer.step()


def test_a_state_loaded_between_two_parts_of_a_batch_is_quiet():
    model = Plain()
    reg = attach(model, classifier="classifier")
    state = copy.deepcopy(reg.state_dict())
    for _ in range(2):
        images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
        (F.cross_entropy(model(images), labels) + reg(labels)).backward()
        reg.load_state_dict(state)


def test_a_line_search_that_asks_several_times_is_quiet():
    model = Plain()
    reg = attach(model, classifier="classifier")
    optimizer = torch.optim.LBFGS([*model.parameters(), *reg.parameters()], max_iter=4)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels) + reg(labels)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def test_two_losses_of_one_step_are_quiet():
    model = Plain()
    reg = attach(model, classifier="classifier")
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
            (F.cross_entropy(model(images), labels) + reg(labels)).backward()
        optimizer.step()


class Scaled(nn.Module):
    """A head of cosines, whose logits are multiplied behind the classifier."""

    def __init__(self, scale):
        super().__init__()
        self.encoder, self.classifier = nn.Conv2d(3, DIM, 4, 4), nn.Conv2d(DIM, CLASSES, 1)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.scale * self.classifier(self.encoder(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def test_logits_that_are_multiplied_behind_the_classifier_are_noticed():
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    step(Scaled(1.0), images, labels)
    with pytest.warns(UserWarning, match="multiplies its output by 20, as heads of cosines do"):
        step(Scaled(20.0), images, labels)


class OnApple(Tensor):
    """A tensor of a device that has no float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if func == Tensor.device.__get__:
            return torch.device("mps")
        if func is Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "after",
    [
        lambda z: F.interpolate(z, scale_factor=4, mode="bilinear"),
        lambda z: F.interpolate(z, scale_factor=4, mode="bilinear")[..., :30, :31],
        lambda z: z.softmax(1),
        torch.sigmoid,
        lambda z: 20 * z,
        lambda z: z[:, 1:],
        lambda z: torch.randn(2, CLASSES, 8, 8),
    ],
)
def test_a_model_on_a_device_without_float64_is_compared_too(after):
    answer = torch.randn(2, CLASSES, 8, 8)
    output = after(answer)
    apple = answer.as_subclass(OnApple), output.as_subclass(OnApple)
    with pytest.raises(TypeError, match="float64"):
        apple[0].double()
    assert comparing.compare(*apple) == comparing.compare(answer, output)
    assert comparing.difference([apple[0]], apple[1]) == comparing.difference([answer], output)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: F.one_hot(y, CLASSES).movedim(-1, 1),
        lambda y: F.one_hot(y, CLASSES).movedim(-1, 1) * 0.6 + 0.1,
        lambda y: y.byte().float() / 255,
    ],
)
def test_labels_on_a_device_without_float64_have_their_remedies(make):
    features, labels = torch.randn(2, DIM, 8, 8), make(torch.randint(0, CLASSES, (2, 8, 8)))
    said = []
    for kind in (Tensor, OnApple):
        with pytest.raises((TypeError, ValueError)) as error:
            check_labels(labels.as_subclass(kind), features.as_subclass(kind), None, CLASSES)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_factor_that_grows_later_is_noticed_at_the_next_size():
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    model = Scaled(1.0)
    reg = attach(model, classifier="classifier")
    model(images)
    reg(labels)
    model.scale.data.fill_(20.0)
    with pytest.warns(UserWarning, match="multiplies its output by 20, as heads of cosines do"):
        model(images[..., :24])


@pytest.mark.parametrize("scale", [20.0, 1.5])
def test_an_example_says_by_how_much_the_logits_are_multiplied(scale):
    with pytest.raises(ClassifierNotFoundError, match=rf"multiplies its output by {scale:g}; pass"):
        attach(Scaled(scale), example=torch.randn(2, 3, 32, 32))


def hot(module, args, output):
    """Divide by a temperature, behind the classifier's back."""
    return 10 * output


def quiet(module, args, output):
    """Look, as most hooks do."""


@pytest.mark.parametrize(("hook", "said"), [(hot, 1), (quiet, 0)])
def test_a_hook_that_changes_the_answer_of_the_classifier_is_noticed_once(hook, said):
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    model = Scaled(1.0)
    model.classifier.register_forward_hook(hook)
    reg = attach(model, classifier="classifier")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            model(images)
            reg(labels)
    assert sum("hook on the classifier changes" in str(each.message) for each in seen) == said
    assert len(seen) == said


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_hook_is_not_looked_at_where_there_is_nothing_to_compare(device):
    model = Scaled(1.0)
    model.classifier.register_forward_hook(hot)
    attach(model.to(device), classifier="classifier")
    model(torch.randn(2 if device == "meta" else 0, 3, 32, 32, device=device))


def test_an_auxiliary_head_that_is_named_need_not_be_what_the_model_returns():
    class Two(Scaled):
        def __init__(self):
            super().__init__(1.0)
            self.aux_head = nn.Conv2d(DIM, CLASSES, 1)

        def forward(self, images):
            self.seen = self.aux_head(self.encoder(images))
            return super().forward(images)

    model = Two()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))
    main, aux = attach(model, classifier="classifier"), attach(model, classifier="aux_head")
    loss = F.cross_entropy(model(images), labels) + F.cross_entropy(model.seen, labels[:, ::4, ::4])
    (loss + main(labels) + aux(labels)).backward()


# Centroids that no optimizer moves.


def idle(make, steps=110):
    """Train the centroids alone, in the order that Lightning has; return how far they went."""
    torch.manual_seed(0)
    reg = MVSCRegularizer(CLASSES, DIM, 2)
    optimizer = make([*reg.parameters()])
    features, classifier = torch.randn(1, DIM, 4, 4), nn.Conv2d(DIM, CLASSES, 1)
    labels, drawn = torch.randint(0, CLASSES, (1, 4, 4)), reg.centroids.detach().clone()
    for _ in range(steps):
        loss = reg(features, labels, classifier)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((reg.centroids - drawn).detach().norm())


def made(name, **options):
    return pytest.param(
        lambda parameters: getattr(torch.optim, name)(parameters, **{"lr": 1e-3, **options}),
        id=" ".join([name, *options]),
    )


@pytest.mark.parametrize(
    "make",
    [
        made("SGD"),
        made("SGD", momentum=0.9, nesterov=True),
        made("SGD", fused=True),
        made("SGD", foreach=True),
        made("Adam"),
        made("Adam", fused=True),
        made("Adam", foreach=True),
        made("Adam", amsgrad=True),
        made("AdamW"),
        made("AdamW", fused=True),
        made("AdamW", foreach=True),
        made("AdamW", maximize=True),
        made("Adagrad"),
        made("Adagrad", fused=True),
        made("Adadelta"),
        made("Adafactor"),
        made("Adamax"),
        made("ASGD"),
        made("NAdam"),
        made("RAdam"),
        made("RMSprop"),
        made("Rprop"),
    ],
)
def test_an_optimizer_that_knows_the_centroids_is_quiet(make):
    assert idle(make) > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_forgotten_regularizer_is_noticed_once(fused):
    other = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match=r"optimizer does not know them") as seen:
        assert idle(lambda _: torch.optim.AdamW([other], fused=fused), steps=310) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    "take",
    [
        lambda loss, own: [
            setattr(p, "grad", g) for p, g in zip(own, torch.autograd.grad(loss, own), strict=True)
        ],
        lambda loss, own: loss.backward(inputs=own),
    ],
    ids=["autograd.grad", "inputs"],
)
def test_gradients_of_the_models_parameters_alone_are_noticed_and_the_remedy_works(take):
    def train(others):
        torch.manual_seed(0)
        classifier, reg = nn.Conv2d(DIM, CLASSES, 1), MVSCRegularizer(CLASSES, DIM)
        own = [*classifier.parameters(), *(reg.parameters() if others else ())]
        groups = [{"params": [*classifier.parameters()]}, reg.param_group()]
        optimizer, drawn = torch.optim.SGD(groups, 0.1), reg.centroids.detach().clone()
        features, labels = torch.randn(1, DIM, 4, 4), torch.randint(0, CLASSES, (1, 4, 4))
        for _ in range(110):
            optimizer.zero_grad()
            take(reg(features, labels, classifier), own)
            optimizer.step()
        return torch.equal(reg.centroids, drawn)

    with pytest.warns(UserWarning, match=r"they get no gradient.*take those of reg.parameters"):
        assert train(False)
    assert not train(True)


@pytest.mark.parametrize("switched", ["frozen", "weights"])
def test_centroids_that_are_not_to_learn_are_no_idle_ones(switched):
    weights = {"align_weight": 0, "pull_weight": 0, "classify_weight": 0}
    reg = MVSCRegularizer(CLASSES, DIM, **(weights if switched == "weights" else {}))
    reg.centroids.requires_grad_(switched != "frozen")
    classifier = nn.Conv2d(DIM, CLASSES, 1)
    for _ in range(110):
        reg(torch.randn(1, DIM, 4, 4), torch.randint(0, CLASSES, (1, 4, 4)), classifier)


def test_training_with_a_regularizer_in_evaluation_mode_says_so_once():
    features, labels = torch.randn(1, DIM, 4, 4), torch.randint(0, CLASSES, (1, 4, 4))
    head, reg = nn.Conv2d(DIM, CLASSES, 1), MVSCRegularizer(CLASSES, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):  # A line search asks for several losses of each step.
            reg.train()(features, labels, head)
            for _ in range(33):
                reg.eval()(features, labels, head)
        with torch.no_grad():
            for _ in range(100):
                reg(features, labels, head)
        for _ in range(66):
            reg(features, labels, head)
    with pytest.warns(UserWarning, match=r"100 losses in a row.*Call reg\.train\(\)"):
        reg(features, labels, head)
    assert reg.step == 4


def test_a_long_validation_without_gradients_is_no_idle_optimizer():
    reg = MVSCRegularizer(CLASSES, DIM, 2)
    batch = torch.randn(1, DIM, 4, 4), torch.randint(0, CLASSES, (1, 4, 4))
    classifier = nn.Conv2d(DIM, CLASSES, 1)
    optimizer = torch.optim.AdamW([reg.param_group()])
    for _ in range(3):
        optimizer.zero_grad()
        reg(*batch, classifier).backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(250):
            reg(*batch, classifier)


def test_the_values_of_the_centroids_are_compared_once(monkeypatch):
    looked = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: looked.append(1) or equal(*pair))
    idle(lambda parameters: torch.optim.AdamW(parameters, fused=True), steps=350)
    assert len(looked) == 1


# A mask of 0 and 255 under an ignore_index of 255.


def test_a_mask_of_0_and_255_is_noticed_once_it_came_three_times():
    features, classifier = torch.randn(1, DIM, 4, 4), nn.Conv2d(DIM, 1, 1)
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[:, :2] = 255
    unlabelled = torch.full_like(mask, 255)
    reg = MVSCRegularizer(2, DIM, 1)
    for labels in (mask, mask, unlabelled, 0 * mask):
        reg(features, labels, classifier)
    with pytest.warns(UserWarning, match=r"no pixel of class 1 .* pass labels // 255\."):
        reg(features, mask, classifier)
    reg(features, mask, classifier)  # A second warning would be an error.
    right = MVSCRegularizer(2, DIM, 1)
    right(features, mask // 255, classifier)
    for _ in range(3):  # The second class was there: 255 means what it says.
        right(features, mask, classifier)
    signed = torch.tensor([[[0, -1], [0, -1]]], dtype=torch.int8)  # in which 255 is -1
    one = MVSCRegularizer(2, DIM, 1, ignore_index=-1)
    for _ in range(3):
        one(features, signed, classifier)


@pytest.mark.parametrize(("places", "labels"), [(256, 1000), (50, 40), (197, 196), (201, 196)])
def test_points_and_tokens_that_do_not_have_a_label_each_are_noticed(places, labels):
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv1d(DIM, CLASSES, 1)
    with pytest.warns(UserWarning, match=rf"{places} places and labels of {labels} .*\[:, 1:\]"):
        reg(torch.randn(2, DIM, places), torch.zeros(2, labels, dtype=torch.long), classifier)


@pytest.mark.parametrize(
    ("size", "labels"), [((256,), (256,)), ((16,), (64,)), ((251,), (1001,)), ((64,), (32,))]
)
def test_sequences_of_a_stride_are_quiet(size, labels):
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv1d(DIM, CLASSES, 1)
    reg(torch.randn(2, DIM, *size), torch.zeros(2, *labels, dtype=torch.long), classifier)


def test_labels_whose_height_and_width_are_exchanged_are_noticed():
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    features = torch.randn(1, DIM, 16, 32)
    for _ in range(2):
        reg(features, torch.zeros(1, 64, 128, dtype=torch.long), classifier)
        reg(features, torch.zeros(1, 32, 128, dtype=torch.long), classifier)  # strides 2 and 4
    with pytest.warns(UserWarning, match=r"128 x 64 have one stride .*labels\.transpose\(1, 2\)"):
        reg(features, torch.zeros(1, 128, 64, dtype=torch.long), classifier)


@pytest.mark.parametrize(("dtype", "classes", "said"), [("uint8", 300, 1), ("uint8", 256, 0)])
def test_labels_whose_dtype_cannot_hold_the_classes_are_noticed(dtype, classes, said):
    reg, classifier = MVSCRegularizer(classes, DIM, 1), nn.Conv2d(DIM, classes, 1)
    labels = torch.randint(0, 300, (2, 8, 8)).to(getattr(torch, dtype))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            reg(torch.randn(2, DIM, 8, 8), labels, classifier)
    assert sum("larger indices have wrapped around" in str(each.message) for each in seen) == said


# Labels, none of which reaches the grid.


def strokes(size=128, width=1):
    labels = torch.full((2, size, size), 255)
    for label in range(CLASSES):
        labels[:, 1 + 16 * label : 1 + 16 * label + width, 2:-2] = label
    return labels


def test_strokes_that_miss_every_centre_are_noticed_once_and_learned_from_if_told():
    features = torch.randn(2, DIM, 8, 8, requires_grad=True)
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    with pytest.warns(UserWarning, match=r"992 labelled.*8 x 8.*grid_label=\"commonest\"") as seen:
        reg(features, strokes(), classifier)
    reg(features, strokes(), classifier)  # A second warning would be an error.
    assert len(seen) == 1
    reg = MVSCRegularizer(CLASSES, DIM, 1, grid_label="commonest")
    reg(features, strokes(), classifier).backward()
    learn = features.grad.abs().sum(1) > 0
    assert_close(learn[:, :4], torch.ones(2, 4, 8).bool())  # A stroke in each upper row.
    assert not bool(learn[:, 4:].any())


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (4, 4, 4), (4,)])
def test_points_that_miss_every_centre_of_a_small_map_are_noticed_after_unlabelled_batches(size):
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    labels = torch.full((2, *(16 * n for n in size)), 255)
    features = torch.randn(2, DIM, *size)
    classifier = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(size) - 1](DIM, CLASSES, 1)
    for _ in range(12):
        reg(features, labels, classifier)
    labels[(slice(None), *[slice(1, None, 16)] * len(size))] = 1
    for _ in range(2):
        reg(features, labels, classifier)
    with pytest.warns(UserWarning, match=r"labelled pixels, and none of them.*grid_label="):
        reg(features, labels, classifier)


def test_strokes_of_which_some_classes_miss_every_centre_are_noticed():
    labels = torch.full((2, 256, 256), 255)
    for label in range(CLASSES):  # Of two pixels: rows 30, 56, 82, ... of features of 8 x 8.
        labels[:, 30 + 26 * label : 32 + 26 * label, 40:200] = label
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    features = torch.randn(2, DIM, 32, 32)
    assert not reg.cell_means(features, labels).present[:, [0, 1]].any()
    with pytest.warns(
        UserWarning, match=r"40 of them, and none of class 0, 1, .*grid_label=\"commonest\""
    ) as seen:
        _ = [reg(features, labels, classifier) for _ in range(4)]
    assert len(seen) == 1


def test_a_thin_class_that_others_surround_is_noticed_if_no_centre_shows_it():
    labels = torch.zeros(2, 256, 256, dtype=torch.long)
    labels[:, 16::64, :] = 3  # The centres are in rows 4, 12, 20, ...
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    with pytest.warns(UserWarning, match=r"none of class 3: .*a finer feature map"):
        reg(torch.randn(2, DIM, 32, 32), labels, classifier)


def test_points_few_of_which_are_at_a_centre_are_noticed_and_dense_labels_are_not():
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    points = torch.full((2, 256, 256), 255)
    points[:, ::16, ::16] = 1
    points[:, 4, 4] = 1
    with pytest.warns(UserWarning, match=r"in 512 feature pixels .* the centre of 2 of them: "):
        reg(torch.randn(2, DIM, 32, 32), points, classifier)
    noise = torch.randint(0, CLASSES, (2, 256, 256))  # Several classes in each feature pixel.
    noise[:, 128:] = 255
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    for _ in range(12):
        reg(torch.randn(2, DIM, 32, 32), noise, classifier)


def test_points_are_looked_at_in_the_first_labelled_batches_only():
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    for labels in [strokes(width=9)] * 10 + [strokes()]:
        reg(torch.randn(2, DIM, 8, 8), labels, classifier)


def test_a_small_map_that_loses_its_labels_now_and_then_is_quiet():
    reg, classifier = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv2d(DIM, CLASSES, 1)
    found = strokes(size=64, width=16)
    for labels in [strokes(size=64), strokes(size=64), found] * 3:
        reg(torch.randn(2, DIM, 4, 4), labels, classifier)


def test_labels_that_reach_the_grid_or_are_none_are_quiet():
    features, classifier = torch.randn(2, DIM, 8, 8), nn.Conv2d(DIM, CLASSES, 1)
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    for labels in (strokes(width=9), torch.full((2, 128, 128), 255), strokes(width=16)):
        reg(features, labels, classifier)
    dense = strokes(width=9)
    assert bool((labels_on_grid(dense, (8, 8), CLASSES, 255) < CLASSES).any())


def test_a_warning_names_the_users_line_and_can_be_silenced_by_it():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        reg = MVSCRegularizer(CLASSES, DIM, 1)
        reg(torch.randn(2, DIM, 8, 8), strokes(), nn.Conv2d(DIM, CLASSES, 1))
    assert [each.filename for each in seen] == [__file__]
