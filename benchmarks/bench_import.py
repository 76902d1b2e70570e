"""How long does ``import mvsc`` take once torch has been imported?

python benchmarks/bench_import.py            # writes benchmarks/results/
python benchmarks/bench_import.py --quick    # once, writes nothing
"""

import statistics
import subprocess
import sys

from measure import command_line, write

CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import mvsc
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    device, quick = command_line(__doc__)
    times = [imports() for _ in range(1 if quick else 11)][-10:]  # the first fills the caches
    names = ("import torch", "import mvsc after it")
    columns = zip(names, zip(*times, strict=True), strict=True)
    rows = [
        {"what": name, "median ms": statistics.median(each), "least ms": min(each)}
        for name, each in columns
    ]
    if not quick:
        write("bench_import", device, {"A new process for each of ten imports": rows})


def imports() -> list[float]:
    """Import both in a new process; return the milliseconds of each."""
    run = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    return [1e3 * float(each) for each in run.stdout.split()]


if __name__ == "__main__":
    main()
