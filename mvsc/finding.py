"""Finding the pixel classifier of a segmenter, or saying why none is certain."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from mvsc.checks import sums_to_one
from mvsc.classifier import TRANSPOSED, base_of, is_pixel_linear, widths
from mvsc.comparing import SOFTMAX, classes_second, difference, logits_in, tensors_in
from mvsc.hosts import (
    ASIDE,
    Host,
    Refusal,
    host_of,
    is_no_segmenter,
    refusal,
    refused_whole,
    speaks_against,
)

logger = logging.getLogger("mvsc")

_SINGLE = "gives one logit, which stands for two classes"

_LISTED = 12

_CHANNELS = 4
"""Channels that an image may have, where nobody says so."""


class ClassifierNotFoundError(ValueError):
    """No pixel classifier could be told for certain; the message lists the candidates."""


def find_classifier(
    model: nn.Module,
    classifier: str | nn.Module | None = None,
    example: Any = None,
    num_classes: int | None = None,
) -> str:
    """Return the dotted path of the layer that turns a pixel's features into its logits.

    It is the one that is named; else the one of a known layout; else the only candidate. A
    segmenter of a known library with another layout is not guessed at.

    Args:
        model: the segmenter, unwrapped.
        classifier: a convolution or a Linear, or a module that holds just one; or its path.
        example: a batch, as in :func:`mvsc.attach`, that proves or finds the pick.
        num_classes: C, if it is known: of several candidates the only one of so many classes.

    Returns:
        Path of a convolution or a Linear.

    Raises:
        ClassifierNotFoundError: if no classifier is certain.
        ValueError: if ``classifier`` is no part of the model or no linear layer.
    """
    if classifier is not None:
        named = _linear_inside(model, _path_of(model, classifier))
        if _classifies_queries(model, named, refusal(model)):
            raise _not_found(model, {named: ""})
        return _not_lazy(model, named) if example is None else _prove(model, named, example)
    hosts = hosts_in(model)
    path = _path_in_host(model, *hosts[0]) if len(hosts) == 1 else None
    reader = None if path is None else _reader_behind(model, *hosts[0], path)
    if example is not None:
        return _prove(model, None if reader else path, example)
    if path is not None and reader is None:
        return path
    candidates = _candidates(model) if hosts else _outside_other_models(model, _candidates(model))
    why, refused = "", refusal(model)
    if path is not None:
        candidates = {path: f"{reader!r}, behind it, reads as many channels"} | candidates
        why = f"behind the classifier of {hosts[0][1].library}, or beside it"
    elif len(hosts) > 1:
        why = f"in one of {len(hosts)} segmenters"
    elif hosts:
        why = f"not where {hosts[0][1].library} keeps a pixel classifier"
    elif refused is not None and refused.types:
        why = "not the last layer"
    if why:
        listed = {p: why if reason in ("", _SINGLE) else reason for p, reason in candidates.items()}
        raise _not_found(model, listed)
    fit = [path for path, reason in candidates.items() if reason in ("", _SINGLE)]
    of = ""
    if len(fit) > 1 and num_classes is not None:
        fit = [path for path in fit if _width_given(model.get_submodule(path)) == num_classes]
        of = f" of {num_classes} classes"
    if len(fit) != 1 or _classifies_queries(model, fit[0], refused):
        given = {path: _width_given(model.get_submodule(path)) for path in fit}
        for path, reason in candidates.items():
            candidates[path] = reason or f"one of {len(fit)} that could be it"
            if num_classes is None and [*given.values()].count(given.get(path, 0)) == 1 < len(fit):
                candidates[path] += f"; num_classes={given[path]} takes it"
        raise _not_found(model, candidates)
    logger.warning(
        "took %r, the only candidate%s, for the classifier; example= proves it", fit[0], of
    )
    return _not_lazy(model, fit[0])


def _not_lazy(model: nn.Module, path: str) -> str:
    if any(map(is_lazy, model.get_submodule(path).parameters())):
        raise ValueError(
            f"classifier must know its sizes, got {path!r}, which is lazy and was not called. "
            "Run one forward first, or pass example=images."
        )
    return path


def _path_of(model: nn.Module, classifier: str | nn.Module) -> str:
    # A module that stands in several places has a name in each.
    named: list[tuple[str, nn.Module]] = [*model.named_modules(remove_duplicate=False)]
    paths = dict.fromkeys(path for path, _ in named)
    if not isinstance(classifier, str | nn.Module):
        raise TypeError(
            f"classifier must be a module of the model or its path, got {classifier!r}. "
            "Pass for example 'decode_head.classifier'."
        )
    if isinstance(classifier, nn.Module):
        for path, module in named:
            if module is classifier:
                return path
        raise ValueError(
            "classifier must be a module of the model, got a "
            f"{type(classifier).__name__} outside of it. Pass one that the model calls."
        )
    if classifier in paths:
        return classifier
    near = difflib.get_close_matches(classifier, paths, n=5, cutoff=0.4)
    there = near or [name for name, _ in _linear_layers(model)][-_LISTED:]
    raise ClassifierNotFoundError(
        f"classifier must be the path of a module of {type(model).__name__}, got {classifier!r}. "
        f"{'The nearest are' if near else 'Its last linear layers are'} "
        f"{', '.join(map(repr, there)) or 'none'}."
    )


def _linear_inside(model: nn.Module, path: str) -> str:
    """Return the path of the only layer with parameters at or below ``path``, if linear."""
    path = path.removesuffix(".base_layer")  # An adapter stands for what it adapts.
    module, names = _through_adapter(model.get_submodule(path), path.split("."))
    path = ".".join(names)
    if is_pixel_linear(module):
        return path
    if any(isinstance(layer, _ConvTransposeNd) for layer in module.modules()):
        raise ValueError(
            f"classifier must answer for each pixel alone, got {type(module).__name__} {path!r}. "
            f"{TRANSPOSED}"
        )
    layers = [
        (f"{path}.{name}".strip("."), layer)
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    if len(layers) == 1 and is_pixel_linear(layers[0][1]):
        return layers[0][0]
    found = ", ".join(f"{name} ({type(layer).__name__})" for name, layer in layers[-_LISTED:])
    raise ValueError(
        "classifier must be a convolution or a Linear, or hold just one, got "
        f"{type(module).__name__} {path!r} with {found or 'no parameters'}. "
        "Name the last linear layer alone, or pass the features to MVSCRegularizer."
    )


def hosts_in(model: nn.Module) -> list[tuple[str, Host]]:
    """Return path and library of each outermost segmenter of a known library in ``model``.

    One that is frozen, while other parts are trained, is a teacher.
    """
    hosts: list[tuple[str, Host]] = []
    trains = any(parameter.requires_grad for parameter in model.parameters())
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") or not outer for outer, _ in hosts):
            continue
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        if (host := host_of(module)) is not None and not (trains and frozen):
            hosts.append((path, host))
    return hosts


def _path_in_host(model: nn.Module, path: str, host: Host) -> str | None:
    for layout in host.classifiers:
        module, names = model.get_submodule(path), [path] if path else []
        for name in layout.split("."):
            module, names = _through_adapter(module, names)
            children = dict(module.named_children())
            listed = isinstance(module, nn.Sequential | nn.ModuleList)
            if name == "-1" and listed and children:
                name = next(reversed(children))
            if name not in children:
                break
            # What parameters follow would belong to a head of the user's own.
            after = list(children.values())[list(children).index(name) + 1 :]
            if isinstance(module, nn.Sequential) and any([*m.parameters()] for m in after):
                break
            module, names = children[name], [*names, name]
        else:
            module, names = _through_adapter(module, names)
            if is_pixel_linear(module):
                return ".".join(names)
    return None


def _reader_behind(model: nn.Module, outer: str, host: Host, path: str) -> str | None:
    """Return a layer that may read what the classifier at ``path`` gives: then it is none.

    So the user's own layers that come after it: outside of the host, or in a subclass of it.
    """
    library = type(model.get_submodule(outer)).__module__.partition(".")[0] == host.library
    given, behind = _width_given(model.get_submodule(path)), False
    for name, layer in model.named_modules():
        inside = not outer or name == outer or name.startswith(f"{outer}.")
        own = not (inside and library) and not name.startswith(f"{path}.")
        if behind and own and given > 1 and _width_read(layer) == given:
            return str(name)
        behind = behind or name == path
    return None


def _through_adapter(module: nn.Module, names: list[str]) -> tuple[nn.Module, list[str]]:
    """Step into the copy that PEFT trains in place of a module it was told to save."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or len(copies) != 1:
        return module, names
    (name,) = copies.keys()
    return copies[name], [*names, "modules_to_save", name]


def _candidates(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that no other layer reads from, with '' or what speaks against.

    Nothing follows a classifier, so nothing in the model is as wide as its classes; only the
    first layer, which reads the image, may be by chance. Layers with a single logit are no
    candidates, and returned only if there is no other.
    """
    # A linear layer with a parametrization has children too.
    layers = {
        path: module
        for path, module in model.named_modules()
        if (is_pixel_linear(module) or not [*module.children()])
        and not path.endswith(".base_layer")
    }
    read = [(path, _width_read(layer)) for path, layer in layers.items() if _width_read(layer)]
    candidates, single = {}, {}
    for path, layer in layers.items():
        width = _width_given(layer)
        if len(read) > 1 and path == read[0][0] and _width_read(layer) <= _CHANNELS:
            continue  # It reads the image.
        if width < 1 or any(width == other for reader, other in read[1:] if reader != path):
            continue
        if width == 1:
            single[path] = _SINGLE
            continue
        candidates[path] = ""
        if isinstance(layer, nn.Linear):
            candidates[path] = "a Linear, which may answer for something else than a pixel"
        candidates[path] = speaks_against(path) or candidates[path]
    return candidates or single


def _outside_other_models(model: nn.Module, candidates: dict[str, str]) -> dict[str, str]:
    """Return the candidates with what speaks against those inside a model of another kind."""
    for outer, module in model.named_modules():
        if not is_no_segmenter(module):
            continue
        why = f"a part of {type(module).__name__}, which is no segmenter that classifies pixels"
        for path, reason in candidates.items():
            if reason in ("", _SINGLE) and (not outer or path.startswith(f"{outer}.")):
                candidates[path] = why
    return candidates


def _width_read(layer: nn.Module) -> int:
    """Return how many channels a layer reads, 0 if it does not say."""
    for name in ("in_channels", "in_features", "num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    shape = getattr(layer, "normalized_shape", None)
    return int(shape[-1]) if shape else 0


def _width_given(layer: nn.Module) -> int:
    """Return how many channels a linear layer gives, 0 for any other."""
    if not is_pixel_linear(layer) or getattr(layer, "groups", 1) != 1:
        return 0
    return widths(layer)[1]


def _prove(model: nn.Module, path: str | None, example: Any) -> str:
    """Return ``path``, or else the only one, whose output in one forward is the logits.

    Of several parts that a model returns the first counts, as where others supervise deeper maps.
    But those of a list are all alike: where others are as large as the first, only a path that is
    known can be proved. So it is where other layers give parts of other classes, or of other names.
    """
    ran = _run(model, example)
    logits = ran.parts[0]
    wide = [name for name, layer in _linear_layers(model) if _fits(layer, logits)]
    names = dict.fromkeys([*wide, *([] if path is None else [path])])
    answers = {name: ran.outputs.get(model.get_submodule(name), []) for name in names}
    reasons = {name: difference(answers[name], logits) for name in names}
    refused = refusal(model)
    if path is None and refused is None and (sole := _of_several(model, ran)):
        return sole
    for name in names:
        # DETR's logits are those of its queries: proved, and yet no pixel's.
        if _classifies_queries(model, name, refused) or refused_whole(model):
            reasons[name] = reasons[name] or "not the last layer"
    rivals = [part for part in ran.parts[1:] if ran.alike and part.shape == logits.shape]
    if path is not None and reasons[path]:
        if any(not difference(answers[path], part) for part in rivals):
            return path
    elif path is None and rivals:
        reasons = {
            name: reason or f"its output is one of {1 + len(rivals)} maps of the logits' size"
            for name, reason in reasons.items()
        }
    proven = [name for name, reason in reasons.items() if not reason]
    if path in proven or (path is None and len(proven) == 1):
        return proven[0] if path is None else path
    fits = "its output is the logits"
    listed = {name: reason or fits for name, reason in reasons.items()}
    refuted = [name for name in reasons if reasons[name]]
    if _are_probabilities(logits):
        elsewhere = _outside_other_models(model, dict.fromkeys(names, ""))
        open_still = [n for n in refuted if not elsewhere[n]] if path is None else [path]
        refuted = [name for name in refuted if name not in open_still]
        for name in open_still:
            listed[name] += "; but the model returns probabilities, so no example can prove it"
    raise _not_found(model, listed, refuted)


def _of_several(model: nn.Module, ran: "_Run") -> str | None:
    """Return the classifier where layers of one model give several maps; None if the first counts.

    Raises:
        ClassifierNotFoundError: if more than one of these layers is read by nothing else.
    """
    if len(ran.parts) == 1:
        return None
    given: dict[str, Tensor] = {}
    for name, layer in _linear_layers(model):
        answers = ran.outputs.get(layer, [])
        for part in ran.parts:
            if name not in given and _fits(layer, part) and not difference(answers, part):
                given[name] = part
    first = ran.parts[0]
    others = [
        name
        for name, part in given.items()
        if part is not first
        and not speaks_against(name)
        and (ran.by_name or part.shape[1] != first.shape[1])
    ]
    if not others or not any(part is first for part in given.values()):
        return None
    candidates = _candidates(model)
    sole = [name for name in given if candidates.get(name) in ("", _SINGLE)]
    # Beside a mask, which is one logit, two or three channels may be offsets or colours.
    few = len(sole) == 1 and given[sole[0]].shape[1] in (2, 3)
    if len(sole) == 1 and not (few and any(part.shape[1] == 1 for part in given.values())):
        return sole[0]
    why = f"its output is one of {len(given)} maps that the model returns"
    raise _not_found(model, dict.fromkeys(given, why), [])


def _fits(layer: nn.Module, logits: Tensor) -> bool:
    """Return whether a layer gives as many classes as some axis of logits may be."""
    axes = {1, -1, *((2,) if logits.ndim == 5 else ())}  # five: also of frames
    width = _width_given(layer)
    return width in {logits.shape[axis] for axis in axes} or (width == 1 and logits.ndim == 3)


def _are_probabilities(logits: Tensor) -> bool:
    """Return whether nothing but a softmax, its logarithm or a sigmoid gives such values."""
    if bool(((logits >= 0) & (logits <= 1)).all()):
        return True
    negative = bool((logits <= 0).all())
    return negative and any(sums_to_one(logits.exp(), axis, SOFTMAX) for axis in (1, -1))


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if _width_given(module) and not path.endswith(".base_layer"):
            yield path, module


class _Run(NamedTuple):
    """What one forward gave."""

    outputs: dict[nn.Module, list[Tensor]]
    """The answers of each linear layer."""
    parts: list[Tensor]
    """What may be the logits."""
    alike: bool
    """Whether these are the parts of a list."""
    by_name: bool
    """Whether they have names, none of which is known."""


def _run(model: nn.Module, example: Any) -> _Run:
    """Run one forward that leaves no trace."""
    outputs: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.setdefault(module, []).append(classes_second(module, output))

    handles = [layer.register_forward_hook(note) for _, layer in _linear_layers(model)]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad(), _evaluating(model):
            if isinstance(example, Mapping):
                output = model(**example)
            else:
                output = model(*example) if isinstance(example, tuple | list) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    named = logits_in(output)
    parts = list(tensors_in(output if named is None else named))
    parts = [part for part in parts if 3 <= part.ndim <= 5]
    if not parts:
        first = output[0] if isinstance(output, tuple | list) and output else output
        came = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            "example must lead to logits of shape (batch, num_classes, *spatial), as the "
            f"model's output or a part of it, got {came}. Name the classifier and leave example "
            "out."
        )
    unknown = isinstance(output, Mapping) and named is None
    return _Run(outputs, parts, alike=isinstance(output, list), by_name=unknown)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and its state dict back in the end.

    Counters, and the observers of quantisation-aware training, move in evaluation mode too.
    """
    modes = {module: module.training for module in model.modules()}
    # Exchanged, not written back; of a tensor with two names there is one copy. What is not in
    # the state dict may be a cache, whose size a module keeps elsewhere.
    kept = [
        (module, name, buffer)
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    copies = {buffer: buffer.clone() for _, _, buffer in kept if not is_lazy(buffer)}
    for module, name, buffer in kept:
        module._buffers[name] = copies.get(buffer, buffer)
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # What a layer does in train(), as LoRA that unmerges, is done.
        for module, training in modes.items():
            module.training = training
        for module, name, buffer in kept:
            module._buffers[name] = buffer


def _classifies_queries(model: nn.Module, path: str, refused: Refusal | None) -> bool:
    """Return whether a layer's name is that of a query classifier, and no map can enter it."""
    maps = isinstance(base_of(model.get_submodule(path)), nn.Conv2d | nn.Conv3d)
    return refused is not None and not maps and not refused.modules.isdisjoint(path.split("."))


def _not_found(
    model: nn.Module, candidates: dict[str, str], refuted: Sequence[str] | None = None
) -> ClassifierNotFoundError:
    """Build the error: the candidates, why none was taken, and what to write instead.

    ``refuted`` are those that a forward spoke against, if there was one.
    """
    modules = dict(model.named_modules())
    refused = refusal(model)
    lines = [f"No pixel classifier is certain in {type(model).__name__}. Candidates:"]
    for path, reason in list(candidates.items())[-_LISTED:]:
        layer = modules[path]
        kind = type(layer).__name__
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kind += f" {'x'.join(map(str, layer.kernel_size))}"
        if _classifies_queries(model, path, refused):
            reason = "classifies queries, not pixels"
        lines.append(f"  {path}: {kind}, {_width_read(layer)} -> {_width_given(layer)}: {reason}")
    if not candidates:
        why = "whose output nothing else in the model reads"
        lines.append(f"  none: no linear layer {why if refuted is None else 'gives such logits'}")
    if refused is not None:
        return ClassifierNotFoundError("\n".join([*lines, refused.recipe]))
    aside = (*ASIDE.values(), "a Linear", "a part of")
    sensible = [
        path
        for path, reason in candidates.items()
        if path not in (refuted or ()) and not reason.startswith(aside)
    ]
    path = sensible[0] if len(sensible) == 1 else "path.of.the.layer"
    if sensible or not candidates or refuted is None:
        lines.append(
            "If one layer turns the features of each pixel into its logits, name it: "
            f'mvsc.attach(model, classifier="{path}").'
        )
    if refuted is None:
        lines.append(
            "Or let a forward find it: mvsc.attach(model, example=images), with a batch as the "
            "model takes it."
        )
    lines.append("Otherwise pass features and a classifier to MVSCRegularizer.")
    return ClassifierNotFoundError("\n".join(lines))
