"""What a long run does to a regularizer: any order of events, EMA, checkpoints of old versions."""

import copy
import gc
import io
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import mvsc
from mvsc import MVSCRegularizer

GOLDEN = Path(__file__).parent / "data" / "regularizer-0.1.pt"
CLASSES, DIM, GROUPS = 4, 3, 3


def example(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, DIM, 5, 4, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (2, 10, 8), generator=generator)
    return features, labels


def head(dtype=torch.float32):
    classifier = nn.Conv2d(DIM, CLASSES, 1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return classifier.to(dtype)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Whatever comes in whatever order, the state says all, and the promises hold."""

    @initialize(seed=st.integers(0, 2**64), attached=st.booleans())
    def build(self, seed, attached):
        self.rng = torch.get_rng_state()
        self.model = nn.Sequential(nn.Identity(), head())
        self.keys = list(self.model.state_dict())
        self.attached = None
        self.reg = MVSCRegularizer(CLASSES, DIM, GROUPS, seed=seed)
        if attached:
            self.attach()
        self.steps = 0

    @precondition(lambda self: self.attached is None)
    @rule()
    def attach(self):
        torch.set_rng_state(self.rng)
        self.attached = mvsc.attach(self.model, classifier="1", groups=GROUPS, seed=self.reg.seed)
        self.attached.regularizer = self.reg

    @precondition(lambda self: self.attached is not None)
    @rule()
    def detach(self):
        self.attached.detach()
        self.attached = None

    @rule(number=st.integers(0, 3))
    def train_step(self, number):
        features, labels = example(number, self.reg.centroids.dtype)
        twin = self.rebuilt()
        self.reg.train()
        self.model.to(features.dtype)
        if self.attached is None:
            loss = self.reg(features, labels, self.model[1])
        else:
            self.model(features)
            loss = self.attached(labels)
        loss.backward()
        self.steps += 1
        assert_close(loss, twin(features, labels, self.model[1]), rtol=0, atol=0)
        assert features.grad is not None
        assert features.grad.isfinite().all()

    @rule(number=st.integers(0, 3), gradient=st.booleans())
    def forward_without_backward(self, number, gradient):
        features, labels = example(number, self.reg.centroids.dtype)
        with torch.set_grad_enabled(gradient):
            assert self.reg(features, labels, head(features.dtype)).isfinite()
        self.steps += 1

    @precondition(lambda self: self.attached is not None)
    @rule()
    def model_forward_without_loss(self):
        self.model(example(0, next(self.model.parameters()).dtype)[0])
        self.attached.discard()

    @rule(number=st.integers(0, 3))
    def evaluate_without_gradient(self, number):
        features, labels = example(number, self.reg.centroids.dtype)
        self.reg.eval()
        with torch.no_grad():
            assert self.reg(features, labels, head(features.dtype)).isfinite()
        self.reg.train()

    @rule(rate=st.floats(0, 0.5))
    def optimizer_step(self, rate):
        optimizer = torch.optim.SGD([self.reg.param_group(lr=rate)])
        optimizer.step()
        optimizer.zero_grad()

    @rule()
    def deepcopy(self):
        self.reg = copy.deepcopy(self.reg)
        if self.attached is not None:
            self.attached.regularizer = self.reg

    @rule()
    def save_and_load(self):
        self.reg.load_state_dict(self.rebuilt().state_dict())

    @rule()
    def move_by_way_of_the_meta_device(self):
        twin = self.rebuilt()
        twin.to("meta").to_empty(device="cpu").load_state_dict(self.reg.state_dict())
        self.reg.load_state_dict(twin.state_dict(), assign=True)

    @rule(cast=st.sampled_from(["half", "bfloat16", "float", "double"]))
    def cast(self, cast):
        before = self.reg.centroids.detach().clone()
        getattr(self.reg, cast)()
        assert_close(self.reg.centroids.detach().float(), before.float(), rtol=0, atol=0)

    @rule()
    def wrong_input(self):
        features, labels = example()
        with pytest.raises(ValueError, match="labels"):
            self.reg(features, labels + 100, head())

    @invariant()
    def the_promises_hold(self):
        if not hasattr(self, "reg"):
            return
        assert self.reg.step.item() == self.steps
        assert self.reg.centroids.dtype in (torch.float32, torch.float64)
        assert self.reg.centroids.isfinite().all()
        assert list(self.reg.state_dict()) == ["centroids", "step"]
        assert list(self.model.state_dict()) == self.keys

    def rebuilt(self):
        """Build another regularizer from what a checkpoint holds."""
        file = io.BytesIO()
        torch.save(self.reg.state_dict(), file)
        file.seek(0)
        twin = MVSCRegularizer(CLASSES, DIM, GROUPS, seed=self.reg.seed)
        twin.to(self.reg.centroids.dtype).load_state_dict(torch.load(file))
        return twin


AnyOrderOfEvents.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None
)
TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase


def test_a_checkpoint_of_version_0_1_continues_as_it_would_have():
    # The file was written by version 0.1.0 and is never written again.
    saved = torch.load(GOLDEN)
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS, seed=5)
    reg.load_state_dict(saved["state"])
    features, labels = example(9)
    terms = reg.terms(features, labels, head())
    assert_close(torch.stack(terms).detach(), saved["next terms"], rtol=1e-5, atol=1e-6)


def test_a_run_that_is_resumed_ends_bitwise_where_an_uninterrupted_one_does():
    def build():
        torch.manual_seed(0)
        encoder, classifier = nn.Conv2d(DIM, DIM, 1), head()
        reg = MVSCRegularizer(CLASSES, DIM, GROUPS, seed=3)
        modules = nn.ModuleDict({"encoder": encoder, "classifier": classifier, "reg": reg})
        optimizer = torch.optim.AdamW([*encoder.parameters(), *classifier.parameters()], lr=0.01)
        optimizer.add_param_group(reg.param_group())
        return modules, optimizer

    def train(modules, optimizer, numbers):
        for number in numbers:
            images, labels = example(number)
            optimizer.zero_grad()
            modules["reg"](modules["encoder"](images), labels, modules["classifier"]).backward()
            optimizer.step()

    whole, optimizer = build()
    train(whole, optimizer, range(10))
    interrupted, optimizer = build()
    train(interrupted, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"modules": interrupted.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed, optimizer = build()
    resumed.load_state_dict(saved["modules"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(5, 10))
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_an_averaged_model_holds_the_average_of_the_centroids_and_the_step():
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
    for use_buffers in (False, True):
        averaged = AveragedModel(
            reg, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
        )
        before = reg.centroids.detach().clone()
        averaged.update_parameters(reg)
        with torch.no_grad():
            reg.centroids += 1
        averaged.update_parameters(reg)
        assert_close(averaged.module.centroids.detach(), before + 0.5)
        assert averaged.module.step.dtype == torch.int64


def test_nothing_grows_over_a_thousand_steps():
    reg, classifier = MVSCRegularizer(CLASSES, DIM, GROUPS), head()
    optimizer = torch.optim.SGD([*classifier.parameters(), reg.centroids], lr=1e-3)
    sizes = []
    for number in range(1000):
        features, labels = example(number % 7)
        reg(features, labels, classifier).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (100, 999):
            gc.collect()
            sizes.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert sizes[1] <= sizes[0]
    assert reg.step.item() == 1000


def test_a_grad_scaler_brings_the_float16_gradients_of_a_large_class_through():
    # A pixel's gradient is its cell's over n, and float16 ends at 6e-8.
    torch.manual_seed(0)
    features, labels = torch.randn(1, DIM, 512, 512), torch.zeros(1, 512, 512, dtype=torch.int64)
    gradients = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**16)):
        leaf = features.to(dtype, copy=True).requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
        scaler.scale(reg(leaf, labels, head(dtype))).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.float() / scale)
    exact, without, scaled = gradients
    assert (scaled - exact).norm() < 5e-3 * exact.norm()
    assert (without - exact).norm() > 5e-2 * exact.norm()


def test_training_in_float16_with_a_grad_scaler_follows_float32():
    runs = []
    for half in (False, True):
        torch.manual_seed(0)
        encoder, classifier = nn.Conv2d(3, DIM, 3, padding=1), head()
        reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
        parameters = [*encoder.parameters(), *classifier.parameters(), *reg.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        # So large that the first steps overflow and are skipped, as in any such run.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, enabled=half)
        taken = 0
        while taken < 20:
            generator = torch.Generator().manual_seed(taken)
            images = torch.randn(2, 3, 10, 8, generator=generator)
            labels = torch.randint(0, CLASSES, (2, 10, 8), generator=generator)
            with torch.autocast("cpu", torch.float16, enabled=half):
                features = encoder(images)
                logits = classifier(features)
                loss = nn.functional.cross_entropy(logits, labels)
                loss = loss + reg(features, labels, classifier)
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if half and scaler.get_scale() < scale:
                reg.step -= 1  # Skipped: to draw alike in both runs.
                continue
            taken += 1
        runs.append([parameter.detach() for parameter in parameters])
        assert all(parameter.isfinite().all() for parameter in runs[-1])
    assert scale < 2.0**20
    assert_close(runs[1], runs[0], rtol=5e-2, atol=5e-3)


@pytest.mark.slow
def test_ten_million_pixels_of_one_class_have_the_loss_of_their_means():
    features = torch.full((1, 1, 3163, 3163), 0.5).expand(-1, DIM, -1, -1).contiguous()
    features.requires_grad_()
    labels = torch.ones(1, 3163, 3163, dtype=torch.uint8)
    reg, small = (MVSCRegularizer(CLASSES, DIM, GROUPS) for _ in range(2))
    loss = reg(features, labels, head())
    loss.backward()
    few = torch.full((1, DIM, 3, 3), 0.5, requires_grad=True)
    expected = small(few, labels[:, :3, :3], head())
    expected.backward()
    assert_close(loss, expected, rtol=1e-3, atol=0)
    assert features.grad is not None
    assert few.grad is not None
    total = features.grad.double().sum((0, 2, 3))
    assert_close(total, few.grad.double().sum((0, 2, 3)), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("assign", [False, True])
def test_a_step_that_has_lost_its_digits_is_refused(assign):
    reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
    reg.step += 70_000
    before = {name: value.clone() for name, value in reg.state_dict().items()}
    half = {name: value.half() for name, value in before.items()}
    with pytest.raises(RuntimeError, match="step must be an integer, got torch.float16"):
        reg.load_state_dict(half, assign=assign)
    assert_close(dict(reg.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e15])
def test_degenerate_features_and_centroids_have_finite_loss_and_gradients(value):
    reg, classifier = MVSCRegularizer(CLASSES, DIM, GROUPS), head()
    features, labels = example()
    with torch.no_grad():
        features.fill_(value)
        reg.centroids.fill_(min(value, 1e6))
    loss = reg(features, labels, classifier)
    loss.backward()
    for tensor in (loss, features.grad, reg.centroids.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
