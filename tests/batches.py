"""What tests share: awkward batches, as training meets them, and a watch on reads by the host."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from mvsc import MVSCRegularizer, sampling

IGNORE = 255

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

FORMS = [(axes, rows) for axes in (1, 2, 3) for rows in (False, True)]
"""Spatial axes of a map, and whether a Linear reads it, channels last."""


class Net(nn.Module):
    """An encoder of two channels and a classifier, of a form; returns features and logits."""

    def __init__(self, axes: int, rows: bool, dim: int, num_classes: int) -> None:
        super().__init__()
        self.rows, conv = rows, CONVOLUTIONS[axes - 1]
        self.encoder = conv(2, dim, 3, padding=1)
        self.classifier = nn.Linear(dim, num_classes) if rows else conv(dim, num_classes, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(inputs).tanh()
        features = features.movedim(1, -1) if self.rows else features
        return features, self.classifier(features)


def as_it_is(features: Any) -> Any:
    return features


@dataclass
class Batch:
    """A regularizer and what one step gives it, everything in float64.

    ``as_map`` turns the features, or an array of their shape, into ``(batch, dim, *spatial)``.
    """

    reg: MVSCRegularizer
    features: Tensor
    labels: Tensor
    classifier: Any
    as_map: Callable[[Any], Any] = as_it_is
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self) -> Tensor:
        return self.reg(self.features, self.labels, self.classifier, **self.options)

    def leaves(self) -> list[Tensor]:
        weight, bias = self.classifier.weight, self.classifier.bias
        assert bias is not None
        return [self.features, self.reg.centroids, weight, bias]


@st.composite
def batches(draw: st.DrawFn, **options: object) -> Batch:
    """Draw batches with absent classes, everything ignored, one pixel, odd groups, more groups
    than pixels, labels of another size, and none at all.
    """
    num_classes = draw(st.integers(2, 4))
    dim = draw(st.integers(1, 4))
    groups = draw(st.integers(1, 5))
    batch = draw(st.integers(0, 2))
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    label_height, label_width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        label_height, label_width = height, width
    seed = draw(st.integers(0, 2**32))
    values = st.sampled_from([*range(num_classes), IGNORE])
    allowed = draw(st.lists(values, min_size=1, unique=True))

    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, len(allowed), (batch, label_height, label_width), generator=generator)
    features = torch.randn(
        batch, dim, height, width, generator=generator, dtype=torch.float64, requires_grad=True
    )
    classifier = nn.Conv2d(dim, num_classes, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    reg = MVSCRegularizer(num_classes, dim, groups, seed=seed, **options).double()  # type: ignore[arg-type]
    return Batch(reg, features, torch.tensor(allowed)[choice], classifier)


def draws(step: Batch) -> tuple[Tensor, Tensor]:
    """Repeat what the step that was just taken has drawn."""
    reg, size = step.reg, step.as_map(step.features).shape[2:]
    grid = sampling.labels_on_grid(step.labels, size, reg.num_classes, reg.ignore_index)
    cells = sampling.draw_groups(grid, reg.groups, reg.num_classes, reg.step, reg.seed)
    return cells, sampling.draw_halves(reg.groups, reg.step, reg.seed)


def by_oracle(step: Batch, features, centroids, weight, bias):
    """Compute the weighted sum of the step that was just taken in NumPy."""
    reg, features = step.reg, step.as_map(features)
    cells, halves = draws(step)
    grid = oracle.labels_on_grid(
        step.labels.numpy(), features.shape[2:], reg.num_classes, reg.ignore_index
    )
    means = oracle.means(
        features, grid, (cells // reg.num_classes).numpy(), reg.groups, reg.num_classes
    )
    half_a, half_b = (half.nonzero().flatten().tolist() for half in halves)
    # Inside a uniform region each place of a wide kernel sees the same vector (R13).
    weight = weight.reshape(*weight.shape[:2], -1).sum(-1)
    return oracle.total(
        oracle.alignment(means, centroids, reg.temperature, reg.align_to),
        oracle.pull(centroids, half_a, half_b),
        oracle.classification(means, centroids, weight, bias, reg.enhance),
        (reg.align_weight, reg.pull_weight, reg.classify_weight),
    )


def relative_error(found, expected):
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    return np.abs(found - expected).max(initial=0.0) / scale


def check_by_oracle(step: Batch) -> None:
    """Take a step and compare its loss, and every gradient, with the oracle's."""
    loss = step.loss()
    gradients = torch.autograd.grad(loss, step.leaves(), allow_unused=True)
    values = [leaf.detach().numpy() for leaf in step.leaves()]
    assert relative_error(loss.item(), by_oracle(step, *values)) < 1e-12
    for position, gradient in enumerate(gradients):

        def along(nudged, position=position):
            return by_oracle(step, *values[:position], nudged, *values[position + 1 :])

        found = np.zeros(values[position].shape) if gradient is None else gradient.numpy()
        assert relative_error(found, oracle.derivative(along, values[position])) < 1e-12


class NoHostReads(TorchDispatchMode):
    """Refuse the operators whose result a device would have to hand to the host."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if any(name.startswith(word) for word in self.forbidden):
            raise AssertionError(f"{name} would wait for the device")
        if name.startswith("index.") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError("boolean indexing would wait for the device")
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Count the operators that a device would have to be asked for: views and empties cost none."""

    free = ("empty", "new_empty", "detach", "promote_types", "scalar_tensor", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.count += not (func.is_view or name in self.free or name.startswith("empty_"))
        return func(*args, **(kwargs or {}))
