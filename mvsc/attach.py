"""Three lines for any segmenter: find the pixel classifier and tap the features it reads."""

import inspect
import logging
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from mvsc.add_to_loss import AddToLoss
from mvsc.classifier import is_pixel_linear, is_plain, is_sharded, tensors_of, widths
from mvsc.comparing import Verdict, classes_second, compare, is_one_of_several, sizes_of
from mvsc.equations import MVSCTerms
from mvsc.finding import ClassifierNotFoundError, find_classifier, hosts_in
from mvsc.hosts import HOSTS, is_auxiliary
from mvsc.regularizer import MVSCRegularizer
from mvsc.running import is_capturing
from mvsc.tap import DATA_PARALLEL, DISCARDED, Hook, Tap, strip
from mvsc.watch import warn

__all__ = ["AttachedRegularizer", "ClassifierNotFoundError", "attach", "detach"]

logger = logging.getLogger("mvsc")

_PRE_HOOKED = (
    "a forward pre-hook on the classifier changes what enters it, after it was taken. Attach when "
    "that hook is there."
)
_HOOKED = (
    "a forward hook on the classifier changes its answer, and L_v asks the layer without hooks, "
    "which are not to see the centroids. Make it a part of a callable, and pass features and that "
    "to MVSCRegularizer."
)

_SEVERAL = (
    "the model returns several maps, of other classes than those of {path!r}, the only layer that "
    "could be told for the classifier. Name the one that makes the logits of these labels: "
    "classifier={path!r}, if it is this one."
)

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

    The classifier is the one that is named; else the one of a known library's
    layout (mvsc/hosts.py has the table); else the only candidate.
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
            loss. ``num_classes`` and ``dim`` are the classifier's; if given, they have to be, and
            of several candidates the only one of so many classes is taken. One logit is two
            classes.

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
    path = find_classifier(model, classifier, example, options.get("num_classes"))
    layer = model.get_submodule(path)
    _notice_adapter(model, path, layer)
    options = _options_of_config(model, path) | options
    dim, logits = widths(layer)
    sizes = {"dim": dim, "num_classes": max(logits, 2)}  # one logit stands for two classes
    for name, found in sizes.items():
        if options.get(name, found) != found:
            one = ", whose one logit stands for two classes" * (found != logits and name != "dim")
            raise ValueError(
                f"{name} must be that of the classifier, {found} of {path!r}{one}, got "
                f"{options[name]}. Name another layer, classifier=...; if the model makes logits "
                "of this one's answer, pass features and a callable to MVSCRegularizer."
            )
    regularizer = MVSCRegularizer(groups=groups, **(options | sizes))
    device = tensors_of(layer)[0].device
    guessed = classifier is example is None and not hosts_in(model)
    return AttachedRegularizer(model, path, regularizer.to(device), add_to_loss, guessed)


def detach(model: nn.Module) -> None:
    """Take off a model whatever was attached to it, whoever holds the regularizer.

    For what nobody can call ``detach()`` of: a regularizer that only the traceback of an error
    holds, and the idle hooks of a model that was copied or pickled while it was attached, which
    torch.jit.script cannot read. Nothing happens where nothing is attached.

    Args:
        model: the segmenter; also inside DistributedDataParallel or ``torch.compile``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1))
        >>> lost = attach(model, classifier="1")
        >>> detach(model)
        >>> reg = attach(model, classifier="1")
    """
    strip(_unwrap(model))


class AttachedRegularizer(nn.Module):
    """A regularizer that takes its features from the model's own forward.

    Made by :func:`attach`. Call it once after each forward in training mode; what cannot be
    meant (no forward since the last call, two of them, features without gradient) is an error.
    As a context manager it detaches on leaving. Its state, ``regularizer.centroids``,
    ``regularizer.step`` and what an optimizer of their own keeps, is to be saved beside the
    model's; settings are those of ``regularizer``. A copy or an unpickled one is attached to
    nothing.

    Attributes:
        regularizer: the :class:`MVSCRegularizer`.
        classifier_path: dotted path of the classifier in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        regularizer: MVSCRegularizer,
        add_to_loss: bool,
        guessed: bool = False,
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.classifier_path = path
        # The tap is no module: the model must not become a part of its own regularizer.
        self._tap = Tap(regularizer._watch)
        self._tap.open(model, path, self)
        _FirstForward(self._tap, guessed).open(model)
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

    def __getattr__(self, name: str) -> Any:
        """Say where that is which only the regularizer inside has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inside = self.__dict__.get("_modules", {}).get("regularizer")
            if inside is None or name.startswith("_") or not hasattr(inside, name):
                raise
        raise AttributeError(
            f"{name} belongs to the regularizer inside. Use reg.regularizer.{name}."
        )

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
        self._tap.clear(DISCARDED)

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


class _FirstForward:
    """A client of the tap that sees, in the first training forward, whether the pick is sound.

    What leaves the classifier has to be what the model returns, up to a resize, where it returns
    logits at all; of several maps the first, where the pick was a guess. If so, each of the first
    sizes shows whether the model pads its images: those of the first forward may need no padding.
    Costs one comparison for each of these sizes.
    """

    def __init__(self, tap: Tap, guessed: bool) -> None:
        self.tap, self.guessed = tap, guessed
        self.answer: Tensor | None = None
        self.verdicts: dict[Any, Verdict] = {}

    def open(self, model: nn.Module) -> None:
        classifier = cast(nn.Module, self.tap.classifier)
        self.handles = [
            classifier.register_forward_hook(Hook(self.tap, self._after_classifier)),
            model.register_forward_hook(Hook(self.tap, self._after_model)),
        ]
        self.tap.handles += self.handles

    def _after_classifier(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self.tap.listens(module):
            tensor = isinstance(output, Tensor)
            if not self.verdicts:
                self._notice_hook(module, args, output)
            self.answer = classes_second(module, output.detach()) if tensor else None

    def _notice_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Warn if a hook of somebody else has changed what entered the layer, or its answer."""
        if args and isinstance(args[0], Tensor) and not self.tap.took(args[0]):
            self.tap.watch.say("pre-hook", _PRE_HOOKED)
        others = [hook for hook in module._forward_hooks.values() if not isinstance(hook, Hook)]
        if not others or not args or not is_plain(module) or is_sharded(module):
            return
        if not isinstance(output, Tensor) or is_capturing(output.device) or 0 in output.shape:
            return
        with torch.no_grad(), suppress(RuntimeError):  # Of tensors without values.
            alone, answer = module.forward(args[0][:1]).float(), output[:1].float()
            near = 0.05 * float(alone.abs().max())
            same = alone.shape == answer.shape
            if same and not torch.allclose(alone, answer, atol=near, rtol=0, equal_nan=True):
                self.tap.watch.say("hook", _HOOKED)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        answer, self.answer = self.answer, None
        if torch.compiler.is_compiling() or answer is None or not self.tap.listens(module):
            return
        if is_capturing(answer.device):
            return
        if self.tap.forwards != 1:
            return  # The tap has better words for that, and for another layer in its place.
        self.tap.padded, found = None, None
        try:
            sizes = sizes_of(answer, output)
            if sizes in self.verdicts:
                self.tap.padded = self.verdicts[sizes].padded
                return
            if len(self.verdicts) == _SIZES_COMPARED or self.tap.replaced():
                return
            found = compare(answer, output)
        except RuntimeError:  # Of tensors without values, or on which little is defined.
            pass
        if found is not None and not found.reason:
            if self.guessed and is_one_of_several(answer, output):
                self.tap.watch.say("several", _SEVERAL.format(path=self.tap.path))
            self.verdicts[sizes], self.tap.padded = found, found.padded
            return
        for handle in self.handles:
            handle.remove()
        # An auxiliary head, which somebody has named, answers for itself.
        named = is_auxiliary(self.tap.path)
        if found is not None and (found.certain or not self.verdicts) and not named:
            warn(
                f"the classifier {self.tap.path!r} of {type(module).__name__} may be the wrong one "
                f"for this loss: {found.reason}"
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


def _notice_adapter(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Warn if a module around a frozen classifier trains what it adds to it, as LoRA does."""
    outer = path.rpartition(".")[0]
    around = model.get_submodule(outer)
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return
    parts = [part for part in around.children() if [*part.parameters()] and part is not layer]
    low_rank = (
        len(parts) == 2
        and all(map(is_pixel_linear, parts))
        and (widths(parts[0])[0], widths(parts[1])[1]) == widths(layer)
    )
    trained = any(parameter.requires_grad for parameter in around.parameters())
    if trained and (low_rank or not parts):
        warn(
            f"the classifier {path!r} is frozen, and {type(around).__name__} around it trains "
            "parameters of its own, as an adapter does. L_v asks the frozen layer alone. Pass the "
            f"features and model.get_submodule({outer!r}) to MVSCRegularizer."
        )


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
