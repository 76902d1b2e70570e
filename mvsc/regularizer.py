"""The module: it owns the centroids and the hyper-parameters; ``terms`` is the walk."""

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mvsc import checks, distributed, equations
from mvsc.classifier import (
    Classifier,
    check_classifier,
    classify_vectors,
    reads_axes,
    reads_rows,
    what_mixes,
    without_margin,
)
from mvsc.equations import MVSCTerms
from mvsc.kernel import segment_sum
from mvsc.labels import (
    check_label_values,
    check_labels,
    check_no_channels,
    default_ignore_index,
    out_of_range,
)
from mvsc.running import is_replaying
from mvsc.sampling import ON_GRID, draw_groups, draw_halves
from mvsc.stepping import MakeOptimizer, Stepper
from mvsc.watch import Watch

__all__ = ["CellMeans", "Classifier", "MVSCRegularizer"]

_SIZES = ("num_classes", "dim", "groups")

_OPTIMIZER = "optimizer."
"""What the names of the state of an optimizer of their own begin with."""

_NO_MOMENTS = (
    'the state that was loaded has centroids and no moments, so optimizer="own" begins anew. All '
    'is well if it is one of optimizer="host". Where torch\'s set_model_state_dict broadcasts a '
    "state, which leaves moments out, use reg.load_state_dict on each process."
)


class CellMeans(NamedTuple):
    """What Eq. (1) gives: the cells, i.e. (group, class) pairs, of one step.

    Attributes:
        means: R, shape ``(groups, num_classes, dim)``, float32 or float64; 0 in an empty cell.
        counts: pixels of each cell, shape ``(groups, num_classes)``, int64.
        present: cells with at least one pixel, shape ``(groups, num_classes)``, bool.
    """

    means: Tensor
    counts: Tensor
    present: Tensor


class MVSCRegularizer(nn.Module):
    """Keep the pixels of a class together in feature space, while training.

    Multi-group Visual Semantic Centroids: learnable class centroids in G groups and three loss
    terms, Eqs. (2), (3) and the classification of the centroids enhanced by Eq. (4), to be
    added to the model's own loss. Nothing of it exists at inference.

    The centroids have to be given to the optimizer, see :meth:`param_group`, unless they have
    their own. They start equal on every process, are drawn without touching the global random
    state, and stay in float32 when a model that owns the regularizer is cast to half precision.

    Args:
        num_classes: C, at least 2.
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
        ignore_index: label of pixels that do not count; may lie inside ``0 .. C - 1``. By
            default 255, or -100 where 255 is a class.
        grid_label: which label a pixel of a coarser feature map takes: ``"centre"``, the one at
            its centre (R15), or ``"commonest"``, of all its labelled pixels: for points, strokes
            and other sparse labels.
        seed: of the initial centroids and of all draws. Use the same on every process.
        sync: ``"auto"`` averages the gradient of the centroids over the processes in backward;
            ``False`` leaves that to the caller.
        sync_means: whether the means of Eq. (1) are taken over the pixels of all processes: then
            the loss is that of the concatenated batch. The paper's are each process's own (R18).
        process_group: the processes to communicate with; all of them by default.
        optimizer: whose the centroids are. ``"host"``: that of the model, which has to be given
            them. ``"own"``, for engines that take the model's optimizer apart (DeepSpeed, FSDP2):
            an AdamW inside, which steps when the model's optimizer has stepped, at the learning
            rate of its last group; or a callable that makes another one of a list of tensors, as
            ``functools.partial(torch.optim.SGD, lr=0.01)``. Then the centroids are no parameter,
            and neither a factor on the loss nor clipping reaches them.

    Attributes:
        centroids: V, shape ``(groups, num_classes, dim)``, initially normal with standard
            deviation ``sqrt(2 / dim)`` (R16): a parameter, or with an optimizer of their own a
            buffer.
        step: int64 scalar buffer, the number of training steps taken; with ``centroids``, and
            what an optimizer of their own keeps, it is the whole state.
        invalid_count: int64 scalar buffer, the labels out of range that were met where reading
            them would have stalled a device; no part of the state.

    Raises:
        TypeError: if a size is not an int, a weight not a number, or a group not a process group.
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

    centroids: Tensor
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
        ignore_index: int | None = None,
        grid_label: Literal["centre", "commonest"] = "centre",
        seed: int = 0,
        sync: Literal["auto", False] = "auto",
        sync_means: bool = False,
        process_group: Any = None,
        optimizer: Literal["host", "own"] | MakeOptimizer = "host",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.groups = groups
        self.temperature = temperature
        self.align_weight = align_weight
        self.pull_weight = pull_weight
        self.classify_weight = classify_weight
        self.enhance = enhance
        self.align_to = align_to
        self.grid_label = grid_label
        self.seed = seed
        self.sync = sync
        self.sync_means = sync_means
        self.process_group = process_group
        for name in _SIZES:
            checks.check_positive_int(name, getattr(self, name))
        if num_classes == 1:  # Eq. (2) and L_v would be 0, without a word.
            raise ValueError(
                "num_classes must be at least 2, got 1. One logit stands for two classes, with "
                "the labels 0 and 1: build MVSCRegularizer with num_classes=2."
            )
        default = default_ignore_index(num_classes)
        self.ignore_index = default if ignore_index is None else ignore_index
        self._check_settings()
        self._sizes = num_classes, dim, groups
        centroids = torch.empty(groups, num_classes, dim, dtype=torch.float32)
        changed = centroids.dtype != torch.float32 or hasattr(centroids, "ds_id")
        if changed or centroids.is_inference():
            raise ValueError(
                "the centroids must be whole, float32 and trainable, and something changes what is "
                "made here, as deepspeed.zero.Init and torch.inference_mode do. Attach outside of "
                "that context."
            )
        self._stepper = None if optimizer == "host" else Stepper(optimizer)
        if self._stepper is None:
            self.centroids = nn.Parameter(centroids)
        else:
            # No parameter: whoever wraps, shards or casts a model around it sees nothing.
            self.register_buffer("centroids", centroids)
            self._follow()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # Labels out of range that were met on a device, where they cannot raise.
        self.register_buffer("invalid_count", torch.zeros((), dtype=torch.int64), persistent=False)
        self._watch = Watch()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the centroids anew, from a private generator, and set ``step`` to 0 (R16).

        What an optimizer of their own has kept is forgotten.
        """
        # On the CPU and from the seed alone: equal on every process and device, with no
        # communication and no use of the global generators.
        generator = torch.Generator(device="cpu").manual_seed(self.seed % 2**64)
        drawn = torch.empty(self.centroids.shape, device="cpu", dtype=torch.float32)
        drawn.normal_(std=(2 / self.dim) ** 0.5, generator=generator)
        drawn = distributed.shard_like(drawn, self.centroids)
        self._watch.forget_values()
        if self._stepper is not None:
            self._stepper.state = {}
            self._follow()
        with torch.no_grad():
            self.centroids.copy_(drawn)
            self.step.zero_()
            self.invalid_count.zero_()

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        *,
        grid: tuple[int, ...] | None = None,
        channels_last: bool | None = None,
    ) -> Tensor:
        """Compute what is added to the model's own loss: the weighted sum of Eq. (5).

        A term whose weight is 0 is not computed. In training mode each call is a step: it
        draws a new split. Call it, or :meth:`terms`, once for each batch, and run one backward
        over the sum of all losses.

        Args:
            features: R, the dense map that enters the classifier, before a dropout (R14), shape
                ``(batch, dim, *spatial)`` with one to three spatial axes: points, images,
                volumes. Where the classifier is an nn.Linear also ``(batch, *spatial, dim)``,
                as the Linear reads it. Any floating dtype and memory layout. Never modified.
            labels: Y, shape ``(batch, *spatial')`` with as many axes, any integer dtype, of any
                size; brought to the feature grid (R15). What is padded carries ``ignore_index``.
            classifier: the model's own pixel classifier: a convolution of any kernel, a Linear,
                or any callable that maps ``(N, dim, 1, 1)``, with as many ones as the features
                have spatial axes, to ``(N, num_classes, 1, 1)`` or ``(N, num_classes)``. A wide
                convolution, alone or inside a module, answers as inside a uniform region (R13).
                One logit z is the two classes (0, z), with ``num_classes=2``.
            grid: height and width of tokens, ``(batch, pixels, dim)``, whose labels are a map;
                by default the only ones that have the labels' ratio.
            channels_last: whether the last axis of the features holds the channels; by default
                found out where the classifier is a Linear, else false.

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
        weighed = zip(MVSCTerms._fields, self._weights(), strict=True)
        wanted = [name for name, weight in weighed if weight != 0]
        return self.total(self._walk(features, labels, classifier, grid, channels_last, wanted))

    def terms(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        *,
        grid: tuple[int, ...] | None = None,
        channels_last: bool | None = None,
    ) -> MVSCTerms:
        """Compute the three terms, unweighted, for those who log them one by one.

        It takes the place of :meth:`forward`, not a call beside it: add ``total(terms)`` to
        the loss.

        Args:
            features: as in :meth:`forward`.
            labels: as in :meth:`forward`.
            classifier: as in :meth:`forward`.
            grid: as in :meth:`forward`.
            channels_last: as in :meth:`forward`.

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
        wanted = MVSCTerms._fields
        return self._walk(features, labels, classifier, grid, channels_last, wanted)

    def total(self, terms: MVSCTerms) -> Tensor:
        """Weigh and add the terms: Eq. (5) without the pixels' own cross-entropy.

        Args:
            terms: what :meth:`terms` returned.

        Returns:
            Scalar, what :meth:`forward` would have returned for the same draws.
        """
        total = equations.weighted_sum(terms, self._weights())
        return total if self._stepper is None else self._stepper.weigh(total)

    @property
    def optimizer(self) -> SimpleNamespace:
        """What an optimizer of their own keeps, by name; empty where the model's steps them.

        Who walks the keys of a state by attributes, as torch's checkpoints do, finds it.
        """
        return SimpleNamespace(**({} if self._stepper is None else self._stepper.state))

    def param_group(self, **overrides: Any) -> dict[str, Any]:
        """Return the centroids as a parameter group for the optimizer, without weight decay.

        Weight decay would shrink the centroids of classes that are rarely seen. Use the
        learning rate of the decode head (R17).

        Args:
            **overrides: further settings of the group, for example ``lr``.

        Returns:
            A group for ``optimizer.add_param_group`` or an optimizer's constructor.

        Raises:
            ValueError: if the centroids have an optimizer of their own.

        Example:
            >>> reg = MVSCRegularizer(num_classes=3, dim=8)
            >>> reg.param_group(lr=6e-4)["weight_decay"]
            0.0
        """
        if self._stepper is not None:
            raise ValueError(
                'optimizer must be "host" for param_group(), got another: the centroids have an '
                "optimizer of their own. Leave the line out."
            )
        return {"params": [self.centroids], "weight_decay": 0.0, **overrides}

    def extra_repr(self) -> str:
        """Show the settings in the module's representation."""
        align, pull, classify = self._weights()
        shown = (
            f"num_classes={self.num_classes}, dim={self.dim}, groups={self.groups}, "
            f"temperature={self.temperature}, align_weight={align}, pull_weight={pull}, "
            f"classify_weight={classify}, enhance={self.enhance}, align_to={self.align_to!r}, "
            f"ignore_index={self.ignore_index}, grid_label={self.grid_label!r}, seed={self.seed}, "
            f"sync={self.sync!r}, sync_means={self.sync_means}"
        )
        made = None if self._stepper is None else self._stepper.make
        return shown if made is None else f"{shown}, optimizer={made!r}"

    def split(self, grid: Tensor, features: Tensor) -> Tensor:
        """Split the pixels of each class into groups: the partition of Eq. (1) (R9).

        This and the methods that follow, in the paper's order, are the steps of one walk. A
        subclass replaces one of them to try another method, and inherits the rest: checks,
        float32 inside, processes in step, checkpointing, compilation.

        Args:
            grid: labels on the feature grid, int64, shape ``(batch, *spatial)``, in
                ``0 .. num_classes``, where ``num_classes`` stands for pixels that do not count.
            features: R, shape ``(batch, dim, *spatial)``.

        Returns:
            The cell ``group * num_classes + label`` of each pixel, shape of the grid;
            ``groups * num_classes`` for one that does not count.
        """
        rank = distributed.rank(self.process_group)
        return draw_groups(grid, self.groups, self.num_classes, self.step, self.seed, rank)

    def cell_means(self, features: Tensor, labels: Tensor) -> CellMeans:
        """Average the features of each cell: Eq. (1), with labels brought to the grid (R15).

        Args:
            features: R, shape ``(batch, dim, *spatial)``.
            labels: Y, shape ``(batch, *spatial')``.

        Returns:
            Means, counts and mask of the cells; with ``sync_means`` of all processes (R18).
        """
        size = features.shape[2:]
        grid = ON_GRID[self.grid_label](labels, size, self.num_classes, self.ignore_index)
        cells = self.split(grid, features)
        sums, counts = segment_sum(features, cells, self.groups * self.num_classes)
        if self.sync_means:
            sums = distributed.sum_over_processes(sums, self.process_group)
            counts = distributed.sum_over_processes(counts, self.process_group)
        means, present = equations.class_group_means(sums, counts, self.groups)
        return CellMeans(means, counts.view_as(present), present)

    def align(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        """Compute Eq. (2): pull each mean to the centroid of its class (R3), push it from others.

        Args:
            cells: of :meth:`cell_means`.
            centroids: V, shape ``(groups, num_classes, dim)``.

        Returns:
            Scalar.
        """
        targets = equations.alignment_targets(centroids, self.align_to)
        return equations.alignment_loss(cells.means, targets, cells.present, self.temperature)

    def pull(self, centroids: Tensor) -> Tensor:
        """Compute Eq. (3), with halves that are the same on every process, as V is (R7).

        Args:
            centroids: V, shape ``(groups, num_classes, dim)``.

        Returns:
            Scalar.
        """
        halves = draw_halves(self.groups, self.step, self.seed, centroids.dtype)
        return equations.centroid_pull_loss(centroids, halves)

    def enhanced(self, cells: CellMeans, centroids: Tensor) -> Tensor:
        """Compute V' of Eq. (4); V itself without ``enhance``.

        Args:
            cells: of :meth:`cell_means`.
            centroids: V, shape ``(groups, num_classes, dim)``.

        Returns:
            Shape of the centroids.
        """
        return equations.enhance_centroids(centroids, cells.means) if self.enhance else centroids

    def classify(
        self, enhanced: Tensor, cells: CellMeans, ask: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Compute L_v: the model's own classifier has to recognise V' (R13).

        Args:
            enhanced: V', shape ``(groups, num_classes, dim)``.
            cells: of :meth:`cell_means`.
            ask: the classifier, for vectors: maps ``(N, dim)`` to ``(N, num_classes)``.

        Returns:
            Scalar.
        """
        logits = ask(rearrange(enhanced, "g c d -> (g c) d"))
        logits = rearrange(logits, "(g c) k -> g c k", g=self.groups)
        return equations.centroid_classification_loss(logits, cells.present)

    def _weights(self) -> tuple[float, float, float]:
        return self.align_weight, self.pull_weight, self.classify_weight

    def _walk(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        grid: tuple[int, ...] | None,
        channels_last: bool | None,
        wanted: Collection[str],
    ) -> MVSCTerms:
        """Check, count the step, and compute the terms; a call that is refused is no step."""
        features, labels, axes = self._check(features, labels, classifier, grid, channels_last)
        self._advance(classifier, learns=bool(wanted))
        ask = partial(classify_vectors, classifier, num_classes=self.num_classes, axes=axes)
        try:
            return self._terms(features, labels, ask, wanted)
        except Exception:  # a classifier's own may be any
            if self.training and not torch.compiler.is_compiling() and not is_replaying():
                self.step -= 1
            raise

    def _terms(
        self,
        features: Tensor,
        labels: Tensor,
        ask: Callable[[Tensor], Tensor],
        wanted: Collection[str],
    ) -> MVSCTerms:
        """Walk from features to terms; one that is not wanted stays a constant 0."""
        # Sums, norms and logits in float32, whatever the model around runs in.
        with _without_autocast(features.device.type):
            centroids = self._centroids(self._dtype(features))
            if len(wanted) < len(MVSCTerms._fields):
                align = pull = classify = features.new_zeros((), dtype=centroids.dtype)
            if "align" in wanted or "classify" in wanted:
                cells = self.cell_means(features, labels)
            if "align" in wanted:
                align = self.align(cells, centroids)
            if "pull" in wanted:
                pull = self.pull(centroids)
            if "classify" in wanted:
                classify = self.classify(self.enhanced(cells, centroids), cells, ask)
            return MVSCTerms(align, pull, classify)

    def _centroids(self, dtype: torch.dtype) -> Tensor:
        """Return V as the walk uses it: in step over the processes, and watched in backward."""
        centroids: Tensor = self.centroids
        if self.training and not torch.compiler.is_compiling():
            centroids = self._watch.notice_kept_gradient(centroids)
        centroids = centroids.to(dtype)
        if self.sync == "auto" and self._stepper is None:
            centroids = distributed.average_gradient(centroids, self.process_group)
        return centroids

    def _check_settings(self) -> None:
        """Raise unless the settings are what they may be: also those that were set later."""
        if checks.check_number("temperature", self.temperature) < 1e-30:
            raise ValueError(
                f"temperature must be at least 1e-30, got {self.temperature}. "
                "The paper's value is 0.07."
            )
        for name in ("align_weight", "pull_weight", "classify_weight"):
            if checks.check_number(name, getattr(self, name)) < 0:
                raise ValueError(
                    f"{name} must be at least 0, got {getattr(self, name)}. "
                    "Use 0 to switch the term off."
                )
        checks.check_int("ignore_index", self.ignore_index)
        checks.check_int("seed", self.seed)
        checks.check_choice("align_to", self.align_to, ("global", "group"))
        checks.check_choice("grid_label", self.grid_label, tuple(ON_GRID))
        checks.check_choice("sync", self.sync, ("auto", False))
        checks.check_choice("enhance", self.enhance, (True, False))
        checks.check_choice("sync_means", self.sync_means, (True, False))
        distributed.check_group(self.process_group)

    def _check(
        self,
        features: Tensor,
        labels: Tensor,
        classifier: Classifier,
        grid: tuple[int, ...] | None,
        channels_last: bool | None,
    ) -> tuple[Tensor, Tensor, int]:
        """Raise unless everything fits.

        Returns:
            Features as ``(batch, dim, *spatial)``, labels, and how many spatial axes the
            classifier reads.
        """
        rows = reads_rows(classifier)
        # Subclasses as MONAI's and torchvision's remember things at each operation.
        features, labels = _plain_tensor(features), _plain_tensor(labels)
        features, last = checks.check_features(
            features, self.dim, self.centroids.device, rows=rows, channels_last=channels_last
        )
        tokens = features.ndim == 3 and (grid is not None or rows or last)
        check_labels(labels, features, tokens, self.num_classes)
        read = not torch.compiler.is_compiling() and self._watch.may_read(labels)
        if read and tokens:  # whose labels may have another number of axes
            check_no_channels(labels, self.num_classes)
        axes = features.ndim - 2
        features = checks.on_grid(features, tuple(labels.shape[1:]), grid, last)
        if reads_axes(classifier) != axes:  # Tokens may be read folded, by a Conv1d, or not.
            axes = features.ndim - 2
        check_classifier(classifier, self.dim, self.num_classes, axes)
        features = without_margin(classifier, features)
        if torch.compiler.is_compiling():
            self._count_invalid(labels)
            return features, labels, axes
        self._check_settings()
        if self._sizes != (self.num_classes, self.dim, self.groups):
            raise ValueError(
                f"{', '.join(_SIZES)} must stay what they were, {self._sizes}, got "
                f"{(self.num_classes, self.dim, self.groups)}. Build another MVSCRegularizer."
            )
        self._notice(features, labels, classifier, read)
        return features, labels, axes

    def _notice(self, features: Tensor, labels: Tensor, classifier: Classifier, read: bool) -> None:
        """Look at what may be wrong without an error; read the labels' values where that is free.

        Raises:
            ValueError: if a label that is read is out of range.
        """
        watch = self._watch
        if "mixing" not in watch.said and (mixing := what_mixes(classifier)):
            watch.say("mixing", mixing)
        watch.notice_sizes(tuple(features.shape[2:]), tuple(labels.shape[1:]))
        watch.notice_dtype(labels.dtype, self.num_classes)
        if read:
            check_label_values(labels, self.num_classes, self.ignore_index)
            watch.notice_mask(labels, self.num_classes)
            if self.grid_label == "centre" and labels.shape[1:] != features.shape[2:]:
                watch.notice_lost_labels(
                    labels, features.shape[2:], self.num_classes, self.ignore_index
                )
        else:
            self._count_invalid(labels)

    def _count_invalid(self, labels: Tensor) -> None:
        """Count labels out of range, which are ignored where reading them would stall a device."""
        bad = out_of_range(labels, self.num_classes, self.ignore_index)
        self.invalid_count += bad.sum()

    def _advance(self, classifier: Classifier, learns: bool) -> None:
        """Count a training step, but not when a backward replays one (checkpointing).

        A replay that drew another split would silently give wrong gradients.
        """
        watched = learns and torch.is_grad_enabled()  # Else nobody means to step.
        if not self.training:
            if watched and not torch.compiler.is_compiling():
                self._watch.notice_evaluation()
            return
        if torch.compiler.is_compiling():
            # Whether a backward replays is known when the graph runs, not when it is traced.
            _count_step(self.step)
        elif not is_replaying():
            self.step += 1
            self._watch.evaluations = 0
            if watched:
                self._watch.notice_idle_centroids(self.centroids, own=self._stepper is not None)
            if self._stepper is not None:
                self._stepper.begin(self.centroids, classifier)

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
        with torch.no_grad():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.centroids.data
        if _is_half(moved):
            self.centroids.data = kept.to(moved.device)
            if kept_grad is not None:
                self.centroids.grad = kept_grad.to(moved.device)
        self._follow()
        return self

    def _follow(self) -> None:
        """Go on with an optimizer of their own, if they have one, after the tensors changed."""
        if self._stepper is not None:
            # A buffer that was moved, copied or assigned is no leaf, or has another's gradient.
            self.centroids = self.centroids.detach().requires_grad_()
            self._stepper.follow(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in {} if self._stepper is None else self._stepper.state.items():
            destination[f"{prefix}{_OPTIMIZER}{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Load as any module, but a state in half precision as float32, with assign=True too."""
        step = state_dict.get(f"{prefix}step")
        if isinstance(step, Tensor) and step.is_floating_point():
            errors.append(
                f"{prefix}step must be an integer, got {step.dtype}, which has lost its digits. "
                "Cast the floating tensors of a state alone."
            )
            return
        self._watch.forget_values()
        mine = f"{prefix}{_OPTIMIZER}"
        names = [name for name in state_dict if name.startswith(mine)]
        moments = {name.removeprefix(mine): state_dict.pop(name) for name in names}
        if self._stepper is not None:
            centroids = state_dict.get(f"{prefix}centroids")
            self._load_moments(moments, mine, centroids, step, missing)
        elif moments:  # torch lists it, unless strict=False
            unexpected.append(f'{mine}*, moments that optimizer="host" has no use for: pass "own"')
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if _is_half(self.centroids):
            self.centroids.data = self.centroids.data.float()
        if self.invalid_count.is_meta:  # no part of a state that was assigned
            self.invalid_count = self.step.new_zeros(())
        self._follow()

    def _load_moments(
        self,
        moments: dict[str, Tensor],
        prefix: str,
        centroids: Tensor | None,
        step: Tensor | None,
        missing: list[str],
    ) -> None:
        """Take over what an optimizer of their own has kept, unless torch refuses the state."""
        stepper = cast(Stepper, self._stepper)
        if centroids is not None and centroids.shape != self.centroids.shape:
            return
        if moments.keys() < stepper.state.keys() and moments:
            missing += [f"{prefix}{name}" for name in stepper.state.keys() - moments.keys()]
        elif moments or (centroids is not None and step is not None):  # else a part of a state
            stepper.state = moments
            begun = step is not None and not step.is_meta and bool(step > 0)
            if begun and not moments and stepper.make == "own":
                self._watch.say("moments", _NO_MOMENTS)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MVSCRegularizer":
        # A process group cannot be copied; the copy communicates with the same processes.
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copied = self.__new__(type(self))
        # Not __dict__, in which compile() keeps a call that is bound to this one.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied


def _plain_tensor(value: Any) -> Any:
    """Return a tensor subclass of another library as the tensor it is; all else as it came."""
    if isinstance(value, Tensor) and type(value).__module__.partition(".")[0] != "torch":
        return value.as_subclass(Tensor)  # with its graph
    return value


@torch.library.custom_op("mvsc::count_step", mutates_args=("step",))
def _count_step(step: Tensor) -> None:
    if not is_replaying():
        step += 1


@_count_step.register_fake
def _(step: Tensor) -> None:
    """Nothing has another shape afterwards."""


def _is_half(tensor: Tensor) -> bool:
    return torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    # The compiler of torch 2.6 cannot ask, so it is taken for granted there.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
