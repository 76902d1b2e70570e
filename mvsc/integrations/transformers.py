"""transformers' Trainer: one line between ``Trainer(...)`` and ``train()``.

``attach(model, add_to_loss=True)`` leaves a loop of one's own the line for the optimizer. A Trainer
makes optimizer and checkpoints itself, so the centroids have to come into both::

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    reg = attach_to_trainer(trainer, groups=4)
    trainer.train()
"""

import weakref
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mvsc.add_to_loss import AddToLoss, arguments_inside
from mvsc.attach import AttachedRegularizer, attach
from mvsc.tap import Hook
from mvsc.watch import warn

FILE_NAME = "mvsc.pt"


def attach_to_trainer(
    trainer: Trainer, *, add_to_loss: bool = True, **options: Any
) -> AttachedRegularizer:
    """Attach a regularizer to the model of a Trainer that has not been started.

    The loss is added to the model's own; the centroids join the Trainer's optimizer without weight
    decay; each checkpoint holds them in a file of their own, ``mvsc.pt``, from which a resumed
    training goes on. The model's files stay what they were. Works under torchrun (DDP), and with
    accumulated gradients: over the parts of a step the loss is averaged, also for a model whose
    own loss the Trainer adds up. With FSDP2, DeepSpeed and layer-wise optimizers the centroids get
    an optimizer of their own, see :class:`mvsc.MVSCRegularizer`.

    Args:
        trainer: the Trainer, with its model on its device.
        add_to_loss: whether to add the loss to the model's own. Without, a ``compute_loss`` of
            your own adds ``reg(labels)``. The Trainer of a model that takes ``num_items_in_batch``
            or ``**kwargs`` adds the parts of a step up as they are: if yours are means, set
            ``trainer.model_accepts_loss_kwargs = False``, and it averages; if you divide by
            ``num_items_in_batch``, divide ``reg(labels)`` by
            ``trainer.current_gradient_accumulation_steps``.
        **options: of :func:`mvsc.attach`.

    Returns:
        The regularizer.

    Raises:
        ValueError: if the Trainer shards its model by FSDP1, makes it in ``train``, keeps the
            labels from it, or came with a scheduler of its own; in ``train``, if it made an
            optimizer that does not know the centroids.
    """
    options = _checked(trainer, add_to_loss, options)
    model = cast(nn.Module, trainer.model)
    reg = attach(model, **options)
    share = _Share(trainer) if add_to_loss else None
    if share is not None:
        AddToLoss(reg._tap, reg.regularizer, share).open(model)
        share.open(model, reg)
    create_optimizer = trainer.create_optimizer
    load_checkpoint = trainer._load_optimizer_and_scheduler

    def create_optimizer_with_centroids(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(reg.regularizer.centroids) not in known:
            optimizer.add_param_group(reg.param_group())
        return optimizer

    def load_checkpoint_with_centroids(checkpoint: str | None) -> None:
        load_checkpoint(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / FILE_NAME
        if not file.exists():
            raise FileNotFoundError(
                f"a resumed training needs its centroids, but there is no {file}. Copy that of "
                "the checkpoint there, or start anew from its weights, with from_pretrained."
            )
        reg.load_state_dict(torch.load(file, weights_only=True))

    # The methods that a subclass would override.
    if options.get("optimizer", "host") == "host":
        trainer.create_optimizer = create_optimizer_with_centroids  # type: ignore[method-assign, unused-ignore]
    trainer._load_optimizer_and_scheduler = load_checkpoint_with_centroids  # type: ignore[method-assign, unused-ignore]
    trainer.add_callback(_Centroids(reg, share))
    return reg


def _checked(trainer: Trainer, add_to_loss: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Raise unless the Trainer can take MVSC; return the options, with what its engine needs."""
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) != 2:
        raise ValueError(
            "trainer must shard its model by FSDP2, got FSDP1, whose classifier has no weights "
            'outside of forward. Use fsdp_config={"version": 2}.'
        )
    # A layer-wise optimizer steps in backward, and the one that the Trainer sees does nothing.
    layer_wise = str(getattr(trainer.args.optim, "value", trainer.args.optim)).endswith("layerwise")
    if fsdp is not None or trainer.is_deepspeed_enabled or layer_wise:
        options = {"optimizer": "own"} | options
        if options["optimizer"] == "host":
            raise ValueError(
                'optimizer must be "own" with FSDP, DeepSpeed and layer-wise optimizers, which '
                'take the parameters of the model only, got "host". Leave it out.'
            )
    if trainer.model_init is not None:
        raise ValueError(
            "trainer must have its model already, since train() makes another one with "
            "model_init. Pass model= instead."
        )
    without_labels = trainer.label_smoother is not None or trainer.compute_loss_func is not None
    if add_to_loss and without_labels:
        raise ValueError(
            "trainer must leave the loss to the model, since with label smoothing or a "
            "compute_loss_func the model gets no labels. Use add_to_loss=False, and add "
            "reg(labels) in a compute_loss of your own."
        )
    if trainer.lr_scheduler is not None and options.get("optimizer", "host") == "host":
        raise ValueError(
            "trainer must make its scheduler itself, since one that exists does not know the "
            "centroids. Pass optimizers=(optimizer, None), and attach before train(), or use "
            'optimizer="own".'
        )
    return options


class _Share:
    """What a loss has to be multiplied by to be a mean over the parts and processes of a step.

    The Trainer divides the loss of most models by the number of parts. That of a model that takes
    ``num_items_in_batch`` it leaves as it is, and multiplies it by the number of processes, since
    that is to be a sum over all of them already. MVSC's is not.
    """

    def __init__(self, trainer: Trainer) -> None:
        # The model outlives its Trainer, and must not keep it: another one may follow.
        self.trainer = weakref.ref(trainer)
        self.counted = False

    def open(self, model: nn.Module, reg: AttachedRegularizer) -> None:
        hook = Hook(reg._tap, self._before_model)
        reg._tap.handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.counted = kwargs.get("num_items_in_batch") is not None

    def notice_means(self) -> None:
        """Warn if the Trainer takes a model's loss for a sum, and its forward knows of no count.

        Then a mean, as the segmenters of transformers have one, grows with the parts and the
        processes of a step, and MVSC, which does not, is the less of it.
        """
        trainer: Any = self.trainer()
        parts = trainer.args.gradient_accumulation_steps
        average = getattr(trainer.args, "average_tokens_across_devices", False)
        several = parts > 1 or (average and trainer.accelerator.num_processes > 1)
        model = trainer.model
        named = any("num_items_in_batch" in each for each in arguments_inside(model))
        if several and self._adds_up(trainer) and not named:
            warn(
                f"the Trainer adds up the losses of {type(model).__name__} over the parts and "
                "processes of a step, as sums that are divided by num_items_in_batch, which its "
                "forward does not name. If they are means, as those of transformers' segmenters, "
                "MVSC counts for less and less beside them: set "
                "trainer.model_accepts_loss_kwargs = False, and it averages."
            )

    def _adds_up(self, trainer: Any) -> bool:
        # What older Trainers do not have, they do not do.
        takes_counts = bool(getattr(trainer, "model_accepts_loss_kwargs", False))
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        return takes_counts if scaled is None else bool(scaled)

    def __call__(self) -> float:
        trainer: Any = self.trainer()
        if trainer is None:
            return 1.0
        args = trainer.args
        share = 1.0
        if self._adds_up(trainer):
            parts = args.gradient_accumulation_steps
            share /= getattr(trainer, "current_gradient_accumulation_steps", parts)
        if self.counted and getattr(args, "average_tokens_across_devices", False):
            copies = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
            share /= trainer.accelerator.num_processes // copies
        return share


class _Centroids(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Does for the centroids what the Trainer does for the parameters of its model only."""

    def __init__(self, reg: AttachedRegularizer, share: _Share | None) -> None:
        self.reg, self.share = reg, share

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        centroids, optimizer = self.reg.regularizer.centroids, given.get("optimizer")
        groups = [] if optimizer is None else optimizer.param_groups
        known = any(each is centroids for group in groups for each in group["params"])
        if groups and isinstance(centroids, nn.Parameter) and not known:
            raise ValueError(
                "trainer must have an optimizer that knows the centroids, got one without them. "
                "Make it in create_optimizer, or add reg.param_group() to it before its scheduler "
                "is made."
            )
        if self.share is not None:
            self.share.notice_means()
        self.reg.zero_grad()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reg.zero_grad()  # The Trainer calls model.zero_grad, not that of the optimizer.

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.should_save:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            # Moved when it is whole: a run that is killed here leaves no half file behind.
            partial = folder / f"{FILE_NAME}.partial"
            torch.save(self.reg.state_dict(), partial)
            partial.replace(folder / FILE_NAME)
