"""Every engine of docs/engines.md: two real processes over gloo against a single one."""

import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version
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
OLDEST = {"accelerate": "1.7", "transformers": "5", "lightning": "2.4", "deepspeed": "0.16"}
"""Versions with FSDP2, and with the settings that make a run comparable."""

SINCE_2_7 = ("FSDP2", "ModelParallel", "tensor parallel", "pipeline")
"""What torch 2.6 does on devices only, or in another way."""


def available(row):
    """Return whether what a row needs is installed."""
    if torch.__version__ < "2.7" and any(each in row for each in SINCE_2_7):
        return False
    needed = [module for host, module in HOSTS.items() if host in row]
    return all(
        find_spec(module) and Version(version(module)) >= Version(OLDEST[module])
        for module in needed
    )


AVAILABLE = [row for row in engines.ROWS if available(row)]


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


@pytest.mark.slow
@pytest.mark.parametrize("example", engines.EXAMPLES)
def test_an_example_runs_in_two_processes(example, tmp_path):
    pytest.importorskip(engines.EXAMPLES[example])
    if torch.__version__ < "2.7" and example == "pipeline":
        pytest.skip("torch 2.6 takes other arguments")
    run([*TORCHRUN, EXAMPLES / f"{example}.py"], tmp_path)


@pytest.mark.slow
def test_a_job_of_ray_train_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("pyarrow")  # Ray Train needs it, and "ray" alone does not bring it.
    program = (
        f"import sys, runpy; main = runpy.run_path({str(EXAMPLES / 'ray_train.py')!r})['main']\n"
        "import ray; ray.init(num_cpus=3, include_dashboard=False)\n"
        f"print([main({str(tmp_path)!r}, epochs).metrics['step'] for epochs in (1, 3)])"
    )
    # Two steps an epoch: the second job begins where the first ended.
    assert run([sys.executable, "-c", program], tmp_path).splitlines()[-1] == "[2, 6]"


# Costs and faults.


def together(task, world, *arguments):
    """Run a task of engines.py in fresh processes; return them when all have ended."""
    context = torch.multiprocessing.get_context("spawn")
    started = [
        context.Process(target=task, args=(rank, world, *arguments)) for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode is not None, "hung"
    return started


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counted by Linux")
@pytest.mark.parametrize("world", [2, 4])
def test_a_step_sends_the_bytes_that_the_page_says(world, tmp_path):
    together(engines.count_bytes, world, tmp_path)
    for rank in range(world):
        counted = torch.load(tmp_path / f"{rank}.pt")
        for options, sent in counted.items():
            expected = sent_a_step(20, 64, world, *options)
            assert expected <= sent <= 1.1 * expected, options


def sent_a_step(classes, dim, processes, own=False, sync_means=False):
    payload = 4 * 4 * classes * dim + 4 * own
    payload += sync_means * (8 * 4 * classes * dim + 8 * 4 * classes)
    return 2 * (processes - 1) / processes * payload


def test_the_table_of_bytes_is_what_the_formula_says():
    page = (HERE.parent / "docs" / "engines.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert [classes for classes, _ in rows] == ["150", "171", "1000", "10000"]
    for classes, row in rows:
        sent = [sent_a_step(int(classes), 256, n) for n in (8, 64, 1024)]
        sent.append(sent_a_step(int(classes), 256, 1024, sync_means=True))
        assert row.split(" | ") == [f"{each / 1e6:.2f}" for each in sent]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "fate"),
    [("host", "killed"), ("own", "killed"), ("own", "ends"), ("host", "goes on")],
)
def test_a_process_that_is_killed_or_out_of_memory_ends_the_other_with_an_error(
    optimizer, fate, tmp_path
):
    survivor, lost = together(engines.die_in_a_step, 2, tmp_path, optimizer, fate)
    assert lost.exitcode == (-signal.SIGKILL if fate == "killed" else 3)
    assert survivor.exitcode == 0
    error, seconds = torch.load(tmp_path / "error.pt")
    assert seconds < 30, error
    assert fate != "goes on" or seconds > 4  # until its time is up
    # What was saved before is whole, and goes on in any number of processes.
    if fate != "killed":
        return
    reg = engines.build(optimizer=optimizer)[1]
    reg.load_state_dict(torch.load(tmp_path / "mvsc.pt"))
    assert reg.regularizer.step == 2
    together(engines.go_on, 3, tmp_path, optimizer)
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert_close(ends[1:], [ends[0]] * 2, rtol=0, atol=0)
