"""The tap: the features of the last forward, to look at and to use, and nothing left behind."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.ao import quantization
from torch.testing import assert_close

from mvsc import MVSCRegularizer
from mvsc.attach import attach, detach
from tiny_nets import CLASSES, DIM, Net, NetWithLoss


class Rows(Net):
    """Its classifier is a Linear on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images).movedim(1, -1)).movedim(-1, 1)


# reg.features.


@pytest.mark.parametrize("kind", [Net, Rows])
@pytest.mark.parametrize(
    "mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_the_features_of_the_last_forward_can_be_looked_at_in_any_mode(
    images, kind, mode, training
):
    model = kind().train(training)
    reg = attach(model, classifier="classifier")
    with mode():
        model(images)
        seen = reg.features
        expected = model.encoder(images)
    assert seen.shape == (2, DIM, 12, 12)
    assert not seen.requires_grad
    assert_close(seen, expected.detach())


def test_the_features_can_be_looked_at_before_and_after_the_loss(images, labels):
    model = Net(nn.Dropout(0.5))
    reg = attach(model)
    model(images)
    before = reg.features
    loss = reg(labels)
    assert torch.equal(reg.features, before)
    loss.backward()
    assert torch.equal(reg.features, before)
    assert_close(before, model.encoder(images).detach())  # from before the dropout


def test_looking_at_the_features_is_no_use_of_them(images, labels):
    model = Net()
    reg = attach(model)
    for _ in range(3):
        model(images)
        _ = reg.features
        reg(labels).backward()


def test_an_evaluation_shows_its_own_features_and_then_training_its_own(images, labels):
    model = Net()
    reg = attach(model)
    other = torch.randn(1, 3, 8, 8)
    model(images)
    reg(labels)
    model.eval()
    with torch.no_grad():
        model(other)
        assert_close(reg.features, model.encoder(other))
    model.train()
    model(images)
    assert reg.features.shape == (2, DIM, 12, 12)


@pytest.mark.parametrize("training", [True, False])
def test_the_features_are_let_go_when_the_next_forward_begins(images, labels, training):
    model = Net().train(training)
    reg = attach(model)
    model(images)
    if training:
        reg(labels).backward()
    kept, alive = weakref.ref(reg._tap.seen), []
    model.encoder.register_forward_pre_hook(lambda *_: alive.append(kept() is not None))
    assert kept() is not None
    model(images)
    assert alive == [False]


def test_the_features_keep_no_graph(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    entered = weakref.ref(reg._tap.features)
    reg(labels).backward()
    gc.collect()
    assert reg.features.grad_fn is None
    assert entered() is None


def test_asking_a_classifier_whose_hooks_have_to_run_is_no_forward(images, labels):
    model = Net()
    classifier = model.classifier
    kernel = classifier._parameters.pop("weight")
    classifier.register_parameter("kernel", kernel)
    # A weight that only the user's own hook computes: no hook can be kept from seeing the call.
    classifier.register_forward_pre_hook(
        lambda module, _: setattr(module, "weight", 1 * module.kernel)
    )
    reg = attach(model, classifier="classifier")
    for _ in range(2):
        model(images)
        features = reg.features
        reg(labels).backward()
        assert torch.equal(reg.features, features)


def test_no_forward_and_no_model_are_said(images):
    model = Net()
    reg = attach(model)
    with pytest.raises(RuntimeError, match="no features to look at"):
        _ = reg.features
    model(images)
    with pytest.raises(RuntimeError, match=r"attached to no model.*Call mvsc\.attach"):
        _ = copy.deepcopy(reg).features
    reg.detach()
    with pytest.raises(RuntimeError, match="attached to no model"):
        _ = reg.features


def test_features_of_tokens_have_their_channels_second():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, DIM, 4, 4), nn.Linear(DIM, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            return self.head(tokens).transpose(1, 2).unflatten(2, (4, 6))

    model = Tokens()
    reg = attach(model, classifier="head")
    images = torch.randn(2, 3, 16, 24)
    F.cross_entropy(model(images), torch.zeros(2, 4, 6).long())
    assert_close(reg.features, model.patches(images).flatten(2).detach())
    assert reg(torch.randint(0, CLASSES, (2, 16, 24))).isfinite()


# Copies and pickles.

LOAD = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "mvsc":
            raise ModuleNotFoundError("mvsc is not here")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {tests!r})
import torch, pickle
try:
    import mvsc
except ModuleNotFoundError:
    print("blocked")
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    output = model(torch.ones(1, 3, 8, 8))
    print(tuple(getattr(output, "logits", output).shape), "mvsc" in sys.modules)
"""


def test_a_pickled_model_that_is_attached_loads_where_there_is_no_mvsc(tmp_path, images, labels):
    paths = []
    for number, (model, options) in enumerate(
        [(Net(nn.Dropout(0.5)), {}), (NetWithLoss(), {"add_to_loss": True}), (Net(), {})]
    ):
        reg = attach(model, classifier="classifier", **options)
        if number == 1:
            model(images, labels).loss.backward()
        elif number == 2:
            model(images)
            reg(labels)
        paths.append(tmp_path / f"{number}.pt")
        torch.save(copy.deepcopy(model) if number == 2 else model, paths[-1])
    here = str(Path(__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-c", LOAD.format(tests=here), *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["blocked", *["(1, 5, 8, 8) False"] * 3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_hooks_of_a_copy_do_nothing(images, labels, duplicate):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    other = duplicate(model)
    expected = F.cross_entropy(other(images).logits, labels)
    assert_close(other(images, labels).loss, expected)
    other.eval()
    with torch.no_grad():
        other(images)
    assert reg._tap.seen is None
    assert reg.regularizer.step == 0
    attach(other).detach()


COUNTED: list[object] = []


def count(*_: object) -> None:
    """Be somebody else's hook, which can be pickled."""
    COUNTED.append(1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_detach_strips_a_copy_too_so_that_it_can_be_scripted(images, duplicate):
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), nn.Dropout(0.5), nn.Conv2d(DIM, CLASSES, 1))
    model[2].register_forward_hook(count)
    attach(model, classifier="2")
    other = duplicate(model)
    detach(other)
    COUNTED.clear()
    other(images)
    assert len(COUNTED) == 1  # Another's hook stays.
    other[2]._forward_hooks.clear()
    other.eval()
    assert_close(torch.jit.script(other)(images), other(images))


def test_a_file_of_an_attached_model_is_no_larger_for_what_was_tapped(images):
    model = Net()
    size = len(saved(model))
    attach(model)
    model(torch.randn(8, 3, 64, 64))
    assert len(saved(model)) < size + 2000


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


# The first forward.


class After(Net):
    """Something comes after the classifier."""

    def __init__(self, after, classes: int = CLASSES) -> None:
        super().__init__(classes=classes)
        self.after = after

    def forward(self, images: Tensor):
        return self.after(super().forward(images))


class Residual(nn.Module):
    """MONAI's UNet ends so: conv(x) + x, of C channels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = (
            nn.Conv2d(3, CLASSES, 3, padding=1),
            nn.Conv2d(CLASSES, CLASSES, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        return self.last(features) + 3 * features


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (Residual, "last"),
        (lambda: After(nn.Conv2d(CLASSES, CLASSES, 3, padding=1)), "classifier"),
        (lambda: After(nn.ConvTranspose2d(CLASSES, CLASSES, 2, 2)), "classifier"),
        (
            lambda: After(nn.Sequential(nn.Conv2d(CLASSES, CLASSES, 1), nn.Tanh())),
            "classifier",
        ),
    ],
    ids=["residual", "conv", "transposed", "conv and tanh"],
)
def test_a_classifier_whose_answer_is_not_what_is_returned_is_doubted_once(
    images, labels, make, path
):
    model = make()
    reg = attach(model, classifier=path)
    with pytest.warns(UserWarning, match=r"may be the wrong one.*\(2, 5, .*not a resize") as seen:
        model(images)
    reg(labels).backward()
    model(images)
    assert len(seen) == 1
    assert seen[0].filename == __file__


class Prototypes(Net):
    """Compares an embedding with prototypes, as heads with text embeddings do."""

    def __init__(self, put) -> None:
        super().__init__(classes=7)
        self.prototypes, self.put = nn.Parameter(torch.randn(CLASSES, 7)), put

    def forward(self, images: Tensor):
        logits = torch.einsum("bdhw,cd->bchw", super().forward(images), self.prototypes)
        return self.put(logits)


@pytest.mark.parametrize(
    "put",
    [lambda z: z, lambda z: (z, z.mean()), lambda z: {"loss": z.mean(), "out": z}],
    ids=["alone", "tuple", "named"],
)
def test_an_embedding_whose_width_is_not_that_of_the_classes_is_doubted_once(images, put):
    model = Prototypes(put)
    reg = attach(model)
    with pytest.warns(UserWarning, match=r"7 classes, and the model returns \(2, 5, ") as seen:
        model(images)
    reg.discard()
    model(images)
    assert len(seen) == 1


def test_a_map_of_another_kind_beside_a_loss_is_not_taken_for_logits(images):
    model = Prototypes(
        lambda z: {"loss": z.mean(), "depth": z[:, :1], "boxes": z[:, :0].flatten(2)}
    )
    reg = attach(model)
    model(images)
    reg.discard()


def test_a_pre_hook_that_changes_what_was_taken_is_noticed_once(images):
    def scaled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (10 * args[0],)

    for first in (True, False):
        model = Net()
        if first:
            model.classifier.register_forward_pre_hook(scaled)
        reg = attach(model)
        model.classifier.register_full_backward_hook(lambda *_: None)  # Makes a view.
        model.classifier.register_forward_pre_hook(lambda *_: None)
        if not first:
            model.classifier.register_forward_pre_hook(scaled)
            with pytest.warns(UserWarning, match="pre-hook on the classifier changes.*is there"):
                model(images)
            reg.discard()
        model(images)


def test_part_of_a_name_that_is_no_auxiliary_heads_silences_nothing(images):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_unet = Net()

        def forward(self, images: Tensor) -> Tensor:
            return 16 * self.attn_unet(images)

    model = Scaled()
    attach(model, classifier="attn_unet.classifier")
    with pytest.warns(UserWarning, match="multiplies its output by 16"):
        model(images)


def upsampled(mode: str, **options: object):
    return lambda z: F.interpolate(z, size=(37, 50), mode=mode, **options)


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z,
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: z.sigmoid(),
        lambda z: F.logsigmoid(z),
        lambda z: z.argmax(1),
        lambda z: z / 3,
        lambda z: z.float().half(),
        lambda z: (z, z.mean((2, 3))),
        lambda z: {"out": z, "aux": torch.randn_like(z)},
        lambda z: {"loss": z.mean()},
        lambda z: {"loss": z.mean(), "edges": z.mean(1, keepdim=True)},
        lambda z: {"loss": z.mean(), "edges": z.amax(1, keepdim=True)},
        lambda z: {"loss": z.mean(), "sure": z.amax(1)},
        lambda z: z.flatten(1),
        lambda z: SimpleNamespace(logits=z, features=None),
        lambda z: [torch.randn_like(z[..., ::2, ::2]), z],
        lambda z: [z, F.interpolate(torch.randn_like(z), scale_factor=0.5)],
        lambda z: torch.stack([z, torch.randn_like(z)], dim=1),
        lambda z: z.movedim(1, -1),
        lambda z: z * float("nan"),
        lambda z: z.flatten(2).transpose(1, 2),
        upsampled("bilinear"),
        upsampled("bilinear", align_corners=True),
        upsampled("bicubic"),
        upsampled("nearest"),
        upsampled("bilinear", antialias=True),
        lambda z: upsampled("bilinear")(z).softmax(1),
        lambda z: upsampled("bilinear")(z.softmax(1)),
        lambda z: F.softplus(upsampled("bilinear")(z)) + 1,
        lambda z: F.logsigmoid(upsampled("bicubic")(z)),
        lambda z: 3 * upsampled("bilinear", align_corners=True)(z),
        lambda z: F.interpolate(z, size=(36, 24), mode="bilinear").flatten(2),
        lambda z: F.interpolate(z, size=(24, 36), mode="bilinear").flatten(2).transpose(1, 2),
        lambda z: F.pixel_shuffle(z.repeat_interleave(4, 1), 2),
    ],
)
def test_what_follows_without_weights_is_quiet(images, after):
    model = After(after)
    attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "You are using.*antialias")
        model(images)


FOLDS = (
    lambda z: z.unflatten(1, (4, 4)).amax(2),  # several prototypes of a class
    lambda z: z.unflatten(1, (4, 4)).logsumexp(1),
    lambda z: F.interpolate(z, scale_factor=2, mode="bilinear").unflatten(1, (4, 4)).amax(2),
    lambda z: F.interpolate(z.unflatten(1, (4, 4)).mean(1), scale_factor=2),  # an ensemble
)


@pytest.mark.parametrize(
    ("after", "classes"),
    [
        (nn.PixelShuffle(2), "as maps of 4: a PixelShuffle or a reshape"),
        (lambda z: z[:, 1:], "15 of them: a cut"),
        (lambda z: z.unflatten(1, (2, 8)), "as maps of 2: a PixelShuffle or a reshape"),
        *((fold, "folds to 4 classes.*num_classes=4") for fold in FOLDS),
    ],
    ids=["shuffle", "cut", "reshape", *(["folded"] * len(FOLDS))],
)
def test_an_answer_that_is_returned_in_other_classes_is_doubted(images, after, classes):
    model = After(after, classes=16)
    attach(model, classifier="classifier")
    with pytest.warns(UserWarning, match=rf"gives 16 .*{classes}"):
        model(images)


@pytest.mark.parametrize("cut", [lambda z: z[:, 1:], lambda z: z[:, :-1]])
def test_an_answer_of_which_a_class_is_left_out_after_a_resize_is_doubted(images, cut):
    model = After(lambda z: cut(F.interpolate(z, scale_factor=2, mode="bilinear")))
    attach(model, classifier="classifier")
    with pytest.warns(UserWarning, match=rf"gives {CLASSES} classes.*{CLASSES - 1} of them: a cut"):
        model(images)


def test_deep_supervision_is_quiet(images):
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.deep = nn.Conv2d(DIM, DIM, 2, 2), nn.Conv2d(DIM, CLASSES, 1)

        def forward(self, images: Tensor):
            features = self.encoder(images)
            return [self.classifier(features), self.deep(self.down(features))]

    model = Deep()
    for path in ("classifier", "deep"):
        with attach(model, classifier=path):
            model(images)


def test_one_logit_is_quiet(images):
    for after in (
        lambda z: z,
        lambda z: z.sigmoid(),
        lambda z: z[:, 0],
        lambda z: z.sigmoid()[:, 0],
    ):
        model = After(after, classes=1)
        with attach(model, classifier="classifier"):
            model(images)


def test_an_empty_batch_and_one_that_is_not_finite_are_quiet():
    for first in (torch.randn(0, 3, 12, 12), torch.full((2, 3, 12, 12), float("inf"))):
        model = After(upsampled("nearest"))
        with attach(model):
            model(first)


def test_the_doubt_costs_the_memory_of_one_image_only(images):
    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, Tensor) and each.dtype == torch.float64:
                    self.largest = max(self.largest, each.numel())
            return result

    model = After(upsampled("bicubic"))
    attach(model)
    with Peak() as peak:
        logits = model(images.repeat(8, 1, 1, 1))
    assert 0 < peak.largest <= logits[:5].numel()


@pytest.mark.parametrize(("after", "kept"), [(lambda z: z, 2), (torch.tanh, 0)])
def test_the_check_of_the_forwards_keeps_no_copy_of_the_answer_nor_hooks_in_vain(
    images, after, kept
):
    model = After(after)
    reg = attach(model)
    hooks = len(model.classifier._forward_hooks), len(model._forward_hooks)
    answer = []
    model.classifier.register_forward_hook(lambda m, args, out: answer.append(weakref.ref(out)))
    logits = model(images)
    assert hooks == (1, 2)
    left = len(model.classifier._forward_hooks) + len(model._forward_hooks)
    assert left == 2 + kept  # that of this test, and that of the tap
    del logits
    reg.discard()
    gc.collect()
    assert answer[0]() is None


# Ways out that the errors name.


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.usefixtures("alone")
def test_frozen_batch_norm_trains_as_the_error_says(images, labels, wrapped):
    net = Net()
    model = nn.parallel.DistributedDataParallel(net) if wrapped else net
    reg = attach(model)
    statistics = net.encoder[1].running_mean.clone()
    model.eval()(images)
    with pytest.raises(RuntimeError, match="in evaluation mode on purpose") as error:
        reg(labels)
    first, _, remedy = str(error.value).rpartition(" inside DistributedDataParallel: ")
    assert first.endswith("with model = model.module")
    eval(remedy.rstrip("."), {"model": model.module if wrapped else model})
    model(images)
    reg(labels).backward()
    assert torch.equal(net.encoder[1].running_mean, statistics)
    assert net.encoder[0].weight.grad is not None


def test_mixup_names_the_explicit_form_and_it_works(images, labels):
    model = Net()
    reg = attach(model)
    model(0.7 * images + 0.3 * images.flip(0))
    reg(labels)
    with pytest.raises(RuntimeError, match="MixUp, pass .*parts, since reg.features is detached"):
        reg(labels.flip(0))
    explicit = MVSCRegularizer(CLASSES, DIM)
    features = model.encoder(images)
    pair = [explicit(features, each, model.classifier) for each in (labels, labels.flip(0))]
    (0.7 * pair[0] + 0.3 * pair[1]).backward()


def test_a_classifier_of_which_only_the_weight_is_used_is_named(images, labels):
    class Tied(Net):
        def forward(self, images: Tensor) -> Tensor:
            return F.conv2d(self.encoder(images), self.classifier.weight)

    model = Tied()
    reg = attach(model)
    model(images)
    with pytest.raises(RuntimeError, match=r"weight without calling it, pass features and class"):
        reg(labels)


# What no forward may fail of.


def test_a_forward_that_failed_leaves_nothing_and_is_tried_again(images, labels):
    model = Net()
    reg = attach(model)
    entered = []
    model.classifier.register_forward_pre_hook(lambda m, args: entered.append(weakref.ref(args[0])))
    handle = model.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images)
    gc.collect()
    assert entered[0]() is None
    with pytest.raises(RuntimeError, match=r"the last forward failed\. Call the model again"):
        reg(labels)
    handle.remove()
    model(images[:1])
    assert reg(labels[:1]).isfinite()


def test_a_model_that_returns_nothing_has_not_failed(images, labels):
    model = After(lambda z: None)
    reg = attach(model)
    model(images)
    assert reg(labels).isfinite()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_trace_in_training_mode_is_that_of_the_model_alone_and_no_forward(images, labels):
    nodes = []
    for model in (Net(), Net()):
        model.encoder[1] = nn.Identity()
        if nodes:
            reg = attach(model)
        traced = torch.jit.trace(model, images)
        nodes.append(len([*traced.inlined_graph.nodes()]))
    assert nodes[0] == nodes[1]
    model(images)
    assert reg(labels).isfinite()


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.5)])
@pytest.mark.filterwarnings("ignore")
def test_quantization_may_replace_the_classifier_of_an_attached_model(images, labels, dropout):
    model = Net(dropout)
    reg = attach(model)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    model(images)
    with pytest.raises(RuntimeError, match=r"was replaced.*Call detach\(\) and attach again"):
        reg(labels)
    reg.detach()
    model(images)
    reg = attach(model)
    model(images)
    reg(labels).backward()


@pytest.mark.parametrize(
    "after",
    [
        lambda z: (z * 2 + 1, z.detach().to_sparse()),
        lambda z: (torch.fft.fft2(z), "a word", None, 3),
        lambda z: torch.nested.nested_tensor([z[0], z[1][:, :8]]),
        lambda z: z.to(torch.float8_e4m3fn),
        lambda z: SimpleNamespace(logits=z),
    ],
    ids=["sparse", "complex", "nested", "float8", "object"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_outputs_of_any_kind_pass_the_first_forward(images, labels, after):
    model = After(after)
    reg = attach(model)
    model(images)
    assert reg(labels).isfinite()


def test_a_forward_without_values_passes(labels):
    model = Net().to("meta")
    reg = attach(model)
    model(torch.randn(2, 3, 12, 12, device="meta"))
    assert reg(labels.to("meta")).is_meta
    model = Net()
    reg = attach(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 3, 12, 12))
    reg.discard()
    model.encoder[1] = nn.Identity()
    assert torch.func.vmap(lambda image: model(image[None])[0])(torch.randn(2, 3, 8, 8)).ndim == 4


def test_a_classifier_that_takes_a_list_runs_and_is_named_by_the_loss(images, labels):
    class OfList(nn.Conv2d):
        def forward(self, maps: list[Tensor]) -> Tensor:
            return super().forward(sum(maps))

    class Lists(Net):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = OfList(DIM, CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier([self.encoder(images)] * 2)

    model = Lists()
    reg = attach(model, classifier="classifier")
    model(images)
    with pytest.raises(RuntimeError, match=r"called with a list.*Pass features and a callable"):
        reg(labels)
    assert model.eval()(images).shape == (2, CLASSES, 12, 12)
