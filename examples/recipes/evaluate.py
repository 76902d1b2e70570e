"""Measure a trained segmenter: mIoU, mAcc and pixel accuracy, whole image at the test scale.

    python examples/recipes/evaluate.py runs/NAME/best.safetensors
    python examples/recipes/evaluate.py runs/NAME/best.safetensors --window 512 --stride 340
    python examples/recipes/evaluate.py runs/NAME/best.safetensors --tau 0.25

Images are fitted into the recipe's scale; logits are brought back to the labels' own size before
they are judged. There is no test-time augmentation. ``--window`` slides over the resized image,
``--tau`` shifts the prior; operating_point.py chooses it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms import v2
from tqdm import tqdm

from commands import run
from data import IGNORE, SegmentationData, open_split
from loading import fit, outlive_interruptions, reading
from models import Segmenter, build, logits_of
from prior import LARGEST, log_shares
from recipes import Recipe
from weights import load_weights


@dataclass(frozen=True)
class Settings:
    """Measure a trained segmenter on the validation images of its data set."""

    weights: tyro.conf.Positional[Path]
    """best.safetensors or last.safetensors of a run."""
    data_root: Path | None = None
    """Folder of the data set; by default the one that the run was trained on."""
    window: int | None = None
    """Side of a sliding window; without it the whole image is seen at once."""
    stride: int | None = None
    """Steps of the window; by default two thirds of it."""
    tau: float = 0.0
    """Take tau times the log of each class's share in training off the logits (prior.py)."""
    workers: int = 2
    """Processes that load images."""
    device: str = "auto"
    """For example "cuda", "mps" or "cpu"; by default the best there is."""


def pick_device(name: str) -> torch.device:
    """Return the device of this name; of "auto", the best there is.

    Raises:
        ValueError: if this machine has no such device.
    """
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
            if device.type == "meta":
                raise RuntimeError("its tensors have no values")
            return device
        except (RuntimeError, AssertionError) as error:  # the latter without CUDA in torch
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one of this machine, got {name!r}: {reason}. Leave it out for the "
                "best there is."
            ) from error
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return best or torch.device("cpu")


@torch.no_grad()
def logits_at(
    segmenter: Segmenter,
    image: Tensor,
    size: tuple[int, int],
    scale: tuple[int, int],
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Compute the logits of one image at ``size``.

    Args:
        segmenter: in evaluation mode.
        image: uint8, ``(3, height, width)``, on the model's device.
        size: height and width of the logits.
        scale: longer and shorter side that the image is fitted into first.
        window: side of a sliding window over the resized image, or None.
        stride: of the window.

    Returns:
        float32, ``(num_classes, *size)``.
    """
    normal = fitted(segmenter, image, scale)
    if window is None:
        logits = _logits(segmenter.model, normal)
    else:
        logits = _slide(segmenter.model, normal, window, stride or max(2 * window // 3, 1))
    return F.interpolate(logits, size, mode="bilinear")[0]


def fitted(segmenter: Segmenter, image: Tensor, scale: tuple[int, int]) -> Tensor:
    """Fit an image, uint8 ``(3, height, width)``, into ``scale``: a batch of one, normalised."""
    size = fit(image.shape[1], image.shape[2], scale)
    return segmenter.normalize(v2.functional.resize(image, list(size), antialias=True)[None])


def padded(images: Tensor) -> Tensor:
    """Pad a batch to sides that are multiples of 32, as encoders want; 0 is the mean colour."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % 32, 0, -height % 32))


def check_window(window: int | None, stride: int | None = None) -> None:
    """Raise unless each pixel is in a window."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    if stride is not None and (window is None or not 1 <= stride <= window):
        raise ValueError(
            f"stride must be in 1 .. window, which is {window}, got {stride}. Leave it out for "
            "two thirds of the window."
        )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    images = padded(images)
    logits, _ = logits_of(model(images), (images.shape[2], images.shape[3]))
    return logits[:, :, :height, :width].float()


def _slide(model: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    height, width = images.shape[2:]
    total, seen = None, images.new_zeros(height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            part = (..., slice(top, top + window), slice(left, left + window))
            logits = _logits(model, images[part])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[part] += logits
            seen[part] += 1
    assert total is not None  # there is at least one window
    return total / seen


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def evaluate(
    segmenter: Segmenter,
    data: SegmentationData,
    recipe: Recipe,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    window: int | None = None,
    stride: int | None = None,
    look: Callable[[Tensor, Tensor], None] = lambda logits, label: None,
    shift: Tensor | None = None,
) -> dict[str, Any]:
    """Judge the segmenter on all images; processes share them and agree on the result.

    ``look`` is shown the logits of each image, ``(num_classes, height, width)``, and its label,
    int64 ``(height, width)``. ``shift``, one number for each class, is taken off the logits.

    Returns:
        ``mIoU``, ``mAcc``, ``aAcc`` in percent, and ``iou``, one number in percent for each
        class, None for one that is neither labelled nor predicted. A class that is labelled in
        no image does not count in mAcc.

    Raises:
        ValueError: if a file is broken, or no pixel of all is labelled.
    """
    mine = Subset(data, range(rank, len(data), processes))
    loader = DataLoader(
        mine, batch_size=None, num_workers=recipe.workers, worker_init_fn=outlive_interruptions
    )
    confusion = confusion_matrix(len(data.classes)).to(device)
    training = segmenter.model.training
    segmenter.model.eval()
    with reading(loader) as images:
        for image, label in tqdm(
            images, "validating", len(mine), leave=False, disable=rank > 0, mininterval=1
        ):
            size = (label.shape[0], label.shape[1])
            logits = logits_at(segmenter, image.to(device), size, recipe.scale, window, stride)
            if shift is not None:
                logits = logits - shift.to(device)[:, None, None]
            # As argmax, which takes three times as long over the first dimension on a CPU.
            predicted, label = logits.max(dim=0).indices, label.to(device).long()
            confusion.update(predicted[None], label[None])
            look(logits, label)
    segmenter.model.train(training)
    found = confusion.compute().cpu()
    if not found.any():
        folder = data.pairs[0][1].parent
        raise ValueError(f"{folder} must have a labelled pixel, found none. Check its labels.")
    if len(data.classes) > 1 and (found.sum(dim=1) > 0).sum() == 1:
        warnings.warn(
            "The validation labels show a single class; all scores are about that one. Masks of 0 "
            "and 255 must have the foreground's index in place of 255. prepare_data.py --check "
            "says more.",
            stacklevel=2,
        )
    return scores(found)


def confusion_matrix(classes: int) -> MulticlassConfusionMatrix:
    """Count labels and predictions; data.py has checked the labels' values already."""
    return MulticlassConfusionMatrix(classes, ignore_index=IGNORE, validate_args=False)


def scores(confusion: Tensor) -> dict[str, Any]:
    """Turn a confusion matrix, rows the labels, into the usual numbers in percent."""
    matrix = confusion.double()
    hits, labelled, claimed = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = 100 * hits / (labelled + claimed - hits)  # NaN: neither labelled nor predicted
    return {
        "mIoU": iou.nanmean().item(),
        "mAcc": (100 * hits / labelled).nanmean().item(),
        "aAcc": (100 * hits.sum() / labelled.sum()).item(),
        "iou": [value if value == value else None for value in iou.tolist()],  # JSON has no NaN
    }


def load_segmenter(
    path: Path, device: torch.device, unshifted: bool = False
) -> tuple[Segmenter, Recipe, Sequence[str]]:
    """Rebuild a trained segmenter from one file of weights, in evaluation mode.

    Raises:
        ValueError: if the file is missing, or is none that train.py wrote; or if its prior has to
            be ``unshifted``, since a second shift would add up, and is not.
    """
    tensors, about = load_weights(path)
    if not {"recipe", "classes"} <= about.keys():
        raise ValueError(
            f"{path} holds no recipe or no classes. Name best.safetensors or last.safetensors of a "
            "run of train.py."
        )
    if unshifted and (tau := about.get("tau")):
        raise ValueError(
            f"{path} must have the prior of its training, got one that is shifted by tau={tau}. "
            "Name the weights that it was made from."
        )
    recipe, classes = Recipe.from_dict(about["recipe"]), about["classes"]
    segmenter = build(replace(recipe, pretrained=False), len(classes))
    for name in set(tensors) - set(segmenter.model.state_dict()):
        give_bias(segmenter.model, name, tensors[name])
    try:
        segmenter.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} must hold the weights of its recipe, {recipe.model} with {len(classes)} "
            f"classes. {error}"
        ) from error
    segmenter.model.to(device).eval()
    return segmenter, recipe, classes


def give_bias(model: nn.Module, name: str, bias: Tensor) -> None:
    """Give a layer the bias that operating_point.py has added to its weights."""
    path, _, kind = name.rpartition(".")
    layer = dict(model.named_modules()).get(path)
    if kind == "bias" and "bias" in getattr(layer, "_parameters", {}):
        layer.bias = nn.Parameter(bias)


def check_classes(classes: Sequence[str], data: SegmentationData) -> None:
    """Raise unless data have the classes of the weights, in their order."""
    if list(classes) != list(data.classes):
        raise ValueError(
            f"the data must have the classes of the weights, {', '.join(classes)}, got "
            f"{', '.join(data.classes)}. Complete classes.txt in the order of the training."
        )


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    check_window(settings.window, settings.stride)
    if not abs(settings.tau) <= LARGEST:
        raise ValueError(f"tau must be a number from {-LARGEST} to {LARGEST}, got {settings.tau}.")
    segmenter, recipe, classes = load_segmenter(
        settings.weights, device, unshifted=bool(settings.tau)
    )
    recipe = replace(recipe, workers=settings.workers)
    root = settings.data_root or recipe.data_root
    data = open_split(recipe.layout, root, "val")
    check_classes(classes, data)
    shift = None
    if settings.tau:
        shift = settings.tau * log_shares(open_split(recipe.layout, root, "train"))
    result = evaluate(
        segmenter,
        data,
        recipe,
        device,
        window=settings.window,
        stride=settings.stride,
        shift=shift,
    )
    print_scores(result, data.classes)


def print_scores(result: dict[str, Any], classes: Sequence[str]) -> None:
    """Print the table of classes and, last, the means."""
    width = max(map(len, classes))
    for name, value in zip(classes, result["iou"], strict=True):
        print(f"{name:{width}}  {'-' if value is None else f'{value:.2f}':>6}")
    print("  ".join(f"{name} {result[name]:.2f}" for name in ("mIoU", "mAcc", "aAcc")))


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings)))
