"""Finding the pixel classifier of a segmenter, or saying why none is certain."""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvsc.checks import ONE_LOGIT

Linear = nn.Conv2d | nn.Linear

logger = logging.getLogger("mvsc")

_SEGMENTERS = {
    "mmseg": ("BaseSegmentor",),
    "segmentation_models_pytorch": ("SegmentationModel",),
    "torchvision": ("_SimpleSegmentationModel", "LRASPP"),
    "transformers": ("Segmentation",),
}
"""How the names of each library's segmenters, or of their base classes, end."""

_LAYOUTS = {
    "mmseg": ("decode_head.conv_seg", "decode_head.-1.conv_seg"),
    "segmentation_models_pytorch": ("segmentation_head.0", "segmentation_head.head.4"),
    "torchvision": ("classifier.-1",),
    "transformers": (
        "decode_head.classifier",
        "segmentation_head.classifier.convolution",
        "head.head.4",
        "decode_head.predictor",
        "decoder.head",
    ),
}
"""Where these segmenters keep their classifier; ``-1`` is the last of a list."""

_QUERY_CLASSIFIERS = {"class_predictor", "class_embed", "cls_embed", "class_labels_classifier"}

_QUERY_RECIPE = (
    "This model classifies queries. Give its pixel embedding an auxiliary 1x1 classifier, "
    "nn.Conv2d(dim, num_classes, 1), with a cross-entropy of its own, and pass the embedding and "
    "that classifier to MVSCRegularizer, as in examples/integrations/query_models.py."
)
_LRASPP_RECIPE = (
    "LRASPP adds two classifiers up. They are one 1x1 convolution on the concatenated features, "
    "which MVSCRegularizer takes, as in examples/integrations/torchvision_lraspp.py."
)

_SAME = 1e-3
"""Relative distance up to which a layer's resized output is taken for the logits."""

_SINGLE = "gives one logit, which stands for two classes"

_LISTED = 12


class ClassifierNotFoundError(ValueError):
    """No pixel classifier could be told for certain; the message lists the candidates."""


def find_classifier(
    model: nn.Module, classifier: str | nn.Module | None = None, example: Any = None
) -> str:
    """Return the dotted path of the layer that turns a pixel's features into its logits.

    It is the one that is named; else the one of a known layout; else the only candidate. A
    segmenter of a known library with another layout is not guessed at.

    Args:
        model: the segmenter, unwrapped.
        classifier: a Conv2d or a Linear, or a module that holds just one; or its path.
        example: a batch, as in :func:`mvsc.attach`, that proves or finds the pick.

    Returns:
        Path of a Conv2d or a Linear.

    Raises:
        ClassifierNotFoundError: if no classifier is certain.
        ValueError: if ``classifier`` is no part of the model or no linear layer.
    """
    if classifier is not None:
        named = _linear_inside(model, _path_of(model, classifier))
        return named if example is None else _prove(model, named, example)
    hosts = _hosts(model)
    path = _path_in_host(model, *hosts[0]) if len(hosts) == 1 else None
    if example is not None:
        return _prove(model, path, example)
    if path is not None:
        return path
    candidates = _candidates(model)
    if hosts:
        why = f"not where {hosts[0][1]} keeps a pixel classifier"
        if len(hosts) > 1:
            why = f"in one of {len(hosts)} segmenters"
        raise _not_found(model, dict.fromkeys(candidates, why))
    fit = [path for path, reason in candidates.items() if not reason]
    if len(fit) != 1:
        why = f"one of {len(fit)} that could be it"
        raise _not_found(model, {path: reason or why for path, reason in candidates.items()})
    logger.warning("took %r, the only candidate, for the classifier; example= proves it", fit[0])
    return fit[0]


def _path_of(model: nn.Module, classifier: str | nn.Module) -> str:
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    if not isinstance(classifier, str | nn.Module):
        raise TypeError(
            f"classifier must be a module of the model or its path, got {classifier!r}. "
            "Pass for example 'decode_head.classifier'."
        )
    if isinstance(classifier, nn.Module):
        if classifier not in paths:
            raise ValueError(
                "classifier must be a module of the model, got a "
                f"{type(classifier).__name__} outside of it. Pass one that the model calls."
            )
        return paths[classifier]
    if classifier in paths.values():
        return classifier
    near = difflib.get_close_matches(classifier, paths.values(), n=5, cutoff=0.4)
    raise ClassifierNotFoundError(
        f"classifier must be the path of a module of {type(model).__name__}, got "
        f"{classifier!r}. The nearest are {', '.join(map(repr, near)) or 'none'}."
    )


def _linear_inside(model: nn.Module, path: str) -> str:
    """Return the path of the only layer with parameters at or below ``path``, if linear."""
    module = model.get_submodule(path)
    if isinstance(module, Linear):
        return path
    layers = [
        (f"{path}.{name}".strip("."), layer)
        for name, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    if len(layers) == 1 and isinstance(layers[0][1], Linear):
        return layers[0][0]
    found = ", ".join(f"{name} ({type(layer).__name__})" for name, layer in layers[-_LISTED:])
    raise ValueError(
        "classifier must be a Conv2d or a Linear, or hold just one, got "
        f"{type(module).__name__} {path!r} with {found or 'no parameters'}. "
        "Name the last linear layer alone, or pass the features to MVSCRegularizer."
    )


def _hosts(model: nn.Module) -> list[tuple[str, str]]:
    """Return path and library of each outermost segmenter of a known library in ``model``."""
    hosts: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") or not outer for outer, _ in hosts):
            continue
        for base in type(module).__mro__:
            library = base.__module__.partition(".")[0]
            if base.__name__.endswith(_SEGMENTERS.get(library, ())):
                hosts.append((path, library))
                break
    return hosts


def _path_in_host(model: nn.Module, path: str, library: str) -> str | None:
    for layout in _LAYOUTS[library]:
        module, names = model.get_submodule(path), [path] if path else []
        for name in layout.split("."):
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
            if isinstance(module, Linear):
                return ".".join(names)
    return None


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
        if isinstance(module, Linear) or not [*module.children()]
    }
    read = [(path, _width_read(layer)) for path, layer in layers.items() if _width_read(layer)]
    candidates, single = {}, {}
    for path, layer in layers.items():
        width = _width_given(layer)
        if width < 1 or any(width == other for reader, other in read[1:] if reader != path):
            continue
        if width == 1:
            single[path] = _SINGLE
            continue
        candidates[path] = ""
        if not isinstance(layer, nn.Conv2d):
            candidates[path] = "a Linear, which may answer for something else than a pixel"
        if "aux" in path.lower():
            candidates[path] = "auxiliary, by its name"
    return candidates or single


def _width_read(layer: nn.Module) -> int:
    """Return how many channels a layer reads, 0 if it does not say."""
    for name in ("in_channels", "in_features", "num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    shape = getattr(layer, "normalized_shape", None)
    return int(shape[-1]) if shape else 0


def _width_given(layer: nn.Module) -> int:
    """Return how many channels a linear layer gives, 0 for any other."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels if layer.groups == 1 else 0
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _prove(model: nn.Module, path: str | None, example: Any) -> str:
    """Return ``path``, or else the only one, whose output in one forward is the logits."""
    outputs, logits = _run(model, example)
    wide = [name for name, m in model.named_modules() if _width_given(m) == logits.shape[1]]
    names = dict.fromkeys([*wide, *([] if path is None else [path])])
    reasons = {name: _difference(outputs.get(name, []), logits) for name in names}
    proven = [name for name, reason in reasons.items() if not reason]
    if path in proven or (path is None and len(proven) == 1):
        return proven[0] if path is None else path
    fits = "its output is the logits"
    listed = {name: reason or fits for name, reason in reasons.items()}
    raise _not_found(model, listed, refuted=[name for name in reasons if reasons[name]])


def _run(model: nn.Module, example: Any) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Run one forward that leaves no trace; return each linear layer's outputs and the logits."""
    outputs: dict[str, list[Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.setdefault(path, []).append(output)

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if _width_given(module)
    ]
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
    if isinstance(output, Mapping):
        output = output["out"] if "out" in output else output.get("logits")
    elif isinstance(output, tuple | list):
        output = output[0]
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 4:
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            "example must lead to logits of shape (batch, num_classes, height, width), as the "
            f"model's output, its 'out', 'logits' or first part, got {came}. "
            "Name the classifier and leave example away."
        )
    return outputs, output


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _difference(outputs: list[Tensor], logits: Tensor) -> str:
    """Say why the outputs of a layer are not the logits; '' if they are, up to a resize."""
    if len(outputs) != 1:
        return f"called {len(outputs)} times in one forward"
    (output,) = outputs
    if output.ndim == 4 and output.shape[1] != logits.shape[1]:
        output = output.movedim(-1, 1)  # A Linear answers in the last axis.
    if output.ndim != 4 or output.shape[:2] != logits.shape[:2]:
        return f"gives {tuple(outputs[0].shape)}, the logits are {tuple(logits.shape)}"
    output, logits = output.double(), logits.double()
    distance = min(
        float(
            (
                F.interpolate(output, logits.shape[2:], mode="bilinear", align_corners=a) - logits
            ).norm()
        )
        for a in (False, True)
    )
    # The tolerance is relative: at random weights all logits of some models are tiny.
    return "" if distance <= _SAME * float(logits.norm()) else "its output is not the logits"


def _not_found(
    model: nn.Module, candidates: dict[str, str], refuted: Sequence[str] = ()
) -> ClassifierNotFoundError:
    """Build the error: the candidates, why none was taken, and what to write instead."""
    modules = dict(model.named_modules())
    queries = [path for path in modules if path.split(".")[-1] in _QUERY_CLASSIFIERS]
    lines = [f"No pixel classifier is certain in {type(model).__name__}. Candidates:"]
    for path, reason in list(candidates.items())[-_LISTED:]:
        layer = modules[path]
        kind = type(layer).__name__
        if isinstance(layer, nn.Conv2d):
            kind += f" {layer.kernel_size[0]}x{layer.kernel_size[1]}"
        reason = "classifies queries, not pixels" if path in queries else reason
        lines.append(f"  {path}: {kind}, {_width_read(layer)} -> {_width_given(layer)}: {reason}")
    if not candidates:
        lines.append("  none: no Conv2d or Linear whose output nothing else in the model reads")
    if queries:
        lines.append(_QUERY_RECIPE)
    elif any(type(module).__name__ == "LRASPPHead" for module in modules.values()):
        lines.append(_LRASPP_RECIPE)
    elif _SINGLE in candidates.values():
        lines.append(ONE_LOGIT)
    else:
        named = [path for path in candidates or ["path.to.it"] if path not in refuted]
        if named:
            line = f'mvsc.attach(model, classifier="{named[-1]}")'
            lines.append(
                f"If one layer turns the features of each pixel into its logits, name it: {line}."
            )
        lines.append("Otherwise pass features and a classifier to MVSCRegularizer.")
    return ClassifierNotFoundError("\n".join(lines))
