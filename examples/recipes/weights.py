"""Files that are never half there: weights with what belongs to them, and a run's own state."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file under another name, and move it when it is complete.

    Raises:
        OSError: if it cannot be written, as on a full disk; nothing is left of it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # the content must be on disk before the name is
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        said = (str(error).splitlines() or [""])[0]
        reason = getattr(error, "strerror", None) or f"{said} (is the disk full?)"
        raise OSError(f"{path} cannot be written: {reason}") from error


def check_folder(out: Path) -> None:
    """Raise if a file stands where a folder for results is to be."""
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out must be a folder, got {out}, but {folder} is a file.")


def save_weights(path: Path, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """Save a state dict as safetensors; ``about`` becomes its metadata, each value as JSON."""
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    write_whole(path, lambda partial: partial.write_bytes(save(own, metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what ``save_weights`` saved: tensors and metadata.

    Raises:
        ValueError: if the file is missing or is not such a file.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}. Name a .safetensors file "
            "that train.py wrote, as runs/NAME/best.safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must be a .safetensors file that train.py wrote, but cannot be read: {error}."
        ) from error
    return tensors, metadata


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save what a run needs to go on: tensors, numbers and strings, in any nesting."""
    write_whole(path, lambda partial: torch.save(dict(state), partial))


def load_state(path: Path) -> dict[str, Any]:
    """Load what ``save_state`` saved; nothing in the file is executed.

    Raises:
        ValueError: if the file is broken.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes lead torch to errors of any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} must be a state that train.py wrote, but cannot be read: {reason}. Choose "
            "another folder with --out to begin anew; the .safetensors beside it can still be used."
        ) from error
    return state
