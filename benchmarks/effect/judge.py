"""Judge a segmenter at several shifts of the prior in one pass, beside its calibration.

The shifts are those of examples/recipes/curve.py: argmax(z - tau * log share), with the share of
each class among the labelled pixels of the training images. Calibration is read in both halves of
the images, too, so that a temperature can be chosen on one and judged on the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curve import TAUS, Curve, points_of
from data import IGNORE

TEMPERATURES = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
BINS = 15  # of the confidence, for the expected calibration error
EVERY = 4  # Calibration looks at every fourth row and column.
BAND = 5  # pixels from a border between two labels


class Judge(Curve):
    """Counts what the scores are made from, image by image."""

    def __init__(self, log_shares: Tensor, device: torch.device) -> None:
        super().__init__(log_shares, device)
        classes = len(log_shares)
        self.bands = torch.zeros(len(TAUS), classes, classes, dtype=torch.int64)
        self.losses = torch.zeros(2, len(TEMPERATURES), classes, dtype=torch.float64)
        self.pixels = torch.zeros(2, classes, dtype=torch.float64)
        # Of each bin: pixels, their confidences, their hits.
        self.bins = torch.zeros(2, len(TEMPERATURES), BINS, 3, dtype=torch.float64)

    def look(self, logits: Tensor, label: Tensor) -> None:
        self.near = near_border(label)
        few = label[::EVERY, ::EVERY]
        known = few != IGNORE
        self.calibrate(self.half, logits[:, ::EVERY, ::EVERY][:, known], few[known])
        super().look(logits, label)

    def count(self, number: int, predicted: Tensor, label: Tensor) -> None:
        self.bands[number] += self.confusion(predicted[self.near], label[self.near])

    def calibrate(self, half: int, logits: Tensor, label: Tensor) -> None:
        classes = len(self.log_shares)
        self.pixels[half] += torch.bincount(label, minlength=classes).cpu()
        predicted = logits.max(dim=0).indices
        hit = (predicted == label).double()
        for number, temperature in enumerate(TEMPERATURES):
            chances = (logits / temperature).log_softmax(dim=0)
            loss = -chances.gather(0, label[None])[0].double()
            self.losses[half, number] += torch.bincount(label, loss, classes).cpu()
            sure = chances.gather(0, predicted[None])[0].double().exp()
            place = (sure * BINS).long().clamp_max(BINS - 1)
            weights = (torch.ones_like(sure), sure, hit)
            found = [torch.bincount(place, weight, BINS) for weight in weights]
            self.bins[half, number] += torch.stack(found, dim=1).cpu()

    def scores(self) -> dict[str, Any]:
        """Return the scores at each tau and temperature, of all images and of each half."""
        bands = points_of(self.bands)["mIoU"]
        frontier = {"tau": TAUS, **self.points(), "boundary_mIoU": bands, "halves": self.halves()}
        both = [slice(half, half + 1) for half in range(len(frontier["halves"]))]
        calibration = {"temperature": TEMPERATURES, **self.calibration(slice(None))}
        calibration["halves"] = [self.calibration(half) for half in both]
        return {"frontier": frontier, "calibration": calibration}

    def calibration(self, halves: slice) -> dict[str, list[float]]:
        """Return, for each temperature, NLL, the mean of the classes' NLL, and ECE in percent."""
        losses, pixels = self.losses[halves].sum(dim=0), self.pixels[halves].sum(dim=0)
        count, sure, hit = self.bins[halves].sum(dim=0).unbind(dim=2)
        of_class = (losses / pixels)[:, pixels > 0]
        return {
            "nll": (losses.sum(dim=1) / pixels.sum()).tolist(),
            "balanced_nll": of_class.mean(dim=1).tolist(),
            "ece": (100 * (sure - hit).abs().sum(dim=1) / count.sum(dim=1)).tolist(),
        }


def near_border(label: Tensor) -> Tensor:
    """Mark the pixels within BAND pixels of one with another label, unlabelled ones left out."""
    value = label[None, None].float()
    known = label != IGNORE
    highest = highest_near(torch.where(known, value, -1.0))
    lowest = -highest_near(torch.where(known, -value, -256.0))
    return ((highest != lowest)[0, 0]) & known


def highest_near(value: Tensor) -> Tensor:
    """Take the maximum over the square of pixels at most BAND away, rows after columns."""
    side = 2 * BAND + 1
    return F.max_pool2d(F.max_pool2d(value, (side, 1), 1, (BAND, 0)), (1, side), 1, (0, BAND))
