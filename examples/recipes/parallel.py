"""Devices and processes: what DDP, FSDP2 and DeepSpeed's ZeRO-2 each need of a training.

An ``Engine`` knows where weights and the optimizer's state are, and how to save and load them.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from recipes import Recipe

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Set up processes, devices, precision and engine, as the launcher asks for them.

    Raises:
        ValueError: if the engine or the number of processes does not fit.
    """
    accelerator = Accelerator(
        cpu=recipe.cpu,
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulate,
    )
    parts = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            "batch_size must be a multiple of processes x accumulate, "
            f"{accelerator.num_processes} x {recipe.accumulate}, got {recipe.batch_size}."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "the engine must be DDP, FSDP2 or DeepSpeed, got FSDP1. Use accelerate launch "
            "--config_file examples/recipes/fsdp2.yaml, or torchrun."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        stage = config["zero_optimization"]["stage"]
        if stage == 3:
            raise ValueError(
                "the stage of ZeRO must be at most 2, got 3, whose weights are in parts, too. Use "
                "accelerate launch --config_file examples/recipes/fsdp2.yaml, which parts the same."
            )
        if recipe.precision == "fp16":
            raise ValueError("precision must be no or bf16 under DeepSpeed, got fp16.")
        # What Accelerate puts there casts the whole model, and its batch norms.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": recipe.precision == "bf16", "dtype": "bfloat16"}
        config["train_micro_batch_size_per_gpu"] = recipe.batch_size // parts
        # Accelerate drops a 0 of its own file, and DeepSpeed's default is to clip.
        config.setdefault("gradient_clipping", 0.0)
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would say nothing, and train in float32.
        raise ValueError("precision must be no or bf16 on a CPU, got fp16.")
    return accelerator


def takes_optimizer_apart(accelerator: Accelerator) -> bool:
    """Return whether the engine's optimizer holds the model's parameters only, in parts."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


class Engine:
    """One device, or DDP: every process has all of the weights and of the optimizer's state."""

    files = 0
    """How many files of its own beside last.pt a state consists of."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def weights(self) -> dict[str, Tensor]:
        """Return the model's weights, whole; every process has to ask."""
        return self.model.state_dict()

    def save(self, folder: Path, step: int, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Return what last.pt has to hold; every process has to ask."""
        return {"model": weights, "optimizer": self.optimizer.state_dict()}

    def tidy(self, folder: Path, step: int) -> None:
        """Remove files of its own that last.pt, which speaks of ``step``, no longer needs."""

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Load what ``save`` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Keep the weights whole for a while, in which processes may call the model at will."""
        yield


class Sharded(Engine):
    """FSDP2: every process has a part of the weights."""

    def weights(self) -> dict[str, Tensor]:
        return get_model_state_dict(self.model, options=WHOLE)

    def save(self, folder: Path, step: int, weights: dict[str, Tensor]) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        return {"model": weights, "optimizer": optimizer}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )

    @contextmanager
    def whole(self) -> Iterator[None]:
        shards = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        yield
        for shard in shards:
            again = shard is not self.model  # as Accelerate does
            shard.set_reshard_after_forward(again, recurse=False)
            shard.reshard()


class DeepSpeed(Engine):
    """ZeRO-2, which writes weights and its optimizer's state itself, a file for each process."""

    def __init__(self, model: nn.Module, engine: Any, accelerator: Accelerator) -> None:
        super().__init__(model, engine.optimizer)
        self.engine, self.accelerator = engine, accelerator
        self.files, self.saved = accelerator.num_processes, -1

    def save(self, folder: Path, step: int, weights: dict[str, Tensor]) -> dict[str, Any]:
        if self.saved != step:
            self.engine.save_checkpoint(folder / "deepspeed", f"step-{step}", save_latest=False)
            self.accelerator.wait_for_everyone()
            self.saved = step
        return {}

    def tidy(self, folder: Path, step: int) -> None:
        for files in folder.glob("deepspeed/step-*"):
            if files.name != f"step-{step}":
                shutil.rmtree(files)

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.saved = int(state["step"])
        self.engine.load_checkpoint(folder / "deepspeed", f"step-{self.saved}")


def make_engine(
    accelerator: Accelerator, model: nn.Module, prepared: Any, optimizer: Any
) -> Engine:
    """Return the engine of what ``accelerator.prepare`` made of a model and its optimizer."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeed(model, prepared, accelerator)
    return (Sharded if isinstance(model, FSDPModule) else Engine)(model, optimizer)


def described(files: int) -> str:
    """Say what wrote a state of so many files of its own."""
    return f"DeepSpeed in {files} processes" if files else "DDP or FSDP2"


def share_buffers(model: nn.Module, processes: int) -> None:
    """Give every process the first one's batch norm statistics, which are those that are saved."""
    if processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
