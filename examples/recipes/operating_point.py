"""Choose where a trained segmenter works: more mIoU for less pixel accuracy, without training.

    python examples/recipes/operating_point.py runs/NAME/best.safetensors --data-root DIR
    python examples/recipes/operating_point.py runs/NAME/best.safetensors --max-loss 0.5

The model is judged on held-out images with its prior shifted by several tau (prior.py). The tau
with the best mIoU is taken, or the best that costs at most ``--max-loss`` points of pixel accuracy,
and is folded into the classifier's bias: the weights that are written have the same keys as before
and cost nothing at inference. What is gained is also told for images that had no part in the
choice: tau is chosen on one half of the images and judged on the other.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from commands import run
from curve import TAUS, Curve, Points, choose
from data import open_split
from evaluate import check_classes, evaluate, load_segmenter, pick_device
from mvsc.finding import find_classifier
from prior import LARGEST, log_shares
from weights import load_weights, save_weights, write_whole


@dataclass(frozen=True)
class Settings:
    """Choose where a trained segmenter works, and write its weights with that prior."""

    weights: tyro.conf.Positional[Path]
    """best.safetensors or last.safetensors of a run."""
    data_root: Path | None = None
    """Folder of the data set; by default the one that the run was trained on."""
    split: Literal["val", "train"] = "val"
    """Images to choose on; other images than those that judge the result."""
    max_loss: float | None = None
    """Points of pixel accuracy that may be lost; by default any number, for the best mIoU."""
    taus: tuple[float, ...] = TAUS
    """Shifts to try; 0, the model as it is, is among them in any case."""
    add_bias: bool = False
    """Give a classifier without bias one."""
    out: Path | None = None
    """File of the shifted weights; by default NAME.shifted.safetensors beside the others. The curve
    is drawn beside it, as PNG."""
    workers: int = 2
    """Processes that load images."""
    device: str = "auto"
    """For example "cuda", "mps" or "cpu"; by default the best there is."""


def main(settings: Settings) -> None:
    """Judge, choose, print and write.

    Raises:
        ValueError: if weights, data or settings do not fit, or the prior cannot be shifted.
    """
    if not all(abs(tau) <= LARGEST for tau in settings.taus):
        raise ValueError(f"taus must be numbers from {-LARGEST} to {LARGEST}, got {settings.taus}.")
    if settings.max_loss is not None and not settings.max_loss >= 0:
        raise ValueError(
            f"max_loss must be at least 0 points of pixel accuracy, got {settings.max_loss}."
        )
    out = settings.out or settings.weights.with_name(f"{settings.weights.stem}.shifted.safetensors")
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(
            f"out must be a file that ends in .safetensors, got {out}. The picture lies beside it."
        )
    if out.resolve() == settings.weights.resolve():
        raise ValueError(f"out must be another file than the weights, which are kept, got {out}.")
    device = pick_device(settings.device)
    segmenter, recipe, classes = load_segmenter(settings.weights, device, unshifted=True)
    path = find_classifier(segmenter.model)
    check_bias(segmenter.model, path, settings.add_bias)
    recipe = replace(recipe, workers=settings.workers)
    root = settings.data_root or recipe.data_root
    data, training = (open_split(recipe.layout, root, each) for each in (settings.split, "train"))
    check_classes(classes, data)
    shares = log_shares(training)

    curve = Curve(shares, device, sorted({0.0, *settings.taus}))
    evaluate(segmenter, data, recipe, device, look=curve.look)
    chosen = chosen_at(curve.points(), curve.taus, settings.max_loss)
    print_curve(curve, chosen, settings.max_loss)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_shifted(settings.weights, out, path, shares, curve.taus[chosen])
    picture = out.with_suffix(".png")
    figure = draw(curve, chosen)
    write_whole(picture, lambda partial: figure.savefig(partial, format="png", dpi=150))
    print(f"Written to {out}, and the curve to {picture}.")


def check_bias(model: nn.Module, path: str, add_bias: bool) -> None:
    """Raise unless the classifier has a bias, or may get one."""
    if getattr(model.get_submodule(path), "bias", None) is None and not add_bias:
        raise ValueError(
            f"the classifier {path!r} must have a bias for the prior to be folded into, got none. "
            "Use --add-bias to give it one, or evaluate.py --tau, which writes nothing."
        )


def chosen_at(points: Points, taus: tuple[float, ...], max_loss: float | None) -> int:
    """Return the place of the tau to take; that of 0 leaves the model as it is."""
    plain = taus.index(0.0)
    least = -1.0 if max_loss is None else points["aAcc"][plain] - max_loss
    found = choose(points, least)
    gains = found is not None and points["mIoU"][found] > points["mIoU"][plain]
    return found if found is not None and gains else plain  # of equals, the model as it is


def print_curve(curve: Curve, chosen: int, max_loss: float | None) -> None:
    """Print the scores at each tau, and what the choice gains on images that it did not see."""
    points = curve.points()
    print(f"{'tau':>7}" + "".join(f"{name:>8}" for name in points))
    for number, tau in enumerate(curve.taus):
        values = "".join(f"{values[number]:8.2f}" for values in points.values())
        print(f"{tau:7.3f}{values}{'  chosen' if number == chosen else ''}")
    if halves := curve.halves():
        gain, cost = on_unseen(halves, curve.taus, max_loss)
        print(
            "Chosen on one half of the images and judged on the other: "
            f"mIoU {gain:+.2f}, pixel accuracy {cost:+.2f}."
        )


def on_unseen(
    halves: list[Points], taus: tuple[float, ...], max_loss: float | None
) -> tuple[float, float]:
    """Return the changes of mIoU and pixel accuracy, the mean of both ways round."""
    plain, changes = taus.index(0.0), []
    for seen, unseen in (halves, halves[::-1]):
        best = chosen_at(seen, taus, max_loss)
        changes.append([unseen[name][best] - unseen[name][plain] for name in ("mIoU", "aAcc")])
    gain, cost = (sum(both) / 2 for both in zip(*changes, strict=True))
    return gain, cost


def write_shifted(source: Path, out: Path, path: str, shares: Tensor, tau: float) -> None:
    """Write weights whose classifier has tau times the log shares taken off its bias."""
    tensors, about = load_weights(source)
    weight, name = tensors[f"{path}.weight"], f"{path}.bias"
    bias = tensors.get(name, weight.new_zeros(len(shares)))
    tensors[name] = (bias.double() - tau * shares.double()).to(bias.dtype)
    save_weights(out, tensors, **{**about, "tau": tau})


def draw(curve: Curve, chosen: int) -> Figure:
    """Draw mIoU over pixel accuracy, with the tau at each point."""
    points = curve.points()
    figure = Figure((5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(points["aAcc"], points["mIoU"], "o-", color="black")
    axes.plot(points["aAcc"][chosen], points["mIoU"][chosen], "o", color="tab:red", markersize=10)
    for tau, *place in zip(curve.taus, points["aAcc"], points["mIoU"], strict=True):
        axes.annotate(f"{tau:g}", place, (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("pixel accuracy [%]")
    axes.set_ylabel("mIoU [%]")
    return figure


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings)))
