"""What each arm gains in mIoU, and what that costs in pixel accuracy."""

import re
import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "effect"))
import report

# What one would choose among; variants of MVSC are in the tables.
CHOICES = {"ce", "mvsc", "balanced", "dice", "lovasz", "pixel-contrast", "proxy-anchor", "centre"}
CHOICES |= {"class-means"}


def method(arm):
    """Leave the strengths out of an arm's name."""
    return re.sub("@[^+]*", "", arm)


def strengths(arm):
    """Read the strengths out of an arm's name, '' for the usual one."""
    return [part.partition("@")[2] for part in arm.split("+")]


panels = []
for kind, note in (("val", ""), ("hold_out", ", choice of strengths")):
    for (schedule, head), cells in report.load(report.RESULTS, kind).items():
        shown = {arm: runs for arm, runs in cells.items() if {*method(arm).split("+")} <= CHOICES}
        if len(shown) > 2:  # more than MVSC beside cross-entropy
            panels.append((f"{head}, {schedule} schedule{note}", shown))

rows = -(-len(panels) // 2)
figure = Figure((9, 4.2 * rows), layout="constrained")
grid = figure.add_gridspec(rows, 2)
named = {}

arms = sorted({method(arm) for _, cells in panels for arm in cells} - {"ce"})
for place, (title, cells) in enumerate(panels):
    alone = place % 2 == 0 and place == len(panels) - 1
    axes = figure.add_subplot(grid[place // 2, :] if alone else grid[place // 2, place % 2])
    axes.set_title(title)
    axes.axhline(0, color="0.8")
    axes.axvline(0, color="0.8")
    axes.margins(0.15)
    for number, arm in enumerate(arms):
        color = "black" if arm == "mvsc" else colormaps["tab20"](number)
        # A method's strengths in order, joined by a line; without a number it is 1, or the usual.
        names = sorted(
            (
                name
                for name in cells
                if method(name) == arm and report.paired(cells, name, "ce", "mIoU")
            ),
            key=lambda name: [float(number or 1) for number in strengths(name)],
        )
        means = []
        for name in names:
            cost, gain = (report.paired(cells, name, "ce", score) for score in ("aAcc", "mIoU"))
            axes.plot(cost, gain, ".", color=color, alpha=0.5)
            means.append((statistics.mean(cost), statistics.mean(gain)))
            if "@" in name:
                label = "+".join(number or "1" for number in strengths(name))
                axes.annotate(label, means[-1], (3, 3), textcoords="offset points", fontsize=7)
        if means:
            named[arm] = axes.plot(*zip(*means, strict=True), "o-", color=color)[0]
    # What loses more than that is outside.
    axes.set_xlim(left=max(axes.get_xlim()[0], -7))
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -1))
    axes.set_xlabel("change of pixel accuracy")
    axes.set_ylabel("change of mIoU")
figure.legend(named.values(), named, loc="outside lower center", ncols=5)
