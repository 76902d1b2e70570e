"""Does a step cost the same for points, images and volumes of as many places?

    python benchmarks/bench_shapes.py            # writes benchmarks/results/
    python benchmarks/bench_shapes.py --quick    # tiny: checks equality, writes nothing

A step is forward and backward of the regularizer. Loss and gradients are first compared with those
of the image; times are medians of interleaved runs. Kept is what autograd saves for backward,
without the features themselves.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from measure import command_line, medians, write
from mvsc import MVSCRegularizer

CLASSES, GROUPS = 21, 4
SHAPES = {"points": 1, "image": 2, "volume": 3}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROUNDS = 41


def features_of(flat: Tensor, side: int, axes: int, layout: str) -> Tensor:
    """Give a map of ``side ** 6`` places another shape, and its memory a layout."""
    features = flat.unflatten(2, (side ** (6 // axes),) * axes)
    if layout != "contiguous":
        features = features.movedim(1, -1).contiguous()
    if layout == "channels last":
        features = features.movedim(-1, 1)
    return features.detach().requires_grad_()


def step_of(flat: Tensor, labels: Tensor, side: int, axes: int, layout: str) -> Callable[[], list]:
    """Return a step that gives the loss and its gradients."""
    reg = MVSCRegularizer(CLASSES, flat.shape[1], GROUPS).to(flat.device)
    torch.manual_seed(0)
    linear = nn.Linear(flat.shape[1], CLASSES)
    classifier: nn.Module = linear
    if layout != "Linear":
        classifier = CONVOLUTIONS[axes - 1](flat.shape[1], CLASSES, 1)
        weight = linear.weight.detach().view_as(classifier.weight)
        classifier.load_state_dict({"weight": weight, "bias": linear.bias})
    classifier.to(flat.device)
    features = features_of(flat, side, axes, layout)
    map_of_labels = labels.unflatten(
        1, features.shape[1:-1] if layout == "Linear" else features.shape[2:]
    )

    def step() -> list[Tensor]:
        loss = reg(features, map_of_labels, classifier)
        gradient, moved = torch.autograd.grad(loss, [features, reg.centroids])
        gradient = gradient.movedim(-1, 1) if layout == "Linear" else gradient
        return [loss.detach(), gradient.flatten(2), moved]

    return step


def kept(step: Callable[[], object], flat: Tensor) -> float:
    """Return how many MiB autograd saves in a step."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() != flat.untyped_storage().nbytes():
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(sizes.values()) / 2**20


def main() -> None:
    device, quick = command_line(__doc__)
    side, batch, dim = (2, 2, 6) if quick else (5, 4, 128)
    torch.manual_seed(0)
    flat = torch.randn(batch, dim, side**6, device=device)
    labels = torch.randint(0, CLASSES, (batch, side**6), device=device)
    rows = []
    for layout in ("contiguous", "channels last", "Linear"):
        steps = {name: step_of(flat, labels, side, axes, layout) for name, axes in SHAPES.items()}
        memory = {name: kept(step, flat) for name, step in steps.items()}
        results = {name: step() for name, step in steps.items()}
        for result in results.values():
            assert_close(result, results["image"], rtol=1e-6, atol=1e-8)
        if quick:
            continue
        times = medians(steps, ROUNDS)
        rows += [
            {
                "features": "rows of a Linear" if layout == "Linear" else layout,
                "shape": name,
                "step (ms)": times[name],
                "over the image": times[name] / times["image"],
                "kept (MiB)": memory[name],
                "kept, over the image": memory[name] / memory["image"],
            }
            for name in SHAPES
        ]
    if quick:
        print("equal")
    else:
        title = f"A step for {batch} maps of {side**6} places, D = {dim}, float32"
        write("bench_shapes", device, {title: rows})


if __name__ == "__main__":
    main()
