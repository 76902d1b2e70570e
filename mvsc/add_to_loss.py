"""Adding the loss to that of a model that gets labels: no training loop has to be touched."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from inspect import Parameter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvsc.regularizer import MVSCRegularizer
from mvsc.running import is_replaying
from mvsc.tap import NO_FORWARD, REPLACED, Hook, Tap, taps_on
from mvsc.watch import warn

_IDLE_FORWARDS = 10
"""Forwards in which add_to_loss had nothing to add, from the first on, after which it says so."""

_ADDED = (
    "add_to_loss has added them to the model's own loss in the last forward. Leave reg(labels) "
    "out; to log the terms, attach without add_to_loss and add reg.total(terms)."
)
_UNLABELLED = (
    "the last forward had no labels. Pass labels to the model, or attach without add_to_loss and "
    "add reg(labels) to the loss yourself."
)
_LABELS_OF_THE_MODEL = (
    "The model's own loss takes the same labels: if it needs them as they are, attach without "
    "add_to_loss and add reg(labels) of the converted ones to the loss yourself."
)
_CHECKPOINTED = (
    "add_to_loss cannot add in a checkpoint of the whole model with its loss. Checkpoint the "
    "model's parts, or attach without add_to_loss and add reg(labels) to the loss yourself, with "
    "use_reentrant=False."
)
_OTHER_HEAD = (
    "add_to_loss had nothing to add in a forward with labels: the classifier did not run. If "
    "another head answers for these labels, all is well. Else name the layer that makes the "
    "logits, classifier=...; if it is this one, and its weight is taken without calling it, pass "
    "features and classifier to MVSCRegularizer."
)
_PAST_THE_HOOKS = (
    "the classifier ran, but not in a call of the model that is attached: somebody calls its "
    "forward method. Attach to the module that is called."
)

_SUMS = (
    "the model divides its loss by num_items_in_batch, the labels of several forwards, and "
    "add_to_loss adds a mean in each, so the weight of MVSC grows with their number. In a "
    "transformers Trainer use attach_to_trainer; in a loop of your own attach without add_to_loss, "
    "and add reg(labels) divided by the number of parts."
)
_UNUSED = (
    f"add_to_loss has added to the loss in the model's output in {_IDLE_FORWARDS} forwards, and no "
    "backward came through any of them. If another loss is trained on, as a compute_loss of your "
    "own makes of the logits, attach with add_to_loss=False and add reg(labels) to that."
)
_COPIED = (
    "add_to_loss adds nothing to the loss of this {model}, which is a copy of the one that is "
    "attached. Attach to the copy that is trained; or call mvsc.detach(copy), if it is to be "
    "trained without MVSC."
)


class AddToLoss:
    """A client of the tap that adds the loss in the forward of a model that gets labels.

    Features and labels come in one forward, so nothing is left open by a forward without labels,
    or by one that failed.

    Args:
        tap: open on the model.
        regularizer: whose loss is added. Not the attached one, which may go: who attaches again
            takes its place.
        scale: asked in each forward for a factor of the loss.
    """

    def __init__(
        self,
        tap: Tap,
        regularizer: MVSCRegularizer,
        scale: Callable[[], float] | None = None,
    ) -> None:
        self.tap, self.regularizer, self.scale = tap, regularizer, scale
        self.inside, self.idle = False, 0
        self.named, self.counted = 0, False
        self.unused = 0
        self.position: int | None = None

    def open(self, model: nn.Module) -> None:
        """Hook on to the model.

        Raises:
            ValueError: if it takes no labels; the tap is closed.
        """
        own: Mapping[str, Parameter] = inspect.signature(model.forward).parameters
        found = own
        kinds = [each.kind for each in own.values()]
        if "labels" not in own and {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} & {*kinds}:
            # It hands on what it gets: the method in its place, or the model inside, has the names.
            found = next((each for each in arguments_inside(model) if "labels" in each), own)
        if "labels" not in found and Parameter.VAR_KEYWORD not in kinds:
            self.tap.close()
            raise ValueError(
                "add_to_loss needs a model that takes labels and returns a loss, got "
                f"{type(model).__name__}, which takes {', '.join(own)}. "
                "Add reg(labels) to the loss yourself."
            )
        # Behind other names than those inside nobody knows what is handed on, and where.
        self.named = sum(kind < Parameter.VAR_POSITIONAL for kind in kinds)
        same = [*own][: self.named] == [*found][: self.named]
        if same and "labels" in found and found["labels"].kind < Parameter.VAR_POSITIONAL:
            self.position = [*found].index("labels")
        classifier = cast(nn.Module, self.tap.classifier)
        self.tap.handles += [
            classifier.register_forward_pre_hook(Hook(self.tap, self._before_classifier)),
            model.register_forward_pre_hook(Hook(self.tap, self._before)),
            model.register_forward_hook(
                _Adding(self.tap, self._after), with_kwargs=True, always_call=True
            ),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inside = True
        if self.tap.listens(module):
            self.tap.clear()

    def _before_classifier(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.inside and self.tap.listens(module):
            self._notice_nothing_added(_PAST_THE_HOOKS)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.inside = False
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and len(args) > self.position:
            labels = args[self.position]
        if not self.tap.listens(module):
            if labels is not None and self.tap.classifier is not None:
                self._notice_deaf(self.tap.classifier)
        elif output is None or labels is None:  # None: the forward has failed.
            self.tap.clear(_UNLABELLED)
            self._notice_unlabelled(type(module).__name__, len(args), output)
        elif self.tap.missing == NO_FORWARD and self.tap.forwards == 0:
            if self.tap.replaced():
                raise RuntimeError(REPLACED)
            self.tap.watch.say("no forward", _OTHER_HEAD)
        else:
            self.idle = -1
            if self.scale is None:
                self._notice_sums(kwargs.get("num_items_in_batch"), labels)
            output = self._add(type(module).__name__, output, labels)
        return output

    def _add(self, model: str, output: Any, labels: Tensor) -> Any:
        """Return the output of a labelled forward with the loss added to that in it."""
        key = _find_loss(output)
        if key is None:
            self.tap.clear()
            raise RuntimeError(
                f"{model} returned no loss for these labels to add to: a {type(output).__name__} "
                "without a scalar called loss, and without one that is its only scalar with a "
                "gradient. Attach without add_to_loss, and add reg(labels) to the loss yourself."
            )
        try:
            loss = self.tap.use(self.regularizer, labels)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("labels "):
                raise
            raise type(error)(f"{error} {_LABELS_OF_THE_MODEL}") from error
        self.tap.missing = _ADDED
        self._notice_unused(loss)
        if self.scale is not None:
            loss = self.scale() * loss
        return _add_to(output, key, loss)

    def _notice_sums(self, items: Any, labels: Tensor) -> None:
        """Warn once if the model's loss is a part of a sum over the labels of several forwards."""
        if items is None or self.counted or torch.compiler.is_compiling():
            return
        self.counted = True
        if int(items) > int((labels != -100).sum()):  # as a Trainer counts
            warn(_SUMS)

    def _notice_unused(self, loss: Tensor) -> None:
        """Warn once if no gradient came to a loss that was added so far: it is not trained on."""
        if self.unused < 0 or torch.compiler.is_compiling() or not loss.requires_grad:
            return
        if self.unused == _IDLE_FORWARDS:
            self.tap.watch.say("unused", _UNUSED)
        self.unused += 1

        def used(_: Tensor) -> None:
            self.unused = -1

        loss.register_hook(used)  # type: ignore[no-untyped-call]

    def _notice_deaf(self, classifier: nn.Module) -> None:
        """Raise in a checkpoint of the whole model; count evaluation mode that trains."""
        if is_replaying():
            raise RuntimeError(_CHECKPOINTED)
        if not classifier.training and torch.is_grad_enabled():
            self._notice_nothing_added(self.tap.missing)

    def _notice_unlabelled(self, model: str, given: int, output: Any) -> None:
        """Raise if labels are among the arguments without a name; count a forward without any."""
        if self.position is None and given > self.named and _find_loss(output) is not None:
            raise RuntimeError(
                f"add_to_loss cannot tell which argument of {model} is labels. Pass it by name, "
                "labels=..., or attach without add_to_loss and add reg(labels) to the loss "
                "yourself."
            )
        if output is not None:
            self._notice_nothing_added(_UNLABELLED)

    def _notice_nothing_added(self, why: str) -> None:
        """Warn once if there was no forward so far in which something was added."""
        if torch.compiler.is_compiling() or self.idle < 0:
            return
        self.idle += 1
        if self.idle == _IDLE_FORWARDS:
            warn(f"add_to_loss has had nothing to add in {_IDLE_FORWARDS} forwards: {why}")


class _Adding(Hook):
    """The hook that adds; in a copy of the model, which adds nothing, it says so."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Adding":
        return _InCopy()


class _InCopy(_Adding):
    def __init__(self) -> None:
        super().__init__(Tap(), self._notice)
        self.forwards = 0

    def _notice(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Warn once if the copy is trained; a teacher's forwards have no loss with a gradient."""
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if taps_on(module):
            return  # The copy is attached by now.
        self.forwards += _find_loss(output) is not None
        if self.forwards == _IDLE_FORWARDS:
            self.tap.watch.say("copy", _COPIED.format(model=type(module).__name__))


def arguments_inside(model: nn.Module) -> Iterator[Mapping[str, Parameter]]:
    """Go through the arguments of every forward that a model's own may hand on to.

    So those of the classes that it derives from, and of the modules inside.
    """
    bases = [base for base in type(model).__mro__ if hasattr(base, "forward")]
    forwards: list[Callable[..., Any]] = [partial(base.forward, model) for base in bases]
    forwards += [module.forward for module in model.modules()]
    for forward in forwards:
        yield inspect.signature(forward).parameters


def _find_loss(output: Any) -> Any:
    """Return the name of the loss in a model's output, in a tuple its index; None if unclear."""
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", ())
        places = [names.index("loss")] if "loss" in names else range(len(output))
        found = [i for i in places if _is_scalar(output[i]) and output[i].requires_grad]
        return found[0] if len(found) == 1 else None
    mapping = isinstance(output, MutableMapping)
    loss = output.get("loss") if mapping else getattr(output, "loss", None)
    return "loss" if _is_scalar(loss) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def _add_to(output: Any, key: Any, loss: Tensor) -> Any:
    """Return the output, of the type that it has, with something added to what is at ``key``."""
    if isinstance(output, tuple):
        parts = [*output]
        parts[key] = parts[key] + loss
        return getattr(output, "_make", tuple)(parts)
    if isinstance(output, (MutableMapping, list)):
        output[key] = output[key] + loss
        return output
    try:
        output.loss = output.loss + loss
    except dataclasses.FrozenInstanceError:
        output = dataclasses.replace(output, loss=output.loss + loss)
    return output
