"""Read the frontiers: what an arm gains in mIoU at a given pixel accuracy, as its prior is shifted.

An arm's curve joins its scores at the tau of judge.py. It is read at the pixel accuracy of
cross-entropy with the same seed, unshifted, minus so many points.
"""

import itertools
import statistics
from typing import Any

Run = dict[str, Any]
LOSSES = (0.0, 0.5, 1.0, 2.0)  # points of pixel accuracy


def gain_at(run: Run, base: Run, loss: float) -> float | None:
    """Return the most mIoU on an arm's curve at that pixel accuracy or more, minus the base's.

    Args:
        run: of an arm, as kept.
        base: of cross-entropy with the same seed.
        loss: points of pixel accuracy that may be lost against the base, unshifted.

    Returns:
        Points of mIoU, or None if no shift leaves so much pixel accuracy.
    """
    floor, plain = at_zero(base["frontier"], "aAcc") - loss, at_zero(base["frontier"], "mIoU")
    curve = run["frontier"]
    points = list(zip(curve["aAcc"], curve["mIoU"], strict=True))
    reached = [miou for accuracy, miou in points if accuracy >= floor]
    for (a, low), (b, high) in itertools.pairwise(points):
        if min(a, b) < floor <= max(a, b):
            reached.append(low + (high - low) * (floor - a) / (b - a))
    return max(reached) - plain if reached else None


def chosen(run: Run, base: Run, loss: float) -> tuple[float, float] | None:
    """Choose tau on one half of the images, judge it on the other; the mean of both ways.

    Returns:
        Change of mIoU and of pixel accuracy against the base, unshifted, on images that were not
        looked at for the choice; None if no tau leaves so much pixel accuracy.
    """
    found = []
    for here, there in ((0, 1), (1, 0)):
        seen, unseen = (run["frontier"]["halves"][half] for half in (here, there))
        floor = half_at_zero(base, here, "aAcc") - loss
        allowed = [i for i, accuracy in enumerate(seen["aAcc"]) if accuracy >= floor]
        if not allowed:
            return None
        best = max(allowed, key=lambda i: seen["mIoU"][i])
        found.append([unseen[k][best] - half_at_zero(base, there, k) for k in ("mIoU", "aAcc")])
    gain, cost = (sum(both) / 2 for both in zip(*found, strict=True))
    return gain, cost


def mean_curve(pairs: list[tuple[Run, Run]]) -> dict[float, tuple[float, float]]:
    """Average curves over seeds: the changes of pixel accuracy and mIoU, at each tau of all runs.

    Args:
        pairs: each an arm's run, and cross-entropy's with the same seed.
    """
    first, *others = (run["frontier"]["tau"] for run, _ in pairs)
    taus = [tau for tau in first if all(tau in each for each in others)]
    return {tau: (mean_change(pairs, tau, "aAcc"), mean_change(pairs, tau, "mIoU")) for tau in taus}


def mean_change(pairs: list[tuple[Run, Run]], tau: float, name: str) -> float:
    """Return how far a score at tau is from cross-entropy's, unshifted; the mean over seeds."""
    return statistics.mean(
        at(run["frontier"], tau, name) - at_zero(base["frontier"], name) for run, base in pairs
    )


def tempered(run: Run) -> dict[str, float]:
    """Choose a temperature by NLL on one half of the images, judge on the other; the mean."""
    halves = run["calibration"]["halves"]
    found = []
    for seen, unseen in (halves, halves[::-1]):
        best = min(range(len(seen["nll"])), key=lambda i: seen["nll"][i])
        found.append({name: unseen[name][best] for name in ("nll", "balanced_nll", "ece")})
    return {name: sum(each[name] for each in found) / 2 for name in found[0]}


def untempered(run: Run) -> dict[str, float]:
    """Return NLL, the mean of the classes' NLL, and ECE in percent, of the model as it is."""
    found = run["calibration"]
    plain = found["temperature"].index(1.0)
    return {name: found[name][plain] for name in ("nll", "balanced_nll", "ece")}


def at(curve: dict[str, Any], tau: float, name: str) -> float:
    return float(curve[name][curve["tau"].index(tau)])


def at_zero(curve: dict[str, Any], name: str) -> float:
    return at(curve, 0.0, name)


def half_at_zero(run: Run, half: int, name: str) -> float:
    curve = run["frontier"]
    return float(curve["halves"][half][name][curve["tau"].index(0.0)])
