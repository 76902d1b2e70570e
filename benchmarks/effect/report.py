"""Print the tables of the study from its kept scores, and write them to results/*.md.

    python benchmarks/effect/report.py

Differences are paired: the arm's score minus that of cross-entropy alone with the same seed. The
95 % interval is Student's, over the seeds that both have.
"""

import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy.stats import t

import frontier
import kept

RESULTS = Path(__file__).parent / "results"
Shares = dict[str, float]  # of each class in the labelled training pixels
Cells = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> scores
CLOSE = frontier.LOSSES[:3]
ABOVE = ["arm", "above", "seeds", *(f"at -{loss:g} points" for loss in CLOSE)]
RIVALS = ("lovasz@4", "dice@4", "mvsc@4")  # whose curves another arm's is to lie above
SCORES = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "pixel accuracy", "boundary_mIoU": "boundary"}


def load(results: Path, kind: str = "val") -> dict[tuple[str, str], Cells]:
    """Read every cell: (schedule, head) -> arm -> seed -> scores."""
    found: dict[tuple[str, str], Cells] = defaultdict(lambda: defaultdict(dict))
    for run in kept.read(results, kind):
        schedule, head, arm, seed = run["cell"].split("/")
        found[schedule, head][arm][int(seed)] = run
    return {place: dict(cells) for place, cells in found.items()}


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval; infinite for a single value."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, float("inf")
    error = statistics.stdev(differences) / count**0.5
    return mean, float(t.ppf(0.975, count - 1)) * error


def shared_seeds(cells: Cells, arm: str, base: str) -> list[int]:
    return sorted(set(cells.get(arm, {})) & set(cells.get(base, {})))


def paired(cells: Cells, arm: str, base: str, score: str) -> list[float]:
    """Return the differences of a score between two arms, seed by seed."""
    both = shared_seeds(cells, arm, base)
    return [cells[arm][seed][score] - cells[base][seed][score] for seed in both]


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def gain(differences: list[float]) -> str:
    if not differences:
        return ""
    mean, half = interval(differences)
    return f"{mean:+.2f}" + (
        "" if half == float("inf") else f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    )


def table(cells: Cells, base: str = "ce") -> str:
    """One row an arm; cross-entropy first, the others by their gain in mIoU."""
    gains = [f"gain in {title} [95 %]" for title in SCORES.values()]
    head = ["arm", "seeds", *SCORES.values(), *gains, "mIoU against mvsc [95 %]"]
    head += ["s a step", "peak MiB"]
    order = sorted(
        cells,
        key=lambda arm: (arm != base, -statistics.mean(paired(cells, arm, base, "mIoU") or [-99])),
    )
    rows = []
    for arm in order:
        runs = cells[arm].values()
        row = [arm, str(len(runs)), *(spread([run[name] for run in runs]) for name in SCORES)]
        row += ["" if arm == base else gain(paired(cells, arm, base, name)) for name in SCORES]
        row += ["" if arm == "mvsc" else gain(paired(cells, arm, "mvsc", "mIoU"))]
        seconds = statistics.median(s for run in runs for s in run["log"]["seconds_per_step"])
        peak = statistics.median(run["peak_mib"] for run in runs)
        # Of two kinds of machine they would say nothing.
        alike = len({run["machine"]["device"] for run in runs}) == 1
        row += [f"{seconds:.2f}", f"{peak:.0f}"] if alike else ["", ""]
        rows.append(row)
    return markdown(head, *rows)


def overview(found: dict[tuple[str, str], Cells]) -> str:
    """One row a schedule and head: what MVSC gained, with its weights and four times them."""
    told = list(itertools.product(("mvsc", "mvsc@4"), ("mIoU", "aAcc")))
    head = ["schedule", "head", "mIoU of ce", *(f"{arm}: {SCORES[name]}" for arm, name in told)]
    rows = []
    for (schedule, decoder), cells in found.items():
        if "ce" not in cells:
            continue
        row = [schedule, decoder, spread([run["mIoU"] for run in cells["ce"].values()])]
        for arm, name in told:
            gains = paired(cells, arm, "ce", name)
            row.append(gain(gains) + (f" ({len(gains)})" if gains and name == "mIoU" else ""))
        rows.append(row)
    return markdown(head, *rows)


def markdown(head: list[str], *rows: list[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def on_top(cells: Cells) -> str:
    """Tell what each half of a pair adds to the other."""
    told = []
    for both in cells:
        loss, plus, attached = both.partition("+")
        for base, added in ((loss, attached), (attached, loss)) if plus else ():
            gains = {title: paired(cells, both, base, name) for name, title in SCORES.items()}
            if all(gains.values()):
                changes = (f"{title} {gain(values)}" for title, values in gains.items())
                told.append(f"{added} on top of {base}: {', '.join(changes)}.")
    return "\n\n".join(told)


def frontiers(cells: Cells, base: str = "ce") -> str:
    """One row an arm: its curve at cross-entropy's pixel accuracy, unshifted, and a bit below."""
    head = ["arm", "seeds", *(f"at -{loss:g} points" for loss in frontier.LOSSES)]
    head += [f"tau chosen for -{loss:g}: mIoU, pixel accuracy" for loss in frontier.LOSSES[:2]]
    rows = read_curves(cells, base)
    for row in rows:
        pairs = pairs_of(cells, row[0], base)
        for loss in frontier.LOSSES[:2]:
            found = [frontier.chosen(*pair, loss) for pair in pairs]
            both = [] if None in found else list(zip(*found, strict=True))
            row.append(", ".join(gain(list(values)) for values in both) or "not reached")
    return markdown(head, *rows)


def above_rivals(cells: Cells, base: str = "ce") -> list[list[str]]:
    """One row an arm and a rival: its seeds, and how far its curve lies above the rival's."""
    rows = []
    for number, rival in enumerate(RIVALS):
        for arm in cells:
            if arm == base or arm in RIVALS[: number + 1]:  # itself, or told the other way round
                continue
            changes = [differences(cells, arm, rival, base, loss) for loss in CLOSE]
            if len(changes[0]) > 1:
                rows.append([arm, rival, str(len(changes[0])), *map(gain_if_reached, changes)])
    return rows


def above(found: dict[tuple[str, str], Cells]) -> str:
    """The same for each schedule and head, of at least three seeds."""
    rows = [
        [schedule, head, *row]
        for (schedule, head), cells in found.items()
        for row in above_rivals(cells)
        if int(row[2]) > 2
    ]
    return markdown(["schedule", "head", *ABOVE], *rows)


def differences(cells: Cells, arm: str, rival: str, base: str, loss: float) -> list[float | None]:
    """Return how far an arm's curve lies above a rival's at an accuracy, seed by seed."""
    ours, theirs = (gains_at(cells, each, base, loss) for each in (arm, rival))
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return [None if a is None or b is None else a - b for a, b in both]


def gains_at(cells: Cells, arm: str, base: str, loss: float) -> dict[int, float | None]:
    """Read an arm's curve at the accuracy of its base with each seed, minus so many points."""
    seeds = shared_seeds(cells, arm, base)
    return {s: frontier.gain_at(cells[arm][s], cells[base][s], loss) for s in seeds}


def gain_if_reached(values: list[float | None]) -> str:
    reached = [value for value in values if value is not None]
    return gain(reached) if len(reached) == len(values) else "not reached"


def pairs_of(cells: Cells, arm: str, base: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the scores of an arm beside those of another with the same seed."""
    return [(cells[arm][seed], cells[base][seed]) for seed in shared_seeds(cells, arm, base)]


def read_curves(cells: Cells, base: str) -> list[list[str]]:
    """Read each arm's curve: its name, its seeds, and the gain at each accuracy; best first."""
    rows = []
    for arm in cells:
        read = [[*gains_at(cells, arm, base, loss).values()] for loss in frontier.LOSSES]
        if not read[0]:
            continue
        # By the gain for half a point; one that is not reached comes last.
        order = statistics.mean(-99.0 if value is None else value for value in read[1])
        rows.append((order, [arm, str(len(read[0])), *map(gain_if_reached, read)]))
    return [row for _, row in sorted(rows, key=lambda each: -each[0])]


def curves(found: dict[tuple[str, str], Cells], base: str = "ce") -> str:
    """One row an arm, for each schedule and head: the gains at three accuracies, and the ECE."""
    columns = [f"at -{loss:g}" for loss in CLOSE]
    parts = []
    for (schedule, head), cells in found.items():
        rows = []
        for arm, seeds, *gains in read_curves(cells, base):
            ece = statistics.mean(frontier.untempered(run)["ece"] for run in cells[arm].values())
            rows.append([arm, seeds, *gains[: len(CLOSE)], f"{ece:.1f}"])
        parts.append(f"**{head}, {schedule} schedule**")
        parts.append(markdown(["arm", "seeds", *columns, "ECE [%]"], *rows))
    return "\n\n".join(parts)


def calibration(cells: Cells) -> str:
    """One row an arm: its chances, as they are and with a temperature chosen on other images."""
    names = {"nll": "NLL", "balanced_nll": "NLL, classes alike", "ece": "ECE [%]"}
    head = ["arm", "seeds", *names.values(), *(f"{name}, tempered" for name in names.values())]
    rows = []
    for arm, runs in cells.items():
        found = [
            [read(run) for run in runs.values()]
            for read in (frontier.untempered, frontier.tempered)
        ]
        values = [statistics.mean(one[name] for one in each) for each in found for name in names]
        rows.append([arm, str(len(runs)), *(f"{value:.3f}" for value in values)])
    return markdown(head, *rows)


def class_gains(cells: Cells, shares: Shares, arm: str, base: str = "ce") -> str:
    """Tell how IoU changed for rare and common classes, and where most."""
    both = shared_seeds(cells, arm, base)
    changes = {}
    for number, name in enumerate(shares):
        pairs = [[cells[each][seed]["iou"][number] for each in (arm, base)] for seed in both]
        # A class that is in no image of the validation has no IoU.
        if all(None not in pair for pair in pairs):
            changes[name] = [ours - plain for ours, plain in pairs]
    rarest = sorted(changes, key=lambda name: shares[name])
    third = len(rarest) // 3
    thirds = {
        "rarest": rarest[:third],
        "middle": rarest[third : len(rarest) - third],
        "commonest": rarest[len(rarest) - third :],
    }
    by_third = (
        f"{title} {len(names)} classes {gain(means)}"
        for title, names in thirds.items()
        if (means := [statistics.mean(v) for v in zip(*(changes[n] for n in names), strict=True)])
    )
    told = [
        f"{name} {change:+.1f}"
        for change, name in sorted((statistics.mean(v), name) for name, v in changes.items())
    ]
    return f"{', '.join(by_third)}; {', '.join(told[:5])}, ..., {', '.join(told[-5:])}"


def group_similarity(cells: Cells, arm: str = "mvsc") -> str:
    """Tell the mean cosine between groups along the training of the first seed."""
    log = next(iter(cells[arm].values()))["log"]
    if "group_similarity" not in log:
        return ""
    steps, values = log["step"], log["group_similarity"]
    shown = [
        0,
        *(next(i for i, s in enumerate(steps) if s >= steps[-1] * f) for f in (0.25, 0.5, 1)),
    ]
    return ", ".join(f"{values[i]:.4f} at step {steps[i]}" for i in shown)


def report(results: Path, shares: Shares | None) -> str:
    """Write everything that the kept scores tell."""
    parts = []
    for (schedule, head), cells in load(results).items():
        parts += heading(f"{head}, {schedule} schedule", cells)
        parts.append(on_top(cells))
        for arm in ("mvsc", "mvsc@4"):
            if shares and shared_seeds(cells, arm, "ce"):
                parts.append(
                    f"IoU of classes, change with {arm}: {class_gains(cells, shares, arm)}."
                )
        if "mvsc" in cells:
            parts.append(f"Mean cosine between the groups: {group_similarity(cells)}.")
    for (schedule, head), cells in load(results, "hold_out").items():
        parts += heading(f"Choice of strengths: {head}, {schedule} schedule", cells)
        parts.append("Judged on every fifth of the training images, which were not trained on.")
    titles = {
        "frontier": "Frontiers",
        "retrained": "Frontiers of a new classifier on kept features",
    }
    for kind, title in titles.items():
        for (schedule, head), cells in load(results, kind).items():
            parts += heading(f"{title}: {head}, {schedule} schedule", cells)
            parts += ["Gain in mIoU over cross-entropy, unshifted, as tau of each arm varies:"]
            parts.append(frontiers(cells))
            if rows := above_rivals(cells):
                parts.append(markdown(ABOVE, *rows))
            parts.append(calibration(cells))
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(title: str, cells: Cells) -> list[str]:
    """Tell what was run and on what, and the table of scores."""
    runs = [run for seeds in cells.values() for run in seeds.values()]
    machines = {f"{run['machine']['device']}, torch {run['machine']['torch']}" for run in runs}
    return [
        f"### {title}: {runs[0]['steps']} steps",
        f"Batch {runs[0]['batch_size']}, images {runs[0]['size'][0]} x {runs[0]['size'][1]}; "
        f"{' and '.join(sorted(machines))}; mean ± standard deviation over seeds, in percent.",
        table(cells),
    ]


def pages(results: Path) -> dict[str, str]:
    """Write what the kept scores tell: the text of each file."""
    classes = results / "classes.json"
    shares = json.loads(classes.read_text("utf-8")) if classes.exists() else None
    shifted = load(results, "frontier")
    return {
        "overview.md": overview(load(results)) + "\n",
        "curves.md": curves(shifted) + "\n",
        "above.md": above(shifted) + "\n",
        "report.md": report(results, shares),
    }


if __name__ == "__main__":
    for name, text in pages(RESULTS).items():
        print(text)
        (RESULTS / name).write_text(text, "utf-8")
