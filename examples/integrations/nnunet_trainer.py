"""nnU-Net v2: a trainer of its own. Deep supervision: MVSC on the highest resolution.

    export nnUNet_extTrainer=/folder/of/this/file
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerMVSC

The prediction needs neither this file nor mvsc, if `trainer_name` in the checkpoint is set back to
nnUNetTrainer; else it builds the network by this class, as nnU-Net does for every trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

import mvsc


class nnUNetTrainerMVSC(nnUNetTrainer):  # noqa: N801 - nnU-Net's own spelling
    """Adds the regularizer to the loss, and its centroids to what is saved."""

    def _build_loss(self) -> Callable[[Any, Any], Tensor]:
        """Attach here: this is called last, when network and optimizer exist."""
        if self.label_manager.has_regions:
            raise ValueError("MVSC needs one class for each pixel, and regions overlap.")
        criterion, network = super()._build_loss(), self.network
        ignore = self.label_manager.ignore_label  # the highest label + 1, or None
        self.mvsc = mvsc.attach(network, groups=4, ignore_index=255 if ignore is None else ignore)
        self.optimizer.add_param_group(self.mvsc.param_group())

        def loss(output: Any, target: Any) -> Tensor:
            value = criterion(output, target)
            if network.training and torch.is_grad_enabled():
                labels = target[0] if isinstance(target, list) else target
                value = value + self.mvsc(labels[:, 0].long())
            return value

        return loss

    def save_checkpoint(self, filename: str) -> None:
        """Save as nnU-Net does, and the centroids in a file beside it."""
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            torch.save(self.mvsc.state_dict(), f"{filename}.partial")
            Path(f"{filename}.partial").replace(f"{filename}.mvsc")

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Go on with the centroids beside the checkpoint, if it is a file."""
        super().load_checkpoint(filename_or_checkpoint)
        if isinstance(filename_or_checkpoint, str):
            state = torch.load(f"{filename_or_checkpoint}.mvsc", weights_only=True)
            self.mvsc.load_state_dict(state)
