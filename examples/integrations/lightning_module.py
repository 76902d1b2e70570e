"""Lightning: the regularizer is a submodule, so device, optimizer and checkpoint know it."""

import lightning
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import mvsc

CLASSES = 21


class Segmenter(lightning.LightningModule):
    """A model and its regularizer side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
        self.reg = mvsc.attach(self.model)
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Add the three terms to the loss and log them one by one."""
        images, labels = batch
        loss = self.criterion(self.model(images), labels)
        terms = self.reg.terms(labels)
        self.log_dict(terms._asdict())
        return loss + self.reg.total(terms)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the centroids a group of their own."""
        groups = [{"params": self.model.parameters()}, self.reg.param_group()]
        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)


def main() -> mvsc.AttachedRegularizer:
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, CLASSES, (4, 64, 64))
    dataset = torch.utils.data.TensorDataset(images, labels)
    module = Segmenter()
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=2))
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})
    return module.reg


if __name__ == "__main__":
    main()
