"""transformers' Trainer: one line between ``Trainer(...)`` and ``train()``.

``attach(model, add_to_loss=True)`` is all that a loop of one's own needs. A Trainer also makes the
optimizer and the checkpoints, so the centroids have to come into both::

    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    reg = attach_to_trainer(trainer, groups=4)
    trainer.train()
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mvsc.attach import AttachedRegularizer, attach

FILE_NAME = "mvsc.pt"


def attach_to_trainer(trainer: Trainer, **options: Any) -> AttachedRegularizer:
    """Attach a regularizer to the model of a Trainer that has not been started.

    The loss is added to the model's own; the centroids join the Trainer's optimizer without weight
    decay; each checkpoint holds them in a file of their own, ``mvsc.pt``, from which a resumed
    training goes on. The model's files stay what they were. Works under torchrun (DDP).

    Args:
        trainer: the Trainer, with its model on its device.
        **options: of :func:`mvsc.attach`.

    Returns:
        The regularizer.

    Raises:
        ValueError: if the Trainer shards its model, keeps the labels from it, or came with a
            scheduler of its own.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "trainer must not use FSDP or DeepSpeed, which would not know the centroids. "
            "Use DistributedDataParallel (torchrun)."
        )
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        raise ValueError(
            "trainer must leave the loss to the model, since with label smoothing or a "
            "compute_loss_func the model gets no labels. Attach to the model and override "
            "compute_loss."
        )
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "trainer must make its scheduler itself, since one that exists does not know the "
            "centroids. Pass optimizers=(optimizer, None)."
        )
    reg = attach(cast(nn.Module, trainer.model), add_to_loss=True, **options)
    create_optimizer = trainer.create_optimizer

    def create_optimizer_with_centroids(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(reg.regularizer.centroids) not in known:
            optimizer.add_param_group(reg.param_group())
        return optimizer

    # The method that a subclass would override.
    trainer.create_optimizer = create_optimizer_with_centroids  # type: ignore[method-assign, unused-ignore]
    trainer.add_callback(_Centroids(reg))
    return reg


class _Centroids(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Does for the centroids what the Trainer does for the parameters of its model only."""

    def __init__(self, reg: AttachedRegularizer) -> None:
        self.reg = reg

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.reg.zero_grad()  # The Trainer calls model.zero_grad, not that of the optimizer.

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.should_save:
            file = self._file(args, state)
            # Moved when it is whole: a run that is killed here leaves no half file behind.
            partial = file.with_suffix(".partial")
            torch.save(self.reg.state_dict(), partial)
            partial.replace(file)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            return
        file = self._file(args, state)
        if not file.exists():
            raise FileNotFoundError(
                f"a resumed training needs its centroids, but there is no {file}. Copy the "
                f"{FILE_NAME} of the checkpoint there, or start anew."
            )
        self.reg.load_state_dict(torch.load(file, weights_only=True))

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE_NAME
