"""A pipeline of two stages (GPipe): the regularizer lives with the last one.

torchrun --nproc-per-node 2 examples/integrations/pipeline.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import mvsc

CLASSES, DIM, PART = 21, 32, 2


def main() -> mvsc.AttachedRegularizer | None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank()
    # Of the last stage's processes: here one. Every process has to make every group.
    last = dist.new_group([1])
    encoder = nn.Sequential(nn.Conv2d(3, DIM, 3, 4, 1), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(DIM, DIM, 1), nn.ReLU(), nn.Conv2d(DIM, CLASSES, 1))
    model = head if rank == 1 else encoder
    reg = None
    if rank == 1:
        reg = mvsc.attach(model, classifier="2", optimizer="own", process_group=last)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=255)
        return loss if reg is None else loss + reg(labels)

    # With its sizes given, a stage runs no trial forward, which would count as a step.
    images = torch.zeros(PART, 3, 64, 64)
    features = torch.zeros(PART, DIM, 16, 16, requires_grad=True)
    logits = torch.zeros(PART, CLASSES, 16, 16, requires_grad=True)
    sizes = {"input_args": (features,), "output_args": (logits,), "input_grads": (features.data,)}
    if rank == 0:
        sizes = {"input_args": (images,), "output_args": (features,)}
        sizes["output_grads"] = (features.data,)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"), **sizes)
    # On every stage: one without a loss_fn would run without gradients, and the others wait.
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=criterion)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        if rank == 0:
            schedule.step(torch.randn(2 * PART, 3, 64, 64))
        else:
            schedule.step(target=torch.randint(0, CLASSES, (2 * PART, 16, 16)), losses=[])
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    return reg


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
