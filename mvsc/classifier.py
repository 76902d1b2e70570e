"""How to ask somebody else's classifier about a vector (reading R13).

The classifier is the model's own last layer: a 1 x 1 map of a pixel, a wider convolution, a layer
whose weight is computed or spread over processes, or any callable. It is asked so that nothing of
the model notices: neither its hooks nor its buffers see the centroids.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from mvsc import checks, distributed
from mvsc.running import is_capturing

Classifier = nn.Module | Callable[[Tensor], Tensor]

PixelLinear = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""A layer that maps the features of each pixel, and with a wide kernel of its neighbours, too."""

# A tuple, since the compiler of torch 2.6 cannot ask for a union.
_PIXEL_LINEAR = get_args(PixelLinear)

_CONVOLVES = (
    None,  # a Linear's
    nn.Conv1d._conv_forward,
    nn.Conv2d._conv_forward,
    nn.Conv3d._conv_forward,
)

AUXILIARY = "an auxiliary 1x1 classifier that has a cross-entropy of its own"
"""What helps where a head gives a place of the features several answers."""

GIVE_IT_ONE = (
    f"{AUXILIARY}, and pass both to MVSCRegularizer, as in "
    "examples/integrations/monai_transposed_head.py of mvsc's repository."
)
"""What to do for features of which no layer makes logits, pixel by pixel."""

TRANSPOSED = (
    "A transposed convolution gives the places of a pixel different logits, so no answer for a "
    f"pixel alone exists. Give the features that enter it {GIVE_IT_ONE}"
)

_FAILED = (
    "classifier must give logits for centroids of shape {shape}, each a map of one place, in "
    "{dtype}, and raised {error!r}. Pass the model's own layer; or a callable that takes them "
    "alone, casts them, and flattens them where it reads rows: "
    "lambda v: F.linear(v.flatten(1).to(weight.dtype), weight)."
)

_MIXING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

# Of two threads that share a classifier the one would keep what the other had taken off.
_LOCK = threading.RLock()

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

_WIDEST = 100
"""Places in an axis that a classifier may be asked about: each centroid is so large a map then."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer inside an adapter (LoRA), which stands for it; any other module itself."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Module) else module


def is_pixel_linear(module: nn.Module) -> bool:
    """Return whether a module maps the features of each pixel linearly to logits.

    A transposed convolution of kernel and stride 1 is a 1x1 convolution.
    """
    layer = base_of(module)
    return isinstance(layer, _PIXEL_LINEAR) or (
        isinstance(layer, _ConvTransposeNd) and not _spreads(layer)
    )


def widths(module: nn.Module) -> tuple[int, int]:
    """Return how many features a layer for which :func:`is_pixel_linear` holds reads and gives."""
    layer: Any = base_of(module)
    weight = layer._parameters.get("weight")
    plain = type(layer) in _PIXEL_LINEAR and type(weight) is nn.Parameter
    if plain and getattr(layer, "groups", 1) == 1 and weight.ndim > 1:
        # Where classes were cut off a pretrained layer, what it says of itself is stale.
        return weight.shape[1], weight.shape[0]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _modules(classifier: object) -> list[nn.Module]:
    """Return the modules of a classifier that is one."""
    return [*classifier.modules()] if isinstance(classifier, nn.Module) else []


def reads_rows(classifier: object) -> bool:
    """Return whether a classifier reads its features in the last axis, as an nn.Linear does."""
    if isinstance(classifier, _PIXEL_LINEAR) or not isinstance(classifier, nn.Module):
        return isinstance(classifier, nn.Linear)
    kinds = [type(m) for m in classifier.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    return bool(kinds) and all(issubclass(kind, nn.Linear) for kind in kinds)


def is_channels_last(layer: nn.Module, shape: torch.Size, width: int) -> bool:
    """Return whether a layer's map of that shape, ``width`` wide, has its channels last.

    As a Linear's, unless it was made to read them first, as VMamba's.
    """
    first = len(shape) > 2 and shape[1] == width != shape[-1]
    return reads_rows(layer) and not first


def reads_axes(classifier: object) -> int | None:
    """Return how many spatial axes the convolutions of a module read; None if it has none."""
    for layer in _modules(classifier):
        if isinstance(layer, _ConvNd):
            return len(layer.kernel_size)
    return None


def without_margin(classifier: object, features: Tensor) -> Tensor:
    """Return the features at which logits have their centre: a view, all of them as a rule.

    A convolution that pads too little, as behind a ReflectionPad2d, gives a smaller map than it
    reads, and the labels are those of that map.
    """
    layer = base_of(classifier) if isinstance(classifier, nn.Module) else None
    if not isinstance(layer, _PIXEL_LINEAR) or not _computes_as_torch(layer):
        return features
    sizes = () if isinstance(layer, nn.Linear) else layer.kernel_size
    if len(sizes) != features.ndim - 2 or any(step != 1 for step in layer.stride):
        return features
    pads = layer._reversed_padding_repeated_twice[::-1]  # of each axis the end, then the start
    for axis, (k, dilation) in enumerate(zip(sizes, layer.dilation, strict=True)):
        end, start = pads[2 * axis : 2 * axis + 2]
        first = max(dilation * (k - 1) // 2 - start, 0)
        left = features.shape[axis + 2] + start + end - dilation * (k - 1)
        if 0 < left < features.shape[axis + 2]:
            features = features.narrow(axis + 2, first, left)
    return features


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module, and then its buffers: a weight that is fixed is one."""
    return [*module.parameters(), *module.buffers()]


def is_sharded(module: object) -> bool:
    """Return whether a module's weight is spread over processes (FSDP2, tensor parallel, ZeRO-3).

    What its hooks do must not be left out.
    """
    # Not module.weight: where spectral_norm computes it, to ask is a power iteration.
    own = getattr(module, "_parameters", {}).values()
    return any(hasattr(each, "full_tensor") or hasattr(each, "ds_id") for each in own)


def check_classifier(classifier: object, dim: int, num_classes: int, axes: int) -> None:
    """Raise unless ``classifier`` can turn ``dim`` features into ``num_classes`` logits.

    Args:
        classifier: what came.
        dim: D.
        num_classes: C.
        axes: number of spatial axes of the features.

    Raises:
        TypeError: if it is not callable.
        ValueError: if its sizes do not fit, or it has no answer for a pixel alone.
    """
    if not callable(classifier):
        raise TypeError(
            "classifier must be the model's last layer, a convolution, a Linear or a callable, "
            f"got {checks.describe(classifier)}. Pass for example model.decode_head.classifier."
        )
    if isinstance(classifier, nn.Embedding):
        raise ValueError(
            "classifier must map features to logits, got an nn.Embedding, which reads indices. "
            "Pass lambda v: v.flatten(1) @ embedding.weight.T."
        )
    if not isinstance(classifier, nn.Module):
        return  # Its output is checked when it has been called.
    convolutions = [layer for layer in classifier.modules() if isinstance(layer, _ConvNd)]
    for layer in convolutions:
        if isinstance(layer, _ConvTransposeNd) and _spreads(layer):
            raise ValueError(f"classifier must answer for each pixel alone. {TRANSPOSED}")
    # One of several may go over channels, as in an attention.
    if convolutions and all(len(layer.kernel_size) != axes for layer in convolutions):
        layer = convolutions[-1]
        raise ValueError(
            f"classifier must have as many spatial axes as the features, {axes}, got a "
            f"{type(layer).__name__}. Pass the map as the classifier reads it: "
            f"{_as_read(axes, len(layer.kernel_size))}."
        )
    last = _last_of(classifier)
    if isinstance(last, (nn.Softmax, nn.Softmax2d, nn.Sigmoid)):
        raise ValueError(_ends_in(type(last).__name__))
    if not is_pixel_linear(classifier):
        return
    width, classes = widths(classifier)
    if width != dim:
        if any(map(is_lazy, classifier.parameters())):
            raise ValueError(
                f"classifier must know its sizes, got a {type(classifier).__name__} that was not "
                "called. Run one forward of the model first."
            )
        raise ValueError(
            f"classifier must take dim={dim} features, got one that takes {width}. "
            "Pass the layer that reads the features you pass."
        )
    if classes != num_classes and not _is_one_logit(classes, num_classes):
        raise ValueError(_wrong_classes(num_classes, classes))


def what_mixes(classifier: object) -> str:
    """Say what a batch or instance norm in the classifier does to the centroids, or ''."""
    modules = classifier.named_modules() if isinstance(classifier, nn.Module) else ()
    found = [
        f"{name or type(module).__name__} ({type(module).__name__})"
        for name, module in modules
        if isinstance(module, _MIXING) and (module.training or module.running_mean is None)
    ]
    if not found:
        return ""
    return (
        f"classifier contains {', '.join(found)}, which would normalise the centroids by their own "
        "statistics. Pass the last linear layer alone."
    )


def classify_vectors(
    classifier: Classifier, vectors: Tensor, num_classes: int, axes: int = 2
) -> Tensor:
    """Ask the model's classifier for the class of each of N vectors (R13).

    A convolution of any kernel answers as inside a uniform region. A classifier of a single logit
    z stands for two classes with the logits (0, z).

    Args:
        classifier: see :meth:`mvsc.MVSCRegularizer.forward`.
        vectors: shape ``(N, dim)``, floating.
        num_classes: C.
        axes: number of spatial axes of the map that the classifier reads.

    Returns:
        Logits, shape ``(N, num_classes)``, in the dtype of the vectors.

    Raises:
        TypeError: if it does not return a tensor.
        ValueError: if it does not return a logit for each vector and class.

    Example:
        >>> conv = nn.Conv2d(8, 3, 3, padding=1)
        >>> classify_vectors(conv, torch.randn(5, 8), num_classes=3).shape
        torch.Size([5, 3])
    """
    if is_plain(classifier):
        weight, bias = _whole(classifier.weight), _whole(classifier.bias)
        # A wide kernel is summed: the convolution itself would pad the vector with zeros and
        # leave only the centre tap.
        weight = weight.flatten(1) if weight[0, 0].numel() == 1 else weight.flatten(2).sum(dim=2)
        logits = F.linear(vectors.to(weight.dtype), weight, bias)
    else:
        logits = _call(classifier, vectors, num_classes, axes)
    logits = logits.reshape(len(vectors), -1).to(vectors.dtype)
    if logits.shape[1] == num_classes:
        return logits
    if not _is_one_logit(logits.shape[1], num_classes):
        raise ValueError(_wrong_classes(num_classes, logits.shape[1]))
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def _call(classifier: Classifier, vectors: Tensor, num_classes: int, axes: int) -> Tensor:
    """Ask a classifier whose arithmetic is its own affair, by calling it."""
    tensors = tensors_of(classifier) if isinstance(classifier, nn.Module) else []
    dtypes = [each.dtype for each in tensors if each.is_floating_point()]
    inputs = vectors.to(dtypes[0] if dtypes else vectors.dtype)
    regions = [] if reads_rows(classifier) else _regions(classifier, axes)
    if regions:
        sizes = [region.size for region in regions]
        inputs = inputs.reshape(*inputs.shape, *[1] * axes).repeat(1, 1, *sizes)
    try:
        with _leaving_no_trace(classifier), _private_randomness(inputs.device):
            logits = _answer(classifier, inputs, axes)
    except (TypeError, RuntimeError) as error:
        # What goes wrong inside a module that could be called says more by itself.
        whole = isinstance(classifier, nn.Module) and not isinstance(error, TypeError)
        if whole or isinstance(error, torch.OutOfMemoryError):
            raise
        told = _FAILED.format(shape=tuple(inputs.shape), dtype=inputs.dtype, error=error)
        raise ValueError(told) from error
    logits = _centre(logits, len(vectors), num_classes, regions)
    if not torch.compiler.is_compiling() and _are_chances(logits.detach()):
        raise ValueError(_ends_in("a softmax"))
    return logits


def _answer(classifier: Classifier, inputs: Tensor, axes: int) -> Any:
    """Call a classifier; a module that fails is asked about rows in place of maps, or maps.

    Nothing tells which of them is read by one that permutes around a Linear, or has a weight of its
    own.
    """
    try:
        return _without_dropout(classifier, inputs)
    except (RuntimeError, IndexError) as error:
        known = not isinstance(classifier, nn.Module) or _computes_as_torch(classifier)
        if known or isinstance(error, torch.OutOfMemoryError):
            raise
        maps = inputs.ndim > 2
        other = inputs.flatten(2)[..., 0] if maps else inputs.reshape(*inputs.shape, *[1] * axes)
        try:
            answer = _without_dropout(classifier, other)
        except Exception:
            raise error from None
        return answer.flatten(1) if isinstance(answer, Tensor) else answer


def _without_dropout(classifier: Classifier, inputs: Tensor) -> Any:
    """Call a classifier with its dropouts off (R13)."""
    dropouts = [m for m in _modules(classifier) if isinstance(m, _DropoutNd) and m.training]
    for dropout in dropouts:
        dropout.training = False
    try:
        return classifier(inputs)
    finally:
        for dropout in dropouts:
            dropout.training = True


def is_plain(classifier: object) -> TypeGuard[PixelLinear]:
    """Return whether a classifier is a linear map whose weights can be used without calling it.

    A subclass, or one whose forward was replaced, may do more. A weight that is no parameter is
    what a hook or a property left there (pruning, weight_norm, spectral_norm), maybe long ago.
    """
    if not isinstance(classifier, _PIXEL_LINEAR):
        return False
    matrix = _stores_weights(classifier) and getattr(classifier, "groups", 1) == 1
    return _computes_as_torch(classifier) and matrix and not _gathers_by_itself(classifier)


def _computes_as_torch(layer: nn.Module) -> bool:
    """Return whether a linear layer's forward is torch's own, of whatever weight."""
    forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)
    # The compiler cannot ask an instance for its own forward.
    own = not torch.compiler.is_compiling() and "forward" in vars(layer)
    convolves = getattr(type(layer), "_conv_forward", None)  # not if it standardises weights
    return type(layer).forward in forwards and not own and convolves in _CONVOLVES


def _stores_weights(layer: nn.Module) -> bool:
    """Return whether neither weight nor bias is what a hook or a property has computed."""
    return {"weight", "bias"} <= layer._parameters.keys()


def _gathers_by_itself(classifier: nn.Module) -> bool:
    """Return whether a layer is sharded, and gathers its weights when it is called.

    So ZeRO-3's, and one to which FSDP2 was applied alone, which has a class of its own. Those of a
    whole that FSDP2 shards are gathered by the model's forward only, which is over.
    """
    if not is_sharded(classifier):
        return False
    return hasattr(classifier.weight, "ds_id") or type(classifier) not in _PIXEL_LINEAR


def _whole(parameter: Any) -> Any:
    return distributed.gather(parameter) if hasattr(parameter, "full_tensor") else parameter


class _Region(NamedTuple):
    """In one axis, of how many places a classifier is asked, and of how many it may answer."""

    size: int
    least: int
    most: int


def _regions(classifier: Classifier, axes: int) -> list[_Region]:
    """Return the uniform region, axis by axis, in whose centre a classifier sees no padding.

    However the padding is divided between both sides, and whatever the strides. What pools or
    upsamples in between answers of too few places or too many.
    """
    seen = [(1, 1)] * axes  # How many places a pixel's answer looks at, and how far it is apart.
    for layer in _modules(classifier):
        if isinstance(layer, _ConvNd) and len(layer.kernel_size) == axes:
            kernel: Any = layer.kernel_size
            dilation, stride = layer.dilation, layer.stride
        elif isinstance(layer, _POOLS) and layer.stride in (1, (1,) * axes):
            kernel, dilation, stride = layer.kernel_size, (1,) * axes, (1,) * axes
            kernel = (kernel,) * axes if isinstance(kernel, int) else kernel
        else:
            continue
        each = zip(seen, kernel, dilation, stride, strict=True)
        seen = [(n + s * apart * (k - 1), s * step) for (n, s), k, apart, step in each]
    sizes = [2 * (n + s) - 3 for n, s in seen]
    if max(sizes) > _WIDEST:
        raise ValueError(
            "classifier must be the model's last layer, got one whose convolutions reach over "
            f"{max(n for n, _ in seen)} places, one after the other. Pass the last linear layer "
            "alone, and the features that enter it."
        )
    return [
        _Region(size, (size - n) // s + 1, (size - 1) // s + 1)
        for size, (n, s) in zip(sizes, seen, strict=True)
    ]


@contextmanager
def _leaving_no_trace(classifier: object) -> Iterator[None]:
    """Keep hooks and buffers of a module from seeing what it is asked.

    Observers of quantisation-aware training, the users' own hooks, the power iteration of
    spectral_norm and running statistics would all learn from the centroids. What computes a
    weight or gathers it is left in place.
    """
    modules = _modules(classifier)
    # The compiler can neither see hooks being taken off nor buffers being exchanged.
    scripted = isinstance(classifier, torch.jit.ScriptModule)
    if torch.compiler.is_compiling() or scripted or any(map(is_sharded, modules)):
        yield
        return
    with _LOCK:
        kept = [(module, _traces(module), dict(module._buffers)) for module in modules]
        for module in modules:
            for name in _HOOKS:
                hooks = vars(module)[name]
                vars(module)[name] = type(hooks)(_computing(module) if name == _HOOKS[0] else {})
            for name, buffer in module._buffers.items():
                # Exchanged, not written back: autograd may have saved the one or the other.
                module._buffers[name] = None if buffer is None else buffer.clone()
        try:
            yield
        finally:
            for module, attributes, buffers in kept:
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


def _private_randomness(device: torch.device) -> AbstractContextManager[Any]:
    """Keep what is drawn inside, as by a functional dropout, from moving the global generators."""
    if torch.compiler.is_compiling() or is_capturing(device):
        return nullcontext()
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _are_chances(logits: Tensor) -> bool:
    """Return whether nothing but a softmax gives such values; on a device nothing is read."""
    if logits.device.type != "cpu" or logits.shape[1] == 1:
        return False
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    return inside and checks.sums_to_one(logits, 1, near=1e-3)


def _computing(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that compute a weight before each forward: torch's, or else maybe any."""
    hooks: dict[int, Any] = module._forward_pre_hooks
    known = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils.")}
    stored = not isinstance(module, _PIXEL_LINEAR) or _stores_weights(module)
    return known if known or stored or parametrize.is_parametrized(module) else hooks


def _traces(module: nn.Module) -> dict[str, Any]:
    """Return the hooks of a module, and what a hook or forward may have computed and left there."""
    kept = Tensor | int | float
    return {k: v for k, v in vars(module).items() if k in _HOOKS or isinstance(v, kept)}


def _as_read(axes: int, wanted: int) -> str:
    """Say how features and labels of ``axes`` spatial axes become those of ``wanted``."""
    if axes < wanted:
        ones = ", None" * (wanted - axes)
        return f"features[:, :{ones}] and labels[:{ones}]"
    more = axes - wanted
    order = (0, *range(2, 2 + more), 1, *range(2 + more, 2 + axes))
    return (
        f"features.permute{order}.flatten(0, {more}), slice by slice, and labels.flatten(0, "
        f"{more}) of as many slices"
    )


def _spreads(layer: _ConvNd) -> bool:
    """Return whether a transposed convolution makes several places of one."""
    return any(n != 1 for n in (*layer.kernel_size, *layer.stride))


def _centre(logits: object, count: int, num_classes: int, regions: list[_Region]) -> Tensor:
    """Return the answer in the centre of a region; raise unless there is one for each vector."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"classifier must return a tensor of logits, got {checks.describe(logits)}."
        )
    # Also where no module says so; the compiler cannot ask.
    end = "" if torch.compiler.is_compiling() else type(logits.grad_fn).__name__
    if end.startswith(("Softmax", "Sigmoid")):
        raise ValueError(_ends_in(end.partition("Backward")[0]))
    shape = tuple(logits.shape)
    places = shape[2:] or (1,) * len(regions)
    fits = len(shape) > 1 and shape[0] == count and len(places) == len(regions)
    if not fits or any(not r.least <= n <= r.most for n, r in zip(places, regions, strict=True)):
        asked = "".join(f", {r.size}" for r in regions)
        spans = "".join(f", {r.least} to {r.most}" if r.size > 1 else ", 1" for r in regions)
        raise ValueError(
            f"classifier must map ({count}, dim{asked}) to ({count}, {num_classes}{spans}), got "
            f"{shape}. Pass the model's last linear layer alone, without upsampling; where a "
            f"PixelShuffle or the like makes several places of one, {AUXILIARY}."
        )
    for axis, region in enumerate(regions, start=2):
        if region.size > 1:
            logits = logits.narrow(axis, (shape[axis] - 1) // 2, 1)
    return logits


def _last_of(module: nn.Module) -> nn.Module:
    """Return the layer that a chain of modules ends with; any other module itself."""
    parts = [part for part in module.children() if not isinstance(part, nn.Identity)]
    # What is inside a layer, as a parametrization, has its weight for an input.
    chained = isinstance(module, nn.Sequential) or (len(parts) == 1 and not is_pixel_linear(module))
    return _last_of(parts[-1]) if parts and chained else module


def _ends_in(name: str) -> str:
    return (
        f"classifier must return logits, got one that ends in {name}. Pass the layers before that "
        "alone, as nn.Sequential(...)."
    )


def _is_one_logit(classes: int, num_classes: int) -> bool:
    return classes == 1 and num_classes == 2


def _wrong_classes(num_classes: int, got: int) -> str:
    if got == 1:
        return (
            f"classifier must return num_classes={num_classes} logits, got one, which stands for "
            "two classes. Build MVSCRegularizer with num_classes=2."
        )
    several = f"; where a PixelShuffle makes several places of one, pass {AUXILIARY}"
    return (
        f"classifier must return num_classes={num_classes} logits, got {got}. "
        f"Build MVSCRegularizer with num_classes={got} or pass the classifier of these classes"
        f"{several if got % num_classes == 0 else ''}."
    )
