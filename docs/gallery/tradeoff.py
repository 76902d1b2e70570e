"""What each arm gains in mIoU, and what that costs in pixel accuracy."""

import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "effect"))
import report

runs = report.load(report.RESULTS)
rows = len({schedule for schedule, _ in runs})
figure = Figure((9, 4.2 * rows), layout="constrained")
arms = sorted({arm for cells in runs.values() for arm in cells} - {"ce"})
named = {}
panels = figure.subplots(rows, -(-len(runs) // rows), squeeze=False).flat
for axes, ((schedule, head), cells) in zip(panels, runs.items(), strict=False):
    axes.set_title(f"{head}, {schedule} schedule")
    axes.axhline(0, color="0.8")
    axes.axvline(0, color="0.8")
    axes.margins(0.15)
    for number, arm in enumerate(arms):
        color = colormaps["tab20"](number)
        cost, gain = (report.paired(cells, arm, "ce", score) for score in ("aAcc", "mIoU"))
        if gain:
            mean = statistics.mean(cost), statistics.mean(gain)
            axes.plot(cost, gain, ".", color=color, alpha=0.5)
            named[arm] = axes.plot(*mean, "o", color=color)[0]
    axes.set_xlabel("change of pixel accuracy")
    axes.set_ylabel("change of mIoU")
figure.legend(named.values(), named, loc="outside lower center", ncols=5)
