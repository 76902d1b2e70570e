"""A segmenter's scores as its prior is shifted: more mIoU for less pixel accuracy, or the reverse.

Images are dealt in turn to two halves, so that a tau that is chosen on one can be judged on the
other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data import IGNORE
from evaluate import scores

TAUS = (-0.5, -0.25, 0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)

Points = dict[str, list[float]]
"""``mIoU``, ``mAcc`` and ``aAcc`` in percent, each at every tau."""


class Curve:
    """Counts hits and misses at each tau, image by image.

    Args:
        log_shares: of :func:`prior.log_shares`.
        device: of the logits that it will be shown.
        taus: shifts of the prior.
    """

    def __init__(
        self, log_shares: Tensor, device: torch.device, taus: Sequence[float] = TAUS
    ) -> None:
        classes = len(log_shares)
        self.log_shares, self.taus = log_shares.to(device), tuple(taus)
        self.confusions = torch.zeros(2, len(taus), classes, classes, dtype=torch.int64)
        self.images = 0
        self.shifted = torch.empty(0, device=device)  # one piece of memory for all images

    @property
    def half(self) -> int:
        """To which half the next image goes."""
        return self.images % 2

    def look(self, logits: Tensor, label: Tensor) -> None:
        """Count one image: logits ``(classes, height, width)``, label ``(height, width)``."""
        known = label != IGNORE
        if self.shifted.shape != logits.shape:
            self.shifted = torch.empty_like(logits)
        for number, tau in enumerate(self.taus):
            torch.sub(logits, self.log_shares[:, None, None], alpha=tau, out=self.shifted)
            # As argmax, which takes three times as long over the first dimension on a CPU.
            predicted = self.shifted.max(dim=0).indices
            self.confusions[self.half, number] += self.confusion(predicted[known], label[known])
            self.count(number, predicted, label)
        self.images += 1

    def count(self, number: int, predicted: Tensor, label: Tensor) -> None:
        """Count something else of the prediction at the tau of this number."""

    def confusion(self, predicted: Tensor, label: Tensor) -> Tensor:
        """Count the pairs of label and prediction."""
        classes = len(self.log_shares)
        counts = torch.bincount(label * classes + predicted, minlength=classes**2)
        return counts.view(classes, classes).cpu()

    def points(self) -> Points:
        """Return the scores of all images."""
        return points_of(self.confusions.sum(dim=0))

    def halves(self) -> list[Points]:
        """Return the scores of each half of the images; none, if a half has no labelled pixel."""
        judged = all(bool(each[0].any()) for each in self.confusions)
        return [points_of(each) for each in self.confusions] if judged else []


def points_of(confusions: Tensor) -> Points:
    """Turn one confusion matrix for each tau into scores."""
    found: list[dict[str, Any]] = [scores(each) for each in confusions]
    return {name: [each[name] for each in found] for name in ("mIoU", "mAcc", "aAcc")}


def choose(points: Points, least: float) -> int | None:
    """Return the place of the tau with the best mIoU among those of enough pixel accuracy.

    Args:
        points: of a curve.
        least: pixel accuracy that must be kept, in percent.
    """
    allowed = [i for i, accuracy in enumerate(points["aAcc"]) if accuracy >= least]
    return max(allowed, key=lambda i: points["mIoU"][i]) if allowed else None
