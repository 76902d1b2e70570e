"""The raw scores of the study: a line of JSON a run, a file for each schedule.

``frontier-short.jsonl`` holds the runs of the short schedule, judged on the validation images,
``hold_out-quick.jsonl`` those of the quick one on held-out training images. Those in
``val-*.jsonl`` were judged before models were looked at with a shifted prior; none is added.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read(results: Path, kind: str) -> list[Run]:
    """Read every run of a kind, in the order of schedule, head, arm and seed."""
    paths = sorted(results.glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def cells(results: Path, kind: str) -> set[str]:
    """Return the cells that are there, SCHEDULE/HEAD/ARM/SEED."""
    return {run["cell"] for run in read(results, kind)}


def add(results: Path, kind: str, run: Run) -> None:
    """Fold a finished run in; one of the same cell that is there is replaced.

    The file is at no time half there, and two studies that finish at once lose nothing.
    """
    path = results / f"{kind}-{run['cell'].split('/')[0]}.jsonl"
    results.mkdir(parents=True, exist_ok=True)
    with alone(results):
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        runs = {each["cell"]: each for each in map(json.loads, lines)} | {run["cell"]: run}
        ordered = sorted(runs.values(), key=lambda each: each["cell"].split("/"))
        text = "".join(json.dumps(each) + "\n" for each in ordered)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, "utf-8")
        partial.replace(path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the folder; the system lets go of it for one that dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
