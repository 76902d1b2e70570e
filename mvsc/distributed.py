"""Several processes: centroids that stay in step, and means over all of them (reading R18).

What the loss uses is the identity for a single process, and communicates by sums. Every process of
a group has to take part equally often.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def check_group(group: Any) -> None:
    """Raise unless ``group`` is None or a group of torch's, if only one of other processes."""
    if group is None or not dist.is_available() or group == dist.GroupMember.NON_GROUP_MEMBER:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, got "
            f"{type(group).__name__}. Of a DeviceMesh use mesh.get_group(), of ranks "
            "torch.distributed.new_group(ranks)."
        )


def rank(group: Any = None) -> int:
    """Return the rank of this process in ``group``; 0 without a process group."""
    return dist.get_rank(group) if _running() else 0


def world_size(group: Any = None) -> int:
    """Return the number of processes in ``group``; 1 without a process group.

    Raises:
        ValueError: if this process is not in the group: it would get another's part, negated.
    """
    size = dist.get_world_size(group) if _running() else 1
    if size < 1:
        raise ValueError(
            "process_group must hold this process, got a group of others. Call the regularizer on "
            "the group's processes only, or give each process the group that it is in."
        )
    return size


def average_gradient(parameter: Tensor, group: Any = None) -> Tensor:
    """Return a view of ``parameter``; its gradient is averaged over the processes in backward.

    That keeps a bare parameter equal on every process, with no wrapper at all, and does not
    disturb one inside DistributedDataParallel: the average of equal gradients is the same.
    """
    if world_size(group) == 1:
        return parameter
    averaged: Tensor = _AverageGradient.apply(parameter, group)
    return averaged


def sum_over_processes(tensor: Tensor, group: Any = None) -> Tensor:
    """Add ``tensor`` up over the processes; its gradient is added up too.

    ``dist.all_reduce`` alone has no gradient: the encoder's would silently shrink by the number
    of processes.
    """
    if world_size(group) == 1:
        return tensor
    total: Tensor = _Sum.apply(tensor, group)
    return total


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard ``tensor`` as FSDP2 has sharded ``parameter``, if it has; every process takes part."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    whole = tensor.to(parameter.device)
    placed: Tensor = distribute_tensor(whole, sharded.device_mesh, sharded.placements)
    return placed


def gather(parameter: Any) -> Tensor:
    """Return the whole of a DTensor; its gradient is averaged over the processes that hold it."""
    from torch.distributed.tensor import Partial

    average = [Partial("avg")] * parameter.device_mesh.ndim
    whole: Tensor = parameter.full_tensor(grad_placements=average)
    return whole


def assert_in_sync(regularizer: nn.Module) -> None:
    """Raise if a regularizer is not bitwise the same on every process.

    A check for the start of a run and after changes to the loop; it communicates, so every process
    of the regularizer's group has to call it.

    Args:
        regularizer: an :class:`mvsc.MVSCRegularizer`, or any module that should be equal.

    Raises:
        RuntimeError: with the ranks and the tensor or sizes that differ.

    Example:
        >>> assert_in_sync(nn.Linear(2, 3))  # A single process is in sync with itself.
    """
    groups = (getattr(module, "process_group", None) for module in regularizer.modules())
    group = next((group for group in groups if group is not None), None)
    if world_size(group) == 1:
        return
    state = regularizer.state_dict()
    shapes: list[Any] = [None] * world_size(group)
    dist.all_gather_object(shapes, {name: tuple(t.shape) for name, t in state.items()}, group)
    for other, theirs in enumerate(shapes):
        if theirs != shapes[0]:
            raise RuntimeError(
                f"the regularizer must be equal on every process, got {shapes[0]} on rank 0 and "
                f"{theirs} on rank {other}. Build it with the same sizes everywhere."
            )
    for name, tensor in state.items():
        tensor = tensor.to(next(iter(state.values())).device)  # An optimizer counts on the CPU.
        if hasattr(tensor, "full_tensor"):  # Sharded by FSDP2.
            tensor = tensor.full_tensor()
        copies = [torch.empty_like(tensor) for _ in range(world_size(group))]
        dist.all_gather(copies, tensor.contiguous(), group=group)
        for other, copied in enumerate(copies):
            # Bit by bit: a NaN is equal to itself.
            if not torch.equal(_bits(copied), _bits(copies[0])):
                raise RuntimeError(
                    f"{name} must be equal on every process, got ranks 0 and {other} that differ. "
                    'Build the regularizer with the same seed everywhere, keep sync="auto", and '
                    "call it equally often on every process."
                )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group) / dist.get_world_size(ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_reduce(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None
