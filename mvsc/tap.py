"""The tap: hooks that take the features of a forward, and the ledger of what was used.

The features are taken where they enter the classifier, or the dropout before it (R14), and given
out once. The ledger says why there are none: no forward, two of them, used up, replaced.
"""

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from mvsc.classifier import base_of, is_channels_last, is_sharded, widths
from mvsc.hosts import HOSTS
from mvsc.running import is_plain_eager, is_replaying
from mvsc.watch import Watch

NOT_ATTACHED = (
    "This regularizer is attached to no model: it was detached, copied or unpickled. "
    "Call mvsc.attach on the model that is trained."
)
NO_FORWARD = (
    "no forward ran since, or none that called the classifier. Call the model first; if a copy "
    "of it is trained, attach to that; if another layer makes its logits, name it, "
    "classifier=...; if it takes the classifier's weight without calling it, pass features and "
    "classifier to MVSCRegularizer; if it, or another model of its class, was compiled and called "
    "without a regularizer, its hooks do not run: attach before the first call, call "
    "torch.compiler.reset(), or set torch._dynamo.config.skip_nnmodule_hook_guards = False."
)
_EVALUATION = (
    "the last forward ran in evaluation mode. Call model.train() before it, or in validation leave "
    "reg(labels) out; if the model is in evaluation mode on purpose, as with frozen batch norm, "
    "put the classifier alone into training mode (and reg, if it is a part of the model), with "
    "model = model.module inside DistributedDataParallel: "
    "model.get_submodule({path!r}).train()."
)
_WITHOUT_GRADIENTS = (
    "the last forward ran without gradients. Leave torch.no_grad() for it, or in validation leave "
    "reg(labels) out; if it is checkpointed, set use_reentrant=False."
)
_USED_UP = (
    "those of the last forward are used up, and none of the attached model followed; if a copy of "
    "it is trained now, attach to that. Call reg(labels) or reg.terms(labels) once for "
    "each forward, and reg.total(terms) for the weighted sum. For two label maps of one forward, "
    "as in MixUp, pass features and classifier to MVSCRegularizer, once for each map; take the "
    "features from the model's parts, since reg.features is detached."
)
_FAILED = "the last forward failed. Call the model again."
DISCARDED = (
    "reg.discard() has forgotten the forwards since the last loss. Call reg(labels) after the "
    "forward that the labels belong to, and before the next one."
)
_TWO_FORWARDS = (
    "The classifier ran more than once since the last loss, so it is open which features belong "
    "to the labels. Call reg(labels) after each forward, before the next one, and add up, or "
    "reg.discard() after a forward that has no loss of its own. If the model itself calls it more "
    "than once, pass the features to MVSCRegularizer."
)
_NO_TENSOR = (
    "the classifier was called with a {kind} in place of a tensor. Pass features and a callable "
    "that classifies them to MVSCRegularizer."
)
_NO_GRADIENT = (
    "The features have no gradient, so the loss could not reach the encoder: all before the "
    "classifier is frozen, detached, or runs in a reentrant checkpoint; or the layer that was "
    "taken for it reads the image. Unfreeze it, set use_reentrant=False, or name another. To train "
    "the classifier alone, leave reg(labels) out and call reg.discard() when the rest trains, or "
    "pass features and classifier to MVSCRegularizer."
)
REPLACED = (
    "The classifier was replaced since it was attached, or has other sizes. Call detach() and "
    "attach again, with the state_dict() of this regularizer where classes and width stayed, and "
    "its param_group() for the optimizer; if the new one is more than a linear layer, pass "
    "features and classifier to MVSCRegularizer."
)
_CHANGED = (
    "The features were changed in place after they were taken. Make the operation that follows "
    "out of place (inplace=False), or pass the features to MVSCRegularizer yourself."
)
DATA_PARALLEL = (
    "model must not be in nn.DataParallel: its replicas run in threads and share one tap. "
    "Use DistributedDataParallel."
)


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
"""Where a module keeps what it calls around its forward, each by the number of a hook."""


class Hook:
    """A hook of mvsc on somebody's module, which does not go where the module is copied to.

    A copy, or a pickle of the whole model, has a hook of the standard library in its place that
    does nothing, so it is attached to nothing and can be loaded where there is no mvsc.

    Args:
        tap: with which it is taken off.
        call: what is to be called.
    """

    def __init__(self, tap: "Tap", call: Callable[..., Any]) -> None:
        self.tap, self.call = tap, call

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def taps_on(module: nn.Module) -> "set[Tap]":
    """Return the taps that are open and hear of a module's forward before it begins."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook)]
    return {hook.tap for hook in hooks if hook.tap.classifier is not None}


def strip(model: nn.Module) -> None:
    """Take every hook of mvsc off a model, also what stands in their place in a copy."""
    for module in model.modules():
        for number, hook in [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]:
            if isinstance(hook, Hook):
                hook.tap.close()
            elif not isinstance(getattr(hook, "__self__", None), nullcontext):
                continue
            for name in _HOOKS:
                vars(module)[name].pop(number, None)


class _Dropped(NamedTuple):
    """What a dropout gave in this forward, how often it was changed by then, and what entered."""

    output: Tensor
    version: int | None
    entered: Tensor


class Tap:
    """Hooks on a model that keep the features of its last forward until they are used.

    A copy of the tap, made with a copy of the model, is attached to nothing: an EMA or teacher
    model never writes into its student's tap, and no graph is ever copied.
    """

    model: Callable[[], nn.Module | None]
    owner: Callable[[], object | None]

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch = watch or Watch()
        self.classifier: nn.Module | None = None
        self.handles: list[RemovableHandle] = []
        self.working = False
        self.seen: Tensor | None = None
        self.padded: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.clear()

    def __reduce__(self) -> tuple[type["Tap"], tuple[()]]:
        return Tap, ()

    def open(self, model: nn.Module, path: str, owner: object) -> None:
        """Hook on to the classifier at ``path``; ``owner`` is who may use what comes out.

        Raises:
            ValueError: if somebody else is attached there.
        """
        for other in taps_on(model):
            if other.replaced():
                other.close()  # It would keep a layer alive that is no part of the model any more.
        entrance = _entrance(model, path)
        module = model.get_submodule(entrance)
        for other in taps_on(module):
            if other.owner() is not None:
                gc.collect()  # A Trainer that is gone, and holds it, is in cycles.
            if other.owner() is None:  # Nobody is left who could use or detach it.
                other.close()
            else:
                raise ValueError(
                    f"model must have one regularizer at a time, got one attached to {path!r} "
                    "already. Call its detach() first, or mvsc.detach(model) where nothing but "
                    "the traceback of an error holds it."
                )
        for dropout in _dropouts_near(model, path):
            before, after = Hook(self, self._before_dropout), Hook(self, self._after_dropout)
            self.handles += [
                dropout.register_forward_pre_hook(before, with_kwargs=True),
                dropout.register_forward_hook(after),
            ]
        before = Hook(self, self._before_classifier)
        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_pre_hook(Hook(self, self._before_model)),
            model.register_forward_hook(Hook(self, self._after_model), always_call=True),
        ]
        self.classifier = model.get_submodule(path)
        self.shape = _shape_of(self.classifier)
        self.model, self.owner, self.path = weakref.ref(model), weakref.ref(owner), path

    def clear(self, missing: str = NO_FORWARD) -> None:
        """Forget what was taken; ``missing`` says why there is nothing."""
        self.features: Tensor | None = None
        self.version: int | None = None
        self.forwards = 0
        self.behind_dropout = False
        self.missing = missing
        self.entering: Tensor | None = None
        self.dropped: list[_Dropped] = []

    def close(self) -> None:
        """Take every hook off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.classifier, self.seen = [], None, None
        self.clear()

    def use(self, call: Callable[..., Any], labels: Tensor, **options: Any) -> Any:
        """Return ``call(features, labels, classifier)``; the features are used up by it."""
        version, taken = self.version, self._take()
        classifier = cast(nn.Module, self.classifier)
        features = taken
        if self.padded is not None and isinstance(labels, Tensor):
            self.watch.notice_padding(*self.padded, tuple(labels.shape[1:]))
        if hasattr(features, "full_tensor"):
            features = features.full_tensor()  # of a classifier that tensor parallelism has split
        width = widths(classifier)[0]
        options["channels_last"] = is_channels_last(classifier, features.shape, width)
        self.working = True  # The call may ask the classifier too: that is no forward.
        try:
            return call(features, labels, classifier, **options)
        except (TypeError, ValueError):
            # A call that is refused is no step, and uses nothing up.
            self.features, self.version, self.forwards = taken, version, 1
            raise
        finally:
            self.working = False

    def look(self) -> Tensor:
        """Return the features of the last forward, of whatever mode, detached, channels first.

        Raises:
            RuntimeError: if there was none since the model was attached.
        """
        if self.classifier is None:
            raise RuntimeError(NOT_ATTACHED)
        seen = self.seen if self.features is None else self.features.detach()
        if seen is None:
            raise RuntimeError(
                "There are no features to look at: the model was not called since, or ran compiled "
                "in evaluation mode. Call it first."
            )
        last = is_channels_last(self.classifier, seen.shape, widths(self.classifier)[0])
        return seen.movedim(-1, 1) if last else seen

    def _take(self) -> Tensor:
        features, version = self.features, self.version
        forwards, missing = self.forwards, self.missing
        self.clear(missing if features is None else _USED_UP)
        if self.classifier is None:
            raise RuntimeError(NOT_ATTACHED)
        if not torch.compiler.is_compiling() and self.replaced():
            raise RuntimeError(REPLACED)
        if forwards > 1:
            raise RuntimeError(_TWO_FORWARDS)
        if features is None:
            raise RuntimeError(f"There are no features for this loss: {missing}")
        if not features.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        if version is not None and features._version != version:
            raise RuntimeError(_CHANGED)
        if not torch.compiler.is_compiling():
            self.seen = features.detach()
        return features

    def took(self, entered: Tensor) -> bool:
        """Return whether what entered the classifier in the end was taken, or came of that."""
        if self.features is None or self.behind_dropout:
            return True
        return _is_same(self.features, self.version, entered)

    def replaced(self) -> bool:
        """Return whether another layer stands where the classifier was, or one of other sizes."""
        model, classifier = self.model(), self.classifier
        try:
            same = model is None or model.get_submodule(self.path) is classifier
        except AttributeError:
            return True
        shape = None if classifier is None else _shape_of(classifier)
        return not same or (None not in (shape, self.shape) and shape != self.shape)

    def listens(self, module: nn.Module) -> bool:
        """Return whether a call of ``module`` is a part of a forward that is trained on.

        If not, the ledger notes why.
        """
        if self.classifier is None or self.working:
            return False
        if getattr(module, "_is_replica", False):
            raise RuntimeError(DATA_PARALLEL)
        if not torch.compiler.is_compiling() and not is_plain_eager():
            return False  # A backward replays the forward, in a checkpoint; or it is traced.
        training = self.classifier.training
        if training and torch.is_grad_enabled():
            return True
        self.missing = _WITHOUT_GRADIENTS if training else _EVALUATION.format(path=self.path)
        return False

    def _before_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and not is_replaying():
            self.seen = None  # Not a map longer than it has to be.

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.dropped = []  # No graph longer than it has to be.
        if torch.compiler.is_compiling() or output is not None or sys.exc_info()[0] is None:
            return
        if self.listens(module):  # The forward has failed: its graph goes before it is tried again.
            self.clear(_FAILED)

    # Quantization's swap_module takes a layer's hooks over without their wish for kwargs.
    def _before_dropout(self, module: _DropoutNd, args: Any, kwargs: Any = None) -> None:
        if self.listens(module):
            features = self._before_dropouts(_first(args, kwargs))
            self.entering = features.clone() if module.inplace else features

    def _after_dropout(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.listens(module) and self.entering is not None:
            self.dropped.append(_Dropped(output, _version_of(output), self.entering))
            self.entering = None

    def _before_dropouts(self, features: Tensor) -> Tensor:
        """Return what entered the dropout that gave these features; of several, the first one."""
        for dropped in self.dropped:
            if _is_same(dropped.output, dropped.version, features):
                return dropped.entered
        return features

    def _before_classifier(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        features = _first(args, kwargs)
        if not self.listens(module):
            if self.classifier is not None and not self.working and is_plain_eager():
                self.seen = features.detach() if isinstance(features, Tensor) else None
            return
        if not isinstance(features, Tensor):
            self.clear(_NO_TENSOR.format(kind=type(features).__name__))
            return
        # Whether a dropout near the classifier really precedes it shows here and only here.
        given, features = features, self._before_dropouts(features)
        self.behind_dropout = given is not features
        # Of two forwards neither is kept: a graph that nobody asks for would stay alive.
        self.forwards = min(self.forwards + 1, 2)
        self.features = features if self.forwards == 1 else None
        self.version, self.dropped = _version_of(features), []


def _entrance(model: nn.Module, path: str) -> str:
    """Return where the features come in: the classifier, or the layer that pads in front of it.

    The padding, by nothing for a 1x1 convolution, would hide that a dropout comes before.
    """
    parent = path.rpartition(".")[0]
    pads = {name for host in HOSTS for name in host.pads}
    return parent if type(model.get_submodule(parent)).__name__ in pads else path


def _dropouts_near(model: nn.Module, path: str) -> list[_DropoutNd]:
    """Return the dropouts that may come right before the classifier.

    Those that a module around it holds, and those in which a part of such a module ends: hooks all
    over an encoder would meet checkpointed and compiled blocks.
    """
    names = path.split(".")
    found = []
    for depth in range(len(names)):
        for part in model.get_submodule(".".join(names[:depth])).children():
            if part is model.get_submodule(path):
                continue
            # A dropout that several blocks share stands in each of them.
            modules = [module for _, module in part.named_modules(remove_duplicate=False)]
            leaves = [module for module in reversed(modules) if not [*module.children()]]
            found += [*takewhile(lambda leaf: isinstance(leaf, _DropoutNd | nn.Identity), leaves)]
    return [each for each in dict.fromkeys(found) if isinstance(each, _DropoutNd)]


def _shape_of(classifier: nn.Module) -> torch.Size | None:
    """Return the shape of a classifier's weight, if it is a parameter that nothing spreads."""
    weight = base_of(classifier)._parameters.get("weight")
    return weight.shape if type(weight) is nn.Parameter and not is_sharded(classifier) else None


def _version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place, which a compiled graph never does."""
    return None if torch.compiler.is_compiling() else tensor._version


def _is_same(one: Tensor, version: int | None, other: Tensor) -> bool:
    """Return whether a tensor is one as it was at that version; a backward hook makes a view."""
    if _version_of(other) != version:
        return False
    if torch.compiler.is_compiling() or one is other:
        return one is other
    bases = [each if each._base is None else each._base for each in (one, other)]
    places = [(each.storage_offset(), each.shape, each.stride()) for each in (one, other)]
    return bases[0] is bases[1] and places[0] == places[1]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    values = [*args, *(kwargs or {}).values()]  # torch 2.6 traces no default of next()
    return values[0] if values else None
