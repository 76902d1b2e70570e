"""DeepSpeed, any stage of ZeRO: the centroids have an optimizer of their own.

torchrun --nproc-per-node 2 examples/integrations/deepspeed_loop.py
"""

import deepspeed
import segmentation_models_pytorch as smp
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

import mvsc

CLASSES, BATCH = 21, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main() -> mvsc.AttachedRegularizer:
    deepspeed.init_distributed()
    model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
    reg = mvsc.attach(model, optimizer="own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    reg.to(engine.device)
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for _ in range(2):
        images = torch.randn(BATCH, 3, 64, 64, device=engine.device)
        labels = torch.randint(0, CLASSES, (BATCH, 64, 64), device=engine.device)
        loss = criterion(engine(images), labels) + reg(labels)
        engine.backward(loss)
        engine.step()
    mvsc.assert_in_sync(reg)
    print(f"{get_accelerator().device_name()} loss {loss.item():.3f}")
    # Beside engine.save_checkpoint, which knows the model: on one process, it is equal on all.
    if engine.global_rank == 0:
        torch.save(reg.state_dict(), "mvsc.pt")
    return reg


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
