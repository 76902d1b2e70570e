"""Asking somebody else's classifier: the right answer, with its gradient, and no trace left."""

import copy
import threading
import warnings
from functools import partial

import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from mvsc import MVSCRegularizer
from mvsc.attach import attach
from mvsc.classifier import (
    check_classifier,
    classify_vectors,
    is_sharded,
    reads_rows,
    what_mixes,
)

CLASSES, DIM = 4, 8


def conv(kind: type[nn.Module] = nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    return kind(DIM, CLASSES, 1)


def pruned(*names: str) -> nn.Module:
    layer = conv()
    for name in names:
        prune.random_unstructured(layer, name, 0.5)
    return layer


class Adapter(nn.Module):
    """LoRA, as PEFT writes it: a layer, and beside it a product of two narrow ones."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = conv().requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(DIM, 2, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, CLASSES, 1, bias=False)})

    def forward(self, features: Tensor) -> Tensor:
        narrow = self.lora_A["default"](self.lora_dropout["default"](features))
        return self.base_layer(features) + self.lora_B["default"](narrow)


COMPUTED = {
    "plain": conv,
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "old spectral_norm": lambda: nn.utils.spectral_norm(conv()),
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "old weight_norm": lambda: nn.utils.weight_norm(conv()),
    "pruned weight": lambda: pruned("weight"),
    "pruned bias": lambda: pruned("bias"),
    "pruned both": lambda: pruned("weight", "bias"),
    "pruned twice": lambda: pruned("weight", "weight"),
    "transposed": lambda: nn.utils.weight_norm(conv(nn.ConvTranspose2d)),
    "adapter": Adapter,
    "orthogonal": lambda: parametrizations.orthogonal(conv()),
    "sigmoid": lambda: parametrize.register_parametrization(conv(), "weight", nn.Sigmoid()),
    "inside": lambda: nn.Sequential(nn.utils.spectral_norm(conv())),
}

computed = pytest.mark.parametrize("make", COMPUTED.values(), ids=[*COMPUTED])


def loss_of(model: nn.Module, reg: MVSCRegularizer, classifier: nn.Module, first: bool) -> Tensor:
    """Compute both losses, that of mvsc before or after the model's own."""
    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
    features = model(images)
    if first:
        loss = reg(features, labels, classifier)
        return loss + F.cross_entropy(classifier(features), labels)
    loss = F.cross_entropy(classifier(features), labels)
    return loss + reg(features, labels, classifier)


@computed
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_the_answer_and_its_gradient_are_those_of_the_layer_itself(make):
    layer, twin = make().eval(), make().eval()
    vectors = torch.randn(5, DIM)
    answer, expected = classify_vectors(layer, vectors, CLASSES), twin(vectors[..., None, None])
    assert_close(answer, expected.flatten(1))
    answer.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(one.grad, other.grad)


@computed
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_no_buffer_of_a_classifier_in_training_changes(make):
    layer = make().train()
    state = copy.deepcopy(layer.state_dict())
    classify_vectors(layer, torch.randn(5, DIM), CLASSES)
    assert_close(layer.state_dict(), state, rtol=0, atol=0)


@computed
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_computed_weight_trains_in_either_order_of_the_losses(make, first):
    encoder, layer, reg = nn.Conv2d(3, DIM, 1), make(), MVSCRegularizer(CLASSES, DIM)
    optimizer = torch.optim.SGD([*layer.parameters(), *reg.parameters()], lr=0.1)
    for _ in range(3):
        loss = loss_of(encoder, reg, layer, first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()


@computed
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_an_evaluation_between_forward_and_loss_costs_no_gradient(make):
    gradients = []
    for evaluate in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, DIM, 1), make())
        reg = attach(model, classifier=model[1], align_weight=0.0, pull_weight=0.0)
        images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, CLASSES, (2, 8, 8))
        model(images)
        if evaluate:
            with torch.no_grad():
                model.eval()(images)
            model.train()
        reg(labels).backward()
        gradients.append([p.grad for p in model[1].parameters() if p.requires_grad])
        assert any(bool(grad.any()) for grad in gradients[-1] if grad is not None)
    assert_close(*gradients)


# Hooks and buffers.


def hooks_on(layer: nn.Module, calls: list[str]) -> None:
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre, kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))


class Own(nn.Conv2d):
    """A subclass, which may do more and so has to be called."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * 1.0


@pytest.mark.parametrize(
    "make",
    [
        conv,
        lambda: Own(DIM, CLASSES, 1),
        lambda: nn.Sequential(conv()),
        lambda: pruned("weight"),
        lambda: parametrizations.weight_norm(conv()),
    ],
    ids=["plain", "subclass", "inside", "pruned", "parametrized"],
)
def test_hooks_of_any_kind_do_not_see_the_centroids(make):
    layer, calls = make(), []
    hooked = [each for each in layer.modules() if isinstance(each, (nn.Conv2d, nn.Sequential))]
    for module in hooked:
        hooks_on(module, calls)
    vectors = torch.randn(5, DIM, requires_grad=True)
    classify_vectors(layer, vectors, CLASSES).sum().backward()
    assert calls == []
    layer(torch.randn(1, DIM, 2, 2, requires_grad=True)).sum().backward()
    assert len(calls) == 6 * len(hooked)


def test_what_a_layer_counts_or_measures_in_attributes_is_not_of_the_centroids():
    class Measured(nn.Conv2d):
        calls, largest = 0, 0.0

        def forward(self, features):
            self.calls += 1
            self.largest = max(self.largest, features.abs().max().item())
            return super().forward(features)

    layer = Measured(8, 3, 1)
    layer(torch.ones(1, 8, 2, 2))
    classify_vectors(layer, 9 * torch.ones(4, 8), num_classes=3)
    assert (layer.calls, layer.largest) == (1, 1.0)


def test_an_embedding_is_no_classifier_but_its_weight_can_be_one():
    with pytest.raises(ValueError, match=r"nn\.Embedding, .* v\.flatten\(1\) @ embedding\.weight"):
        check_classifier(nn.Embedding(3, 8), 8, 3, 2)


def test_the_hooks_are_back_after_a_classifier_that_failed():
    class Failing(nn.Conv2d):
        def forward(self, features: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    layer, calls = Failing(DIM, CLASSES, 1), []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    for ask in (partial(classify_vectors, layer, num_classes=CLASSES), layer):
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(torch.randn(5, DIM))
    assert calls == ["pre"]


class NeedsLabels(nn.Conv2d):
    """A head with a margin, as of ArcFace, which is called with the labels, too."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return super().forward(features)


@pytest.mark.parametrize(
    ("classifier", "why"),
    [
        (lambda v: F.linear(v, torch.ones(CLASSES, DIM)), "shapes cannot be multiplied"),
        (NeedsLabels(DIM, CLASSES, 1), "'labels'"),
    ],
)
def test_a_classifier_that_cannot_be_asked_says_how_and_what_came(classifier, why):
    features, labels = torch.randn(2, DIM, 4, 4), torch.randint(0, CLASSES, (2, 4, 4))
    told = rf"of shape \(\d+, {DIM}, 1, 1\), .* in torch.float32, .*{why}.*v\.flatten\(1\)"
    with pytest.raises(ValueError, match=told):
        MVSCRegularizer(CLASSES, DIM)(features, labels, classifier)
    rows = MVSCRegularizer(CLASSES, DIM)
    rows(features, labels, lambda v: F.linear(v.flatten(1), torch.ones(CLASSES, DIM)))


def test_memory_that_runs_out_in_a_classifier_is_not_taken_for_a_wrong_one():
    def classify(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    features, labels = torch.randn(2, DIM, 4, 4), torch.randint(0, CLASSES, (2, 4, 4))
    with pytest.raises(torch.OutOfMemoryError):
        MVSCRegularizer(CLASSES, DIM)(features, labels, classify)


def test_a_hook_that_changes_the_weight_of_its_own_accord_is_still_called():
    layer = conv()
    del layer._parameters["weight"]
    layer.root = nn.Parameter(torch.rand(CLASSES, DIM, 1, 1))
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.root.square()))
    answer = classify_vectors(layer, torch.ones(1, DIM), CLASSES)
    assert_close(answer[0], layer.root.square().flatten(1).sum(1) + layer.bias)


def test_a_hook_on_a_classifier_of_two_threads_stays():
    inside, both = threading.Event(), threading.Event()

    class Waiting(nn.Conv2d):
        def forward(self, features: Tensor) -> Tensor:
            if threading.current_thread() is first:
                inside.set()
                both.wait(0.2)
            else:  # What this one found when it came is what it leaves behind.
                both.set()
                first.join()
            return super().forward(features)

    layer = Waiting(DIM, CLASSES, 1)
    layer.register_forward_hook(lambda *_: None)
    ask = partial(classify_vectors, layer, torch.ones(1, DIM), CLASSES)
    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
    first.start()
    inside.wait()
    second.start()
    second.join()
    assert len(layer._forward_hooks) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dropout_inside_drops_nothing_of_the_centroids(compiled):
    if compiled and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 traces no generator's context")
    head, vectors = Adapter(dropout=0.5), torch.randn(5, DIM)
    ask = torch.compile(classify_vectors, fullgraph=True, backend="eager", disable=not compiled)
    answer = ask(head, vectors, CLASSES)
    assert all(module.training for module in head.modules())
    assert_close(answer, head.eval()(vectors[..., None, None]).flatten(1))


def test_an_attached_adapter_with_dropout_is_quiet():
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), Adapter(dropout=0.5))
    reg = attach(model)
    model(torch.randn(2, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reg(torch.zeros(2, 8, 8).long()).isfinite()


def test_the_statistics_of_a_batch_norm_do_not_see_the_centroids():
    model = nn.Sequential(nn.BatchNorm2d(DIM), nn.Conv2d(DIM, CLASSES, 1))
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"0 \(BatchNorm2d\)"):
        MVSCRegularizer(CLASSES, DIM)(
            torch.randn(2, DIM, 4, 4), torch.randint(0, CLASSES, (2, 4, 4)), model
        )
    assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack", "x86"])
def test_quantisation_aware_training_learns_the_ranges_that_it_would_have_learned(engine):
    states = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            quantization.QuantStub(),
            nn.Conv2d(3, DIM, 3),
            nn.ReLU(),
            nn.Conv2d(DIM, CLASSES, 1),
            quantization.DeQuantStub(),
        )
        with torch.no_grad():
            model[3].weight *= 20  # A trained model's logits are wide.
        model.qconfig = quantization.get_default_qat_qconfig(engine)
        quantization.prepare_qat(model.train(), inplace=True)
        reg = attach(model, classifier="3") if attached else None
        for _ in range(20):
            model(torch.randn(2, 3, 8, 8))
            if reg is not None:
                reg(torch.zeros(2, 6, 6).long())
        states.append(model.state_dict())
    assert_close(*states, rtol=0, atol=0)


# Kinds of layers.


@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("settings", [{}, {"padding": 1}, {"dilation": 2}, {"padding": "same"}])
def test_a_wide_kernel_answers_as_inside_a_uniform_region_in_any_number_of_axes(
    kind, axes, inside, settings
):
    layer = kind(DIM, CLASSES, 3, **settings)
    vectors = torch.randn(5, DIM)
    region = vectors.reshape(5, DIM, *[1] * axes).expand(-1, -1, *[11] * axes)
    expected = layer(region)[(..., *[5] * axes)]
    asked = nn.Sequential(layer) if inside else layer
    assert_close(classify_vectors(asked, vectors, CLASSES, axes), expected)


STRIDED = {
    "one": lambda: nn.Sequential(nn.Conv2d(DIM, CLASSES, 3, 2, 1)),
    "computed": lambda: parametrizations.weight_norm(nn.Conv2d(DIM, CLASSES, 3, 2, 1)),
    "first": lambda: nn.Sequential(nn.Conv2d(DIM, 6, 3, 3, 1), nn.Conv2d(6, CLASSES, 5, 1, 2)),
    "both": lambda: nn.Sequential(nn.Conv2d(DIM, 6, 4, 2, 1), nn.Conv2d(6, CLASSES, 3, 2, 1)),
    "no padding": lambda: nn.Sequential(nn.Conv2d(DIM, CLASSES, 3, 2)),
    "narrow": lambda: nn.Sequential(nn.Conv2d(DIM, CLASSES, 1, 2)),
    "one side": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 0, 2)), nn.Conv2d(DIM, CLASSES, 3, 2)),
    "causal": lambda: nn.Sequential(nn.ZeroPad2d((4, 0, 4, 0)), nn.Conv2d(DIM, CLASSES, 5)),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=[*STRIDED])
def test_strides_and_padding_on_one_side_change_no_answer(make):
    head, vectors = make(), torch.randn(5, DIM)
    inside = head(vectors[:, :, None, None].expand(-1, -1, 41, 41))
    places = [size // 2 for size in inside.shape[2:]]
    assert_close(classify_vectors(head, vectors, CLASSES), inside[:, :, places[0], places[1]])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    "last",
    [
        nn.Upsample(scale_factor=2),
        nn.UpsamplingBilinear2d(scale_factor=8),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
)
def test_what_gives_a_wide_kernels_places_others_is_refused(padding, last):
    wide = nn.Conv2d(DIM, CLASSES, 3, padding=padding)
    with pytest.raises(ValueError, match=r"to \(5, 4, 3 to 5, 3 to 5\), got .*linear layer alone"):
        classify_vectors(nn.Sequential(wide, last), torch.randn(5, DIM), CLASSES)
    assert classify_vectors(wide, torch.randn(5, DIM), CLASSES).shape == (5, CLASSES)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_grouped_convolution_answers_as_it_does_in_the_model(kernel):
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), nn.Conv2d(DIM, CLASSES, kernel, groups=2))
    vectors = torch.randn(5, DIM)
    expected = model[1](vectors[..., None, None].expand(-1, -1, kernel, kernel)).flatten(1)
    assert_close(classify_vectors(model[1], vectors, CLASSES), expected)
    reg = attach(model, classifier="1")
    size = model(torch.randn(2, 3, 8, 8)).shape[2:]
    reg(torch.zeros(2, *size).long()).backward()
    assert model[1].weight.grad.any()


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_of_one_place_is_a_1x1_convolution(kind):
    axes = int(kind.__name__[-2])
    layer, vectors = kind(DIM, CLASSES, 1), torch.randn(5, DIM)
    expected = layer(vectors.reshape(5, DIM, *[1] * axes)).flatten(1)
    assert_close(classify_vectors(layer, vectors, CLASSES, axes), expected)
    labels, size = torch.randint(0, CLASSES, (2, *[4] * axes)), [4] * axes
    assert MVSCRegularizer(CLASSES, DIM)(torch.randn(2, DIM, *size), labels, layer).isfinite()


@pytest.mark.parametrize("settings", [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3}])
def test_other_transposed_convolutions_are_refused_with_the_way_out(settings):
    layer = nn.ConvTranspose2d(DIM, CLASSES, **settings)
    for each in (layer, nn.Sequential(layer)):
        with pytest.raises(ValueError, match=r"transposed convolution.*auxiliary 1x1 classifier"):
            MVSCRegularizer(CLASSES, DIM)(
                torch.randn(2, DIM, 4, 4), torch.zeros(2, 4, 4).long(), each
            )


class Activation(nn.Module):
    """As that of segmentation_models_pytorch."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, logits: Tensor) -> Tensor:
        return self.activation(logits)


class Head(nn.Module):
    """One whose own code says what comes last."""

    def __init__(self, last) -> None:
        super().__init__()
        self.conv, self.gate, self.last = conv(), nn.Sigmoid(), last

    def forward(self, features: Tensor) -> Tensor:
        return self.last(self.conv(features * self.gate(features)))


PROBABILITIES = {
    "Softmax": lambda: nn.Sequential(conv(), nn.Softmax(1)),
    "Softmax2d": lambda: nn.Sequential(conv(), nn.Identity(), Activation(nn.Softmax2d())),
    "Sigmoid": lambda: nn.Sequential(nn.Sequential(conv(), nn.Sigmoid()), nn.Identity()),
}


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("own", [False, True])
def test_a_classifier_that_ends_in_probabilities_is_refused(name, own):
    reg, last = MVSCRegularizer(CLASSES, DIM), getattr(torch, name.lower().removesuffix("2d"))
    inputs = torch.randn(2, DIM, 4, 4), torch.zeros(2, 4, 4).long()
    ends = partial(last, dim=1) if name.startswith("Softmax") else last
    classifier = Head(ends) if own else PROBABILITIES[name]()
    named = name.removesuffix("2d") if own else name
    with pytest.raises(ValueError, match=rf"ends in {named}\..*layers before that alone"):
        reg(*inputs, classifier)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(conv()),
        lambda: nn.Sequential(conv(), Activation(nn.Identity())),
        lambda: nn.Sequential(nn.Identity(), conv(), nn.LogSoftmax(1)),
        lambda: nn.Sequential(nn.Sequential(nn.Sequential(), conv())),
    ],
)
def test_a_classifier_that_ends_in_logits_has_the_loss_of_its_layer(make):
    reg = MVSCRegularizer(CLASSES, DIM).eval()
    inputs = torch.randn(2, DIM, 4, 4), torch.zeros(2, 4, 4).long()
    assert_close(reg(*inputs, make()), reg(*inputs, conv()))


def test_a_sigmoid_inside_a_classifier_stays():
    head, vectors = Head(nn.Identity()), torch.randn(5, DIM, requires_grad=True)
    expected = head.conv((vectors * vectors.sigmoid())[..., None, None]).flatten(1)
    assert_close(classify_vectors(head, vectors, CLASSES), expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_logit_is_two_classes_of_a_sigmoid(inside, bias):
    layer = nn.Conv2d(DIM, 1, 1, bias=bias)
    vectors = torch.randn(5, DIM)
    answer = classify_vectors(nn.Sequential(layer) if inside else layer, vectors, 2)
    sigmoid = layer(vectors[..., None, None]).flatten().sigmoid()
    assert_close(answer.softmax(1)[:, 1], sigmoid)


def test_a_linear_reads_rows_alone_or_inside_a_module():
    assert reads_rows(nn.Linear(DIM, 2))
    assert reads_rows(nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2)))
    assert not reads_rows(nn.Sequential(nn.Conv2d(DIM, 2, 1), nn.Linear(2, 2)))
    assert not reads_rows(lambda vectors: vectors)
    assert not reads_rows(nn.Identity())


def test_a_sharded_weight_is_told_without_computing_one():
    class Sharded(Tensor):
        def full_tensor(self):
            raise AssertionError("not asked for")

    layer = conv()
    assert not is_sharded(layer)
    layer._parameters["weight"] = torch.zeros(1).as_subclass(Sharded)
    assert is_sharded(layer)
    zero_3 = conv()
    zero_3.weight.ds_id = 7
    assert is_sharded(zero_3)
    assert not is_sharded(lambda vectors: vectors)


def test_the_hooks_of_a_sharded_classifier_gather_its_weight_and_stay():
    layer, calls = conv(), []
    layer.weight.ds_id = 7
    layer.register_forward_pre_hook(lambda *_: calls.append("gathered"))
    classify_vectors(layer, torch.randn(5, DIM), CLASSES)
    classify_vectors(nn.Sequential(layer), torch.randn(5, DIM), CLASSES)
    assert calls == ["gathered", "gathered"]


def test_of_a_layer_whose_classes_were_cut_off_the_weights_count():
    layer = nn.Conv2d(DIM, 21, 1)
    keep = [0, 7, 15]
    layer.weight, layer.bias = (nn.Parameter(p.detach()[keep]) for p in (layer.weight, layer.bias))
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), layer)
    reg = attach(model, classifier="1")
    assert reg.regularizer.num_classes == 3
    vectors = torch.randn(5, DIM)
    expected = layer(vectors[..., None, None]).flatten(1)
    assert_close(classify_vectors(layer, vectors, 3), expected)
    with pytest.raises(ValueError, match="must return num_classes=21 logits, got 3"):
        classify_vectors(layer, vectors, 21)


class Standardised(nn.Conv2d):
    """Weight standardisation, where convolutions are made for others to change them."""

    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / weight.flatten(1).std(dim=1).view(-1, 1, 1, 1)
        return super()._conv_forward(inputs, weight, bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_convolution_that_computes_its_weight_on_the_way_is_called(compiled):
    layer, vectors = Standardised(DIM, CLASSES, 1), torch.randn(5, DIM)
    ask = torch.compile(classify_vectors, backend="eager") if compiled else classify_vectors
    assert_close(ask(layer, vectors, CLASSES), layer(vectors[..., None, None]).flatten(1))


class Functional(nn.Module):
    """A head whose dropout is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.last = conv()

    def forward(self, features: Tensor) -> Tensor:
        return self.last(F.dropout2d(features, 0.5, self.training))


@pytest.mark.parametrize("wrap", [lambda head: head, lambda head: lambda v: head(v)])
def test_what_a_classifier_draws_does_not_move_the_global_generator(wrap):
    classifier = wrap(Functional())
    before = torch.get_rng_state()
    classify_vectors(classifier, torch.ones(3, DIM), CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_attention_over_channels_has_axes_of_its_own():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, features: Tensor) -> Tensor:
            weights = self.mix(features.mean((2, 3)).unsqueeze(1)).sigmoid()
            return features * weights.transpose(1, 2).unsqueeze(-1)

    head = nn.Sequential(Attention(), conv())
    check_classifier(head, DIM, CLASSES, 2)
    vectors = torch.randn(3, DIM)
    expected = head(vectors[:, :, None, None])[:, :, 0, 0]
    assert_close(classify_vectors(head, vectors, CLASSES), expected)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 1, 1), nn.MaxPool2d((3, 5), 1, (1, 2))])
def test_a_pool_that_leaves_the_size_sees_no_padding(pool):
    head, vectors = nn.Sequential(pool, conv()), torch.randn(3, DIM)
    assert_close(
        classify_vectors(head, vectors, CLASSES), classify_vectors(conv(), vectors, CLASSES)
    )


@pytest.mark.parametrize(
    "after",
    [
        lambda z: F.interpolate(z.softmax(1), scale_factor=1.0),
        lambda z: torch.cat([1 - z[:, :1].sigmoid(), z[:, :1].sigmoid()], 1),
    ],
)
def test_values_that_only_a_softmax_gives_are_refused(after):
    def classifier(vectors: Tensor) -> Tensor:
        return after(F.conv2d(vectors, weight))

    weight = conv().weight
    classes = after(torch.zeros(1, CLASSES, 1, 1)).shape[1]
    with pytest.raises(ValueError, match="must return logits, got one that ends in a softmax"):
        classify_vectors(classifier, torch.randn(3, DIM), classes)


def test_a_head_that_reaches_too_far_is_refused_before_it_fills_the_memory():
    branches = [nn.Conv2d(DIM, DIM, 3, padding=rate, dilation=rate) for rate in (6, 12, 18)]
    with pytest.raises(ValueError, match=r"reach over 73 places.*Pass the last linear layer alone"):
        classify_vectors(nn.Sequential(*branches, conv()), torch.randn(3, DIM), CLASSES)


def test_a_lazy_classifier_is_told_to_run_first():
    with pytest.raises(ValueError, match="must know its sizes, got a LazyConv2d that was not cal"):
        check_classifier(nn.LazyConv2d(CLASSES, 1), DIM, CLASSES, 2)


def test_a_frozen_batch_norm_mixes_nothing():
    head = nn.Sequential(nn.BatchNorm2d(DIM), conv())
    assert "BatchNorm2d" in what_mixes(head)
    assert what_mixes(head.eval()) == ""
    assert "InstanceNorm2d" in what_mixes(nn.Sequential(nn.InstanceNorm2d(DIM), conv()).eval())


class Folded(nn.Linear):
    """A Linear that reads maps, as VMamba writes it."""

    def forward(self, features: Tensor) -> Tensor:
        return F.conv2d(features, self.weight[:, :, None, None], self.bias)


class Around(nn.Module):
    """A head that reads maps and permutes around its Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(DIM, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Cosine(nn.Module):
    """A head of a weight of its own, which reads rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, DIM))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(F.normalize(rows, dim=-1), F.normalize(self.weight, dim=-1))


@pytest.mark.parametrize("make", [lambda: Folded(DIM, CLASSES), Around, Cosine])
def test_a_module_is_asked_about_rows_or_maps_as_it_reads_them(make):
    head, vectors = make(), torch.randn(3, DIM)
    maps = vectors if isinstance(head, Cosine) else vectors[:, :, None, None]
    assert_close(classify_vectors(head, vectors, CLASSES), head(maps).flatten(1))


def test_what_fails_in_both_ways_says_so_as_it_fails_in_its_own():
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 8"):
        classify_vectors(nn.Sequential(nn.Conv2d(3, DIM, 1), conv()), torch.randn(3, DIM), CLASSES)


def test_an_attached_linear_that_reads_maps_has_their_channels_second():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), Folded(DIM, CLASSES))
    images, labels = torch.randn(2, 3, 5, 6), torch.randint(0, CLASSES, (2, 5, 6))
    reg, explicit = attach(model, classifier="1"), MVSCRegularizer(CLASSES, DIM)
    model(images)
    features = model[0](images)
    assert_close(reg.features, features.detach())
    assert_close(reg(labels), explicit(features, labels, lambda v: model[1](v)))
