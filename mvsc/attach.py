"""Three lines for any segmenter: find the pixel classifier and tap the features it reads."""

import inspect
import logging
import weakref
from collections.abc import Callable
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from mvsc import checks
from mvsc.equations import MVSCTerms
from mvsc.finding import ClassifierNotFoundError, Linear, find_classifier
from mvsc.regularizer import MVSCRegularizer

__all__ = ["AttachedRegularizer", "ClassifierNotFoundError", "attach"]

logger = logging.getLogger("mvsc")

_NOT_ATTACHED = (
    "This regularizer is attached to no model: it was detached, copied or unpickled. "
    "Call mvsc.attach on the model that is trained."
)
_NO_FORWARD = (
    "no forward ran since. Call the model first; if it, or another model of its class, was "
    "compiled and called without a regularizer, its hooks do not run: attach before the first "
    "call, call torch.compiler.reset(), or set "
    "torch._dynamo.config.skip_nnmodule_hook_guards = False."
)
_EVALUATION = "the last forward ran in evaluation mode. Call model.train() before it."
_WITHOUT_GRADIENTS = (
    "the last forward ran without gradients. Leave torch.no_grad() for it; if it is "
    "checkpointed, set use_reentrant=False."
)
_USED_UP = (
    "those of the last forward are used up. Call reg(labels) or reg.terms(labels) once for "
    "each forward, and reg.total(terms) for the weighted sum."
)
_TWO_FORWARDS = (
    "The classifier ran more than once since the last loss, so it is open which features belong "
    "to the labels. Call reg(labels) after each forward and add up, or reg.discard() after a "
    "forward that has no loss of its own. If the model itself calls it more than once, pass the "
    "features to MVSCRegularizer."
)
_NO_LABELS = (
    "Two forwards in a row got no labels, so add_to_loss had nothing to add. Pass labels to the "
    "model, or attach without add_to_loss and add reg(labels) to the loss yourself."
)
_NO_GRADIENT = (
    "The features have no gradient, so the loss could not reach the encoder: all before the "
    "classifier is frozen, or runs in a reentrant checkpoint. Unfreeze it, or set "
    "use_reentrant=False."
)
_REPLACED = (
    "The classifier was replaced since it was attached. Call detach() and attach again; if the new "
    "one is more than a linear layer, pass features and classifier to MVSCRegularizer."
)
_CHANGED = (
    "The features were changed in place after they were taken. Make the operation that follows "
    "out of place (inplace=False), or pass the features to MVSCRegularizer yourself."
)
_DATA_PARALLEL = (
    "model must not be in nn.DataParallel: its replicas run in threads and share one tap. "
    "Use DistributedDataParallel."
)


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
        classifier: the last linear layer, a Conv2d or a Linear, or a module that holds just
            one; or its dotted path.
        example: a batch for one forward in evaluation mode that proves the pick: a tensor, or a
            tuple or mapping of arguments.
        groups: G.
        add_to_loss: whether to add the loss to ``output.loss`` of a model that takes ``labels``,
            as those of transformers do: then no training loop has to be touched.
        **options: of :class:`MVSCRegularizer`. ``ignore_index``, by default 255, or that of the
            model's transformers config, should be that of the model's own loss. ``num_classes``
            and ``dim`` are the classifier's; if given, they have to be.

    Returns:
        The regularizer, on the model's device. Its centroids have to be given to the optimizer,
        see :meth:`AttachedRegularizer.param_group`.

    Raises:
        ClassifierNotFoundError: if no classifier is certain; it lists the candidates.
        ValueError: if the model cannot be tapped (DataParallel, FSDP1, attached already), or the
            classifier gives a single logit or not the ``num_classes`` that were given.

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
    layer = cast(Linear, model.get_submodule(path))
    options = _options_of_config(model, path) | options
    if isinstance(layer, nn.Conv2d):
        dim, num_classes = layer.in_channels, layer.out_channels
    else:
        dim, num_classes = layer.in_features, layer.out_features
    sizes = {"dim": dim, "num_classes": num_classes}
    checks.check_sizes_of_classifier(path, sizes, options)
    regularizer = MVSCRegularizer(groups=groups, **(options | sizes))
    return AttachedRegularizer(model, path, regularizer.to(layer.weight.device), add_to_loss)


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
        self._tap = _Tap()
        self._tap.open(model, path, self)
        if add_to_loss:
            self._tap.add_to_loss(model, self)
        logger.info("attached to classifier %r of %s", path, type(model).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a setting of ``regularizer``, which would be without effect here."""
        inside = self.__dict__.get("_modules", {}).get("regularizer")
        if hasattr(inside, name) and not hasattr(self, name):
            raise AttributeError(
                f"{name} is a setting of the regularizer inside. Set reg.regularizer.{name}."
            )
        super().__setattr__(name, value)

    def forward(self, labels: Tensor) -> Tensor:
        """Compute the loss of the last forward, see :meth:`MVSCRegularizer.forward`.

        Args:
            labels: class map of the batch, shape ``(batch, H, W)``, any integer dtype.

        Returns:
            Scalar, to be added to the model's own loss before one backward.

        Raises:
            RuntimeError: if the last forward left no features that can be used.
        """
        loss: Tensor = self._tap.use(self.regularizer, labels)
        return loss

    def terms(self, labels: Tensor) -> MVSCTerms:
        """Compute the three terms, unweighted; in place of a call, see :meth:`forward`."""
        terms: MVSCTerms = self._tap.use(self.regularizer.terms, labels)
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


class _Tap:
    """Hooks on a model that keep the features of its last forward until they are used.

    A copy of the tap, made with a copy of the model, is attached to nothing: an EMA or teacher
    model never writes into its student's tap, and no graph is ever copied.
    """

    model: Callable[[], nn.Module | None]
    owner: Callable[[], AttachedRegularizer | None]

    def __init__(self) -> None:
        self.classifier: Linear | None = None
        self.handles: list[RemovableHandle] = []
        self.working = False
        self.clear()

    def __reduce__(self) -> tuple[type["_Tap"], tuple[()]]:
        return _Tap, ()

    def open(self, model: nn.Module, path: str, owner: AttachedRegularizer) -> None:
        entrance = _entrance(model, path)
        module = model.get_submodule(entrance)
        for hook in list(module._forward_pre_hooks.values()):
            other = getattr(hook, "__self__", None)
            if not isinstance(other, _Tap) or other.classifier is None:
                continue
            if other.owner() is None:  # Nobody is left who could use or detach it.
                other.close()
            else:
                raise ValueError(
                    f"model must have one regularizer at a time, got one attached to {path!r} "
                    "already. Call its detach() first."
                )
        for dropout in _dropouts_near(model, path, entrance):
            self.handles += [
                dropout.register_forward_pre_hook(self._before_dropout, with_kwargs=True),
                dropout.register_forward_hook(self._after_dropout),
            ]
        self.handles.append(
            module.register_forward_pre_hook(self._before_classifier, with_kwargs=True)
        )
        self.classifier = cast(Linear, model.get_submodule(path))
        self.model, self.owner, self.path = weakref.ref(model), weakref.ref(owner), path

    def add_to_loss(self, model: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        names = list(inspect.signature(model.forward).parameters)
        if "labels" not in names:
            self.close()
            raise ValueError(
                "add_to_loss needs a model that takes labels and returns a loss, got "
                f"{type(model).__name__}, which takes {', '.join(names)}. "
                "Add reg(labels) to the loss yourself."
            )
        self.loss, self.position = loss, names.index("labels")
        self.handles.append(model.register_forward_hook(self._after_model, with_kwargs=True))

    def clear(self, missing: str = _NO_FORWARD) -> None:
        self.features: Tensor | None = None
        self.version: int | None = None
        self.forwards = 0
        self.missing = missing
        self.undropped: Tensor | None = None
        self.dropped: Tensor | None = None

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.classifier = [], None
        self.clear()

    def use(self, call: Callable[..., Any], labels: Tensor) -> Any:
        """Return ``call(features, labels, classifier)``; the features are used up by it."""
        features, classifier = self._take(), self.classifier
        if isinstance(classifier, nn.Linear):
            features = features.movedim(-1, 1)
        self.working = True  # The call asks the classifier too: that is no forward.
        try:
            return call(features, labels, classifier)
        finally:
            self.working = False

    def _take(self) -> Tensor:
        features, version, forwards, missing = (
            self.features,
            self.version,
            self.forwards,
            self.missing,
        )
        self.clear(missing if features is None else _USED_UP)
        if self.classifier is None:
            raise RuntimeError(_NOT_ATTACHED)
        if not torch.compiler.is_compiling() and self._replaced():
            raise RuntimeError(_REPLACED)
        if forwards > 1:
            raise RuntimeError(_TWO_FORWARDS)
        if features is None:
            raise RuntimeError(f"There are no features for this loss: {missing}")
        if not features.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        if version is not None and features._version != version:
            raise RuntimeError(_CHANGED)
        return features

    def _replaced(self) -> bool:
        model = self.model()
        try:
            return model is not None and model.get_submodule(self.path) is not self.classifier
        except AttributeError:
            return True

    def listens(self, module: nn.Module) -> bool:
        if self.classifier is None or self.working:
            return False
        if getattr(module, "_is_replica", False):
            raise RuntimeError(_DATA_PARALLEL)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return False  # A backward replays the forward: activation checkpointing.
        training = self.classifier.training
        if training and torch.is_grad_enabled():
            return True
        self.missing = _WITHOUT_GRADIENTS if training else _EVALUATION
        return False

    def _before_dropout(self, module: _DropoutNd, args: tuple[Any, ...], kwargs: Any) -> None:
        features = _first(args, kwargs)
        # Of several in a row the first one counts.
        if self.listens(module) and self.dropped is not features:
            self.undropped = features.clone() if module.inplace else features

    def _after_dropout(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.listens(module):
            self.dropped = output

    def _before_classifier(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if not self.listens(module):
            return
        # Whether a dropout near the classifier really precedes it shows here and only here.
        features = _first(args, kwargs)
        if self.dropped is features and self.undropped is not None:
            features = self.undropped
        # Of two forwards neither is kept: a graph that nobody asks for would stay alive.
        self.forwards = min(self.forwards + 1, 2)
        self.features = features if self.forwards == 1 else None
        # A compiled graph has no in-place operations and no versions.
        self.version = None if torch.compiler.is_compiling() else features._version
        self.undropped = self.dropped = None

    def _after_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self.listens(module):
            return output
        labels = kwargs.get("labels", args[self.position] if len(args) > self.position else None)
        if labels is None:
            if self.forwards > 1:
                raise RuntimeError(_NO_LABELS)
            return output
        if isinstance(output, tuple):  # With return_dict=False the loss comes first.
            return (output[0] + self.loss(labels), *output[1:])
        if getattr(output, "loss", None) is None:
            raise RuntimeError(
                f"{type(module).__name__} returned no loss for these labels to add to. "
                "Attach without add_to_loss, and add reg(labels) to the loss yourself."
            )
        output.loss = output.loss + self.loss(labels)
        return output


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and ``torch.compile``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(_DATA_PARALLEL)
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
        for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
            if isinstance(getattr(config, name, None), int):
                return {"ignore_index": getattr(config, name)}
    return {}


def _entrance(model: nn.Module, path: str) -> str:
    """Return where the features come in: the classifier, or the layer that pads in front of it.

    The padding, by nothing for a 1x1 convolution, would hide that a dropout comes before.
    """
    parent = path.rpartition(".")[0]
    pads = type(model.get_submodule(parent)).__name__ == "MobileNetV2ConvLayer"
    return parent if pads else path


def _dropouts_near(model: nn.Module, path: str, entrance: str) -> list[_DropoutNd]:
    """Return the dropouts registered right before the classifier, and those beside its entrance.

    Only these are watched: hooks all over an encoder would meet checkpointed and compiled blocks.
    """
    modules = list(model.modules())
    earlier = modules[: modules.index(model.get_submodule(path))]
    leaves = [module for module in reversed(earlier) if not [*module.children()]]
    before = takewhile(lambda module: isinstance(module, _DropoutNd | nn.Identity), leaves)
    beside = model.get_submodule(entrance.rpartition(".")[0]).children()
    return [m for m in dict.fromkeys([*before, *beside]) if isinstance(m, _DropoutNd)]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first
