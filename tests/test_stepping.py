"""Centroids with an optimizer of their own, in one process, against those in the model's."""

import copy
import functools
import io
import pickle
import re
import threading
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mvsc import MVSCRegularizer, attach

CLASSES, DIM = 5, 8
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)


def segmenter():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, DIM, 3, padding=1), nn.Tanh(), nn.Conv2d(DIM, CLASSES, 1))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return images, torch.randint(0, CLASSES, (2, 8, 8), generator=generator)


class Run:
    """A training of one's own: the centroids in the model's optimizer, or with their own."""

    def __init__(self, optimizer="host", make=ADAMW, accumulate=1):
        self.model = segmenter()
        self.reg = attach(self.model, classifier="2", optimizer=optimizer)
        self.optimizer = make(self.model.parameters())
        if optimizer == "host":
            self.optimizer.add_param_group(self.reg.param_group())
        self.accumulate, self.steps = accumulate, 0
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def loss(self, number, factor=1.0):
        images, labels = batch(number)
        return factor * (F.cross_entropy(self.model(images), labels) + self.reg(labels))

    def step(self, factor=1.0):
        self.optimizer.zero_grad()
        for part in range(self.accumulate):
            loss = self.loss(10 * self.steps + part, factor / self.accumulate)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1

    def step_without_mvsc(self):
        images, labels = batch(10 * self.steps)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.reg.discard()
        self.optimizer.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    @property
    def tensors(self):
        return self.reg.regularizer.centroids.detach(), self.model[0].weight.detach()


def assert_same(run, other, **tolerance):
    assert_close(run.tensors, other.tensors, **(tolerance or {"rtol": 0, "atol": 0}))


# As in the model's optimizer.


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_own_centroids_go_where_those_in_the_model_s_optimizer_go(make, accumulate):
    host = Run("host", make, accumulate).train(4)
    assert_same(Run(make, make, accumulate).train(4), host, rtol=1e-6, atol=1e-7)


def test_own_is_adamw_without_decay_at_the_rate_of_the_last_group():
    rates = [0.5, 0.01]

    def make(parameters):
        first, *rest = parameters
        groups = [{"params": [first], "lr": rates[0]}, {"params": rest, "lr": rates[1]}]
        return torch.optim.AdamW(groups, weight_decay=0.3)

    host, own = Run("host", make), Run("own", make)
    host.optimizer.param_groups[-1]["lr"] = rates[1]
    assert host.optimizer.param_groups[-1]["weight_decay"] == 0
    assert_same(own.train(4), host.train(4))


@pytest.mark.parametrize("optimizer", ["own", SGD])
@pytest.mark.parametrize("rates", [(0.0, 0.5, 0.01), (0.3, 0.0, 0.0), (0.1, 0.1, 0.1)])
def test_a_host_that_steps_one_group_at_a_time_is_followed_at_its_last_one(optimizer, rates):
    def make(parameters):
        first, second, *rest = parameters
        parts = zip(([first], [second], rest), rates, strict=True)
        groups = [{"params": part, "lr": rate, "initial_lr": 0.1} for part, rate in parts]
        return torch.optim.SGD(groups)

    def step_each_group(host):  # as DeepSpeed's ZeRO-1 and ZeRO-2 do
        for group in groups:
            host.param_groups = [group]
            torch.optim.SGD.step(host)
        host.param_groups = groups

    apart, whole = Run(optimizer, make), Run(optimizer, make)
    groups = apart.optimizer.param_groups
    apart.optimizer.step = MethodType(step_each_group, apart.optimizer)
    for run in (apart, whole):
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        for _ in range(3):
            run.step()
            schedule.step()
            run.step_without_mvsc()
    assert_same(apart, whole)
    assert_close(apart.reg.state_dict(), whole.reg.state_dict(), rtol=0, atol=0)


def test_another_step_of_the_model_s_optimizer_takes_no_step_of_the_centroids_again():
    run = Run("own").train(2)
    centroids, _ = run.tensors
    expected = centroids.clone()
    (group,) = run.optimizer.param_groups
    group["lr"] = 0.5
    run.optimizer.step()
    assert_close(centroids, expected, rtol=0, atol=0)
    # Nor does one of other parameters, which is no part of the step that was taken.
    run.optimizer.param_groups = [{**group, "params": [nn.Parameter(torch.ones(1))]}]
    run.optimizer.step()
    assert_close(centroids, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda reg: pickle.loads(pickle.dumps(reg))])
def test_a_copy_after_a_step_does_not_carry_the_model_s_optimizer(way):
    run = Run("own").train(1)
    reg = run.reg.regularizer
    assert reg._stepper.taken.host() is run.optimizer
    copied = way(reg)
    assert copied._stepper.taken is None
    assert_close(copied.state_dict(), reg.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [SGD, ADAMW])
@pytest.mark.parametrize("scheduler", ["StepLR", "LinearLR", "OneCycleLR"])
def test_own_centroids_follow_any_schedule_of_the_model_s_optimizer(make, scheduler):
    schedules = torch.optim.lr_scheduler
    runs = [Run("host", make), Run(make, make)]
    if make is ADAMW:
        runs.append(Run("own", make))
    for run in runs:
        if scheduler == "StepLR":
            schedule = schedules.StepLR(run.optimizer, 2, 0.5)
        elif scheduler == "LinearLR":
            schedule = schedules.LinearLR(run.optimizer, 0.1, total_iters=3)
        else:
            rate = run.optimizer.param_groups[0]["lr"]
            schedule = schedules.OneCycleLR(run.optimizer, 25 * rate, 6, cycle_momentum=False)
        for _ in range(5):
            run.step()
            schedule.step()
    for run in runs[1:]:
        assert_same(run, runs[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_a_rate_that_changes_with_nothing_to_compare_it_with_is_told(make):
    run = Run(make, make).train(2)
    run.optimizer.param_groups[0]["lr"] /= 2
    with pytest.warns(UserWarning, match="its last group has no initial_lr") as caught:
        run.train(2)
    assert len(caught) == 1
    run.optimizer.param_groups[0]["initial_lr"] = 2 * run.optimizer.param_groups[0]["lr"]
    host = Run("host", make).train(2)
    for group in host.optimizer.param_groups:
        group["lr"] /= 2
    run = Run(make, make)
    run.optimizer.param_groups[0]["initial_lr"] = run.optimizer.param_groups[0]["lr"]
    run.train(2).optimizer.param_groups[0]["lr"] /= 2
    assert_same(run.train(2), host.train(2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_steps_with_weights_of_zero_leave_no_trace_in_the_next_mean(make):
    runs = [Run("host", make), Run(make, make)]
    for run in runs:
        reg = run.reg.regularizer
        names = ("align_weight", "pull_weight", "classify_weight")
        weights = [getattr(reg, name) for name in names]
        for number in range(6):
            for name, weight in zip(names, weights, strict=True):
                setattr(reg, name, weight if number % 3 == 2 else 0.0)
            run.step()
    assert_same(runs[1], runs[0], rtol=1e-6, atol=1e-7)


def test_a_fused_optimizer_that_skips_an_overflow_inside_is_no_step():
    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, fused=True)

    runs = [Run("host", make), Run(ADAMW, make)]
    for run in runs:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        run.step(factor=torch.inf)
        run.train(2).step(factor=torch.inf)
        run.train(2)
    assert_same(runs[1], runs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_a_loss_multiplied_by_zero_moves_own_centroids_no_more(make):
    run = Run(make, make).train(2)
    before = copy.deepcopy(run.reg.state_dict())
    run.step(factor=0.0)
    after = run.reg.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"regularizer.step"}


def test_a_sum_of_one_s_own_of_the_terms_is_told_that_its_factor_does_not_show():
    run = Run("own")
    images, labels = batch(0)
    run.model(images)
    sum(run.reg.terms(labels)).backward()
    with pytest.warns(UserWarning, match=r"Add reg\.total\(terms\) instead"):
        run.optimizer.step()


def test_gradients_that_never_come_to_own_centroids_are_told():
    run = Run("own")
    parameters = list(run.model.parameters())

    def step(number):
        grads = torch.autograd.grad(run.loss(number), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        run.optimizer.step()

    with pytest.warns(UserWarning, match=r"Use loss\.backward\(\)") as caught:
        [step(number) for number in range(101)]
    assert len(caught) == 1


def test_a_callable_may_keep_its_rate_in_a_tensor():
    class Strict(torch.optim.SGD):  # as torchao's
        def step(self, closure=None):
            assert isinstance(self.param_groups[0]["lr"], torch.Tensor)
            super().step(closure)

    rate = torch.tensor(0.1)
    runs = [Run(functools.partial(Strict, lr=rate), SGD), Run(functools.partial(SGD, momentum=0))]
    for run in runs:
        run.optimizer = SGD(run.model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        for _ in range(3):
            run.step()
            schedule.step()
            # Its optimizer is made anew, of the same tensor.
            run.reg.load_state_dict(copy.deepcopy(run.reg.state_dict()))
    assert_same(*runs)
    assert_close(rate, torch.tensor(0.1), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_an_optimizer_that_finds_its_rate_itself_leaves_a_callable_its_own():
    adafactor = pytest.importorskip("transformers").optimization.Adafactor
    run = Run(SGD, adafactor)
    before = run.reg.regularizer.centroids.clone()
    run.train(2)
    assert run.reg.regularizer._stepper.optimizer.param_groups[0]["lr"] == 0.1
    assert not torch.equal(run.reg.regularizer.centroids, before)
    run.optimizer.param_groups[-1]["initial_lr"] = 1e-3  # as of a schedule of transformers
    run.step()
    with pytest.raises(ValueError, match=r"a learning rate to follow, got None in the last group"):
        Run("own", adafactor).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_round_what_a_loss_was_multiplied_by(dtype):
    factor = 65536.0 + 128  # more than half precision holds
    runs = []
    for default in (torch.float32, dtype):
        run = Run(SGD, SGD)
        torch.set_default_dtype(default)
        try:
            run.reg.regularizer._follow()
        finally:
            torch.set_default_dtype(torch.float32)
        run.step(factor)
        runs.append(run.reg.regularizer.centroids)
    assert torch.equal(*runs)


def test_an_optimizer_that_wraps_another_steps_once():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, inner.defaults)

        def step(self, closure=None):
            self.inner.step()

    wrapped = Run(lambda tensors: Lookahead(SGD(tensors)), SGD).train(3)
    assert_same(wrapped, Run(SGD, SGD).train(3))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_a_loss_scale_and_a_step_that_overflows_leave_no_trace(make, accumulate):
    runs = [Run("host", make, accumulate), Run(make, make, accumulate)]
    for run in runs:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        run.train(2).step(factor=torch.inf)
        run.train(2)
    assert runs[1].scaler.get_scale() < 2.0**12
    assert_same(runs[1], runs[0], rtol=1e-6, atol=1e-7)


def test_a_factor_on_the_loss_does_not_reach_own_centroids():
    plain, halved = Run(SGD, SGD), Run(SGD, SGD)
    plain.step()
    halved.step(0.5)
    assert_close(halved.tensors[0], plain.tensors[0], rtol=0, atol=0)
    assert not torch.equal(halved.tensors[1], plain.tensors[1])


def test_the_loss_is_bitwise_that_of_centroids_in_the_model_s_optimizer():
    assert_close(Run("own").loss(0), Run("host").loss(0), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_regularizer_trains_own_centroids_as_an_eager_one():
    runs = [Run("host", SGD), Run(SGD, SGD)]
    torch.compiler.reset()
    for run in runs:
        call = torch.compile(run.reg.regularizer, fullgraph=True, backend="aot_eager")
        for number in range(3):
            images, labels = batch(number)
            features = run.model[:2](images)
            logits = run.model[2](features)
            run.optimizer.zero_grad()
            (F.cross_entropy(logits, labels) + call(features, labels, run.model[2])).backward()
            run.optimizer.step()
    assert_same(runs[1], runs[0], rtol=1e-5, atol=1e-6)


# State.


@pytest.mark.parametrize("optimizer", ["own", SGD, ADAMW], ids=["own", "SGD", "AdamW"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(optimizer, assign):
    make = SGD if optimizer is SGD else ADAMW
    whole = Run(optimizer, make).train(3)
    file = io.BytesIO()
    states = [each.state_dict() for each in (whole.model, whole.optimizer, whole.reg)]
    torch.save(states, file)
    whole.train(3)
    file.seek(0)
    resumed = Run(optimizer, make)
    saved = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.reg.load_state_dict(saved[2], assign=assign)
    resumed.steps = 3
    assert_same(resumed.train(3), whole)


def test_a_checkpoint_that_is_loaded_in_place_finds_the_moments_before_the_first_step(tmp_path):
    import torch.distributed.checkpoint as checkpoint

    whole = Run("own").train(2)
    saved = {"model": whole.model.state_dict(), "mvsc": whole.reg.state_dict()}
    saved["optimizer"] = whole.optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        checkpoint.save({"mvsc": saved["mvsc"]}, checkpoint_id=tmp_path)
        resumed = Run("own")
        found = {"mvsc": resumed.reg.state_dict()}
        assert found["mvsc"].keys() == saved["mvsc"].keys()
        checkpoint.load(found, checkpoint_id=tmp_path)
    resumed.reg.load_state_dict(found["mvsc"])
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    resumed.steps = 2
    assert_same(resumed.train(2), whole.train(2))


def test_torch_s_checkpoints_walk_the_state_of_a_module_that_holds_own_centroids():
    from torch.distributed.checkpoint import state_dict as checkpoints

    run = Run("own").train(2)
    box = nn.ModuleDict({"model": run.model, "reg": run.reg})
    options = checkpoints.StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(checkpoints.get_model_state_dict(box, options=options))
    assert "reg.regularizer.optimizer.exp_avg" in saved
    expected = copy.deepcopy(box.state_dict())
    run.train(1)
    checkpoints.set_model_state_dict(box, saved, options=options)
    assert_close(dict(box.state_dict()), dict(expected), rtol=0, atol=0)


def test_the_count_of_steps_is_float32_wherever_it_was_made():
    torch.set_default_dtype(torch.bfloat16)
    try:
        reg = MVSCRegularizer(CLASSES, DIM, optimizer="own")
    finally:
        torch.set_default_dtype(torch.float32)
    state = reg.state_dict()
    assert state["optimizer.step"].dtype == torch.float32
    reg.load_state_dict({**state, "optimizer.step": torch.tensor(200.0, dtype=torch.bfloat16)})
    count = reg.state_dict()["optimizer.step"]
    assert (count.dtype, count.item()) == (torch.float32, 200.0)


def test_own_centroids_leave_the_meta_device():
    with torch.device("meta"):
        reg = MVSCRegularizer(CLASSES, DIM, optimizer="own")
    reg.to_empty(device="cpu").reset_parameters()
    expected = MVSCRegularizer(CLASSES, DIM, optimizer="own").state_dict()
    assert_close(dict(reg.state_dict()), dict(expected), rtol=0, atol=0)


def test_what_changes_the_centroids_as_they_are_made_is_refused(monkeypatch):
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of that context"):
        MVSCRegularizer(CLASSES, DIM)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **_: empty(*size, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"as deepspeed\.zero\.Init and torch\.inf"):
        MVSCRegularizer(CLASSES, DIM)


def test_the_state_of_another_kind_of_optimizer_is_refused():
    own, adagrad = (
        MVSCRegularizer(CLASSES, DIM, optimizer=make)
        for make in ("own", functools.partial(torch.optim.Adagrad, lr=0.1))
    )
    state = adagrad.state_dict()
    with pytest.raises(ValueError, match=r"one of Adagrad, \['step', 'sum'\], got \['exp_avg'"):
        adagrad.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match="one of AdamW"):
        own.load_state_dict(state)


def test_a_state_that_is_refused_or_in_part_leaves_the_moments_alone():
    run = Run("own").train(2)
    before = {name: value.clone() for name, value in run.reg.regularizer.state_dict().items()}

    def load(state, **options):
        return run.reg.regularizer.load_state_dict(state, **options)

    other = MVSCRegularizer(CLASSES + 2, DIM, optimizer="own").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for centroids"):
        load(other)
    lacking = {name: value for name, value in before.items() if name != "optimizer.exp_avg"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"optimizer\.exp_avg"'):
        load(lacking)
    load({"step": before["step"]}, strict=False)
    load({"centroids": before["centroids"]}, strict=False)  # as Lightning loads: one by one
    assert_close(dict(run.reg.regularizer.state_dict()), before, rtol=0, atol=0)
    assert_same(run.train(2), Run("own").train(4))


def test_the_state_is_that_of_other_centroids_and_the_moments():
    own, host = Run("own"), Run("host")
    moments = {f"regularizer.optimizer.{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    assert own.reg.state_dict().keys() - host.reg.state_dict().keys() == moments
    # Begun in the model's optimizer, gone on with one of their own: only the moments are new.
    with pytest.warns(UserWarning, match=r"no moments.*All is well.*optimizer=\"host\""):
        own.reg.load_state_dict(host.train(2).reg.state_dict())
    assert_close(own.tensors[0], host.tensors[0], rtol=0, atol=0)
    assert own.reg.state_dict()["regularizer.optimizer.step"] == 0
    with pytest.raises(RuntimeError, match=r'optimizer="host" has no use for: pass "own"'):
        host.reg.load_state_dict(own.reg.state_dict())
    host.reg.load_state_dict(own.reg.state_dict(), strict=False)


def test_no_parameter_is_left_and_half_precision_leaves_centroids_and_moments_alone():
    run = Run("own").train(1)
    assert list(run.reg.parameters()) == []
    reg = run.reg.regularizer
    before = {name: value.clone() for name, value in reg.state_dict().items()}
    assert_close(dict(reg.half().state_dict()), before, rtol=0, atol=0)
    reg.double()
    assert {v.dtype for n, v in reg.state_dict().items() if not n.endswith("step")} == {
        torch.float64
    }


def test_centroids_that_are_drawn_anew_begin_with_new_moments():
    run = Run("own")
    begun = {name: value.clone() for name, value in run.reg.state_dict().items()}
    run.train(2).reg.regularizer.reset_parameters()
    assert_close(dict(run.reg.state_dict()), begun, rtol=0, atol=0)


def explicit_step(reg, make=ADAMW):
    """Take one step of a regularizer that is attached to nothing; return whether it moved."""
    model, before = segmenter(), reg.centroids.detach().clone()
    images, labels = batch(0)
    optimizer = make(model.parameters())
    (reg(model[:2](images), labels, model[2])).backward()
    optimizer.step()
    return not torch.equal(before, reg.centroids)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda reg: pickle.loads(pickle.dumps(reg))])
def test_a_copy_steps_by_itself_and_as_the_original_would(copied):
    reg = MVSCRegularizer(CLASSES, DIM, optimizer=SGD)
    assert explicit_step(reg)
    model, optimizer = segmenter(), ADAMW(segmenter().parameters())
    images, labels = batch(1)
    reg(model[:2](images), labels, model[2]).backward()
    other = copied(reg)
    before = other.centroids.detach().clone()
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    # The gradient was the original's, and so is the step.
    assert_close(other.centroids.detach(), before, rtol=0, atol=0)
    assert not torch.equal(reg.centroids, before)
    again = copied(reg)
    assert explicit_step(reg)
    assert explicit_step(again)
    assert_close(dict(again.state_dict()), dict(reg.state_dict()), rtol=0, atol=0)


def test_a_regularizer_that_is_gone_is_followed_no_longer():
    import weakref

    from mvsc import stepping

    reg = MVSCRegularizer(CLASSES, DIM, optimizer="own")
    assert reg in stepping._steppers
    gone = weakref.ref(reg)
    del reg
    assert gone() is None


# Beside others.


def test_models_in_threads_are_each_followed_at_their_own_optimizer_s_rate():
    rates = (0.1, 0.01, 0.001)
    runs, twins = (
        [Run("own", make=functools.partial(torch.optim.AdamW, lr=rate)) for rate in rates]
        for _ in range(2)
    )
    threads = [threading.Thread(target=run.train, args=(20,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run, twin in zip(runs, twins, strict=True):
        assert_same(run, twin.train(20))


def test_a_step_in_another_thread_than_the_forward_is_followed():
    run, twin = Run("own"), Run("own").train(1)
    run.optimizer.zero_grad()
    run.loss(0).backward()
    thread = threading.Thread(target=run.optimizer.step)
    thread.start()
    thread.join()
    assert_same(run, twin)


def test_an_optimizer_without_a_rate_is_none_of_ours():
    class Cocob(torch.optim.Optimizer):
        def __init__(self, tensors):
            super().__init__(tensors, {"alpha": 100.0})

        def step(self):
            pass

    run = Run("own")  # lives
    Cocob([nn.Parameter(torch.zeros(1))]).step()
    run.optimizer = Cocob(run.model.parameters())
    run.loss(0).backward()
    with pytest.raises(ValueError, match="must have a learning rate to follow, got None"):
        run.optimizer.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["compiled", "evaluation"])
def test_one_that_lives_on_in_this_thread_does_not_take_the_steps_of_another(how):
    kept, alone = Run(SGD, SGD), Run(SGD, SGD)
    kept.step()
    before = alone.tensors[0].clone()
    if how == "compiled":
        torch.compiler.reset()
        alone.reg.regularizer.compile(backend="eager")
    else:
        alone.reg.regularizer.eval()
    alone.step()
    assert not torch.equal(alone.tensors[0], before)


@pytest.mark.filterwarnings("error")
def test_a_compiled_step_of_the_model_s_optimizer_is_followed_and_not_traced():
    runs = [Run(SGD, SGD), Run(SGD, SGD)]
    torch.compiler.reset()
    compiled = torch.compile(runs[1].optimizer.step, backend="eager")
    for number in range(3):
        for run, step in zip(runs, (runs[0].optimizer.step, compiled), strict=True):
            run.optimizer.zero_grad()
            run.loss(number).backward()
            step()
    assert_same(runs[1], runs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_whose_backwards_come_first_follow_each_its_own_optimizer(order):
    slow = functools.partial(torch.optim.AdamW, lr=1e-3)
    alone = [Run("own", make).train(2) for make in (ADAMW, slow)]
    pair = [Run("own", make) for make in (ADAMW, slow)]
    for number in range(2):
        for run in pair:
            run.optimizer.zero_grad()
            run.loss(10 * number).backward()
        for which in order:
            pair[which].optimizer.step()
    for run, expected in zip(pair, alone, strict=True):
        assert_same(run, expected)
    moved = pair[1].tensors[0].clone()
    pair[1].optimizer.step()  # No backward since: nothing to follow.
    assert_close(pair[1].tensors[0], moved, rtol=0, atol=0)


def test_where_an_engine_has_taken_both_models_apart_both_are_followed():
    pair = [Run("own"), Run("own")]
    before = [run.tensors[0].clone() for run in pair]
    for run in pair:
        run.loss(0).backward()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in pair[0].model.parameters()]))
    flat.grad = torch.ones_like(flat)
    torch.optim.SGD([flat], lr=0.1).step()
    for run, old in zip(pair, before, strict=True):
        assert not torch.equal(run.tensors[0], old)


def test_an_optimizer_that_steps_without_a_backward_of_the_regularizer_moves_nothing():
    run = Run("own")
    before = run.tensors[0].clone()
    other = nn.Linear(2, 2)
    optimizer = SGD(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert_close(run.tensors[0], before, rtol=0, atol=0)


def test_evaluation_moves_nothing():
    run = Run("own").train(1)
    before = run.tensors[0].clone()
    run.model.eval()
    with torch.no_grad():
        run.model(batch(0)[0])
    run.optimizer.step()
    assert_close(run.tensors[0], before, rtol=0, atol=0)


def test_own_centroids_are_neither_idle_nor_do_they_keep_a_gradient():
    run = Run("own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(110):
            run.optimizer.zero_grad()
            run.loss(0).backward()
            run.optimizer.step()
            run.model.zero_grad()


def test_own_centroids_whose_model_no_torch_optimizer_steps_are_told_so():
    run = Run("own")
    with pytest.warns(UserWarning, match="no torch.optim.Optimizer has stepped") as caught:
        [run.loss(0).backward() for _ in range(101)]
    assert len(caught) == 1


# What cannot be.


def test_centroids_with_an_optimizer_of_their_own_are_no_group_for_another():
    message = "have an optimizer of their own. Leave the line out."
    with pytest.raises(ValueError, match=message):
        Run("own").reg.param_group()


@pytest.mark.parametrize(
    ("optimizer", "came"),
    [
        ("adam", "got str 'adam'"),
        (torch.optim.SGD(nn.Linear(1, 1).parameters()), "got SGD"),
        (None, "got None"),
        (lambda tensors: tensors, "got list"),
        (torch.optim.LBFGS, "without a closure, got LBFGS"),
    ],
)
def test_what_makes_no_optimizer_is_refused(optimizer, came):
    with pytest.raises(TypeError, match="functools.partial") as caught:
        MVSCRegularizer(CLASSES, DIM, optimizer=optimizer)
    assert re.search(came, str(caught.value)), caught.value
