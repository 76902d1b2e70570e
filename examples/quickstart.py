"""Train a small segmenter twice from one seed, without and with MVSC, and compare the two.

    python examples/quickstart.py                  about two minutes on 2 CPU cores
    python examples/quickstart.py --seeds 0 1 2    mean and standard deviation over three seeds

MVSC's lines are marked ``# MVSC``. OUT/mosaics has the images, as docs/recipes.md wants your own.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

import mvsc

SIZE, BATCH, LR, IGNORE, TURN = 96, 8, 1e-3, 255, 2 * np.pi
PLAIN, MVSC = ARMS = ("cross-entropy", "with MVSC")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = __doc__.partition("\n")[0]
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder")
    parser.add_argument("--images", type=int, default=240, help="for training; half to validate")
    parser.add_argument("--epochs", type=int, default=12, help="0: only write the mosaics")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a pair of runs each")
    options = parser.parse_args()
    counts = {"train": options.images, "val": (options.images + 1) // 2}
    data = [make_mosaics(options.out / "mosaics", *each) for each in counts.items()]
    if options.epochs < 1:
        return
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    runs = {arm: [] for arm in ARMS}
    for seed, arm in itertools.product(options.seeds, ARMS):
        runs[arm].append(train(arm, seed, *data, options.epochs, device))
    print_table(runs)
    draw(*data[1], [runs[arm][0]["predicted"] for arm in ARMS], options.out / "predictions.png")


def train(arm, seed, data, val, epochs, device):
    # Both arms draw weights, order and augmentation from this seed; MVSC has a stream of its own.
    torch.manual_seed(seed)
    model = smp.Segformer(
        "tu-resnet10t", encoder_weights=None, decoder_segmentation_channels=128, classes=CLASSES
    ).to(device)
    head = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
    parameters = [{"params": model.encoder.parameters()}, {"params": head, "lr": 10 * LR}]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    if arm == MVSC:
        reg = mvsc.attach(model, groups=4, seed=seed)  # MVSC
        optimizer.add_param_group(reg.to(device).param_group(lr=10 * LR))  # MVSC
    loader = DataLoader(list(zip(*data, strict=True)), BATCH, shuffle=True, collate_fn=augmented)
    steps, warmup = epochs * len(loader), max(epochs * len(loader) // 20, 1)
    rates = [LinearLR(optimizer, 0.1, 1, warmup), PolynomialLR(optimizer, max(steps - warmup, 1))]
    schedule = SequentialLR(optimizer, rates, milestones=[warmup])
    began = time.perf_counter()
    for epoch in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(images), labels, ignore_index=IGNORE)
            if arm == MVSC:
                loss = loss + reg(labels)  # MVSC
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed}, {arm}, epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    cost = 1000 * (time.perf_counter() - began) / steps
    if arm == MVSC:
        cosine = mvsc.diagnostics.group_similarity(reg.regularizer.centroids).item()
        print(f"Cosine of the centroids of a class in different groups (1: the same): {cosine:.4f}")
    return evaluate(model, *val, device) | {"ms a step": cost}


def augmented(pairs):
    move = v2.Compose([v2.RandomResizedCrop(SIZE, (0.5, 1), (0.9, 1.1)), v2.RandomHorizontalFlip()])
    moved = (move(tv_tensors.Image(image), tv_tensors.Mask(label)) for image, label in pairs)
    images, labels = (torch.stack(part) for part in zip(*moved, strict=True))
    return images.float() / 127.5 - 1, labels.long()


@torch.no_grad()
def evaluate(model, images, labels, device):
    model.eval()
    parts = (images.float() / 127.5 - 1).to(device).split(BATCH)
    predicted = torch.cat([model(part).argmax(dim=1).cpu() for part in parts])
    pairs = (labels.long() * CLASSES + predicted)[labels != IGNORE]
    matrix = torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, -1).double()
    hits, labelled, claimed = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    return {
        "mIoU [%]": 100 * (hits / (labelled + claimed - hits)).nanmean().item(),
        "mAcc [%]": 100 * (hits / labelled).nanmean().item(),
        "pixel accuracy [%]": 100 * (hits.sum() / labelled.sum()).item(),
        "predicted": predicted.numpy(),
    }


def print_table(runs):
    print(f"\n{'':20}{PLAIN:>18}{MVSC:>18}{'difference':>18}")
    for name in ("mIoU [%]", "mAcc [%]", "pixel accuracy [%]", "ms a step"):
        plain, ours = ([run[name] for run in runs[arm]] for arm in ARMS)
        gain = spread(np.subtract(ours, plain), "+.2f")
        print(f"{name:20}{spread(plain):>18}{spread(ours):>18}{gain:>18}")


def spread(values, form=".2f"):
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2f}"


def draw(images, labels, predicted, path):
    figure = Figure((7, 7), layout="constrained")
    axes = figure.subplots(4, 4, subplot_kw={"xticks": [], "yticks": [], "facecolor": "black"})
    parts = (images.movedim(1, -1).numpy(), np.ma.masked_equal(labels.numpy(), IGNORE), *predicted)
    for column, shown, title in zip(axes.T, parts, ("image", "label", *ARMS), strict=True):
        column[0].set_title(title)
        for ax, i in zip(column, np.linspace(0, len(shown) - 1, 4, dtype=int), strict=True):
            ax.imshow(shown[i], "tab20", vmin=0, vmax=19, interpolation="nearest")
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}: what both predict after training with the first seed.")


def lumps(u, v):
    waves = ((2.1, 1.3), (-2.6, 1.7), (0.7, 3.1), (-3.4, 0.9))
    return sum(np.sin(a * u + b * v + i) for i, (a, b) in enumerate(waves)) / 2  # -2 .. 2


TEXTURES = {  # The classes, frequent ones first. Values are cut to -1 .. 1.
    "plain": lambda u, v: 0 * u,
    "stripes": lambda u, v: np.sin(TURN * u),
    "lumps": lambda u, v: 2 * lumps(3 * u, 3 * v),
    "checks": lambda u, v: 3 * np.sin(np.pi * u) * np.sin(np.pi * v),
    "waves": lambda u, v: np.sin(TURN * (u + 0.4 * np.sin(TURN * v / 3))),
    "grain": lambda u, v: 2 * (np.sin(127 * np.floor(5 * u) + 311 * np.floor(5 * v)) * 1e4 % 1) - 1,
    "dots": lambda u, v: 4 * (np.cos(TURN * u) + np.cos(TURN * v) - 0.9),
    "grid": lambda u, v: 6 * (np.maximum(np.cos(TURN * u), np.cos(TURN * v)) - 0.75),
    "bricks": lambda u, v: 6 * (np.maximum(np.cos(TURN * v), np.cos(np.pi * (u + v // 1))) - 0.75),
    "marble": lambda u, v: np.sin(TURN * (u / 2 + 0.4 * lumps(2 * u, 2 * v))),
    "zigzag": lambda u, v: np.sin(TURN * (u + np.abs(v % 2 - 1))),
    "weave": lambda u, v: np.sin(TURN * np.where((u // 2 + v // 2) % 2 == 0, u, v)),
    "rings": lambda u, v: np.sin(TURN * np.hypot(u % 4 - 2, v % 4 - 2)),
    "cracks": lambda u, v: 6 * (0.25 - np.abs(lumps(2 * u, 2 * v))),
}
CLASSES = len(TEXTURES)


def make_mosaics(folder, split, count):
    """Draw a split, write it, and return its images and labels: uint8, (N, 3, H, W), (N, H, W)."""
    rng = np.random.default_rng(int(split == "val"))
    images, labels = map(np.stack, zip(*(draw_mosaic(rng) for _ in range(count)), strict=True))
    for kind, arrays in (("images", images), ("labels", labels)):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(arrays):
            Image.fromarray(pixels).save(folder / kind / split / f"{number:04}.png")
    (folder / "classes.txt").write_text("\n".join(TEXTURES) + "\n", "utf-8")
    return torch.from_numpy(images).movedim(3, 1).contiguous(), torch.from_numpy(labels)


def draw_mosaic(rng, regions=10):
    """Draw textures whose colours, scale, direction and light say nothing about their class."""
    share = 0.85 ** np.arange(CLASSES)
    kind = rng.choice(CLASSES, regions, p=share / share.sum())
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    # A Voronoi diagram with bent borders, in which rare classes have small regions.
    a, b, c, d = rng.uniform(0, 100, 4)
    bent_x, bent_y = x + 3 * lumps(x / 12 + a, y / 12 + b), y + 3 * lumps(x / 12 + c, y / 12 + d)
    site_x, site_y = rng.uniform(0, SIZE, (regions, 2)).T[:, :, None, None]
    distance = np.hypot(bent_x - site_x, bent_y - site_y) - 12 * share[kind, None, None]
    region = distance.argmin(axis=0)
    edge = np.diff(np.partition(distance, 1, axis=0)[:2], axis=0)[0] < 1.5

    def pick(low, high, *shape):
        return rng.uniform(low, high, (regions, *shape))[region]

    angle, period = pick(0, TURN), pick(6, 12)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + pick(0, 100)
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + pick(0, 100)
    ink = np.choose(kind[region], [texture(u, v) for texture in TEXTURES.values()]).clip(-1, 1)
    sign, dark, light = np.sign(pick(-1, 1)), pick(0, 0.5, 3), pick(0.5, 1, 3)
    image = dark + (light - dark) * ((ink * sign)[..., None] + 1) / 2
    angle = rng.uniform(0, TURN)  # that the light comes from
    shade = (x / SIZE - 0.5) * np.cos(angle) + (y / SIZE - 0.5) * np.sin(angle)
    image = image * (0.8 + 0.4 * shade[..., None]) + rng.normal(0, 0.06, image.shape)
    image = (255 * image.clip(0, 1)).astype(np.uint8)
    return image, np.where(edge, IGNORE, kind[region]).astype(np.uint8)


if __name__ == "__main__":
    main()
