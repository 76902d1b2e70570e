"""Lightning on several processes: no line changes with the strategy.

torchrun --nproc-per-node 2 examples/integrations/lightning_ddp.py
"""

import os

import lightning
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import mvsc

CLASSES = 21


class Segmenter(lightning.LightningModule):
    """The regularizer is a submodule, so device and checkpoint know it; no optimizer has to."""

    def __init__(self) -> None:
        super().__init__()
        self.model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
        self.reg = mvsc.attach(self.model, optimizer="own")
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Add the loss."""
        images, labels = batch
        return self.criterion(self.model(images), labels) + self.reg(labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the model alone."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)


def main() -> mvsc.AttachedRegularizer:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(0, CLASSES, (8, 64, 64))
    dataset = torch.utils.data.TensorDataset(images, labels)
    module = Segmenter()
    trainer = lightning.Trainer(
        strategy="ddp" if processes > 1 else "auto",  # or ModelParallelStrategy(...)
        devices=processes,
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=2))
    mvsc.assert_in_sync(module.reg)
    if processes > 1:  # Lightning ends NCCL's group only; gloo's may abort at the exit.
        torch.distributed.destroy_process_group()
    return module.reg


if __name__ == "__main__":
    main()
