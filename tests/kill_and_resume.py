"""Kill a training run with signal 9 at random moments, resume it, and compare what it ends with.

    python tests/kill_and_resume.py            # 20 kills, some minutes
    python tests/kill_and_resume.py 3 --seed 1

Every second kill waits for a file that is just being written. After each, the last checkpoint must
load and must not be older than before; in the end every tensor of the run's state must be, bit by
bit, that of a run that was never killed.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

import tiny_data

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
sys.path.insert(0, str(RECIPES))  # As a script of its own it is not run by pytest.
from weights import load_state, load_weights  # noqa: E402

SHAPE = "--steps 60 --batch-size 2 --crop 32 32 --scale 64 48 --warmup 5 --no-pretrained"
SAVING = "--workers 0 --cpu --log-every 1 --save-every 2 --eval-every 20 --resume"
SETTINGS = ["folder-segformer-lite0", *SHAPE.split(), *SAVING.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), chosen.kills, random.Random(chosen.seed))


def kill_and_resume(folder: Path, kills: int, draw: random.Random) -> None:
    data = tiny_data.make_folder(folder / "data", train=5)

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, RECIPES / "train.py", *SETTINGS, "--data-root", data]
        # One thread each: beside other work, threads that wait for each other take minutes.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
        )

    began = time.monotonic()
    finish(start(folder / "whole"))
    whole = time.monotonic() - began
    out, step = folder / "killed", 0
    for number in range(kills):
        process = start(out)
        if number % 2:
            moment = wait_for_write(process, out, draw.randrange(40))
        else:
            moment = f"after {(seconds := draw.uniform(0, whole)):.1f} s"
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        process.kill()
        process.communicate()
        reached = load_state(out / "last.pt")["step"] if (out / "last.pt").exists() else 0
        assert reached >= step, f"went back from step {step} to {reached}"
        for path in out.glob("*.safetensors"):
            load_weights(path)
        print(f"kill {number + 1}, {moment}: checkpoint of step {reached}", flush=True)
        step = reached % 60  # a run that came to its end begins anew, in a new folder
        if reached == 60:
            compare(folder / "whole", out)
            out = folder / f"killed{number}"
    finish(start(out))
    compare(folder / "whole", out)
    print(f"{kills} kills: every run ended with the weights of the one that was not killed")


def wait_for_write(process: subprocess.Popen, out: Path, skip: int) -> str:
    """Wait until, after ``skip`` others, a file is half written; say which."""
    seen: set[int] = set()
    while process.poll() is None:
        for path in out.glob("*.partial"):
            try:
                seen.add(path.stat().st_ino)
            except FileNotFoundError:
                continue
            if len(seen) > skip:
                return f"while writing {path.name}"
    return "at its end"


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def compare(whole: Path, killed: Path) -> None:
    a, b = load_state(whole / "last.pt"), load_state(killed / "last.pt")
    for name in ("step", "model", "reg", "optimizer", "schedule", "best", "scores"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    for name in ("best.safetensors", "last.safetensors", "last.centroids.safetensors"):
        ours, theirs = (load_weights(run / name)[0] for run in (whole, killed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


if __name__ == "__main__":
    main()
