"""ultralytics' semantic segmentation, by a trainer of its own.

Not by `YOLO(...)`, which builds another model when it trains.

    trainer = MVSCTrainer(overrides={"model": "yolo26n-sem.yaml", "data": "my.yaml"})
    trainer.train()
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.semantic import SemanticSegmentationTrainer

import mvsc


class WithMVSC:
    """The model's own criterion, and the regularizer while training; no part of the model."""

    def __init__(self, criterion: Any, reg: mvsc.AttachedRegularizer) -> None:
        self.criterion, self.reg = criterion, reg

    def __call__(self, preds: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss to be trained on, and the criterion's own parts to be shown."""
        loss, items = self.criterion(preds, batch)
        if isinstance(preds, tuple) and torch.is_grad_enabled():  # training: (main, auxiliary)
            # Its losses are summed over the batch.
            loss = loss + self.reg(batch["semantic_mask"]) * len(batch["img"])
        return loss, items

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.criterion  # the averaged model and the checkpoints know nothing of mvsc


class MVSCTrainer(SemanticSegmentationTrainer):
    """Attaches when the optimizer is built: the model is whole then, and not yet averaged."""

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build it as ultralytics does, and attach."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        self.mvsc = mvsc.attach(model, groups=4, ignore_index=255)
        optimizer.add_param_group(self.mvsc.param_group(lr=optimizer.param_groups[0]["lr"]))
        model.criterion = WithMVSC(model.init_criterion(), self.mvsc)
        return optimizer


if __name__ == "__main__":
    MVSCTrainer(overrides={"model": "yolo26n-sem.yaml", "data": sys.argv[1]}).train()
