"""The module: it owns the centroids and the hyper-parameters; ``terms`` is the walk."""

import copy
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvsc import checks, distributed, equations
from mvsc.equations import MVSCTerms
from mvsc.sampling import draw_groups, draw_halves, labels_on_grid, stream_key
from mvsc.segment import segment_sum

Classifier = nn.Module | Callable[[Tensor], Tensor]

_STEPS_CHECKED_ON_DEVICE = 3
"""Steps in which labels on a device are read back and checked in full."""

_IDLE_STEPS = 100
"""Steps without a change after which the centroids count as forgotten by the optimizer."""


class MVSCRegularizer(nn.Module):
    """Keep the pixels of a class together in feature space, while training.

    Multi-group Visual Semantic Centroids: learnable class centroids in G groups and three loss
    terms, Eqs. (2), (3) and the classification of the centroids enhanced by Eq. (4), to be
    added to the model's own loss. Nothing of it exists at inference.

    The centroids have to be given to the optimizer, see :meth:`param_group`. They start equal
    on every process, are drawn without touching the global random state, and stay in float32
    when a model that owns the regularizer is cast to half precision.

    Args:
        num_classes: C, at least 1.
        dim: D, the width of the features that enter the classifier, at least 1.
        groups: G, the number of centroids of each class, at least 1. The paper's best is 4.
        temperature: tau of Eq. (2), at least 1e-30.
        align_weight: lambda_f of Eq. (2), at least 0. A weight of 0 skips the term's work.
        pull_weight: lambda_c of Eq. (3).
        classify_weight: lambda_v of L_v.
        enhance: whether Eq. (4) lets L_v reach the features; without it L_v trains the
            centroids and the classifier only.
        align_to: ``"global"`` aligns the means to the mean of the centroids over the groups,
            ``"group"`` to the centroid of their own group (R3).
        ignore_index: label of pixels that do not count; may lie inside ``0 .. C - 1``.
        seed: of the initial centroids and of all draws. Use the same on every process.
        sync: ``"auto"`` averages the gradient of the centroids over the processes in backward;
            ``False`` leaves that to the caller.
        sync_means: whether the means of Eq. (1) are taken over the pixels of all processes: then
            the loss is that of the concatenated batch. The paper's are each process's own (R18).
        process_group: the processes to communicate with; all of them by default.

    Attributes:
        centroids: V, parameter of shape ``(groups, num_classes, dim)``, initially normal with
            standard deviation ``sqrt(2 / dim)`` (R16).
        step: int64 scalar buffer, the number of training steps taken; with ``centroids`` it is
            the whole state.

    Raises:
        TypeError: if a size is not an int or a weight not a number.
        ValueError: if a value is outside its range.

    Example:
        >>> reg = MVSCRegularizer(num_classes=3, dim=8, groups=2)
        >>> classifier = nn.Conv2d(8, 3, 1)
        >>> features = torch.randn(2, 8, 16, 16, requires_grad=True)
        >>> labels = torch.randint(0, 3, (2, 64, 64))
        >>> loss = reg(features, labels, classifier)
        >>> loss.backward()
        >>> loss.shape, reg.centroids.grad.shape
        (torch.Size([]), torch.Size([2, 3, 8]))
    """

    step: Tensor
    invalid_count: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        groups: int = 4,
        *,
        temperature: float = 0.07,
        align_weight: float = 0.1,
        pull_weight: float = 1.0,
        classify_weight: float = 0.05,
        enhance: bool = True,
        align_to: Literal["global", "group"] = "global",
        ignore_index: int = 255,
        seed: int = 0,
        sync: Literal["auto", False] = "auto",
        sync_means: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "dim": dim, "groups": groups}
        for name, size in sizes.items():
            checks.check_positive_int(name, size)
        checks.check_temperature(temperature)
        weights = {
            "align_weight": align_weight,
            "pull_weight": pull_weight,
            "classify_weight": classify_weight,
        }
        for name, weight in weights.items():
            checks.check_weight(name, weight)
        checks.check_int("ignore_index", ignore_index)
        checks.check_int("seed", seed)
        checks.check_choice("align_to", align_to, ("global", "group"))
        checks.check_choice("sync", sync, ("auto", False))
        checks.check_choice("enhance", enhance, (True, False))
        checks.check_choice("sync_means", sync_means, (True, False))
        self.num_classes = num_classes
        self.dim = dim
        self.groups = groups
        self.temperature = temperature
        self.align_weight = align_weight
        self.pull_weight = pull_weight
        self.classify_weight = classify_weight
        self.enhance = enhance
        self.align_to = align_to
        self.ignore_index = ignore_index
        self.seed = seed
        self.sync = sync
        self.sync_means = sync_means
        self.process_group = process_group
        self.centroids = nn.Parameter(torch.empty(groups, num_classes, dim, dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # Labels out of range that were met on a device, where they cannot raise.
        self.register_buffer("invalid_count", torch.zeros((), dtype=torch.int64), persistent=False)
        self._checks_left = _STEPS_CHECKED_ON_DEVICE
        self._classifier_warned = False
        self._idle_steps, self._idle_warned = 0, False
        self._version_seen = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centroids anew, from a private generator, and set ``step`` to 0 (R16)."""
        # On the CPU and from the seed alone: equal on every process and device, with no
        # communication and no use of the global generators.
        generator = torch.Generator(device="cpu").manual_seed(self.seed % 2**64)
        drawn = torch.empty(self.centroids.shape, device="cpu", dtype=torch.float32)
        drawn.normal_(std=(2 / self.dim) ** 0.5, generator=generator)
        drawn = distributed.shard_like(drawn, self.centroids)
        with torch.no_grad():
            self.centroids.copy_(drawn)
            self.step.zero_()
            self.invalid_count.zero_()

    def forward(self, features: Tensor, labels: Tensor, classifier: Classifier) -> Tensor:
        """Compute what is added to the model's own loss: the weighted sum of Eq. (5).

        A term whose weight is 0 is not computed. In training mode each call is a step: it
        draws a new split. Call it, or :meth:`terms`, once for each batch, and run one backward
        over the sum of all losses.

        Args:
            features: R, the dense map that enters the classifier, before a dropout (R14), shape
                ``(batch, dim, h, w)``, any floating dtype and memory layout. Never modified.
            labels: Y, shape ``(batch, H, W)``, any integer dtype, of any size; brought to the
                feature grid (R15).
            classifier: the model's own pixel classifier: a Conv2d, a Linear, or any callable
                that maps ``(N, dim, 1, 1)`` to ``(N, num_classes, 1, 1)`` or
                ``(N, num_classes)``. A k x k convolution, alone or inside a module, answers as
                inside a uniform region (R13).

        Returns:
            Scalar, float32 (float64 for float64 features), at least 0. Without a labelled
            pixel Eq. (2) and L_v are 0 and connected to the graph, with zero gradients.

        Raises:
            TypeError: if features are not floating, labels not integers, or the classifier is
                not callable.
            ValueError: if shapes, devices or the number of classes do not fit, or a label is
                out of range. On a device, label values raise in the first steps only; later
                such pixels are ignored and counted in ``invalid_count``, since reading them
                would stall the device.
        """
        return self.total(self._walk(features, labels, classifier, self._weights()))

    def terms(self, features: Tensor, labels: Tensor, classifier: Classifier) -> MVSCTerms:
        """Compute the three terms, unweighted, for those who log them one by one.

        It takes the place of :meth:`forward`, not a call beside it: add ``total(terms)`` to
        the loss.

        Args:
            features: as in :meth:`forward`.
            labels: as in :meth:`forward`.
            classifier: as in :meth:`forward`.

        Returns:
            The terms, scalars with gradients; see :class:`MVSCTerms`.

        Example:
            >>> reg = MVSCRegularizer(num_classes=3, dim=8)
            >>> features, labels = torch.randn(2, 8, 4, 4), torch.randint(0, 3, (2, 4, 4))
            >>> terms = reg.terms(features, labels, nn.Conv2d(8, 3, 1))
            >>> loss = reg.total(terms)
            >>> {name: term.item() for name, term in terms._asdict().items()}.keys()
            dict_keys(['align', 'pull', 'classify'])
        """
        return self._walk(features, labels, classifier, (1.0, 1.0, 1.0))

    def total(self, terms: MVSCTerms) -> Tensor:
        """Weigh and add the terms: Eq. (5) without the pixels' own cross-entropy.

        Args:
            terms: what :meth:`terms` returned.

        Returns:
            Scalar, what :meth:`forward` would have returned for the same draws.
        """
        return equations.weighted_sum(terms, self._weights())

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        """Return the centroids as a parameter group for the optimizer, without weight decay.

        Weight decay would shrink the centroids of classes that are rarely seen. Use the
        learning rate of the decode head (R17).

        Args:
            **overrides: further settings of the group, for example ``lr``.

        Returns:
            A group for ``optimizer.add_param_group`` or an optimizer's constructor.

        Example:
            >>> reg = MVSCRegularizer(num_classes=3, dim=8)
            >>> reg.param_group(lr=6e-4)["weight_decay"]
            0.0
        """
        return {"params": [self.centroids], "weight_decay": 0.0, **overrides}

    def extra_repr(self) -> str:
        """Show the settings in the module's representation."""
        align, pull, classify = self._weights()
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, groups={self.groups}, "
            f"temperature={self.temperature}, align_weight={align}, pull_weight={pull}, "
            f"classify_weight={classify}, enhance={self.enhance}, align_to={self.align_to!r}, "
            f"ignore_index={self.ignore_index}, seed={self.seed}"
        )

    def _weights(self) -> tuple[float, float, float]:
        return self.align_weight, self.pull_weight, self.classify_weight

    def _walk(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        weights: tuple[float, float, float],
    ) -> MVSCTerms:
        """Walk from features to terms; a term whose weight is 0 stays a constant 0."""
        self._check(features, labels, classifier)
        self._advance()
        device_type = features.device.type
        # The compiler of torch 2.6 cannot ask, so it is taken for granted there.
        if not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)):
            return self._terms(features, labels, classifier, weights)
        # Sums, norms and logits in float32, whatever the model around runs in.
        with torch.autocast(device_type, enabled=False):
            return self._terms(features, labels, classifier, weights)

    def _terms(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        weights: tuple[float, float, float],
    ) -> MVSCTerms:
        align_weight, pull_weight, classify_weight = weights
        align = pull = classify = features.new_zeros((), dtype=self._dtype(features))
        centroids = self.centroids.to(align.dtype)
        if self.sync == "auto":
            centroids = distributed.average_gradient(centroids, self.process_group)

        if align_weight or classify_weight:
            size = (features.shape[2], features.shape[3])
            grid = labels_on_grid(labels, size, self.num_classes, self.ignore_index)
            rank = distributed.rank(self.process_group)
            key = stream_key(self.seed, self.step, rank)
            cells = draw_groups(grid, self.groups, self.num_classes, key)
            sums, counts = segment_sum(features, cells, self.groups * self.num_classes)
            if self.sync_means:
                sums = distributed.sum_over_processes(sums, self.process_group)
                counts = distributed.sum_over_processes(counts, self.process_group)
            means, present = equations.class_group_means(sums, counts, self.groups)
            means = means.to(align.dtype)

        if align_weight:
            to_group = self.align_to == "group"
            targets = centroids if to_group else equations.global_centroids(centroids)
            align = equations.alignment_loss(means, targets, present, self.temperature)

        if pull_weight:
            # The same on every process: the centroids are.
            order = draw_halves(self.groups, stream_key(self.seed, self.step))
            pull = equations.centroid_pull_loss(centroids, order)

        if classify_weight:
            enhanced = equations.enhance_centroids(centroids, means) if self.enhance else centroids
            classify = equations.centroid_classification_loss(
                enhanced, present, lambda vectors: self._classify(vectors, classifier)
            )
        return MVSCTerms(align, pull, classify)

    def _classify(self, vectors: Tensor, classifier: Classifier) -> Tensor:
        """Ask the model's classifier for the class of each of N vectors (R13)."""
        if _is_plain_linear(classifier):
            weight = classifier.weight
            # A k x k kernel is summed: the convolution itself would pad the vector with zeros
            # and leave only the centre tap.
            weight = weight.flatten(2).sum(dim=2) if weight.ndim == 4 else weight
            logits = F.linear(vectors.to(weight.dtype), weight, classifier.bias)
        else:
            parameters = classifier.parameters() if isinstance(classifier, nn.Module) else ()
            dtype = next((p.dtype for p in parameters if p.is_floating_point()), vectors.dtype)
            inputs = vectors.to(dtype)
            rows, columns = _reach(classifier)
            if not isinstance(classifier, nn.Linear):
                inputs = inputs[:, :, None, None].repeat(1, 1, rows, columns)
            logits = classifier(inputs)
            if rows * columns > 1 and isinstance(logits, Tensor) and logits.ndim == 4:
                # The centre of the region, where no padding is seen.
                height, width = logits.shape[2:]
                logits = logits[:, :, (height - 1) // 2, (width - 1) // 2]
            checks.check_logits(logits, len(vectors), self.num_classes)
        return logits.reshape(len(vectors), self.num_classes).to(vectors.dtype)

    def _check(self, features: Tensor, labels: Tensor, classifier: Classifier) -> None:
        checks.check_features(features, self.dim, self.centroids.device)
        checks.check_labels(labels, features)
        checks.check_classifier(classifier, self.dim, self.num_classes)
        if not torch.compiler.is_compiling():
            if not self._classifier_warned:
                self._classifier_warned = checks.warn_of_dropout_and_norm(classifier)
            on_cpu = labels.device.type == "cpu"
            if on_cpu or (self._checks_left > 0 and not _capturing(labels.device)):
                self._checks_left -= 0 if on_cpu else 1
                checks.check_label_values(labels, self.num_classes, self.ignore_index)
                return
        bad = checks.out_of_range(labels, self.num_classes, self.ignore_index)
        self.invalid_count += bad.sum()

    def _advance(self) -> None:
        """Count a training step, but not when a backward replays one (checkpointing).

        A replay that drew another split would silently give wrong gradients.
        """
        if not self.training:
            return
        if torch.compiler.is_compiling():
            # Whether a backward replays is known when the graph runs, not when it is traced.
            _count_step(self.step)
        elif not _replaying():
            self.step += 1
            self._notice_idle_centroids()

    def _notice_idle_centroids(self) -> None:
        """Warn once if no optimizer moves the centroids, though they have a gradient."""
        # Nothing is read from the device: an optimizer changes the tensor, which autograd counts
        # (though not for a fused one), and clears its gradient.
        version = self.centroids._version
        idle = self.centroids.grad is not None and version == self._version_seen
        self._idle_steps = self._idle_steps + 1 if idle else 0
        self._version_seen = version
        if self._idle_steps == _IDLE_STEPS and not self._idle_warned:
            self._idle_warned = True
            checks.warn_of_idle_centroids(_IDLE_STEPS)

    def _dtype(self, features: Tensor) -> torch.dtype:
        # FSDP2's mixed precision hands out the centroids in half precision, too.
        common = torch.promote_types(features.dtype, self.centroids.dtype)
        return torch.promote_types(common, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MVSCRegularizer":
        """Move as any module, but keep the centroids in float32 at least.

        In half precision an optimizer's step is smaller than the rounding of the centroids,
        and they would stand still.
        """
        kept, grad = self.centroids.data, self.centroids.grad
        kept_grad = None if grad is None else grad.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.centroids.data
        if _is_half(moved):
            self.centroids.data = kept.to(moved.device)
            if kept_grad is not None:
                self.centroids.grad = kept_grad.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module, but a state in half precision as float32, with assign=True too."""
        step = state_dict.get(f"{prefix}step")
        if isinstance(step, Tensor) and step.is_floating_point():
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}step must be an integer, got {step.dtype}, which has lost its digits. "
                "Cast the floating tensors of a state alone."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if _is_half(self.centroids):
            self.centroids.data = self.centroids.data.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MVSCRegularizer":
        # A process group cannot be copied; the copy communicates with the same processes.
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copied = self.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _replaying() -> bool:
    """Tell whether a backward runs: the signal that FSDP2 uses, too."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("mvsc::count_step", mutates_args=("step",))
def _count_step(step: Tensor) -> None:
    if not _replaying():
        step += 1


@_count_step.register_fake
def _(step: Tensor) -> None:
    """Nothing has another shape afterwards."""


def _is_half(tensor: Tensor) -> bool:
    return torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype


def _is_plain_linear(classifier: object) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Tell whether a classifier is a linear map whose weights can be used without calling it.

    A subclass, or one whose forward was replaced, may do more, and weights that FSDP2 has sharded
    are gathered, and their gradient averaged, by its hooks: both have to be called.
    """
    forwards = (nn.Conv2d.forward, nn.Linear.forward)
    if not isinstance(classifier, (nn.Conv2d, nn.Linear)):
        return False
    # The compiler cannot ask an instance for its own forward.
    own = not torch.compiler.is_compiling() and "forward" in vars(classifier)
    plain = type(classifier).forward in forwards and not own
    return plain and not checks.is_sharded(classifier)


def _reach(classifier: Classifier) -> tuple[int, int]:
    """Return the rows and columns around a pixel that a classifier looks at."""
    rows = columns = 1
    for layer in classifier.modules() if isinstance(classifier, nn.Module) else ():
        if isinstance(layer, nn.Conv2d):
            rows += layer.dilation[0] * (layer.kernel_size[0] - 1)
            columns += layer.dilation[1] * (layer.kernel_size[1] - 1)
    return rows, columns


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
