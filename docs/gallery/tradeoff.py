"""What each arm gains in mIoU, and what that costs in pixel accuracy."""

import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "effect"))
import report

panels = [
    (f"{head}, {schedule} schedule{note}", cells)
    for kind, note in (("val", ""), ("hold_out", ", choice of strengths"))
    for (schedule, head), cells in report.load(report.RESULTS, kind).items()
]

rows = -(-len(panels) // 2)
figure = Figure((9, 4.2 * rows), layout="constrained")
named = {}
arms = sorted({arm.partition("@")[0] for _, cells in panels for arm in cells} - {"ce"})
grid = list(figure.subplots(rows, 2).flat)
for spare in grid[len(panels) :]:
    spare.axis("off")
for axes, (title, cells) in zip(grid, panels, strict=False):
    axes.set_title(title)
    axes.axhline(0, color="0.8")
    axes.axvline(0, color="0.8")
    axes.margins(0.15)
    for number, arm in enumerate(arms):
        color = colormaps["tab20"](number)
        # A method's strengths in order, joined by a line; without a number it is 1, or the usual.
        names = sorted(
            (
                name
                for name in cells
                if name.partition("@")[0] == arm and report.paired(cells, name, "ce", "mIoU")
            ),
            key=lambda name: float(name.partition("@")[2] or 1),
        )
        means = []
        for name in names:
            cost, gain = (report.paired(cells, name, "ce", score) for score in ("aAcc", "mIoU"))
            axes.plot(cost, gain, ".", color=color, alpha=0.5)
            means.append((statistics.mean(cost), statistics.mean(gain)))
            if "@" in name:
                axes.annotate(name.partition("@")[2], means[-1], fontsize=6)
        if means:
            named[arm] = axes.plot(*zip(*means, strict=True), "o-", color=color)[0]
    axes.set_xlabel("change of pixel accuracy")
    axes.set_ylabel("change of mIoU")
figure.legend(named.values(), named, loc="outside lower center", ncols=5)
