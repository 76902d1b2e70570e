"""Accelerate with FSDP2: attach before prepare; the regularizer itself is not prepared.

    accelerate launch --config_file fsdp2.yaml examples/integrations/accelerate_fsdp2.py

With one process, or where there is no device for FSDP, it is the same code.
"""

import os
from tempfile import TemporaryDirectory

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn

import mvsc

CLASSES = 21


def main() -> mvsc.AttachedRegularizer:
    sharded = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin if sharded else None)
    model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
    reg = mvsc.attach(model, optimizer="own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    reg.to(accelerator.device)
    accelerator.register_for_checkpointing(reg)  # into save_state and load_state
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=accelerator.device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=accelerator.device)
        loss = criterion(model(images), labels) + reg(labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.3f}")
    mvsc.assert_in_sync(reg)
    with TemporaryDirectory() as folder:
        accelerator.save_state(f"{folder}/{accelerator.process_index}")
    accelerator.end_training()
    return reg


if __name__ == "__main__":
    main()
