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
EXAMPLES = HERE.parent / "examples" / "integrations"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
TORCHRUN += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
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
    run([sys.executable, HERE / "engines.py", folder, *rows], folder)
    return folder


def run(command, folder):
    """Run a command in a folder, with the tests' packages; return what it printed."""
    environment = os.environ | engines.ENVIRONMENT
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        del environment[name]  # torchrun sets its own
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path])
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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


@pytest.mark.parametrize("example", engines.EXAMPLES)
def test_an_example_runs_in_two_processes(example, tmp_path):
    pytest.importorskip(engines.EXAMPLES[example])
    run([*TORCHRUN, EXAMPLES / f"{example}.py"], tmp_path)


@pytest.mark.slow
def test_a_job_of_ray_train_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("ray")
    program = (
        f"import sys, runpy; main = runpy.run_path({str(EXAMPLES / 'ray_train.py')!r})['main']\n"
        "import ray; ray.init(num_cpus=3, include_dashboard=False)\n"
        f"print([main({str(tmp_path)!r}, epochs).metrics['step'] for epochs in (1, 3)])"
    )
    # Two steps an epoch: the second job begins where the first ended.
    assert run([sys.executable, "-c", program], tmp_path).splitlines()[-1] == "[2, 6]"
