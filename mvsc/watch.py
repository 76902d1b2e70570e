"""What a training loop may get wrong without an error: noticed seldom, said once.

Nothing here is a part of the loss. On the hot path nothing is read from the device: what autograd
and Python know for nothing raises a suspicion, and only that is looked into, once.
"""

import sys
import warnings
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mvsc.checks import describe_sizes
from mvsc.running import is_capturing
from mvsc.sampling import cells_of_classes, labels_on_grid

_STEPS_CHECKED_ON_DEVICE = 3
"""Steps in which labels on a device are read back and checked in full."""

_STEPS_CHECKED_FOR_LOST = 10
"""Steps with labels in which it is seen whether these reach the feature grid at all."""

_LOST_BY_CHANCE = 3
"""Steps in a row in which a small feature map may lose all labels."""

_MANY = 64
"""Feature pixels with labels, of which some centres would show them if they were no strokes."""

_MASKS = 3
"""Steps that have to look like a mask of 0 and 255."""

_FEW = 8
"""Rows or columns of a feature map below which sizes show nothing, and labels little."""

_IDLE_STEPS = 100
"""Steps without a change after which the centroids count as forgotten by the optimizer."""

_NOT_IN_OPTIMIZER = (
    "the optimizer does not know them. Add optimizer.add_param_group(reg.param_group()); where the "
    'engine does not take it, attach with optimizer="own".'
)
_NO_GRADIENT = (
    "the optimizer does not know them, or they get no gradient. Add "
    "optimizer.add_param_group(reg.param_group()); where gradients are taken of the model's "
    "parameters alone (torch.autograd.grad, backward(inputs=...)), take those of "
    "reg.parameters(), too."
)
_NO_OTHER_STEPPED = (
    "their own optimizer steps after the model's, and no torch.optim.Optimizer has stepped. "
    'With one that is none, use optimizer="host" and step reg.parameters() in it. In fastai take '
    "opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)."
)

_KEPT = (
    "the centroids still had the gradient of an earlier step when this one's was added, though an "
    "optimizer has moved them since: model.zero_grad() does not know them. Call "
    "optimizer.zero_grad(), or reg.zero_grad() beside model.zero_grad(). In a transformers Trainer "
    "use attach_to_trainer, which does so. (If gradients are added up on purpose, all is well.)"
)


def warn(message: str) -> None:
    """Warn at the line outside of mvsc and torch that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("mvsc.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class Watch:
    """The bookkeeping of one regularizer: what it has checked, suspected and said so far."""

    def __init__(self) -> None:
        self.checks_left = _STEPS_CHECKED_ON_DEVICE
        self.lost_checks_left = _STEPS_CHECKED_FOR_LOST
        self.masks_left = _MASKS
        self.lost_in_a_row, self.evaluations = 0, 0
        self.cells: tuple[Tensor, Tensor] | None = None
        self.said: set[str] = set()
        self.idle_steps, self.version_seen = 0, 0
        self.values_seen: Tensor | None = None
        self.always_kept: Tensor | bool = True
        self.version_at_backward: int | None = None

    def forget_values(self) -> None:
        """Begin anew: somebody other than an optimizer has set the values."""
        self.idle_steps, self.version_at_backward, self.values_seen = 0, None, None

    def may_read(self, labels: Tensor) -> bool:
        """Return whether the labels of this step are to be read; on a device, three times."""
        if labels.device.type == "cpu":
            return True
        if self.checks_left == 0 or labels.is_meta or is_capturing(labels.device):
            return False
        self.checks_left -= 1
        return True

    def say(self, what: str, message: str) -> None:
        """Warn, if this was not said before."""
        if what not in self.said:
            self.said.add(what)
            warn(message)

    def notice_padding(
        self, padded: tuple[int, ...], cropped: tuple[int, ...], labels: tuple[int, ...]
    ) -> None:
        """Warn if labels were not padded as a model that crops its logits pads its images."""
        if len(padded) != len(labels):
            return  # an error comes
        # Labels may be of another resolution than logits; a square is padded to a square.
        unpadded, right = _factor(cropped, labels), _factor(padded, labels)
        if labels == cropped or right is None or (_is_stride(unpadded) and not _is_stride(right)):
            sizes = [round(a * b / c) for a, b, c in zip(padded, labels, cropped, strict=True)]
            self.say(
                "sizes",
                "the model pads its images and crops its logits, so labels of "
                f"{describe_sizes(labels)} are stretched over images of {describe_sizes(sizes)}. "
                "Pad the labels with ignore_index to that size, in the same way: "
                "F.pad(labels, (left, right, top, bottom), value=ignore_index). Where add_to_loss "
                "hands on the model's own, attach without it and call reg(padded).",
            )

    def notice_sizes(self, features: tuple[int, ...], labels: tuple[int, ...]) -> None:
        """Warn if no stride brings the labels to the features: the model has padded or cropped."""
        if "sizes" in self.said:
            return
        sizes = f"features of {describe_sizes(features)} and labels of {describe_sizes(labels)}"
        if _are_turned(features, labels):
            message = (
                f"{sizes} have one stride for both axes if height and width of the labels are "
                "exchanged. If they are, use labels.transpose(1, 2)."
            )
        elif _have_a_stride(features, labels):
            return
        elif len(features) == 1:
            message = (
                f"features of {features[0]} places and labels of {labels[0]} have no common "
                "stride. Points need a label each, in their order. Of tokens cut off class and "
                "register tokens, features[:, 1:]; in an attached model the classifier has to "
                "read the others alone. If the model resamples a sequence, all is well."
            )
        else:
            ratios = " and ".join(f"{b / a:.3g}" for a, b in zip(features, labels, strict=True))
            message = (
                f"{sizes} have no common stride ({ratios}): a model that pads or crops inside "
                "would have its labels stretched. Pad the labels as the model pads its images, "
                "F.pad(labels, (0, right, 0, bottom), value=ignore_index), or crop them as it "
                "crops. If it resizes its images, all is well."
            )
        self.say("sizes", message)

    def notice_dtype(self, dtype: torch.dtype, num_classes: int) -> None:
        """Warn if labels are of a dtype that cannot hold every class: larger ones wrap around."""
        if torch.iinfo(dtype).max < num_classes - 1:
            self.say(
                "dtype",
                f"labels of {dtype} hold no class above {torch.iinfo(dtype).max}, and there are "
                f"{num_classes}: larger indices have wrapped around. Keep labels in torch.int16 "
                "or wider from the file on. (If no label is larger, all is well.)",
            )

    def notice_lost_labels(
        self, labels: Tensor, size: torch.Size, num_classes: int, ignore_index: int
    ) -> None:
        """Warn if no label, less than half of them or none of a class is at a feature's centre.

        Reads values, which have been read anyway to be checked.
        """
        if self.lost_checks_left == 0 or "lost" in self.said:
            return
        labelled = labels.long() != ignore_index
        if not bool(labelled.any()):
            return
        self.lost_checks_left -= 1
        grid = labels_on_grid(labels, size, num_classes, ignore_index)
        if bool((grid < num_classes).any()):
            self.lost_in_a_row = 0
            there = cells_of_classes(labels, size, num_classes, ignore_index)
            self._notice_strokes(there.cpu(), grid.cpu(), num_classes)
            return
        self.lost_in_a_row += 1
        if min(size) < _FEW and self.lost_in_a_row < _LOST_BY_CHANCE:
            return  # In a small map a single batch may lose its labels by chance.
        self.say(
            "lost",
            f"labels hold {int(labelled.sum())} labelled pixels, and none of "
            f"them is at the centre of one of the {describe_sizes(size)} feature pixels of an "
            'image, so nothing is learned from them. Use grid_label="commonest" for points and '
            "strokes.",
        )

    def _notice_strokes(self, there: Tensor, grid: Tensor, num_classes: int) -> None:
        """Warn if the labels of many feature pixels, or all of a class, are beside the centres."""
        reached = torch.bincount(grid.flatten(), minlength=num_classes + 1)
        reached[-1] = grid.numel() - reached[-1]
        if self.cells is not None:
            there, reached = there + self.cells[0], reached + self.cells[1]
        self.cells = there, reached
        beside = torch.where(reached == 0, there, 0)[:-1]
        few = there[-1] >= _MANY and 2 * reached[-1] < there[-1]
        if not few and bool((beside < _MANY).all()):
            return
        lost = beside.nonzero().flatten().tolist()
        more = ", ..." * (len(lost) > 10)
        classes = f", and none of class {', '.join(map(str, lost[:10]))}{more}" if lost else ""
        self.say(
            "lost",
            f"labels lie in {there[-1]} feature pixels so far, and at the centre of {reached[-1]} "
            f"of them{classes}: nothing is learned from the others. Use "
            'grid_label="commonest" for points and strokes; where other classes surround them, a '
            "finer feature map.",
        )

    def notice_mask(self, labels: Tensor, num_classes: int) -> None:
        """Warn if two classes seem to be a mask of 0 and 255, which is ignored."""
        if self.masks_left == 0 or num_classes != 2:
            return
        labels = labels.long()  # Before any comparison: int8 == 255 is true for -1.
        if bool((labels == 1).any()):
            self.masks_left = 0
        elif bool((labels == 255).any() and (labels == 0).any()):
            self.masks_left -= 1
            if self.masks_left == 0:
                self.say(
                    "mask",
                    "the labels hold no pixel of class 1 so far, but some of 255, which are "
                    "ignored. For masks of 0 and 255 pass labels // 255. If 255 marks unlabelled "
                    "pixels, all is well.",
                )

    def notice_evaluation(self) -> None:
        """Warn if losses with gradients are taken in evaluation mode, one after the other."""
        self.evaluations += 1
        if self.evaluations == _IDLE_STEPS:
            self.say(
                "evaluation",
                f"the regularizer was in evaluation mode in {_IDLE_STEPS} losses in a row, so all "
                "of them had the same split of the pixels. Call reg.train() where model.train() is "
                "called. (If this is a validation, use torch.no_grad().)",
            )

    def notice_idle_centroids(self, centroids: Tensor, own: bool = False) -> None:
        """Warn if no optimizer moves the centroids, though they have a part in the loss."""
        # An optimizer changes the tensor, which autograd counts.
        version = centroids._version
        idle = version == self.version_seen and centroids.requires_grad
        if own and centroids.grad is None:
            idle = False  # The stepper notices that.
        self.version_seen = version
        self.idle_steps = self.idle_steps + 1 if idle else 0
        if self.idle_steps < _IDLE_STEPS // 2 or "idle" in self.said:
            self.values_seen = None
        elif self.values_seen is None:
            # A fused optimizer moves values that autograd does not count: compare them, once.
            self.values_seen, self.always_kept = _shard_of(centroids).clone(), True
        elif self.idle_steps >= _IDLE_STEPS and not is_capturing(centroids.device):
            if torch.equal(self.values_seen, _shard_of(centroids)) and self.values_seen.numel():
                why = _NO_OTHER_STEPPED if own else _NOT_IN_OPTIMIZER
                why = _NO_GRADIENT if centroids.grad is None else why
                self.say(
                    "idle",
                    f"the centroids have not changed in {_IDLE_STEPS} steps: {why} (If all is "
                    "right, then their rate was 0, or gradients were accumulated, for so long.)",
                )
            elif self.always_kept and centroids.grad is not None:
                self.say("kept", _KEPT)
            self.said.add("idle")
            self.values_seen = None

    def notice_kept_gradient(self, centroids: Tensor) -> Tensor:
        """Return the centroids; a backward warns if it adds to a gradient that was used already.

        That is what ``model.zero_grad()`` leaves behind, since the centroids are not the model's.
        """
        if "kept" in self.said or not torch.is_grad_enabled() or not centroids.requires_grad:
            return centroids
        view = centroids.view_as(centroids)

        def before(_: Any) -> None:
            if self.values_seen is not None:  # Autograd may not count what moves them.
                kept = False if centroids.grad is None else centroids.grad.any()
                self.always_kept = kept & self.always_kept
            last, self.version_at_backward = self.version_at_backward, centroids._version
            moved = last is not None and last != centroids._version
            if centroids.grad is None or not moved or is_capturing(centroids.device):
                return
            # Set to zero in place, or kept: that takes a look.
            if "kept" not in self.said and bool(centroids.grad.any()):
                self.say("kept", _KEPT)
            self.said.add("kept")

        view.register_hook(before)  # type: ignore[no-untyped-call]
        return view


def _shard_of(tensor: Tensor) -> Tensor:
    """Return the values that this process has: no other may be asked, since it may not ask."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _factor(size: tuple[int, ...], labels: tuple[int, ...]) -> Fraction | None:
    """Return by how much labels are larger than a size; None if not by the same in each axis."""
    factors = {Fraction(b, a) for a, b in zip(size, labels, strict=True)}
    return factors.pop() if len(factors) == 1 else None


def _is_stride(factor: Fraction | None) -> bool:
    """Return whether a factor is a power of 2, this way or that, as nearly all strides are."""
    return factor is not None and (factor.numerator * factor.denominator).bit_count() == 1


def _are_turned(features: tuple[int, ...], labels: tuple[int, ...]) -> bool:
    """Return whether labels of a map have one integer stride, but with their axes exchanged."""
    if len(features) != 2 or min(features) < _FEW:
        return False
    (height, width), (rows, columns) = features, labels
    right = rows * width == columns * height
    return not right and columns * width == rows * height and columns % height == 0


def _have_a_stride(features: tuple[int, ...], labels: tuple[int, ...]) -> bool:
    """Return whether sizes can be those of a map and its labels without padding in between.

    So if each axis has an integer stride of its own, rounded up or down; or if one stride, of any
    value, fits all axes to a pixel, of which there are several. Of a few pixels nothing can be
    said.
    """
    if min(features) < _FEW:
        return True
    pairs = [(min(pair), max(pair)) for pair in zip(features, labels, strict=True)]
    if all(any(n in (m // s, -(-m // s)) for s in (m // n, -(-m // n))) for n, m in pairs):
        return True
    if len(pairs) == 1 or any(
        (a < b) != (features[0] < labels[0]) for a, b in zip(features, labels, strict=True)
    ):
        return False
    lowest = max(m / (n + 1) for n, m in pairs)
    highest = min(m / (n - 1) if n > 1 else float("inf") for n, m in pairs)
    return lowest <= highest
