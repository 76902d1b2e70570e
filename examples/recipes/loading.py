"""From files to batches: augmentation, and an order that depends on the seed alone.

Every random choice is a function of (seed, epoch, image). So runs with and without MVSC see the
same batches, however many processes load them, and a resumed run goes on where it stopped.
"""

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from data import IGNORE, SegmentationData
from recipes import Recipe

# MMSegmentation's strengths. v2.RandomPhotometricDistort would swap the colour channels, too.
STRENGTHS = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
PHOTOMETRIC = v2.Compose(
    [v2.RandomApply([v2.ColorJitter(**{name: value})]) for name, value in STRENGTHS.items()]
)


class Draw(NamedTuple):
    """One image of one epoch."""

    epoch: int
    index: int


def key(*words: int | str) -> int:
    """Hash words into a seed of 63 bits, the same on every machine."""
    return random.Random("/".join(map(str, words))).getrandbits(63)


def fit(height: int, width: int, box: tuple[float, float]) -> tuple[int, int]:
    """Return the size of an image fitted into (longer, shorter) side, its shape kept."""
    long, short = max(box), min(box)
    factor = min(long / max(height, width), short / min(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Training crops: random scale, crop, flip and photometric distortion."""

    def __init__(self, data: SegmentationData, recipe: Recipe, mean: tuple[float, ...]) -> None:
        self.data, self.recipe = data, recipe
        # What normalisation turns into 0.
        self.fill = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        image, label = self.data[draw.index]
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: torch.manual_seed would speak to devices, in each worker.
            torch.default_generator.manual_seed(key("augment", self.recipe.seed, *draw))
            return self.augment(image, label)

    def augment(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from torch's global generator: image uint8 ``(3, h, w)``, label ``(h, w)``."""
        ratio = torch.empty(()).uniform_(*self.recipe.scale_range).item()
        long, short = self.recipe.scale
        size = fit(*label.shape[-2:], (long * ratio, short * ratio))
        image = v2.functional.resize(image, list(size), antialias=True).as_subclass(Tensor)
        label = F.interpolate(label[None, None], size, mode="nearest-exact")[0, 0]

        width, height = self.recipe.crop
        for _ in range(10):
            top, left = (
                int(torch.randint(max(have - want, 0) + 1, ()))
                for have, want in zip(size, (height, width), strict=True)
            )
            crop = label[top : top + height, left : left + width]
            pixels = torch.bincount(crop[crop != IGNORE].long())
            if (pixels > 0).sum() > 1 and pixels.max() < self.recipe.cat_max_ratio * pixels.sum():
                break
        image = image[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            image, crop = image.flip(2), crop.flip(1)
        image = PHOTOMETRIC(image)

        whole = self.fill[:, None, None].repeat(1, height, width)
        whole[:, : image.shape[1], : image.shape[2]] = image
        labels = torch.full((height, width), IGNORE, dtype=torch.uint8)
        labels[: crop.shape[0], : crop.shape[1]] = crop
        return whole, labels


class Batches(Sampler[list[Draw]]):
    """Endless shuffled epochs, one after the other, cut into batches; no image is left out.

    Args:
        images: in an epoch.
        batch_size: of all processes together.
        start: first batch.
        stop: batch to stop before.
        seed: of the order.
        rank: of this process, which takes its equal share of each batch.
        processes: that train.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.images, self.seed = images, seed
        self.batch_size, self.start, self.stop = batch_size, start, stop
        share = batch_size // processes
        self.share = range(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        order: list[int] = []
        shuffled = -1
        for batch in range(self.start, self.stop):
            draws = []
            for position in self.share:
                epoch, place = divmod(batch * self.batch_size + position, self.images)
                if epoch != shuffled:
                    generator = torch.Generator().manual_seed(key("order", self.seed, epoch))
                    order = torch.randperm(self.images, generator=generator).tolist()
                    shuffled = epoch
                draws.append(Draw(epoch, order[place]))
            yield draws


def outlive_interruptions(_: int) -> None:
    """Let a loader's process ignore Ctrl-C and SIGTERM, which reach the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over a loader and end its processes, however the block ends.

    An exception that somebody keeps would keep the iterator, and at exit Python would wait for ever
    for processes that ignore its SIGTERM.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()  # torch has no public name for it


def training_batches(
    data: SegmentationData,
    recipe: Recipe,
    mean: tuple[float, ...],
    step: int,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load the parts of the batches from ``step`` to the recipe's last.

    Returns:
        Batches of images, uint8 ``(n, 3, height, width)``, and labels, uint8 ``(n, height,
        width)``; ``recipe.accumulate`` of them are a step.
    """
    order = Batches(
        len(data),
        recipe.batch_size // recipe.accumulate,
        step * recipe.accumulate,
        recipe.steps * recipe.accumulate,
        recipe.seed,
        rank,
        processes,
    )
    return DataLoader(
        Augmented(data, recipe, mean),
        batch_sampler=order,
        num_workers=recipe.workers,
        worker_init_fn=outlive_interruptions,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if recipe.workers else None,
    )
