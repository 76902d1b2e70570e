"""Judge a segmenter at eight shifts of the prior in one pass, beside its calibration.

A shift takes argmax(z - tau * log share), with the share of each class among the labelled pixels
of the training images. It is a constant for each class, so it can be folded into the classifier's
bias, and it commutes with the bilinear upsampling of the logits.

Images are dealt in turn to two halves. What has to be chosen, a tau or a temperature, can then be
chosen on one half and judged on the other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import IGNORE
from evaluate import scores

TAUS = (-0.25, 0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
TEMPERATURES = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
BINS = 15  # of the confidence, for the expected calibration error
EVERY = 4  # Calibration looks at every fourth row and column.
BAND = 5  # pixels from a border between two labels


class Judge:
    """Counts what the scores are made from, image by image.

    Args:
        pixels: labelled pixels of each class in the training images.
        device: of the logits that it will be shown.
    """

    def __init__(self, pixels: Tensor, device: torch.device) -> None:
        classes = len(pixels)
        self.log_shares = log_shares(pixels).to(device)
        self.confusions = torch.zeros(2, len(TAUS), classes, classes, dtype=torch.int64)
        self.bands = torch.zeros(len(TAUS), classes, classes, dtype=torch.int64)
        self.losses = torch.zeros(2, len(TEMPERATURES), classes, dtype=torch.float64)
        self.pixels = torch.zeros(2, classes, dtype=torch.float64)
        # Of each bin: pixels, their confidences, their hits.
        self.bins = torch.zeros(2, len(TEMPERATURES), BINS, 3, dtype=torch.float64)
        self.images = 0
        self.shifted = torch.empty(0, device=device)  # One piece of memory for all images.

    def look(self, logits: Tensor, label: Tensor) -> None:
        """Count one image: logits ``(classes, height, width)``, label ``(height, width)``."""
        half = self.images % 2
        self.images += 1
        known = label != IGNORE
        near = near_border(label)
        if self.shifted.shape != logits.shape:
            self.shifted = torch.empty_like(logits)
        for number, tau in enumerate(TAUS):
            torch.sub(logits, self.log_shares[:, None, None], alpha=tau, out=self.shifted)
            predicted = self.shifted.max(dim=0).indices
            self.confusions[half, number] += self.confusion(predicted[known], label[known])
            self.bands[number] += self.confusion(predicted[near], label[near])
        label = label[::EVERY, ::EVERY]
        known = label != IGNORE
        self.calibrate(half, logits[:, ::EVERY, ::EVERY][:, known], label[known])

    def confusion(self, predicted: Tensor, label: Tensor) -> Tensor:
        classes = len(self.log_shares)
        counts = torch.bincount(label * classes + predicted, minlength=classes**2)
        return counts.view(classes, classes).cpu()

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
        names = ("mIoU", "mAcc", "aAcc")
        whole = [scores(each) for each in self.confusions.sum(dim=0)]
        frontier: dict[str, Any] = {"tau": TAUS, **{k: [s[k] for s in whole] for k in names}}
        frontier["boundary_mIoU"] = [scores(each)["mIoU"] for each in self.bands]
        calibration = {"temperature": TEMPERATURES, **self.calibration(slice(None))}
        frontier["halves"], calibration["halves"] = [], []
        for half in (0, 1) if self.images > 1 else ():
            found = [scores(each) for each in self.confusions[half]]
            frontier["halves"].append({k: [s[k] for s in found] for k in names})
            calibration["halves"].append(self.calibration(slice(half, half + 1)))
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


def log_shares(pixels: Tensor) -> Tensor:
    """Return the log of each class's share; a class that never occurs counts as one pixel."""
    return (pixels.clamp_min(1) / pixels.sum()).log()


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
