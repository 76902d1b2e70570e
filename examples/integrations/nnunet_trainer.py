"""nnU-Net v2: a trainer of its own. Deep supervision: MVSC on the highest resolution.

    export nnUNet_extTrainer=/folder/of/this/file
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerMVSC

The prediction needs neither this file nor mvsc, if `trainer_name` in the checkpoint is set back to
nnUNetTrainer; else it builds the network by this class, as nnU-Net does for every trainer.
"""

from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

import mvsc


class nnUNetTrainerMVSC(nnUNetTrainer):  # noqa: N801 - nnU-Net's own spelling
    """Adds the regularizer to the loss, and its centroids to the checkpoint."""

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
        """Save as nnU-Net does, and the centroids with it."""
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
            torch.save({**checkpoint, "mvsc": self.mvsc.state_dict()}, filename)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Go on with the centroids of the checkpoint."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location=self.device, weights_only=False)
        self.mvsc.load_state_dict(checkpoint["mvsc"])
