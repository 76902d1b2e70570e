"""What tests share: awkward batches, as training meets them, and a watch on reads by the host."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvsc import MVSCRegularizer

IGNORE = 255


@dataclass
class Batch:
    """A regularizer and what one step gives it, everything in float64."""

    reg: MVSCRegularizer
    features: Tensor
    labels: Tensor
    classifier: nn.Conv2d

    def loss(self) -> Tensor:
        return self.reg(self.features, self.labels, self.classifier)

    def leaves(self) -> list[Tensor]:
        weight, bias = self.classifier.weight, self.classifier.bias
        assert bias is not None
        return [self.features, self.reg.centroids, weight, bias]


@st.composite
def batches(draw: st.DrawFn, **options: object) -> Batch:
    """Draw batches with absent classes, everything ignored, one pixel, odd groups, more groups
    than pixels, labels of another size, and none at all.
    """
    num_classes = draw(st.integers(1, 4))
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
