"""Three lines for any segmenter: find the pixel classifier and tap the features it reads."""

import dataclasses
import inspect
import logging
from collections.abc import Callable, MutableMapping
from functools import partial
from inspect import Parameter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvsc.classifier import widths
from mvsc.equations import MVSCTerms
from mvsc.finding import (
    ClassifierNotFoundError,
    classes_second,
    find_classifier,
    sizes_of,
    why_not_the_logits,
)
from mvsc.hosts import HOSTS
from mvsc.regularizer import MVSCRegularizer
from mvsc.tap import ADDED, DATA_PARALLEL, PAST_THE_HOOKS, UNLABELLED, Hook, Tap
from mvsc.watch import warn

__all__ = ["AttachedRegularizer", "ClassifierNotFoundError", "attach"]

logger = logging.getLogger("mvsc")

_IDLE_FORWARDS = 10
"""Forwards in which add_to_loss had nothing to add, from the first on, after which it says so."""

_SIZES_COMPARED = 8
"""Sizes of images at which it is seen whether the model pads."""


def attach(
    model: nn.Module,
    *,
    classifier: str | nn.Module | None = None,
    example: Any = None,
    groups: int = 4,
    add_to_loss: bool = False,
    **options: Any,
) -> "AttachedRegularizer":
    """Attach a regularizer to a segmentation model, which itself stays as it is.

    The classifier is the one that is named; else the one of a known layout
    (segmentation_models_pytorch, torchvision, transformers, mmseg); else the only candidate.
    Its input is tapped, or that of the dropout right before it (R14). Parameters, state dict and
    inference of the model do not change. A model inside DistributedDataParallel or
    ``torch.compile`` is found in there; attach before a compiled model's first call.

    Args:
        model: the segmenter.
        classifier: the last linear layer, a convolution or a Linear, or a module that holds just
            one; or its dotted path.
        example: a batch for one forward in evaluation mode that proves the pick: a tensor, or a
            tuple or mapping of arguments.
        groups: G.
        add_to_loss: whether to add the loss to that of a model that takes ``labels`` and returns
            ``loss`` by name, or in a tuple the only scalar, as those of transformers do: then no
            training loop has to be touched.
        **options: of :class:`MVSCRegularizer`. ``ignore_index``, by default that of the model's
            transformers config or else the regularizer's own, should be that of the model's own
            loss. ``num_classes`` and ``dim`` are the classifier's; if given, they have to be. One
            logit is two classes.

    Returns:
        The regularizer, on the model's device. Its centroids have to be given to the optimizer,
        see :meth:`AttachedRegularizer.param_group`.

    Raises:
        ClassifierNotFoundError: if no classifier is certain; it lists the candidates.
        ValueError: if the model cannot be tapped (DataParallel, FSDP1, attached already), or the
            classifier has no answer for a pixel alone or not the ``num_classes`` that were given.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1))
        >>> reg = attach(model, groups=2)
        >>> optimizer = torch.optim.SGD([*model.parameters()], lr=0.1)
        >>> optimizer.add_param_group(reg.param_group())
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2, 14, 14))
        >>> loss = nn.functional.cross_entropy(model(images), labels) + reg(labels)
        >>> reg.classifier_path
        '2'
    """
    model = _unwrap(model)
    path = find_classifier(model, classifier, example)
    layer = model.get_submodule(path)
    options = _options_of_config(model, path) | options
    dim, logits = widths(layer)
    sizes = {"dim": dim, "num_classes": max(logits, 2)}  # one logit stands for two classes
    for name, found in sizes.items():
        if options.get(name, found) != found:
            one = ", whose one logit stands for two classes" * (found != logits and name != "dim")
            raise ValueError(
                f"{name} must be that of the classifier, {found} of {path!r}{one}, got "
                f"{options[name]}. Name another layer, classifier=..., or leave it out."
            )
    regularizer = MVSCRegularizer(groups=groups, **(options | sizes))
    device = next(layer.parameters()).device
    return AttachedRegularizer(model, path, regularizer.to(device), add_to_loss)


class AttachedRegularizer(nn.Module):
    """A regularizer that takes its features from the model's own forward.

    Made by :func:`attach`. Call it once after each forward in training mode; what cannot be
    meant (no forward since the last call, two of them, features without gradient) is an error.
    As a context manager it detaches on leaving. Its state, ``regularizer.centroids`` and
    ``regularizer.step``, is to be saved beside the model's; settings are those of
    ``regularizer``. A copy or an unpickled one is attached to nothing.

    Attributes:
        regularizer: the :class:`MVSCRegularizer`.
        classifier_path: dotted path of the classifier in the model.
    """

    def __init__(
        self, model: nn.Module, path: str, regularizer: MVSCRegularizer, add_to_loss: bool
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.classifier_path = path
        # The tap is no module: the model must not become a part of its own regularizer.
        self._tap = Tap(regularizer._watch)
        self._tap.open(model, path, self)
        _FirstForward(self._tap).open(model)
        if add_to_loss:
            AddToLoss(self._tap, regularizer).open(model)
        logger.info("attached to classifier %r of %s", path, type(model).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a setting of ``regularizer``, which would be without effect here."""
        if name in _SETTINGS:
            raise AttributeError(
                f"{name} is a setting of the regularizer inside. Set reg.regularizer.{name}."
            )
        super().__setattr__(name, value)

    @property
    def features(self) -> Tensor:
        """The map that entered the classifier in the last forward, of whatever mode, to look at.

        Detached, shape ``(batch, dim, *spatial)``, before a dropout; for diagnostics and pictures.
        It is let go when the next forward begins.

        Raises:
            RuntimeError: if there was no forward since the model was attached.
        """
        return self._tap.look()

    def forward(self, labels: Tensor, *, grid: tuple[int, ...] | None = None) -> Tensor:
        """Compute the loss of the last forward, see :meth:`MVSCRegularizer.forward`.

        Args:
            labels: class map of the batch, shape ``(batch, *spatial')``, any integer dtype.
            grid: height and width of tokens, as in :meth:`MVSCRegularizer.forward`.

        Returns:
            Scalar, to be added to the model's own loss before one backward.

        Raises:
            RuntimeError: if the last forward left no features that can be used.
        """
        loss: Tensor = self._tap.use(self.regularizer, labels, grid=grid)
        return loss

    def terms(self, labels: Tensor, *, grid: tuple[int, ...] | None = None) -> MVSCTerms:
        """Compute the three terms, unweighted; in place of a call, see :meth:`forward`."""
        terms: MVSCTerms = self._tap.use(self.regularizer.terms, labels, grid=grid)
        return terms

    def total(self, terms: MVSCTerms) -> Tensor:
        """Weigh and add the terms, see :meth:`MVSCRegularizer.total`."""
        return self.regularizer.total(terms)

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        """Return the centroids for the optimizer, see :meth:`MVSCRegularizer.param_group`."""
        return self.regularizer.param_group(**overrides)

    def discard(self) -> None:
        """Forget the features of the forwards since the last call: they have no loss here."""
        self._tap.clear()

    def detach(self) -> None:
        """Take every hook off the model; calls raise from here on."""
        self._tap.close()

    def __enter__(self) -> "AttachedRegularizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def extra_repr(self) -> str:
        """Show the classifier in the module's representation."""
        return f"classifier_path={self.classifier_path!r}"


_SETTINGS = frozenset(inspect.signature(MVSCRegularizer).parameters)


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
        self.named = 0
        self.position: int | None = None

    def open(self, model: nn.Module) -> None:
        """Hook on to the model.

        Raises:
            ValueError: if it takes no labels; the tap is closed.
        """
        own = found = inspect.signature(model.forward).parameters
        kinds = [each.kind for each in own.values()]
        if "labels" not in own and {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} & {*kinds}:
            # It hands on what it gets: the method in its place, or the model inside, has the names.
            bases = [base for base in type(model).__mro__ if hasattr(base, "forward")]
            hidden: list[Callable[..., Any]] = [partial(base.forward, model) for base in bases]
            hidden += [module.forward for module in model.modules()]
            inner = (inspect.signature(forward).parameters for forward in hidden)
            found = next((each for each in inner if "labels" in each), own)
        if "labels" not in found:
            self.tap.close()
            raise ValueError(
                "add_to_loss needs a model that takes labels and returns a loss, got "
                f"{type(model).__name__}, which takes {', '.join(own)}. "
                "Add reg(labels) to the loss yourself."
            )
        # Behind other names than those inside nobody knows what is handed on, and where.
        self.named = sum(kind < Parameter.VAR_POSITIONAL for kind in kinds)
        same = [*own][: self.named] == [*found][: self.named]
        if same and found["labels"].kind < Parameter.VAR_POSITIONAL:
            self.position = [*found].index("labels")
        classifier = cast(nn.Module, self.tap.classifier)
        self.tap.handles += [
            classifier.register_forward_pre_hook(Hook(self, self._before_classifier)),
            model.register_forward_pre_hook(Hook(self, self._before)),
            model.register_forward_hook(
                Hook(self, self._after), with_kwargs=True, always_call=True
            ),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inside = True
        if self.tap.listens(module):
            self.tap.clear()

    def _before_classifier(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.inside and self.tap.listens(module):
            self._notice_nothing_added(PAST_THE_HOOKS)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        self.inside = False
        listens = self.tap.listens(module)
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and len(args) > self.position:
            labels = args[self.position]
        if not listens:
            evaluates = self.tap.classifier is not None and not self.tap.classifier.training
            if evaluates and labels is not None and torch.is_grad_enabled():
                self._notice_nothing_added(self.tap.missing)
            return output
        if output is None or labels is None:  # None: the forward has failed.
            self.tap.clear(UNLABELLED)
            if self.position is None and len(args) > self.named and _find_loss(output) is not None:
                raise RuntimeError(
                    f"add_to_loss cannot tell which argument of {type(module).__name__} is labels. "
                    "Pass it by name, labels=..., or attach without add_to_loss and add "
                    "reg(labels) to the loss yourself."
                )
            if output is not None:
                self._notice_nothing_added(UNLABELLED)
            return output
        self.idle = -1
        key = _find_loss(output)
        if key is None:
            self.tap.clear()
            raise RuntimeError(
                f"{type(module).__name__} returned no loss for these labels to add to: a "
                f"{type(output).__name__} without a scalar called loss, and without one that is "
                "its only scalar with a gradient. Attach without add_to_loss, and add reg(labels) "
                "to the loss yourself."
            )
        loss = self.tap.use(self.regularizer, labels)
        self.tap.missing = ADDED
        if self.scale is not None:
            loss = self.scale() * loss
        return _add_to(output, key, loss)

    def _notice_nothing_added(self, why: str) -> None:
        """Warn once if there was no forward so far in which something was added."""
        if torch.compiler.is_compiling() or self.idle < 0:
            return
        self.idle += 1
        if self.idle == _IDLE_FORWARDS:
            warn(f"add_to_loss has had nothing to add in {_IDLE_FORWARDS} forwards: {why}")


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


class _FirstForward:
    """A client of the tap that sees, in the first training forward, whether the pick is sound.

    What leaves the classifier has to be what the model returns, up to a resize, where it returns
    logits at all. If so, each of the first sizes shows whether the model pads its images: those of
    the first forward may need no padding. Costs one comparison for each of these sizes.
    """

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.answer: Tensor | None = None
        self.padded: dict[Any, tuple[tuple[int, ...], tuple[int, ...]] | None] = {}

    def open(self, model: nn.Module) -> None:
        classifier = cast(nn.Module, self.tap.classifier)
        self.handles = [
            classifier.register_forward_hook(Hook(self, self._after_classifier)),
            model.register_forward_hook(Hook(self, self._after_model)),
        ]
        self.tap.handles += self.handles

    def _after_classifier(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self.tap.listens(module):
            tensor = isinstance(output, Tensor)
            self.answer = classes_second(module, output.detach()) if tensor else None

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        answer, self.answer = self.answer, None
        if torch.compiler.is_compiling() or answer is None or not self.tap.listens(module):
            return
        if answer.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self.tap.forwards != 1:
            return  # The tap has better words for that, and for another layer in its place.
        self.tap.padded, found = None, None
        try:
            sizes = sizes_of(answer, output)
            if sizes in self.padded or len(self.padded) == _SIZES_COMPARED:
                self.tap.padded = self.padded.get(sizes)
                return
            if self.tap.replaced():
                return
            found = why_not_the_logits(answer, output)
        except RuntimeError:  # Of tensors without values, or on which little is defined.
            pass
        if found is not None and not found[1]:
            self.tap.padded = self.padded[sizes] = found[0]
            return
        for handle in self.handles:
            handle.remove()
        if found is not None and not self.padded:
            warn(
                f"the classifier {self.tap.path!r} of {type(module).__name__} may be the wrong one "
                f"for this loss: {found[1]}"
            )


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(DATA_PARALLEL)
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "model must not be in FullyShardedDataParallel: its classifier has no weights "
                "outside of forward. Use fully_shard (FSDP2)."
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _options_of_config(model: nn.Module, path: str) -> dict[str, Any]:
    """Return the label that the loss of a transformers model ignores, as an option."""
    names = path.split(".")
    for depth in range(len(names)):
        config = getattr(model.get_submodule(".".join(names[:depth])), "config", None)
        for host in HOSTS:
            for name in host.ignore_index:
                if isinstance(getattr(config, name, None), int):
                    return {"ignore_index": getattr(config, name)}
    return {}
