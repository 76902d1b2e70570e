"""What each arm gains as its prior is shifted: mIoU over pixel accuracy, the mean over seeds."""

import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "effect"))
import frontier
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
    for arm in cells:
        pairs = report.pairs_of(cells, arm, "ce")
        if not pairs:
            continue
        points = frontier.mean_curve(pairs)
        x, y = zip(*points.values(), strict=True)
        color = "black" if arm == "ce" else colormaps["tab20"](arms.index(arm))
        named[arm] = axes.plot(x, y, ".-", color=color)[0]
        axes.plot(*points[0.0], "o", color=color)
    # What loses more than three points is outside.
    axes.set_xlim(left=-3)
    axes.set_ylim(bottom=-1)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xlabel("change of pixel accuracy [points]")
    axes.set_ylabel("change of mIoU [points]")
figure.legend(named.values(), named, loc="outside lower center", ncols=4)
