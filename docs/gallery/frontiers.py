"""What each arm reaches as its prior is shifted: mIoU over pixel accuracy, the mean over seeds."""

import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "effect"))
import report

panels = {
    place: cells
    for place, cells in report.load(report.RESULTS, "frontier").items()
    if "ce" in cells
}
rows = -(-len(panels) // 2)
figure = Figure((9, 4.2 * rows), layout="constrained")
grid = figure.add_gridspec(rows, 2)
arms = sorted({arm for cells in panels.values() for arm in cells} - {"ce"})
named = {}

for place, ((schedule, head), cells) in enumerate(panels.items()):
    alone = place % 2 == 0 and place == len(panels) - 1
    axes = figure.add_subplot(grid[place // 2, :] if alone else grid[place // 2, place % 2])
    axes.set_title(f"{head}, {schedule} schedule")
    plain = [run["frontier"] for run in cells["ce"].values()]
    zero = plain[0]["tau"].index(0.0)
    floor, base = (statistics.mean(run[name][zero] for run in plain) for name in ("aAcc", "mIoU"))
    for arm, runs in cells.items():
        curves = [run["frontier"] for run in runs.values()]
        x, y = (
            [statistics.mean(values) for values in zip(*(c[name] for c in curves), strict=True)]
            for name in ("aAcc", "mIoU")
        )
        color = "black" if arm == "ce" else colormaps["tab20"](arms.index(arm))
        named[arm] = axes.plot(x, y, ".-", color=color)[0]
        axes.plot(x[zero], y[zero], "o", color=color)
    # What loses more than three points is outside.
    axes.set_xlim(left=floor - 3)
    axes.set_ylim(bottom=base - 1)
    axes.axvline(floor, color="0.8", zorder=0)
    axes.set_xlabel("pixel accuracy [%]")
    axes.set_ylabel("mIoU [%]")
figure.legend(named.values(), named, loc="outside lower center", ncols=4)
