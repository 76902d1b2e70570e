"""Train a 3-D segmenter to the end on generated volumes, with MVSC and without.

    python benchmarks/train_volumes.py            # writes benchmarks/results/train_volumes-cpu.md
    python benchmarks/train_volumes.py --quick    # two steps, writes nothing

Volumes of 32^3 voxels hold small spheres, large spheres and tubes of equal brightness in noise, so
that the shape alone tells the four classes apart. MONAI's SegResNet learns from a few of them; the
two runs of a seed see the same weights, volumes and order. Given is the mean IoU over the classes
of held-out volumes after the last step, whatever it is. A second table asks, with one seed, what it
depends on: the length of the training and the weight of Eq. 2.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from monai.networks.nets import SegResNet
from torch import Tensor

import mvsc
from measure import command_line, write

CLASSES, SIDE = 4, 32
SEEDS = (0, 1, 2)
TRAINING, HELD_OUT, BATCH, STEPS = 12, 12, 2, 240
DEPENDS_ON = [
    (120, None),
    (120, {}),
    (120, {"align_weight": 0.01}),
    (120, {"align_weight": 0.0}),
    (4 * STEPS, None),
    (4 * STEPS, {}),
]
"""Steps, and the options of MVSC; None without it."""


def volume(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an image (1, 32, 32, 32) and its labels: small spheres 1, large ones 2, tubes 3."""
    places = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij")).float()
    labels = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.long)
    for label, radius in ((3, 3.0), (3, 3.0), (2, 7.0), (2, 7.0), (1, 3.5), (1, 3.5), (1, 3.5)):
        centre = torch.rand(3, generator=generator) * SIDE
        offset = places - centre.view(3, 1, 1, 1)
        if label == 3:
            along = F.normalize(torch.randn(3, generator=generator), dim=0).view(3, 1, 1, 1)
            offset = offset - (offset * along).sum(0) * along
        labels[offset.square().sum(0) < radius**2] = label
    noise = torch.randn(labels.shape, generator=generator)
    return ((labels > 0).float() + 0.6 * noise).unsqueeze(0), labels


def volumes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = zip(*[volume(generator) for _ in range(count)], strict=True)
    return torch.stack(images), torch.stack(labels)


def train(
    seed: int, steps: int, device: torch.device, options: dict[str, float] | None
) -> tuple[float, float]:
    """Return the mean IoU of held-out volumes, and the seconds that training took.

    ``options`` are those of MVSC; None for a training without it.
    """
    images, labels = (each.to(device) for each in volumes(TRAINING, seed))
    torch.manual_seed(seed)
    model = SegResNet(3, 8, 1, CLASSES, blocks_down=(1, 1, 2), blocks_up=(1, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    reg = None if options is None else mvsc.attach(model, groups=4, **options)
    if reg is not None:
        optimizer.add_param_group(reg.param_group())
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=1.0)
    order = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randperm(TRAINING, generator=order)[:BATCH]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        if reg is not None:
            loss = loss + reg(labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    return mean_iou(model, *volumes(HELD_OUT, 1000 + seed), device), seconds


@torch.no_grad()
def mean_iou(model: SegResNet, images: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    predicted = torch.cat([model(each.to(device)).argmax(1).cpu() for each in images.split(BATCH)])
    ious = []
    for label in range(CLASSES):
        mine, theirs = predicted == label, labels == label
        ious.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    return statistics.mean(ious)


def main() -> None:
    device, quick = command_line(__doc__)
    rows = []
    for seed in SEEDS[:1] if quick else SEEDS:
        steps = 2 if quick else STEPS
        plain, plain_seconds = train(seed, steps, device, None)
        ours, seconds = train(seed, steps, device, {})
        rows.append(
            {
                "seed": seed,
                "mIoU without": 100 * plain,
                "mIoU with MVSC": 100 * ours,
                "difference": 100 * (ours - plain),
                "seconds without": plain_seconds,
                "seconds with": seconds,
            }
        )
        print(rows[-1], flush=True)
    if not quick:
        mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        rows.append({**mean, "seed": "mean"})
        title = f"SegResNet, {STEPS} steps on {TRAINING} volumes, {HELD_OUT} held out"
        others = []
        for steps, options in DEPENDS_ON:
            told = "without" if options is None else "all of it"
            if options:
                told = ", ".join(f"{name}={value:g}" for name, value in options.items())
            iou, seconds = train(0, steps, device, options)
            others.append({"steps": steps, "MVSC": told, "mIoU": 100 * iou, "seconds": seconds})
            print(others[-1], flush=True)
        write("train_volumes", device, {title: rows, "What it depends on, seed 0": others})


if __name__ == "__main__":
    main()
