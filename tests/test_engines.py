"""Every engine of docs/engines.md: two real processes over gloo against a single one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import engines

HERE = Path(__file__).parent
HOSTS = {
    "Accelerate": "accelerate",
    "Trainer": "transformers",
    "Lightning": "lightning",
    "DeepSpeed": "deepspeed",
}
AVAILABLE = [
    row
    for row in engines.ROWS
    if all(find_spec(module) for host, module in HOSTS.items() if host in row)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Where the rows that are asked for have left what they trained."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {each.params.get("row") for each in params if each is not None}
    folder = tmp_path_factory.mktemp("engines")
    rows = [row for row in AVAILABLE if row in asked]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    command = [sys.executable, HERE / "engines.py", folder, *rows]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def result(folder, row, who):
    file = folder / f"{row}-{who}.pt"
    assert file.exists(), f"{row}: process {who} hung or was killed"
    found = torch.load(file)
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("row", engines.ROWS)
def test_two_processes_under_an_engine_are_one_with_the_mean_gradient(folder, row):
    if row not in AVAILABLE:
        pytest.skip("not installed")
    first, second = (result(folder, row, rank) for rank in range(2))
    assert_close(second, first, rtol=0, atol=0)
    expected = result(folder, row, "alone")
    if expected is None:  # A difference already.
        expected = {name: torch.zeros_like(value) for name, value in first.items()}
    rounding = 3e-3 if "bfloat16" in row else 1e-6
    assert_close(first, expected, rtol=0, atol=rounding)
