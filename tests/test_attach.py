import copy
import dataclasses
import gc
import io
import pickle
import warnings
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mvsc import MVSCRegularizer
from mvsc.attach import AttachedRegularizer, attach, detach
from tiny_nets import CLASSES, DIM, Net, NetWithLoss, TwoHeads


def first_grad(model: nn.Module) -> Tensor:
    grad = model.encoder[0].weight.grad
    assert grad is not None
    return grad


# What is attached computes what the explicit form computes.


def test_loss_and_gradients_are_those_of_the_explicit_form(images, labels):
    model = Net()
    twin = copy.deepcopy(model)
    reg = attach(model, groups=2)
    explicit = MVSCRegularizer(CLASSES, DIM, groups=2)

    loss = F.cross_entropy(model(images), labels) + reg(labels)
    loss.backward()
    features = twin.encoder(images)
    expected = F.cross_entropy(twin.classifier(features), labels)
    expected = expected + explicit(features, labels, twin.classifier)
    expected.backward()

    assert_close(loss, expected)
    assert_close(reg.regularizer.centroids.grad, explicit.centroids.grad)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, other.grad)


def test_terms_and_their_total_stand_in_for_a_call(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    terms = reg.terms(labels)
    assert terms._fields == ("align", "pull", "classify")
    reg.detach()
    reg = attach(model)
    model(images)
    assert_close(reg.total(terms), reg(labels))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_features_come_from_before_the_dropout(images, labels, kind, inplace):
    model = Net(kind(0.9, inplace=inplace))
    model.encoder[2] = nn.Softplus()  # Its backward, unlike ReLU's, does not need its output.
    reg = attach(model)
    explicit = MVSCRegularizer(CLASSES, DIM)
    model(images)
    loss = reg(labels)
    expected = explicit(model.encoder(images), labels, model.classifier)
    assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, model.encoder[0].weight)[0] for x in (loss, expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("inplace", [False, True])
def test_features_come_from_before_all_dropouts_in_a_row(images, labels, inplace):
    row = (nn.Dropout(0.5, inplace), nn.Identity(), nn.Dropout2d(0.5, inplace), nn.Identity())
    model = Net(nn.Sequential(*row))
    model.encoder[2] = nn.Softplus()
    reg = attach(model)
    model(images)
    expected = MVSCRegularizer(CLASSES, DIM)(model.encoder(images), labels, model.classifier)
    assert_close(reg(labels), expected)


def test_a_dropout_elsewhere_is_not_taken_for_the_one_before_the_classifier(images, labels):
    class Elsewhere(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.encoder(self.dropout(images)))

    model = Elsewhere(nn.Dropout(0.5))
    reg = attach(model)
    entered = []
    model.classifier.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(images)
    assert reg._tap.features is entered[0]


class HeadInItsOwnModule(Net):
    """The dropout is the model's, the classifier that of a part."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__(dropout)
        self.head, self.classifier = nn.Sequential(self.classifier), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(super().forward(images))


class ClassifierFirst(Net):
    """The classifier is registered before the block that ends in the dropout."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        classifier = self.classifier
        del self.encoder, self.classifier, self.dropout
        self.classifier, self.encoder = classifier, Net().encoder.append(dropout)
        self.dropout = nn.Identity()


class TwoDropouts(Net):
    """An auxiliary head has a dropout of its own, which runs in between and afterwards."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__(dropout)
        self.other, self.auxiliary = nn.Dropout2d(0.5), nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        dropped, other = self.dropout(features), self.other(2 * features)
        return self.classifier(dropped), self.auxiliary(self.other(other))


class BackwardHooks(Net):
    """A full backward hook wraps what leaves a module."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__(dropout)
        self.dropout.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("kind", [HeadInItsOwnModule, ClassifierFirst, TwoDropouts, BackwardHooks])
def test_the_dropout_before_the_classifier_is_found_wherever_it_is(images, labels, kind, compiles):
    model = kind(nn.Dropout2d(0.5))
    path = "head.0" if kind is HeadInItsOwnModule else "classifier"
    reg = attach(model, classifier=path)
    if compiles and kind is not BackwardHooks:  # which end a graph
        model.compile(backend="eager", fullgraph=True)
    model(images)
    assert not reg._tap.dropped  # Nothing of the forward is held.
    features = (model.encoder[:3] if kind is ClassifierFirst else model.encoder)(images)
    classifier = model.get_submodule(path)
    assert_close(reg(labels), MVSCRegularizer(CLASSES, DIM)(features, labels, classifier))


def test_what_changes_a_dropouts_output_in_place_is_not_skipped(images, labels):
    class Activated(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.read = self.dropout(self.encoder(images)).sub_(1)
            return self.classifier(self.read)

    model = Activated(nn.Dropout(0.5))
    reg = attach(model)
    model(images)
    assert torch.equal(reg.features, model.read.detach())


def test_a_linear_classifier_reads_the_last_axis(images, labels):
    class LastAxis(Net):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(DIM, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.encoder(images).movedim(1, -1)).movedim(-1, 1)

    model = LastAxis()
    reg = attach(model, classifier="classifier")
    model(images)
    expected = MVSCRegularizer(CLASSES, DIM)(model.encoder(images), labels, model.classifier)
    assert_close(reg(labels), expected)
    assert attach(LastAxis(), example=images).classifier_path == "classifier"


def test_a_few_steps_move_the_centroids_and_lower_the_loss(images, labels):
    model = Net()
    reg = attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.add_param_group(reg.param_group(lr=0.5))
    before = reg.regularizer.centroids.detach().clone()
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels) + reg(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(before, reg.regularizer.centroids)
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_features_in_bfloat16_are_welcome(images, labels):
    model = Net()
    reg = attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels) + reg(labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(first_grad(model).norm()) > 0


def test_a_call_of_the_classifier_by_the_regularizer_is_no_forward(images, labels):
    calls = []

    class Counting(nn.Conv2d):  # Not a plain Conv2d, so the regularizer has to call it.
        def forward(self, features: Tensor) -> Tensor:
            calls.append(features.shape)
            return super().forward(features)

    model = Net()
    model.classifier = Counting(DIM, CLASSES, 1)
    reg = attach(model)
    for _ in range(2):
        (F.cross_entropy(model(images), labels) + reg(labels)).backward()
    assert len(calls) == 4


# The model stays what it was.


def test_keys_parameters_and_outputs_of_the_model_do_not_change(images, labels):
    model = Net(nn.Dropout(0.5))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    logits = model.eval()(images)
    with attach(model) as reg:
        assert list(model.state_dict()) == keys
        assert list(map(id, model.parameters())) == list(map(id, parameters))
        assert torch.equal(model(images), logits)
        assert list(reg.state_dict()) == ["regularizer.centroids", "regularizer.step"]
        assert [p.shape for p in reg.parameters()] == [(4, CLASSES, DIM)]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images), logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_attach_and_the_loss_leave_the_global_random_state_alone(images, labels):
    class Noisy(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + torch.rand_like(images))

    model = Noisy()
    state = torch.get_rng_state()
    reg = attach(model, example=images)
    assert torch.equal(torch.get_rng_state(), state)
    model(images)
    state = torch.get_rng_state()
    reg(labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_with_dropout_sees_the_same_masks_as_without(images, labels):
    model = Net(nn.Dropout(0.5))
    torch.manual_seed(1)
    logits = model(images)
    attach(model)
    torch.manual_seed(1)
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("used", [False, True])
def test_the_model_can_be_copied_averaged_and_pickled_after_a_forward(images, labels, used):
    model = Net(nn.Dropout(0.5))
    reg = attach(model)
    model(images)
    if used:
        reg(labels).backward()
    copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    restored = torch.load(file, weights_only=False)
    assert_close(restored.state_dict(), model.state_dict())
    restored(images)


def test_a_copy_of_the_model_does_not_write_into_the_tap(images, labels):
    model = Net()
    reg = attach(model)
    teacher = copy.deepcopy(model)
    assert teacher.training
    expected = model(images)
    features = reg._tap.features
    teacher(torch.randn_like(images))
    assert reg._tap.features is features
    (F.cross_entropy(expected, labels) + reg(labels)).backward()
    assert attach(teacher).classifier_path == "classifier"


def unpickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled])
def test_a_copy_of_the_regularizer_is_attached_to_nothing(images, labels, duplicate):
    model = Net()
    reg = attach(model)
    model(images)
    with pytest.raises(RuntimeError, match=r"attached to no model.*Call mvsc\.attach"):
        duplicate(reg)(labels)
    assert_close(duplicate(reg).state_dict(), reg.state_dict())


def test_nothing_keeps_the_features_alive_after_backward(images, labels):
    model = Net(nn.Dropout(0.5))
    reg = attach(model)
    logits = model(images)
    features = weakref.ref(reg._tap.features)
    loss = F.cross_entropy(logits, labels) + reg(labels)
    loss.backward()
    del loss, logits
    assert features() is None


def test_nothing_keeps_the_features_alive_after_detach(images):
    model = Net()
    reg = attach(model)
    logits = model(images)
    features = weakref.ref(reg._tap.features)
    reg.detach()
    del logits
    assert features() is None


def test_features_may_be_passed_by_name(images, labels):
    class ByName(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(input=self.dropout(input=self.encoder(images)))

    losses = []
    for kind in (Net, ByName):
        torch.manual_seed(1)
        model = kind(nn.Dropout(0.5))
        reg = attach(model)
        model(images)
        losses.append(reg(labels))
    assert_close(*losses, rtol=0, atol=0)


# Never silent.


@pytest.mark.parametrize(
    "replaced",
    [
        lambda old: nn.Conv2d(DIM, 3, 1),
        lambda old: nn.Sequential(nn.Conv2d(DIM, CLASSES, 1)),
        lambda old: nn.Sequential(old, nn.Conv2d(CLASSES, CLASSES, 1)),
    ],
    ids=["another", "a list", "wrapped"],
)
def test_a_classifier_that_was_replaced_raises(images, labels, replaced):
    model = Net()
    reg = attach(model)
    model.classifier = replaced(model.classifier)
    model(images)
    with pytest.raises(RuntimeError, match="was replaced since it was attached"):
        reg(labels)


def test_a_forward_of_the_classifiers_own_is_called(images, labels):
    model = Net()
    plain, reg = model.classifier.forward, attach(model)
    found = []
    for factor in (1, 3):
        model.classifier.forward = lambda x, by=factor: by * plain(x)
        model(images)
        found.append(reg.terms(labels).classify)
    logits = model.classifier(reg.regularizer.centroids.flatten(0, 1)[:, :, None, None])
    target = torch.arange(CLASSES).repeat(4)
    present = torch.isin(target, labels)
    expected = F.cross_entropy(logits.flatten(1)[present], target[present])
    assert_close(found[1], expected)
    assert found[0] != found[1]


def test_a_regularizer_that_nobody_holds_gives_way(images, labels):
    model = Net()
    attach(model)
    reg = attach(model)
    model(images)
    assert reg(labels).item() > 0
    with pytest.raises(ValueError, match="one regularizer at a time"):
        attach(model)


@pytest.mark.parametrize("add_to_loss", [False, True])
def test_detach_makes_room_where_only_the_traceback_of_an_error_holds_a_regularizer(
    images, labels, add_to_loss
):
    model = NetWithLoss()

    def trial():
        reg = attach(model, add_to_loss=add_to_loss)
        raise RuntimeError("diverged", str(reg))

    with pytest.raises(RuntimeError, match="diverged") as kept:  # as a notebook keeps the last one
        trial()
    with pytest.raises(ValueError, match=r"or mvsc\.detach\(model\) where nothing but"):
        attach(model)
    detach(model)
    detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    reg = attach(model, add_to_loss=add_to_loss)
    assert model(images, labels).loss.isfinite()
    reg.detach()
    assert kept.tb is not None


@pytest.mark.parametrize("add_to_loss", [False, True])
def test_who_attaches_again_takes_the_place_of_one_that_nobody_holds(images, labels, add_to_loss):
    model = NetWithLoss()

    def trial():
        reg = attach(model, add_to_loss=add_to_loss)
        reg.holder = [reg]  # As something in cycles would, until they are collected.
        return reg.regularizer.centroids

    first = trial()
    if add_to_loss:  # It works as long as nobody takes its place.
        model(images, labels).loss.backward()
        assert first.grad is not None
    second = trial()
    assert second is not first
    held = attach(model)
    with pytest.raises(ValueError, match=r"Call its detach\(\) first"):
        attach(model, add_to_loss=add_to_loss)
    held.detach()


def test_a_loss_without_a_forward_raises(labels):
    with pytest.raises(RuntimeError, match=r"no forward ran since.*torch\.compiler\.reset\(\)"):
        attach(Net())(labels)


def test_a_second_loss_of_one_forward_raises(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    reg(labels)
    with pytest.raises(RuntimeError, match=r"used up.*once for each forward"):
        reg(labels)


def test_two_forwards_before_one_loss_raise_and_keep_no_graph(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    model(images)
    assert reg._tap.features is None
    with pytest.raises(RuntimeError, match=r"ran more than once.*reg\.discard\(\)"):
        reg(labels)
    model(images)
    assert reg(labels).item() > 0


def test_a_copy_that_is_trained_in_place_of_the_model_is_named_as_a_cause(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    reg(labels)
    model = copy.deepcopy(model)
    model(images)
    with pytest.raises(RuntimeError, match="a copy of it is trained now, attach to that"):
        reg(labels)


def test_discard_forgets_a_forward(images, labels):
    model = Net()
    reg = attach(model)
    model(torch.randn_like(images))
    reg.discard()
    model(images)
    assert_close(
        reg(labels), MVSCRegularizer(CLASSES, DIM)(model.encoder(images), labels, model.classifier)
    )
    model(images)
    reg.discard()
    with pytest.raises(RuntimeError, match=r"reg\.discard\(\) has forgotten .*before the next"):
        reg(labels)


def test_a_forward_in_evaluation_mode_raises(images, labels):
    model = Net().eval()
    reg = attach(model)
    model(images)
    with pytest.raises(RuntimeError, match=r"evaluation mode.*Call model\.train\(\)"):
        reg(labels)


def test_a_forward_without_gradients_raises(images, labels):
    model = Net()
    reg = attach(model)
    with torch.no_grad():
        model(images)
    with pytest.raises(RuntimeError, match=r"without gradients.*use_reentrant=False"):
        reg(labels)


def test_an_evaluation_between_forward_and_loss_does_not_matter(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    with torch.no_grad():
        model.eval()(torch.randn_like(images))
    model.train()
    features = reg._tap.features
    assert features is not None
    assert reg(labels).item() > 0


def test_frozen_features_raise(images, labels):
    model = Net()
    model.encoder.requires_grad_(False)
    reg = attach(model)
    model(images)
    with pytest.raises(
        RuntimeError, match=r"no gradient.*frozen.*Unfreeze.*classifier alone.*to MVSC"
    ):
        reg(labels)


def test_reentrant_checkpointing_raises(images, labels):
    model = Net()
    reg = attach(model)
    checkpoint(model, images.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reg(labels)


def test_checkpointing_gives_the_gradients_of_a_plain_forward(images, labels):
    gradients = []
    for forward in (
        lambda net: net(images),
        lambda net: checkpoint(net, images, use_reentrant=False),
    ):
        torch.manual_seed(1)
        model = Net(nn.Dropout(0.5))
        reg = attach(model)
        for _ in range(2):  # A replay must not be taken for a forward of the next step.
            (F.cross_entropy(forward(model), labels) + reg(labels)).backward()
        gradients.append(first_grad(model))
    assert_close(*gradients)


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.5)])
def test_a_change_in_place_after_the_tap_raises(images, labels, dropout):
    class Changing(Net):
        def forward(self, images: Tensor) -> Tensor:
            features = self.encoder(images)
            logits = self.classifier(self.dropout(features))
            features.mul_(2)
            return logits

    model = Changing(dropout)
    reg = attach(model)
    model(images)
    with pytest.raises(RuntimeError, match=r"changed in place.*inplace=False"):
        reg(labels)


def test_a_classifier_of_other_sizes_is_told_to_attach_again(images, labels):
    model = Net()
    reg = attach(model)
    model.classifier.weight = nn.Parameter(torch.randn(CLASSES + 2, DIM, 1, 1))
    model.classifier.bias = nn.Parameter(torch.zeros(CLASSES + 2))
    model(images)
    with pytest.raises(RuntimeError, match=r"replaced .*, or has other sizes\. Call detach\(\)"):
        reg(labels)


class Adapted(nn.Module):
    """LoRA, as a user writes it: parameters beside a frozen layer."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, DIM, 1, 1))
        self.up = nn.Parameter(torch.zeros(CLASSES, 2, 1, 1))
        self.dropout = nn.Dropout(0.1)

    def forward(self, features: Tensor) -> Tensor:
        narrow = F.conv2d(self.dropout(features), self.down)
        return self.layer(features) + F.conv2d(narrow, self.up)


def test_an_adapter_around_the_classifier_is_noticed_and_the_remedy_trains_it(images, labels):
    model = Net()
    model.classifier = Adapted(model.classifier)
    with pytest.warns(UserWarning, match=r"Adapted around it.*get_submodule\('classifier'\)"):
        attach(model)
    loss = MVSCRegularizer(CLASSES, DIM)(model.encoder(images), labels, model.classifier)
    loss.backward()
    assert model.classifier.up.grad.norm() > 0
    model.classifier.layer.requires_grad_(True)  # then it is no adapter
    detach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model)


def test_an_adapter_of_two_layers_around_the_classifier_is_noticed():
    class TwoLayers(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Conv2d(DIM, 2, 1, bias=False)
            self.up = nn.Conv2d(2, CLASSES, 1, bias=False)

        def forward(self, features: Tensor) -> Tensor:
            return self.base(features) + self.up(self.down(features))

    model = Net()
    model.classifier = TwoLayers(model.classifier)
    with pytest.warns(UserWarning, match=r"TwoLayers around it.*get_submodule\('classifier'\)"):
        attach(model, classifier="classifier.base")
    detach(model)
    model.classifier.requires_grad_(False)  # A frozen head of three layers is no adapter.
    attach(model, classifier="classifier.base")


def test_what_the_regularizer_inside_has_is_pointed_at():
    reg = attach(Net())
    with pytest.raises(AttributeError, match=r"Use reg\.regularizer\.centroids"):
        reg.centroids  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        reg.nothing  # noqa: B018
    assert not hasattr(reg, "step")


def test_one_image_without_a_batch_is_told_to_get_one(images, labels):
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), nn.Conv2d(DIM, CLASSES, 1))
    reg = attach(model)
    model(images[0])
    with pytest.raises(ValueError, match=r"images\.unsqueeze\(0\) and labels\.unsqueeze"):
        reg(labels[0])


def test_a_detached_regularizer_raises(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    reg.detach()
    with pytest.raises(RuntimeError, match="detached"):
        reg(labels)


def test_a_second_attach_raises_until_the_first_is_detached():
    model = Net()
    reg = attach(model)
    with pytest.raises(ValueError, match=r"one regularizer at a time.*detach\(\)"):
        attach(model)
    reg.detach()
    attach(model)


def test_bad_labels_raise_as_in_the_explicit_form(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    with pytest.raises(TypeError, match=r"Use labels\.long\(\)"):
        reg(labels.float())


# Wrapped models.


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_an_eager_one(images, labels, backend):
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = Net()
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        reg = attach(run)
        assert reg.classifier_path == "classifier"
        for _ in range(2):
            (F.cross_entropy(run(images), labels) + reg(labels)).backward()
        gradients.append(first_grad(model))
    assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own, of the features
def test_an_attached_regularizer_can_be_compiled_alone(images, labels):
    torch.compiler.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = Net()
        reg = attach(model)
        if compiled:
            reg.regularizer.compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            loss = F.cross_entropy(model(images), labels) + reg(labels)
            loss.backward()
            losses.append((loss.detach(), first_grad(model).clone()))
    assert_close(losses[2:], losses[:2])


def test_a_model_compiled_and_run_before_attach_raises_until_reset(images, labels):
    torch.compiler.reset()
    model = Net()
    run = torch.compile(model, backend="eager")
    run(images)
    reg = attach(run)
    run(images)
    with pytest.raises(RuntimeError, match=r"compiled and called without a"):
        reg(labels)
    torch.compiler.reset()
    run(images)
    assert reg(labels).item() > 0


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match=r"DataParallel.*Use DistributedDataParallel"):
        attach(nn.DataParallel(Net()))


def test_a_replica_of_data_parallel_raises(images):
    model = Net()
    attach(model)
    model.classifier._is_replica = True  # As nn.DataParallel marks what it runs in its threads.
    with pytest.raises(RuntimeError, match="Use DistributedDataParallel"):
        model(images)


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        attach("segformer")


def test_the_regularizer_is_on_the_device_of_the_model():
    assert attach(Net().to("meta")).regularizer.centroids.device.type == "meta"


# add_to_loss.


def test_add_to_loss_adds_the_loss_where_labels_come_in(images, labels):
    model = NetWithLoss()
    expected = model(images, labels).loss + MVSCRegularizer(CLASSES, DIM)(
        model.encoder(images), labels, model.classifier
    )
    for arguments in ({"labels": labels}, {"labels": labels, "return_dict": False}):
        with attach(model, add_to_loss=True):
            output = model(images, **arguments)
            assert_close(output.loss if "return_dict" not in arguments else output[0], expected)
    with attach(model, add_to_loss=True):
        assert_close(model(images, labels).loss, expected)  # By position.


def test_add_to_loss_leaves_forwards_without_labels_or_training_alone(images, labels):
    model = NetWithLoss()
    loss = model.eval()(images, labels).loss
    with attach(model, add_to_loss=True):
        assert torch.equal(model(images, labels).loss, loss)
        model.train()
        assert model(images).loss is None


def test_add_to_loss_does_nothing_in_a_copy(images, labels):
    model = NetWithLoss()
    loss = model(images, labels).loss
    attach(model, add_to_loss=True)
    assert_close(copy.deepcopy(model)(images, labels).loss, loss)


def test_a_copy_that_is_trained_says_once_that_add_to_loss_adds_nothing_there(images, labels):
    model = NetWithLoss()
    attach(model, add_to_loss=True)
    for trained in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        with pytest.warns(UserWarning, match=r"NetWithLoss, which is a copy.*detach\(copy") as said:
            _ = [trained(images, labels) for _ in range(30)]
        assert len(said) == 1


def test_a_teacher_and_a_copy_that_is_attached_or_stripped_say_nothing(images, labels):
    model = NetWithLoss()
    attach(model, add_to_loss=True)
    teacher, other, left = (copy.deepcopy(model) for _ in range(3))
    reg = attach(other)
    detach(left)
    for _ in range(12):
        with torch.no_grad():
            teacher(images, labels)
        teacher(images)  # Without a loss.
        other(images, labels)
        reg(labels)
        left(images, labels)


def test_add_to_loss_leaves_a_step_of_another_head_alone_and_says_so_once(images, labels):
    class Tasks(NetWithLoss):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv2d(DIM, CLASSES, 1)

        def forward(self, images: Tensor, labels: Tensor, other: bool = False) -> SimpleNamespace:
            if not other:
                return super().forward(images, labels)
            return SimpleNamespace(loss=F.cross_entropy(self.other(self.encoder(images)), labels))

    model = Tasks()
    reg = attach(model, classifier="classifier", add_to_loss=True)
    with pytest.warns(UserWarning, match="the classifier did not run. If another head") as seen:
        model(images, labels, other=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images, labels, other=True)
    assert len(seen) == 1
    model(images, labels)
    assert reg.regularizer.step == 1


@pytest.mark.parametrize("trained", [False, True])
def test_add_to_loss_to_a_loss_that_nobody_trains_on_says_so_once(images, labels, trained):
    model = NetWithLoss()
    attach(model, add_to_loss=True)

    def step() -> None:
        output = model(images, labels)
        own = F.cross_entropy(output.logits, labels, weight=torch.ones(CLASSES))
        (output.loss if trained else own).backward()

    for _ in range(10):
        step()
    if trained:
        step()
        return
    with pytest.warns(UserWarning, match="no backward came through.*add_to_loss=False and") as seen:
        step()
    for _ in range(20):
        step()
    assert len(seen) == 1


def test_add_to_loss_that_never_gets_labels_says_so_once(images, labels):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    for _ in range(9):
        model(images)
    with pytest.warns(UserWarning, match=r"10 forwards.*no labels\. Pass labels to the model"):
        model(images)
    for _ in range(20):
        model(images)
    model(images, labels)
    assert reg.regularizer.step == 1


def test_add_to_loss_in_evaluation_mode_on_purpose_says_how(images, labels):
    model = NetWithLoss().eval()
    reg = attach(model, add_to_loss=True)
    with torch.no_grad():  # An evaluation.
        for _ in range(20):
            model(images, labels)
    for _ in range(9):
        model(images, labels)
    with pytest.warns(UserWarning, match="nothing to add in 10 forwards.*evaluation mode") as said:
        model(images, labels)
    eval(str(said[0].message).rpartition(": ")[2].rstrip("."), {"model": model})
    model(images, labels).loss.backward()
    assert reg.regularizer.centroids.grad is not None


def test_add_to_loss_converts_no_labels_that_the_models_own_loss_needs(images, labels):
    class Binary(NetWithLoss):
        def forward(self, images, labels=None):
            logits = Net.forward(self, images)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            return SimpleNamespace(loss=loss, logits=logits)

    model, masks = Binary(classes=1), (labels[:, None] > 1).float()
    held = attach(model, classifier="classifier", add_to_loss=True)
    told = r"squeeze\(1\)\.long.*own loss.*attach without add_to_loss"
    with pytest.raises(ValueError, match=told):
        model(images, masks)
    held.detach()
    reg = attach(model, classifier="classifier")
    (model(images, masks).loss + reg(masks.squeeze(1).long())).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_add_to_loss_in_a_checkpoint_of_the_model_with_its_loss_is_refused(
    images, labels, use_reentrant
):
    model = NetWithLoss()
    images.requires_grad_()

    def loss(images):
        return model(images, labels).loss

    held = attach(model, add_to_loss=True)
    with pytest.raises(RuntimeError, match=r"checkpoint of the whole model.*model's parts"):
        checkpoint(loss, images, use_reentrant=use_reentrant).backward()
    held.detach()
    reg = attach(model)
    (checkpoint(loss, images, use_reentrant=False) + reg(labels)).backward()


class Direct(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)  # As PEFT's tuners do.


def test_add_to_loss_that_is_passed_by_says_so_once_and_the_remedy_works(images, labels):
    inner = NetWithLoss()
    plain = inner(images, labels).loss
    reg = attach(inner, add_to_loss=True)
    model = Direct(inner)
    for _ in range(9):
        model(images, labels=labels)
    with pytest.warns(UserWarning, match="10 forwards.*Attach to the module that is called"):
        model(images, labels=labels)
    for _ in range(20):
        model(images, labels=labels)
    reg.detach()
    attach(model, add_to_loss=True)
    assert model(images, labels=labels).loss > plain


def test_add_to_loss_takes_steps_with_labelled_and_unlabelled_forwards(images, labels):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    for _ in range(30):
        (model(images, labels).loss + model(images).logits.square().mean()).backward()
    assert reg.regularizer.step == 30


def test_add_to_loss_survives_a_forward_that_failed_and_keeps_no_graph_of_it(images, labels):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    entered = []
    model.classifier.register_forward_pre_hook(lambda m, args: entered.append(weakref.ref(args[0])))
    handle = model.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images, labels)
    gc.collect()
    assert entered[0]() is None
    handle.remove()
    expected = attach(copy.deepcopy(model), add_to_loss=True).regularizer
    assert model(images[:1], labels[:1]).loss.isfinite()
    assert reg.regularizer.step == 1
    assert expected.step == 0


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Positional(Wrapped):
    def forward(self, *args):
        return self.inner(*args)


class Leading(Wrapped):
    def forward(self, mode, *args, **kwargs):
        return self.inner(*args, **kwargs)


class SameName(Wrapped):
    def forward(self, images, *args, **kwargs):
        return self.inner(images, *args, **kwargs)


class Loose(NetWithLoss):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def replaced(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Wrapped(NetWithLoss()),
        lambda: Positional(NetWithLoss()),
        lambda: SameName(NetWithLoss()),
        lambda: replaced(NetWithLoss()),
        Loose,
    ],
    ids=["wrapper", "positional", "same name", "replaced", "subclass"],
)
def test_add_to_loss_looks_through_what_hands_on_what_it_gets(images, labels, make, by_name):
    losses = []
    for build in (make, NetWithLoss):
        torch.manual_seed(1)
        model = build()
        attach(model, add_to_loss=True)
        by_name = by_name and not isinstance(model, Positional)
        losses.append((model(images, labels=labels) if by_name else model(images, labels)).loss)
    assert_close(*losses, rtol=0, atol=0)


def test_add_to_loss_does_not_guess_at_labels_behind_arguments_of_a_wrapper(images, labels):
    model = Leading(NetWithLoss())
    reg = attach(model, add_to_loss=True)
    with pytest.raises(RuntimeError, match=r"argument of Leading is labels\. Pass it by name"):
        model("train", images, labels)
    model("train", images)
    assert reg.regularizer.step == 0
    model("train", images, labels=labels)
    assert reg.regularizer.step == 1


# The compiler looks at the gradient of every tensor that it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_add_to_loss_works_in_a_compiled_model(images, labels):
    torch.compiler.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = NetWithLoss()
        attach(model, add_to_loss=True)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses.append(run(images, labels=labels, return_dict=False)[0])
    assert_close(*losses)


def decorated(forward):
    def inner(*args, **kwargs):
        return forward(*args, **kwargs)

    return inner  # without functools.wraps, so nothing shows the names


class Decorated(NetWithLoss):
    forward = decorated(NetWithLoss.forward)


class ByName(NetWithLoss):
    def forward(self, **batch):
        logits = self.classifier(self.encoder(batch["images"]))
        return SimpleNamespace(loss=F.cross_entropy(logits, batch["labels"]), logits=logits)


@pytest.mark.parametrize("kind", [Decorated, ByName])
def test_add_to_loss_takes_labels_by_name_where_nothing_tells_the_names(images, labels, kind):
    model = kind.__new__(kind)
    NetWithLoss.__init__(model)
    reg = attach(model, classifier="classifier", add_to_loss=True)
    output = model(images=images, labels=labels)
    assert output.loss > F.cross_entropy(output.logits, labels) + 0.1
    assert reg.regularizer.step == 1


def test_add_to_loss_refuses_a_classifier_that_was_replaced(images, labels):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    model.classifier = nn.Conv2d(DIM, CLASSES, 1)
    with pytest.raises(RuntimeError, match="was replaced since it was attached"):
        model(images, labels)
    reg.detach()


@pytest.mark.parametrize("add_to_loss", [True, False])
def test_attaching_to_another_classifier_leaves_nothing_of_the_replaced_one(
    images, labels, add_to_loss
):
    model, kept, hooks = NetWithLoss(), [], []
    for _ in range(3):
        model.classifier = nn.Conv2d(DIM, CLASSES, 1)
        kept.append(weakref.ref(model.classifier))
        reg = attach(model, add_to_loss=add_to_loss)
        model(images, labels)  # A warning would be an error.
        hooks.append(len(model._forward_hooks) + len(model._forward_pre_hooks))
    gc.collect()
    assert [each() is None for each in kept] == [True, True, False]
    assert hooks[0] == hooks[1] == hooks[2]
    assert reg.regularizer.step == add_to_loss


def test_regularizers_of_two_heads_live_side_by_side(images, labels):
    model = TwoHeads()
    regs = [attach(model, classifier=name) for name in ("classifier", "boundary")]
    model(images)
    assert all(reg(labels) > 0 for reg in regs)


def test_add_to_loss_says_once_that_it_adds_means_to_parts_of_a_sum(images, labels):
    class Sums(NetWithLoss):
        def forward(self, images, labels=None, num_items_in_batch=None):
            return super().forward(images, labels)

    for items, said in ((labels.numel(), 0), (4 * labels.numel(), 1)):
        model = Sums()
        attach(model, add_to_loss=True)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                model(images, labels, num_items_in_batch=torch.tensor(items))
        assert sum("use attach_to_trainer" in str(each.message) for each in seen) == said


def test_add_to_loss_needs_a_model_that_takes_labels():
    model = Net()
    with pytest.raises(ValueError, match=r"Net, which takes images\. Add reg\(labels\)"):
        attach(model, add_to_loss=True)
    attach(model)  # Nothing was left behind.


def test_add_to_loss_needs_a_loss(images, labels):
    class NoLoss(NetWithLoss):
        def forward(self, images: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
            return super().forward(images)

    model = NoLoss()
    attach(model, add_to_loss=True)
    with pytest.raises(RuntimeError, match="NoLoss returned no loss.*a SimpleNamespace without"):
        model(images, labels=labels)


class Named(NamedTuple):
    logits: Tensor
    auxiliary: Tensor
    loss: Tensor


class Unnamed(NamedTuple):
    logits: Tensor
    total: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor
    logits: Tensor

    def __iter__(self):
        return iter((self.loss, self.logits))


class Returns(NetWithLoss):
    """Its output is made of logits and loss by a function."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images, labels=None):
        output = super().forward(images, labels)
        return self.make(output.logits, output.loss)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda z, loss: (z, loss), lambda out: out[1]),
        (lambda z, loss: (z, z.mean().detach(), loss), lambda out: out[2]),
        (lambda z, loss: Named(z, z.mean(), loss), lambda out: out.loss),
        (Unnamed, lambda out: out.total),
        (lambda z, loss: [z, loss], lambda out: out[1]),
        (lambda z, loss: {"logits": z, "loss": loss}, lambda out: out["loss"]),
        (lambda z, loss: Frozen(loss, z), lambda out: out.loss),
    ],
    ids=["tuple", "metric", "named", "unnamed", "list", "dict", "frozen"],
)
def test_add_to_loss_finds_the_loss_in_what_a_model_returns(images, labels, make, loss):
    model = Returns(make)
    plain = model(images, labels)
    added = MVSCRegularizer(CLASSES, DIM)(model.encoder(images), labels, model.classifier)
    attach(model, add_to_loss=True)
    output = model(images, labels)
    assert type(output) is type(plain)
    assert_close(loss(output), loss(plain) + added)
    parts = [getattr(out, "values", out.__iter__)() for out in (output, plain)]
    logits = [next(part for part in each if part.ndim == 4) for each in parts]
    assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda z, loss: (z, loss, z.mean()), "tuple"),
        (lambda z, loss: (loss.expand(2), z), "tuple"),
        (lambda z, loss: {"logits": z, "total": loss}, "dict"),
        (lambda z, loss: SimpleNamespace(loss=loss.item(), logits=z), "SimpleNamespace"),
    ],
    ids=["two", "per image", "other name", "number"],
)
def test_add_to_loss_refuses_what_may_be_no_loss(images, labels, make, kind):
    model = Returns(make)
    reg = attach(model, add_to_loss=True)
    with pytest.raises(RuntimeError, match=rf"Returns returned no loss.*a {kind} without"):
        model(images, labels)
    assert reg.regularizer.step == 0


# Options and sizes.


def test_options_reach_the_regularizer():
    reg = attach(Net(), groups=2, temperature=0.2, ignore_index=0)
    assert (reg.regularizer.groups, reg.regularizer.temperature) == (2, 0.2)
    assert reg.regularizer.ignore_index == 0
    assert "classifier_path='classifier'" in repr(reg)
    assert isinstance(reg, AttachedRegularizer)


def test_the_sizes_are_the_classifiers():
    with attach(Net(), num_classes=CLASSES, dim=DIM) as reg:
        assert (reg.regularizer.num_classes, reg.regularizer.dim) == (CLASSES, DIM)
    # The labels of 5 classes would fit a layer of 20, whose channels PixelShuffle rearranges.
    shuffled = nn.Sequential(nn.Conv2d(3, DIM, 3), nn.Conv2d(DIM, 20, 1), nn.PixelShuffle(2))
    with pytest.raises(ValueError, match=r"num_classes must be .*, 20 of '1', got 5\. Name"):
        attach(shuffled, num_classes=5)


def test_a_single_logit_is_two_classes(images, labels):
    model = Net(classes=1)
    reg = attach(model, classifier="classifier")
    assert reg.regularizer.num_classes == 2
    model(images)
    found = reg.terms(labels % 2)
    explicit = MVSCRegularizer(2, DIM)
    features = model.encoder(images)
    for classifier in (
        model.classifier,
        lambda v: torch.cat([torch.zeros_like(model.classifier(v)), model.classifier(v)], dim=1),
    ):
        explicit.step.zero_()
        assert_close(explicit.terms(features, labels % 2, classifier), found)
    logits = model.classifier(explicit.centroids.flatten(0, 1)[:, :, None, None]).flatten()
    target = torch.arange(2.0).repeat(4)
    assert_close(found.classify, F.binary_cross_entropy_with_logits(logits, target))
    with pytest.raises(ValueError, match=r"2 of 'classifier', whose one logit stands for"):
        attach(Net(classes=1), classifier="classifier", num_classes=1)
    with pytest.raises(ValueError, match=r"got one, which stands for two classes.*num_classes=2"):
        MVSCRegularizer(3, DIM)(features, labels % 2, model.classifier)


def test_a_model_may_be_moved_after_it_was_attached(images, labels):
    model = Net()
    reg = attach(model)
    model.to("meta")
    model(images.to("meta"))
    with pytest.raises(ValueError, match=r"Move the regularizer with \.to\('meta'\)"):
        reg(labels.to("meta"))
    assert reg.to("meta")(labels.to("meta")).device.type == "meta"


def test_a_setting_is_set_where_it_has_an_effect(images, labels):
    model = Net()
    reg = attach(model)
    with pytest.raises(AttributeError, match=r"Set reg\.regularizer\.align_weight\."):
        reg.align_weight = 0.0
    reg.regularizer.align_weight = reg.regularizer.classify_weight = 0.0
    reg.regularizer.pull_weight = 0.0
    model(images)
    assert reg(labels) == 0
    reg.note = reg.pre_bwd_fn = "of my own"
    reg.regularizer.pre_bwd_fn = "of a framework"
    reg.pre_bwd_fn = "which sets it on every module"


def test_the_ignored_label_of_the_models_config_gives_way_to_the_users():
    model = Net()
    model.config = SimpleNamespace(semantic_loss_ignore_index=7)
    with attach(model) as reg:
        assert reg.regularizer.ignore_index == 7
    assert attach(model, ignore_index=3).regularizer.ignore_index == 3


def test_a_refused_call_uses_nothing_up(images, labels):
    model = Net()
    reg = attach(model)
    model(images)
    for wrong in (labels.float(), labels[:1], labels + 99):
        with pytest.raises((TypeError, ValueError)):
            reg(wrong)
    assert reg(labels).isfinite()
    with pytest.raises(RuntimeError, match="used up"):
        reg(labels)


def test_with_add_to_loss_a_second_loss_is_told_that_the_first_was_added(images, labels):
    model = NetWithLoss()
    reg = attach(model, add_to_loss=True)
    model(images, labels)
    with pytest.raises(RuntimeError, match=r"add_to_loss has added them.*Leave reg\(labels\) out"):
        reg(labels)
    model(images)
    with pytest.raises(RuntimeError, match=r"had no labels\. Pass labels to the model"):
        reg(labels)


class Fixed(nn.Conv2d):
    """Has a weight that is not learned, as the simplex of neural collapse."""

    def __init__(self) -> None:
        super().__init__(DIM, CLASSES, 1, bias=False)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_whose_weight_is_fixed_is_asked_as_it_is(images, labels, dtype):
    model = Net()
    model.classifier = Fixed()
    model, images = model.to(dtype), images.to(dtype)
    reg = attach(model, classifier="classifier")
    model(images)
    loss = reg(labels)
    regularizer = MVSCRegularizer(CLASSES, DIM)
    assert_close(loss, regularizer(model.encoder(images), labels, model.classifier))
    loss.backward()
    assert reg.regularizer.centroids.grad.any()


def test_an_optimizer_of_named_parameters_takes_the_centroids_with_their_name(images, labels):
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    reg = attach(model)
    optimizer.add_param_group(reg.param_group(params=[*reg.named_parameters()]))
    drawn = reg.regularizer.centroids.detach().clone()
    model(images)
    reg(labels).backward()
    optimizer.step()
    assert not torch.equal(reg.regularizer.centroids, drawn)
    assert optimizer.param_groups[-1]["weight_decay"] == 0
