"""What the benchmarks share: interleaved medians, counts, and results as Markdown tables."""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

RESULTS = Path(__file__).parent / "results"


def command_line(description: str) -> tuple[torch.device, bool]:
    """Read ``--device`` and ``--quick``, which every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, correctness only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    return torch.device(arguments.device), arguments.quick


def medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time each way once a round, in turn, and return the median of each in milliseconds.

    In turn, because a machine's speed drifts: ways that are compared share every phase of it.
    """
    timers = {
        name: Timer("way()", globals={"way": way}, num_threads=torch.get_num_threads())
        for name, way in ways.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median * 1e3)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


class Operators(TorchDispatchMode):
    """Count the operators that a device would have to be asked for: views and empties cost none."""

    free = ("empty", "new_empty", "detach", "promote_types", "scalar_tensor", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        self.count += not (func.is_view or name in self.free or name.startswith("empty_"))
        return func(*args, **(kwargs or {}))


def count_operators(step: Callable[[], object]) -> int:
    """Run a step and count its operators, of forward and backward."""
    with Operators() as operators:
        step()
    return operators.count


def count_kernels(step: Callable[[], object]) -> int:
    """Run a step and count what a GPU was asked for: kernels, copies and fills."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


@contextmanager
def noted(failed: dict[str, str], name: str, strict: bool) -> Iterator[None]:
    """Keep going over a way that is wrong or does not run, and note it; not if ``strict``."""
    try:
        yield
    except (AssertionError, RuntimeError) as problem:
        if strict:
            raise
        failed[name] = "wrong" if isinstance(problem, AssertionError) else "fails"
        print(f"{name}: {problem}")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where the numbers come from."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Render rows with the same keys as a Markdown table; numbers to three digits."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(name: str, device: torch.device, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables and keep them as ``results/<name>-<device>.md``, which the docs show."""
    where = machine(device)
    text = "\n\n".join(
        [
            f"`python benchmarks/{name}.py` on "
            + ", ".join(f"{key} {value}" for key, value in where.items()),
            *(f"**{title}**\n\n{table(rows)}" for title, rows in tables.items() if rows),
        ]
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device.type}.md"
    partial = path.with_suffix(".md.partial")
    partial.write_text(text + "\n")
    partial.replace(path)
