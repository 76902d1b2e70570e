"""What does the whole regularizer add to a training step, and what would its rivals add?

    python benchmarks/bench_step.py            # writes benchmarks/results/
    python benchmarks/bench_step.py --quick    # tiny models, one round, writes nothing

The step is forward, cross-entropy, backward and AdamW of SegFormer-B0 (transformers) and
DeepLabV3-ResNet50 (torchvision) at 512 x 512, 171 classes, random weights. A term is timed on the
step's own features and labels, forward and backward to the features and its own parameters:
the difference of two noisy steps would say nothing about one per cent. On a GPU steps are steady:
there the whole step is timed with MVSC and without, too, as a loop would run it.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from measure import command_line, medians, write
from mvsc import MVSCRegularizer, attach, segment_mean
from mvsc.sampling import draw_groups, labels_on_grid, stream_key

CLASSES, IGNORE = 171, 255

Term = Callable[[Tensor, Tensor, nn.Conv2d], Tensor]


class PixelContrast:
    """Supervised contrast over 1024 sampled pixels, temperature 0.07."""

    def __call__(self, features: Tensor, labels: Tensor, classifier: nn.Conv2d) -> Tensor:
        vectors, classes = _sample(features, labels, 1024)
        vectors = F.normalize(vectors, dim=1)
        same = (classes[:, None] == classes[None, :]).fill_diagonal_(False)
        logits = (vectors @ vectors.T / 0.07).fill_diagonal_(-1e4)
        positive = logits.log_softmax(dim=1).masked_fill(~same, 0).sum(1) / same.sum(1).clamp_min(1)
        return -positive.mean()


class ProxyAnchor(nn.Module):
    """ProxyAnchor of pytorch-metric-learning over 1024 sampled pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loss = ProxyAnchorLoss(CLASSES, dim)

    def forward(self, features: Tensor, labels: Tensor, classifier: nn.Conv2d) -> Tensor:
        loss: Tensor = self.loss(*_sample(features, labels, 1024))
        return loss


class PrototypeLoop(nn.Module):
    """Class means by a Python loop with boolean indexing, pulled to learnable prototypes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, dim))

    def forward(self, features: Tensor, labels: Tensor, classifier: nn.Conv2d) -> Tensor:
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        flat = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest").flatten()
        losses = []
        for c in flat.unique():
            if c == IGNORE:
                continue
            mean = F.normalize(rows[flat == c].mean(0), dim=0)
            logits = F.normalize(self.prototypes, dim=1) @ mean / 0.07
            losses.append(F.cross_entropy(logits[None], c.long()[None]))
        return torch.stack(losses).mean()


def main() -> None:
    device, quick = command_line(__doc__)
    batch = 16 if device.type == "cuda" else 2
    size, rounds = (64, 1) if quick else (512, 7)
    images, labels = a_batch(batch, size, device)
    if quick:
        config = SegformerConfig(num_labels=CLASSES, depths=[1, 1, 1, 1])
    else:
        config = SegformerConfig(num_labels=CLASSES)  # its defaults are those of MiT-B0
    segformer = SegformerForSemanticSegmentation(config)
    models = {"SegFormer-B0": (segformer, segformer.decode_head.classifier)}
    if not quick:
        deeplab = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
        models["DeepLabV3-R50"] = deeplab, deeplab.classifier[4]
    alone, whole = [], []
    for name, (model, classifier) in models.items():
        model.to(device)
        alone += step(name, model, classifier, images, labels, rounds)
        if quick or device.type == "cuda":
            whole += whole_steps(name, model, classifier, images, labels, rounds, not quick)
        if not quick:
            title = f"at 512 x 512, batch {batch}, 171 classes"
            tables = {f"A step {title}": alone, f"Whole steps {title}": whole}
            write("bench_step", device, tables)


def step(
    name: str,
    model: nn.Module,
    classifier: nn.Conv2d,
    images: Tensor,
    labels: Tensor,
    rounds: int,
) -> list[dict[str, object]]:
    """Time one model's step and, on its features, each term alone; one row for each."""
    device = images.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5)
    with attach(model, classifier=classifier) as reg:
        model(images)
        features = reg.features.requires_grad_()
    dim = features.shape[1]
    terms: dict[str, Term] = {
        "mvsc": MVSCRegularizer(CLASSES, dim).to(device),
        "pixel contrast, 1024 pixels": PixelContrast(),
        "ProxyAnchor, 1024 pixels": ProxyAnchor(dim).to(device),
        "prototypes, loop over classes": PrototypeLoop(dim).to(device),
    }
    grid = labels_on_grid(labels, (features.shape[2], features.shape[3]), CLASSES, IGNORE)
    cells = draw_groups(grid, 4, CLASSES, stream_key(0, torch.tensor(1, device=device)))
    whole = medians(
        {name: partial(_step, model, optimizer, images, labels, classifier)}, max(1, rounds // 2)
    )[name]
    times = medians(
        {
            "segment_mean alone": partial(
                _backward, lambda: segment_mean(features, cells, 4 * CLASSES)[0].sum(), features
            ),
            **{
                each: partial(_backward, partial(term, features, labels, classifier), features)
                for each, term in terms.items()
            },
        },
        2 * rounds,
    )
    return [
        {
            "model": name,
            "D": dim,
            "grid": f"{features.shape[2]} x {features.shape[3]}",
            "what": what,
            "ms": time,
            "% of the step": 100 * time / whole,
        }
        for what, time in {"step with cross-entropy alone": whole, **times}.items()
    ]


def whole_steps(
    name: str,
    model: nn.Module,
    classifier: nn.Conv2d,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    compiled: bool,
) -> list[dict[str, object]]:
    """Time a training step with MVSC and without, and see what memory each needs."""
    device = images.device
    regs = [MVSCRegularizer(CLASSES, classifier.in_channels).to(device) for _ in range(2)]
    if compiled:
        regs[1].compile(fullgraph=True)
    ways = {"cross-entropy alone": None, "with mvsc": regs[0], "with mvsc, compiled": regs[1]}
    parameters = [*model.parameters(), *(reg.centroids for reg in regs)]
    optimizer = torch.optim.AdamW(parameters, lr=6e-5)
    rows: list[dict[str, object]] = []
    for precision, dtype in {"float32": None, "bfloat16": torch.bfloat16}.items():
        steps = {
            way: partial(_step, model, optimizer, images, labels, classifier, reg, dtype)
            for way, reg in ways.items()
        }
        times = medians(steps, 2 * rounds)
        for way, one in steps.items():
            row = {"model": name, "precision": precision, "step": way, "ms": times[way]}
            row["% more"] = 100 * (times[way] / times["cross-entropy alone"] - 1)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                one()
                row["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            rows.append(row)
    return rows


def a_batch(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make images of noise, and labels in regions of a class, as in an image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    # 16 x 16 blocks out of 20 classes an image.
    classes = torch.randint(0, CLASSES, (batch, 20), generator=generator)
    choice = torch.randint(0, 20, (batch, (size // 16) ** 2), generator=generator)
    labels = classes.gather(1, choice).view(batch, size // 16, size // 16)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    labels[:, :4] = IGNORE
    return images, labels


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    classifier: nn.Conv2d,
    reg: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    seen: list[Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        output = model(images)
        logits = output["logits" if "logits" in output else "out"]
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE)
        if reg is not None:
            loss = loss + reg(seen[0], labels, classifier)
    hook.remove()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _backward(term: Callable[[], Tensor], features: Tensor) -> None:
    features.grad = None
    term().backward()


def _sample(features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    grid = labels_on_grid(labels, (features.shape[2], features.shape[3]), CLASSES, IGNORE).flatten()
    counted = (grid < CLASSES).nonzero().flatten()
    chosen = counted[torch.randperm(len(counted), device=grid.device)[:count]]
    pixels = features.shape[2] * features.shape[3]
    return features.flatten(2)[chosen // pixels, :, chosen % pixels], grid[chosen]


if __name__ == "__main__":
    main()
