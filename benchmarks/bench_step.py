"""What does the whole regularizer add to a training step, and what would its rivals add?

    python benchmarks/bench_step.py            # writes benchmarks/results/
    python benchmarks/bench_step.py --quick    # tiny models, one round, writes nothing

The step is forward, cross-entropy, backward and AdamW, with random weights: BiSeNetV1-ResNet18 at
1024 x 512 (realtime.py, 19 classes), DeepLabV3-ResNet50 (torchvision) and SegFormer-B0
(transformers) at 512 x 512, 171 classes. A term is timed on the step's own features and logits,
forward and backward to them and to its own parameters: the difference of two noisy steps would say
nothing about one per cent. On a GPU steps are steady: there the whole step is timed with each term
and without, too, as a loop would run it.

Operators are those that a device has to be asked for, forward and backward, without views and
empties; kernels are what a GPU then runs, compiled or not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyAnchorLoss
from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from measure import command_line, count_kernels, count_operators, medians, noted, write
from mvsc import MVSCRegularizer, segment_mean
from mvsc.sampling import draw_groups, labels_on_grid
from realtime import BiSeNet

IGNORE = 255


class Seen(NamedTuple):
    """What a term may read of a step.

    Attributes:
        features: what enters the classifier.
        logits: the model's, as large as the labels.
        labels: of the images, with ``IGNORE``.
        classifier: the model's.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    classifier: nn.Conv2d


Term = Callable[[Seen], Tensor]


@dataclass
class Host:
    """A model to train, and how.

    Attributes:
        name: in the tables.
        model: returns a mapping with ``out`` or ``logits``, those of auxiliary heads as ``aux``.
        classifier: inside the model.
        height: of the images.
        width: of the images.
        batch: images a step.
        precisions: in which whole steps are timed.
        compiled: whether they are timed with the model compiled, too.
    """

    name: str
    model: nn.Module
    classifier: nn.Conv2d
    height: int = 512
    width: int = 512
    batch: int = 16
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    compiled: bool = False

    @property
    def classes(self) -> int:
        return self.classifier.out_channels

    @property
    def title(self) -> str:
        return f"{self.batch} x {self.width} x {self.height}, {self.classes} classes"


class Mvsc(nn.Module):
    """MVSC, with its defaults."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.reg = MVSCRegularizer(classes, dim)

    def forward(self, seen: Seen) -> Tensor:
        loss: Tensor = self.reg(seen.features, seen.labels, seen.classifier)
        return loss


class PixelContrast(nn.Module):
    """Supervised contrast over 1024 sampled pixels, temperature 0.07."""

    def forward(self, seen: Seen) -> Tensor:
        vectors, classes = _sample(seen, 1024)
        vectors = F.normalize(vectors, dim=1)
        same = (classes[:, None] == classes[None, :]).fill_diagonal_(False)
        logits = (vectors @ vectors.T / 0.07).fill_diagonal_(-1e4)
        positive = logits.log_softmax(dim=1).masked_fill(~same, 0).sum(1) / same.sum(1).clamp_min(1)
        return -positive.mean()


class ProxyAnchor(nn.Module):
    """ProxyAnchor of pytorch-metric-learning over 1024 sampled pixels."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.loss = ProxyAnchorLoss(classes, dim)

    def forward(self, seen: Seen) -> Tensor:
        vectors, classes = _sample(seen, 1024)
        # In half precision it would cast its own parameters, for good.
        with torch.autocast(vectors.device.type, enabled=False):
            loss: Tensor = self.loss(vectors.float(), classes)
        return loss


class PrototypeLoop(nn.Module):
    """Class means by a Python loop with boolean indexing, pulled to learnable prototypes."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, dim))

    def forward(self, seen: Seen) -> Tensor:
        features, labels = seen.features, seen.labels[:, None].float()
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        flat = F.interpolate(labels, features.shape[2:], mode="nearest").flatten()
        losses = []
        for c in flat.unique():
            if c == IGNORE:
                continue
            mean = F.normalize(rows[flat == c].float().mean(0), dim=0)
            logits = F.normalize(self.prototypes, dim=1) @ mean / 0.07
            losses.append(F.cross_entropy(logits[None], c.long()[None]))
        return torch.stack(losses).mean()


class OnLogits(nn.Module):
    """A loss of segmentation_models_pytorch on the logits of all pixels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, seen: Seen) -> Tensor:
        loss: Tensor = self.loss(seen.logits.float(), seen.labels)
        return loss


def terms_for(host: Host, device: torch.device) -> dict[str, nn.Module]:
    """Make what one might add to the step's loss."""
    dim, classes = host.classifier.in_channels, host.classes
    terms = {
        "mvsc": Mvsc(dim, classes),
        "pixel contrast, 1024 pixels": PixelContrast(),
        "ProxyAnchor, 1024 pixels": ProxyAnchor(dim, classes),
        "prototypes, loop over classes": PrototypeLoop(dim, classes),
        "Lovász": OnLogits(LovaszLoss("multiclass", ignore_index=IGNORE)),
        "Dice": OnLogits(DiceLoss("multiclass", ignore_index=IGNORE)),
    }
    return {name: term.to(device) for name, term in terms.items()}


COMPILED = ("mvsc", "pixel contrast, 1024 pixels", "Dice")
"""Terms without a loop over classes, which the compiler would unroll."""


def hosts(device: torch.device, quick: bool) -> list[Host]:
    if quick:
        config = SegformerConfig(
            num_labels=19,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 40, 64],
            decoder_hidden_size=32,
        )
        segformer = SegformerForSemanticSegmentation(config)
        bisenet = BiSeNet(19)
        return [
            # Not in bfloat16, as below: convolutions of a CPU that has none take minutes.
            Host("BiSeNetV1-R18", bisenet, bisenet.classifier, 32, 64, 2, ("float32",)),
            Host("SegFormer-B0", segformer, segformer.decode_head.classifier, 64, 64, 2),
        ]
    bisenet = BiSeNet(19)
    deeplab = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=171)
    segformer = SegformerForSemanticSegmentation(SegformerConfig(num_labels=171))  # MiT-B0
    found = [
        Host(
            "BiSeNetV1-R18",
            bisenet,
            bisenet.classifier,
            width=1024,
            batch=8,
            precisions=("bfloat16",),
            compiled=True,
        ),
        Host("DeepLabV3-R50", deeplab, deeplab.classifier[4]),
        Host("SegFormer-B0", segformer, segformer.decode_head.classifier),
    ]
    if device.type != "cuda":
        for host in found:
            host.batch = 2
    return found


def main() -> None:
    device, quick = command_line(__doc__)
    rounds = 1 if quick else 7
    alone: list[dict[str, object]] = []
    whole: list[dict[str, object]] = []
    for host in hosts(device, quick):
        host.model.to(device)
        images, labels = a_batch(host, device)
        alone += step(host, images, labels, rounds)
        if quick or device.type == "cuda":
            whole += whole_steps(host, images, labels, rounds, not quick)
        if not quick:  # Written again for each model: what is measured stays.
            write("bench_step", device, {"Terms alone": alone, "Whole steps": whole})
        host.model.cpu()


def step(host: Host, images: Tensor, labels: Tensor, rounds: int) -> list[dict[str, object]]:
    """Time one model's step and, on what it computed, each term alone; one row for each."""
    device = images.device
    optimizer = torch.optim.AdamW(host.model.parameters(), lr=6e-5)
    seen, _ = forward(host, host.model, images, labels)
    # Leaves, so that a term's backward ends where the model's would begin.
    features = seen.features.detach().requires_grad_()
    logits = seen.logits.detach().requires_grad_()
    seen = seen._replace(features=features, logits=logits)
    size, groups = (features.shape[2], features.shape[3]), 4
    grid = labels_on_grid(labels, size, host.classes, IGNORE)
    cells = draw_groups(grid, groups, host.classes, torch.tensor(1, device=device))
    ways: dict[str, Term] = {
        "segment_mean alone": lambda seen: segment_mean(
            seen.features, cells, groups * host.classes
        )[0].sum(),
        **terms_for(host, device),
    }
    one = partial(train, host, host.model, optimizer, images, labels)
    steps = {name: partial(_backward, term, seen) for name, term in ways.items()}
    whole = medians({"": one}, max(1, rounds // 2))[""]
    title = "step with cross-entropy alone"
    times = {title: whole, **medians(steps, 2 * rounds)}
    counted = {name: count_operators(each) for name, each in {title: one, **steps}.items()}
    return [
        {
            "model": host.name,
            "batch": host.title,
            "D": host.classifier.in_channels,
            "grid": f"{size[0]} x {size[1]}",
            "what": what,
            "ms": time,
            "% of the step": 100 * time / whole,
            "operators": counted[what],
        }
        for what, time in times.items()
    ]


def whole_steps(
    host: Host, images: Tensor, labels: Tensor, rounds: int, compiled: bool
) -> list[dict[str, object]]:
    """Time a training step with each term and without, and see what memory each needs."""
    device = images.device
    terms: dict[str, nn.Module | None] = {"cross-entropy alone": None, **terms_for(host, device)}
    if compiled:
        for name, term in terms_for(host, device).items():
            if name in COMPILED:
                term.compile()
                terms[f"{name}, compiled"] = term
    owned = [each for term in terms.values() if term is not None for each in term.parameters()]
    optimizer = torch.optim.AdamW([*host.model.parameters(), *owned], lr=6e-5)
    models = {"eager": host.model}
    if compiled and host.compiled:
        models["compiled"] = torch.compile(host.model)
    rows: list[dict[str, object]] = []
    for precision in host.precisions:
        dtype = None if precision == "float32" else getattr(torch, precision)
        for how, model in models.items():
            steps = {
                name: partial(train, host, model, optimizer, images, labels, term, dtype)
                for name, term in terms.items()
            }
            failed: dict[str, str] = {}
            for name, one in steps.items():
                # A loss that a compiler or a memory cannot take is left out of the table.
                with noted(failed, name, strict=not compiled):
                    one()
            steps = {name: one for name, one in steps.items() if name not in failed}
            times = medians(steps, 2 * rounds)
            for name, one in steps.items():
                row = {"model": host.name, "batch": host.title, "precision": precision}
                row |= {"the model": how, "step": name, "ms": times[name]}
                row["% more"] = 100 * (times[name] / times["cross-entropy alone"] - 1)
                eager = how == "eager" and not name.endswith("compiled")
                row["operators"] = count_operators(one) if eager else ""
                if device.type == "cuda":
                    row["kernels"] = count_kernels(one)
                    torch.cuda.reset_peak_memory_stats()
                    one()
                    row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
                rows.append(row)
    return rows


def a_batch(host: Host, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make images of noise, and labels in regions of a class, as in an image."""
    batch, height, width = host.batch, host.height, host.width
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator).to(device)
    # 16 x 16 blocks out of 20 classes an image.
    classes = torch.randint(0, host.classes, (batch, 20), generator=generator)
    rows, columns = height // 16, width // 16
    choice = torch.randint(0, 20, (batch, rows * columns), generator=generator)
    labels = classes.gather(1, choice).view(batch, rows, columns)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    labels[:, :4] = IGNORE
    return images, labels


def forward(
    host: Host, model: nn.Module | Callable[..., Any], images: Tensor, labels: Tensor
) -> tuple[Seen, Tensor]:
    """Run the model; what a term may see, and the cross-entropy of all its heads."""
    entered: list[Tensor] = []
    hook = None
    if not isinstance(host.model, BiSeNet):
        hook = host.classifier.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    output: Mapping[str, Tensor] = model(images)
    if hook is not None:
        hook.remove()
    features = entered[0] if entered else output["features"]
    main = "logits" if "logits" in output else "out"
    heads = [main, *(name for name in output if name.startswith("aux"))]
    logits = [F.interpolate(output[head], labels.shape[1:], mode="bilinear") for head in heads]
    losses = [F.cross_entropy(each.float(), labels, ignore_index=IGNORE) for each in logits]
    return Seen(features, logits[0], labels, host.classifier), torch.stack(losses).sum()


def train(
    host: Host,
    model: nn.Module | Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    term: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        seen, loss = forward(host, model, images, labels)
        if term is not None:
            loss = loss + term(seen)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _backward(term: Term, seen: Seen) -> None:
    seen.features.grad = seen.logits.grad = None
    term(seen).backward()


def _sample(seen: Seen, count: int) -> tuple[Tensor, Tensor]:
    features, classes = seen.features, seen.classifier.out_channels
    size = (features.shape[2], features.shape[3])
    grid = labels_on_grid(seen.labels, size, classes, IGNORE).flatten()
    counted = (grid < classes).nonzero().flatten()
    chosen = counted[torch.randperm(len(counted), device=grid.device)[:count]]
    pixels = size[0] * size[1]
    return features.flatten(2)[chosen // pixels, :, chosen % pixels], grid[chosen]


if __name__ == "__main__":
    main()
