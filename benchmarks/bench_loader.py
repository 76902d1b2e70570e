"""Does loading keep up? The recipes' loader, torchvision's reference pipeline, and a step.

All on the same files, in images per second of one process. The reference has no photometric
distortion, so ours is timed without it, too, and the reference with torchvision's own.

    python benchmarks/bench_loader.py            # generated photographs of 640 x 480
    python benchmarks/bench_loader.py --quick
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "recipes"))

import loading  # noqa: E402
from data import open_split  # noqa: E402
from measure import command_line, write  # noqa: E402
from models import IMAGENET, build  # noqa: E402
from recipes import Recipe  # noqa: E402
from train import cross_entropy, logits_of  # noqa: E402

CLASSES = 21
WAVES = ((2.1, 1.3), (-2.6, 1.7), (0.7, 3.1), (-3.4, 0.9))


class Reference(Dataset):
    """torchvision's SegmentationPresetTrain (references/segmentation, v2, tensor backend)."""

    def __init__(self, data, recipe, *more):
        short, crop = min(recipe.scale), recipe.crop[0]
        self.data = data
        self.transform = v2.Compose(
            [
                v2.RandomResize(round(0.5 * short), round(2 * short), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomCrop(
                    crop, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}
                ),
                *more,
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(*IMAGENET),
            ]
        )

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.transform(*self.data[index])
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)


def photographs(folder: Path, count: int) -> None:
    """Write smooth noise of 640 x 480 as JPEG, and regions of it as labels."""
    y, x = np.mgrid[:480, :640] / 60
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng(number)
            a, b = rng.uniform(0, 100, 2)
            field = sum(np.sin(p * (x + a) + q * (y + b) + i) for i, (p, q) in enumerate(WAVES)) / 2
            pixels = 128 + 50 * field[..., None] * rng.uniform(-1, 1, 3)
            pixels = np.clip(pixels + rng.normal(0, 8, (480, 640, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(
                folder / "images" / split / f"{number:03}.jpg", quality=90
            )
            label = np.clip((field + 2) / 4 * CLASSES, 0, CLASSES - 1).astype(np.uint8)
            Image.fromarray(label).save(folder / "labels" / split / f"{number:03}.png")
    (folder / "classes.txt").write_text("\n".join(f"class {c}" for c in range(CLASSES)))


def images_per_second(loader, images: int) -> float:
    start = time.perf_counter()
    for _ in loader:
        pass
    return images / (time.perf_counter() - start)


def step_rate(recipe: Recipe, device: torch.device) -> float:
    """Images per second of forward and backward alone."""
    segmenter = build(recipe, CLASSES)
    model, size = segmenter.model.to(device), recipe.crop[::-1]
    images = torch.randn(2, 3, *size, device=device)
    labels = torch.randint(0, CLASSES, (2, *size), device=device)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        cross_entropy(logits_of(model(images), size)[0], labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(2 / (time.perf_counter() - start))
    return sorted(rates)[1]


def main() -> None:
    device, quick = command_line(__doc__)
    torch.set_num_threads(1)  # as a loader's process has it
    rounds, count = (1, 4) if quick else (5, 40)
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), count)
        data = open_split("folder", Path(folder), "train")
        side = 64 if quick else 512
        recipe = Recipe(
            data_root=Path(folder),
            pretrained=False,
            scale=(4 * side, side),
            crop=(side, side),
            batch_size=4,
            steps=count // 4,
            workers=0,
        )

        def reference(*more):
            return DataLoader(Reference(data, recipe, *more), batch_size=4, shuffle=True)

        whole = loading.PHOTOMETRIC
        ours = loading.training_batches(data, recipe, IMAGENET[0], 0)
        ways = {
            "recipe": (ours, whole),
            "recipe without distortion": (ours, v2.Identity()),
            "torchvision, distortion added": (reference(v2.RandomPhotometricDistort()), whole),
            "torchvision": (reference(), whole),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (loader, loading.PHOTOMETRIC) in ways.items():
                found[name].append(images_per_second(loader, count))
        loading.PHOTOMETRIC = whole
        rows = [
            {
                "pipeline": name,
                "images/s of one process": sorted(rates)[len(rates) // 2],
                "of torchvision's": sorted(
                    ours / theirs for ours, theirs in zip(rates, found["torchvision"], strict=True)
                )[len(rates) // 2],
            }
            for name, rates in found.items()
        ]
        rate = step_rate(recipe, device)
    name = f"a step of SegFormer-B0 on {device.type}"
    ratio = rate / rows[-1]["images/s of one process"]
    rows.append({"pipeline": name, "images/s of one process": rate, "of torchvision's": ratio})
    if not quick:
        write("bench_loader", device, {f"crop {side}, JPEG of 640 x 480": rows})


if __name__ == "__main__":
    main()
