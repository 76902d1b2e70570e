"""Accelerate: prepare the regularizer with the model, and it is in every saved state."""

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from torch import nn

import mvsc

CLASSES = 21


def main() -> nn.Module:
    accelerator = Accelerator(mixed_precision="bf16")
    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=CLASSES)
    reg = mvsc.attach(model)
    groups = [{"params": model.parameters()}, reg.param_group()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
    model, reg, optimizer = accelerator.prepare(model, reg, optimizer)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=accelerator.device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=accelerator.device)
        loss = criterion(model(images), labels) + reg(labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.print(f"loss {loss.item():.3f}")
    return accelerator.unwrap_model(reg)


if __name__ == "__main__":
    main()
