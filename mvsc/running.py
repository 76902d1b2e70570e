"""What torch does at this moment that is no plain forward: capture, replay, trace."""

import torch


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_replaying() -> bool:
    """Return whether a backward runs: the signal that FSDP2 uses, too."""
    return torch._C._current_graph_task_id() != -1


def is_plain_eager() -> bool:
    """Return whether tensors are what they seem: not compiled, traced, or replayed in backward."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not is_replaying()
