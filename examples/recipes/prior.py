"""The prior of a trained segmenter, and how to shift it without training.

Classes that are rare in training are seldom predicted. Taking tau times the log of each class's
share off the logits makes rare classes likelier. It is a constant for each class: it can be folded
into the classifier's bias, and commutes with the bilinear upsampling of the logits.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from data import SegmentationData, read_label

LARGEST = 100
"""Of tau, either way: long before it the shares alone decide; far beyond it nothing is finite."""


def class_pixels(data: SegmentationData) -> Tensor:
    """Count the labelled pixels of each class.

    Raises:
        ValueError: if a label is broken.
    """
    pixels = torch.zeros(256, dtype=torch.int64)
    for _, path in tqdm(data.pairs, "counting", leave=False, mininterval=1):
        pixels += torch.bincount(read_label(path, data.coding).flatten().long(), minlength=256)
    return pixels[: len(data.classes)].float()


def log_shares(data: SegmentationData) -> Tensor:
    """Return the log of each class's share of the labelled pixels of a split.

    Raises:
        ValueError: if a label is broken, or a class never occurs, so that its share is 0.
    """
    pixels = class_pixels(data)
    absent = [name for name, count in zip(data.classes, pixels, strict=True) if count == 0]
    if absent:
        raise ValueError(
            f"each class must occur in training for its prior to be shifted, but no training image "
            f"shows {', '.join(absent)}. Such a class has no share."
        )
    return (pixels / pixels.sum()).log()
