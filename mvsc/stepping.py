"""Centroids with an optimizer of their own, for engines that take the model's optimizer apart.

Nothing here knows an engine. All of them, at some depth, step a ``torch.optim.Optimizer``, and
torch tells whoever asks that one has stepped. All of them scale the loss, and by how much shows in
the gradient of a zero that was added to it.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from mvsc import checks, distributed

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
"""Makes an optimizer of the tensors it is given, as ``partial(torch.optim.SGD, lr=0.1)`` does."""


class Owner(Protocol):
    """What a stepper asks of its regularizer."""

    centroids: Tensor
    sync: Any
    process_group: Any


_steppers: "WeakKeyDictionary[Owner, Stepper]" = WeakKeyDictionary()
"""Of each regularizer that lives, in the order of making, which is that of all processes."""

_hook: Any = None


class Taken(NamedTuple):
    """A step that was taken: of which host, at which group's rate, along what, from where."""

    host: Optimizer
    group: dict[str, Any]
    mean: Tensor
    centroids: Tensor
    optimizer: dict[str, Any]


def _after_step(host: Optimizer, *_: Any) -> None:
    """Let each stepper step after an optimizer that is none of theirs."""
    steppers = list(_steppers.items())
    if not any(host is stepper.optimizer for _, stepper in steppers):
        for owner, stepper in steppers:
            stepper.step(owner, host)


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
    """

    def __init__(self, optimizer: Literal["own"] | MakeOptimizer) -> None:
        if optimizer != "own" and not callable(optimizer):
            raise TypeError(
                'optimizer must be "host", "own" or a callable that makes an optimizer of a list '
                f"of tensors, got {checks.describe(optimizer)}. "
                "Use functools.partial(torch.optim.AdamW, lr=1e-3)."
            )
        self.make = optimizer
        self.optimizer: Optimizer | None = None
        self.loaded: dict[str, Tensor] = {}
        self.taken: Taken | None = None
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
        self.zero = torch.zeros((), device=owner.centroids.device, requires_grad=True)
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)
        _steppers[owner] = self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the host, with which a copy has nothing to do."""
        return {**self.__dict__, "taken": None}

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss, bitwise, with a zero whose gradient is what it is multiplied by."""
        return loss + (self.zero - self.zero.detach())

    def step(self, owner: Owner, host: Optimizer) -> None:
        """Take a step along the mean gradient since the last one, at the rate of the last group.

        DeepSpeed lets its optimizer step once for each group, and see no other: the step is taken
        at the first group's rate, and again, from where it began, at that of each that follows.
        """
        centroids, group, taken = owner.centroids, host.param_groups[-1], self.taken
        if centroids.grad is not None:
            mean = self._mean_gradient(centroids.grad, owner)
            optimizer = self._optimizer_of(centroids)
            self.taken = None
            if len(host.param_groups) == 1:
                began = centroids.detach().clone(), copy.deepcopy(optimizer.state_dict())
                self.taken = Taken(host, group, mean, *began)
        elif taken is not None and host is taken.host and group is not taken.group:
            mean, optimizer = taken.mean, self._optimizer_of(centroids)
            with torch.no_grad():
                centroids.copy_(taken.centroids)
            optimizer.load_state_dict(copy.deepcopy(taken.optimizer))
            self.taken = taken._replace(group=group)
        else:
            return  # No backward since: the host has several optimizers, or trains something else.
        rate = float(group["lr"])
        if self.make != "own":
            rate = optimizer.defaults["lr"] * (rate / float(group.get("initial_lr", rate) or 1.0))
        optimizer.param_groups[0]["lr"] = rate
        centroids.grad = mean
        optimizer.step()
        centroids.grad = self.zero.grad = None

    def _mean_gradient(self, grad: Tensor, owner: Owner) -> Tensor:
        weight = torch.ones_like(self.zero) if self.zero.grad is None else self.zero.grad
        sums = torch.cat([grad.flatten(), weight.reshape(1).to(grad)])
        if owner.sync == "auto":
            sums = distributed.sum_over_processes(sums, owner.process_group)
        mean = (sums[:-1] / sums[-1]).view_as(grad)
        # A loss that was multiplied by 0 or overflowed has no gradient to follow.
        return torch.where(mean.isfinite().all(), mean, 0.0)

    def forget_overflow(self, centroids: Tensor) -> None:
        """Drop a gradient that is not finite: mixed precision has skipped the host's step."""
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

    def _optimizer_of(self, centroids: Tensor) -> Optimizer:
        """Return the optimizer; made anew, with its state, where the centroids were moved."""
        if self.optimizer is not None and self.optimizer.param_groups[0]["params"][0] is centroids:
            return self.optimizer
        state = self.state
        made: Any = (
            torch.optim.AdamW([centroids], weight_decay=0.0)
            if self.make == "own"
            else self.make([centroids])
        )
        if not isinstance(made, Optimizer) or "lr" not in made.defaults:
            raise TypeError(
                "optimizer must make a torch.optim.Optimizer with a learning rate, got "
                f"{checks.describe(made)}. Use functools.partial(torch.optim.AdamW, lr=1e-3)."
            )
        if self.make == "own" and not state:
            # As AdamW begins. A checkpoint that is loaded in place finds all of it by name.
            first, second = (torch.zeros_like(centroids, requires_grad=False) for _ in range(2))
            state = {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}
        if state:
            groups = made.state_dict()["param_groups"]
            made.load_state_dict({"state": {0: state}, "param_groups": groups})
        self.optimizer, self.loaded = made, {}
        return made
