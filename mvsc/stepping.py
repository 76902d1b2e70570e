"""Centroids with an optimizer of their own, for engines that take the model's optimizer apart.

Nothing here knows an engine. All of them, at some depth, step a ``torch.optim.Optimizer``, and
torch tells whoever asks that one has stepped. All of them scale the loss, and by how much shows in
the gradient of a zero that was added to it.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mvsc import checks, distributed
from mvsc.watch import Watch

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
"""Makes an optimizer of the tensors it is given, as ``partial(torch.optim.SGD, lr=0.1)`` does."""


class Owner(Protocol):
    """What a stepper asks of its regularizer."""

    centroids: Tensor
    sync: Any
    process_group: Any
    _watch: Watch


_steppers: "WeakKeyDictionary[Owner, Stepper]" = WeakKeyDictionary()
"""Of each regularizer that lives, in the order of making, which is that of all processes."""

_hook: Any = None
_here = threading.local()

_SILENT_STEPS = 100

_FOR_EXAMPLE = "Use functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)."
_BY_HAND = (
    "the loss was added up from reg.terms(labels) by hand, so by how much it is multiplied "
    "(a loss scale, accumulation) does not show, and the centroids' own optimizer follows the "
    "multiplied gradient. Add reg.total(terms) instead."
)
_NO_GRADIENT = (
    f"the model's optimizer has stepped {_SILENT_STEPS} times after forwards with MVSC, and no "
    "gradient came to the centroids: torch.autograd.grad, backward(inputs=...) and zero-bubble "
    'pipelines leave them out. Use loss.backward(), or optimizer="host".'
)
_NO_INITIAL_RATE = (
    "the model's optimizer has changed its learning rate, but its last group has no initial_lr to "
    "compare with, so the centroids' own optimizer keeps its rate. Set "
    'optimizer.param_groups[-1]["initial_lr"] to the rate at the start, or use optimizer="own".'
)


class Taken(NamedTuple):
    """The step that was taken last: along what, from where; whose, at what rates of its groups."""

    host: ReferenceType[Optimizer]
    rates: dict[int, float]
    mean: Tensor
    finite: Tensor
    centroids: Tensor
    optimizer: dict[str, Any]


def _after_step(host: Optimizer, *_: Any) -> None:
    """Let each stepper step after an optimizer that is none of theirs."""
    if getattr(_here, "stepping", False):
        return  # The step is one of theirs, or of what theirs wraps.
    _here.stepping = True
    try:
        pairs = list(_steppers.items())
        # Where several models train in threads, each optimizer is followed in its own.
        # One whose forwards were compiled, or in evaluation mode, has not said in which.
        here = threading.get_ident()
        if any(stepper.thread == here for _, stepper in pairs):
            pairs = [pair for pair in pairs if pair[1].thread in (None, here)]
        # Of two models whose backwards come before their steps, each follows its own optimizer, if
        # an engine has left the classifier whole.
        if len(pairs) > 1:
            held = {id(each) for group in host.param_groups for each in group["params"]}
            pairs = [pair for pair in pairs if pair[1].is_asked_about(held)] or pairs
        for owner, stepper in pairs:
            stepper.step(owner, host)
    finally:
        _here.stepping = False


class Stepper:
    """Steps a regularizer's centroids, once after each backward, when another optimizer steps.

    It follows the mean gradient over the backward passes and the processes. What the loss was
    multiplied by, for mixed precision, accumulation or processes of other sizes, is its weight in
    that mean.

    Args:
        optimizer: ``"own"``, for AdamW without weight decay at the learning rate that the last
            group of the other optimizer has at that moment; or what makes an optimizer, whose
            learning rate is multiplied by that group's ``lr / initial_lr`` if it has a schedule.

    Raises:
        TypeError: if it is neither, or does not make an optimizer.
        ValueError: if a state is loaded that is another kind of optimizer's.
    """

    def __init__(self, optimizer: Literal["own"] | MakeOptimizer) -> None:
        if optimizer != "own" and not callable(optimizer):
            raise TypeError(
                'optimizer must be "host", "own" or a callable that makes an optimizer of a list '
                f"of tensors, got {checks.describe(optimizer)}. {_FOR_EXAMPLE}"
            )
        self.make = optimizer
        self.optimizer: Optimizer | None = None
        self.loaded: dict[str, Tensor] = {}
        self.taken: Taken | None = None
        self.waiting, self.silent_steps = False, 0
        self.thread: int | None = None  # of the last forward
        self.classifier: ReferenceType[nn.Module] | None = None  # of the last forward
        self.zero: Tensor  # its gradient is what the loss was multiplied by

    def follow(self, owner: Owner) -> None:
        """Step ``owner``'s centroids, which are a new tensor, from here on, while it lives.

        A gradient that was not used yet is forgotten.

        Raises:
            TypeError: if ``make`` makes no optimizer.
        """
        global _hook
        self._optimizer_of(owner.centroids)
        self.taken = None
        device = owner.centroids.device
        self.zero = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
        if _hook is None:
            # Not traced into a compiled step; an optimizer, which was made, has loaded Dynamo.
            after_step: Any = torch.compiler.disable(_after_step)  # type: ignore[no-untyped-call]
            _hook = register_optimizer_step_post_hook(after_step)
        _steppers[owner] = self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out host and model, with which a copy has nothing to do."""
        return {**self.__dict__, "taken": None, "classifier": None}

    def is_asked_about(self, held: set[int]) -> bool:
        """Return whether a parameter of the classifier is one of these, by their ids."""
        classifier = None if self.classifier is None else self.classifier()
        return classifier is not None and any(id(each) in held for each in classifier.parameters())

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss, bitwise, with a zero whose gradient is what it is multiplied by."""
        return loss + (self.zero - self.zero.detach())

    def step(self, owner: Owner, host: Optimizer) -> None:
        """Take a step along the mean gradient since the last one, at the rate of the last group.

        DeepSpeed lets its optimizer step once for each group, and see no other: the step is taken
        at the first group's rate, and again, from where it began, at that of each that follows.
        """
        centroids, group, taken = owner.centroids, host.param_groups[-1], self.taken
        optimizer = self._optimizer_of(centroids)
        rate = float(group.get("lr") or 0.0)
        which = id(group["params"][0]) if group["params"] else id(group)
        if taken is not None and taken.host() is not host:
            taken = None
        if centroids.grad is not None:
            if taken is not None:
                self._notice_schedule(owner, group, taken.rates.get(which, rate), rate)
            began = centroids.detach().clone(), copy.deepcopy(optimizer.state_dict())
            taken = Taken(ref(host), {}, *self._mean_gradient(owner, centroids.grad), *began)
        elif taken is not None and len(host.param_groups) == 1 and which not in taken.rates:
            if self._rate(optimizer, group) == optimizer.param_groups[0]["lr"]:
                taken.rates[which] = rate
                return  # It would be the same step.
            with torch.no_grad():
                centroids.copy_(taken.centroids)
            optimizer.load_state_dict(copy.deepcopy(taken.optimizer))
        else:
            self._notice_silence(owner)
            self.taken = None
            self.zero.grad = None  # A loss of which MVSC was no part has none in the mean.
            return
        taken.rates[which] = rate
        _set_rate(optimizer.param_groups[0], self._rate(optimizer, group))
        centroids.grad = taken.mean
        optimizer.step()
        self._undo_unless(taken.finite, taken, optimizer, centroids)
        centroids.grad = self.zero.grad = None
        self.taken, self.waiting, self.silent_steps = taken, False, 0

    def _rate(self, optimizer: Optimizer, group: dict[str, Any]) -> float:
        """Return the rate that goes with that of a host's group; an Adafactor's may be None.

        Raises:
            ValueError: if there is none to follow.
        """
        rate = group.get("lr")
        if self.make != "own":
            begun = group.get("initial_lr")
            factor = 1.0 if rate is None or begun is None else float(rate) / float(begun or 1.0)
            return float(optimizer.defaults["lr"]) * factor
        if rate is None:
            raise ValueError(
                'optimizer="own" must have a learning rate to follow, got None in the last group '
                f"of the model's. {_FOR_EXAMPLE}"
            )
        return float(rate)

    def _notice_schedule(
        self, owner: Owner, group: dict[str, Any], before: float, now: float
    ) -> None:
        """Warn if a group's rate has changed, and a callable has nothing to compare it with."""
        if self.make != "own" and "initial_lr" not in group and before != now:
            owner._watch.say("rate", _NO_INITIAL_RATE)

    def _mean_gradient(self, owner: Owner, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over backwards and processes, and whether it is finite; 0 where not."""
        weight = self.zero.grad
        if weight is None:
            owner._watch.say("by hand", _BY_HAND)
            weight = torch.ones_like(self.zero)
        sums = torch.cat([grad.detach().flatten(), weight.detach().reshape(1).to(grad)])
        if owner.sync == "auto":
            sums = distributed.sum_over_processes(sums, owner.process_group)
        mean = (sums[:-1] / sums[-1]).view_as(grad)
        # A loss that was multiplied by 0 or overflowed has no gradient to follow.
        finite = mean.isfinite().all()
        return torch.where(finite, mean, 0.0), finite

    def _undo_unless(
        self, finite: Tensor, taken: Taken, optimizer: Optimizer, centroids: Tensor
    ) -> None:
        """Undo a step along nothing: momentum moves, too. What is on another device stays."""
        now, before = optimizer.state.get(centroids, {}), taken.optimizer["state"].get(0, {})
        if not before and isinstance(now.get("step"), Tensor):
            before = {"step": torch.zeros_like(now["step"])}
        pairs = [(now[name], value) for name, value in before.items() if name in now]
        pairs.append((centroids, taken.centroids))
        with torch.no_grad():
            for value, old in pairs:
                if isinstance(value, Tensor) and value.device == finite.device:
                    value.copy_(torch.where(finite, value, old))

    def _notice_silence(self, owner: Owner) -> None:
        """Warn if losses with MVSC come and go, and no gradient ever does."""
        silent = self.waiting and self.zero.grad is None
        self.silent_steps = self.silent_steps + 1 if silent else 0
        self.waiting = False
        if self.silent_steps == _SILENT_STEPS:
            owner._watch.say("idle", _NO_GRADIENT)

    def begin(self, centroids: Tensor, classifier: object) -> None:
        """Begin a step; drop a gradient that is not finite, whose step mixed precision skipped."""
        self.waiting, self.thread = torch.is_grad_enabled(), threading.get_ident()
        self.classifier = ref(classifier) if isinstance(classifier, nn.Module) else None
        grad, weight = centroids.grad, self.zero.grad
        if grad is not None and weight is not None:
            finite = grad.isfinite().all() & weight.isfinite()
            centroids.grad = torch.where(finite, grad, 0.0)
            self.zero.grad = torch.where(finite, weight, 0.0)

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state: moments and the like, by name."""
        if self.optimizer is None:
            return self.loaded
        (centroids,) = self.optimizer.param_groups[0]["params"]
        found = self.optimizer.state.get(centroids, {}).items()
        return {k: torch.as_tensor(v) for k, v in found if isinstance(v, Tensor | int | float)}

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self.optimizer = None
        self.loaded = {name: value.detach().clone() for name, value in state.items()}
        count = self.loaded.get("step")
        if count is not None and count.is_floating_point():
            self.loaded["step"] = count.float()  # In half precision it stands still at 256.

    def _optimizer_of(self, centroids: Tensor) -> Optimizer:
        """Return the optimizer; made anew, with its state, where the centroids were moved."""
        if self.optimizer is not None and self.optimizer.param_groups[0]["params"][0] is centroids:
            return self.optimizer
        state = self.state
        if any(value.is_meta for value in state.values()) and not centroids.is_meta:
            state = {}  # Memory came, and no values yet.
        made: Any = (
            torch.optim.AdamW([centroids], weight_decay=0.0)
            if self.make == "own"
            else self.make([centroids])
        )
        closed = isinstance(made, torch.optim.LBFGS)  # It steps with a closure alone.
        if not isinstance(made, Optimizer) or "lr" not in made.defaults or closed:
            raise TypeError(
                "optimizer must make a torch.optim.Optimizer with a learning rate, which steps "
                f"without a closure, got {checks.describe(made)}. {_FOR_EXAMPLE}"
            )
        group = made.param_groups[0]
        if isinstance(group["lr"], Tensor):  # It is set, and may be the user's, or the default's.
            group["lr"] = group["lr"].clone()
        kept = set(made.state.get(centroids, {}))
        if self.make == "own":
            # As AdamW begins. A checkpoint that is loaded in place finds all of it by name.
            first, second = (torch.zeros_like(centroids, requires_grad=False) for _ in range(2))
            count = torch.zeros((), dtype=torch.float32)
            fresh = {"step": count, "exp_avg": first, "exp_avg_sq": second}
            kept, state = set(fresh), state or fresh
        if state and kept and kept != set(state):
            self.loaded = {}
            raise ValueError(
                f"the state must be one of {type(made).__name__}, {sorted(kept)}, got "
                f"{sorted(state)}. Attach with the optimizer of which the state is."
            )
        if state:
            groups = made.state_dict()["param_groups"]
            made.load_state_dict({"state": {0: state}, "param_groups": groups})
        self.optimizer, self.loaded = made, {}
        return made


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a group, which an optimizer may keep in a tensor, and want there."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
