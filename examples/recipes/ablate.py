"""Run the grids of the paper's Tables 2 and 3 over seeds, and print ours beside the paper's.

    python examples/recipes/ablate.py ade20k-segformer-b0 --recipe.data-root DIR --seeds 0 1 2
    python examples/recipes/ablate.py folder-segformer-lite0 --recipe.data-root DIR --table groups

Each cell is a run of train.py in a folder of its own. Call it again after an interruption: what
is finished stays, what was begun goes on. ``--report`` only prints what is there.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from commands import run
from recipes import RECIPES, Recipe
from train import check_same, train


@dataclass(frozen=True)
class Arm:
    """One row of a table: how a recipe is changed, and what the paper reports for it."""

    title: str
    mvsc: bool = True
    reg: dict[str, Any] = field(default_factory=dict)
    paper: tuple[float, float] | None = None
    """mIoU and mAcc on ADE20K with MiT-B0, 20k steps, from a single run."""


BASELINE = Arm("baseline", mvsc=False, paper=(30.9, 41.1))
FULL = Arm("MVSC", paper=(32.6, 44.0))
TABLES: dict[str, list[Arm]] = {
    "terms": [
        BASELINE,
        Arm("without Eq. 2", reg={"align_weight": 0.0}, paper=(31.4, 41.8)),
        Arm("without Eq. 3", reg={"pull_weight": 0.0}, paper=(32.2, 43.0)),
        Arm("without L_v", reg={"classify_weight": 0.0}, paper=(32.3, 43.3)),
        Arm("without Eq. 4", reg={"enhance": False}, paper=(32.1, 42.8)),
        FULL,
    ],
    "groups": [
        BASELINE,
        Arm("G = 1", reg={"groups": 1}, paper=(32.2, 43.1)),
        Arm("G = 2", reg={"groups": 2}, paper=(32.0, 43.4)),
        FULL,
        Arm("G = 8", reg={"groups": 8}, paper=(32.3, 43.8)),
    ],
}


@dataclass(frozen=True)
class Settings:
    """Run the paper's ablations with any recipe."""

    recipe: Recipe
    table: Literal["terms", "groups"] = "terms"
    """terms: the paper's Table 2; groups: its Table 3."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a whole set of runs."""
    out: Path = Path("runs/ablation")
    """Folder of all cells."""
    report: bool = False
    """Print what is there, and train nothing."""


def cell(settings: Settings, arm: Arm, seed: int) -> Recipe:
    """Return the recipe of one cell; arms that both tables have share their cells."""
    name = arm.title.lower().replace(" ", "-").replace(".", "").replace("-=-", "")
    return replace(
        settings.recipe,
        mvsc=arm.mvsc,
        reg=replace(settings.recipe.reg, **arm.reg),
        seed=seed,
        out=settings.out / name / f"seed{seed}",
        resume=True,
    )


def scores_of(recipe: Recipe) -> dict[str, Any] | None:
    """Read the scores of a finished cell; None if it is not finished.

    Raises:
        ValueError: if they are broken, or those of other settings.
    """
    path = recipe.folder / "scores.json"
    if not path.exists():
        return None
    try:
        scores: dict[str, Any] = json.loads(path.read_text("utf-8"))
        before = scores["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be the scores that train.py wrote, but cannot be read: {error}. Remove "
            "it: the same command writes it again."
        ) from error
    check_same(recipe, before)
    return scores


def main(settings: Settings) -> None:
    if not settings.seeds:
        raise ValueError("seeds must hold at least one integer, got none. Use --seeds 0.")
    if len(set(settings.seeds)) < len(settings.seeds):
        raise ValueError(f"seeds must be different, got {settings.seeds}. Name each once.")
    check_own(settings.recipe)
    arms = TABLES[settings.table]
    # Seed by seed, so that an unfinished study compares all arms on the same seeds.
    for seed in () if settings.report else settings.seeds:
        for arm in arms:
            recipe = cell(settings, arm, seed)
            if scores_of(recipe) is None:
                train(recipe)
    print(report(settings, arms))


def check_own(recipe: Recipe) -> None:
    """Raise if the recipe has what each cell is given."""
    instead = {
        "out": "Use --out for the folder of all cells.",
        "seed": "Use --seeds.",
        "mvsc": "The baseline is among the arms.",
    }
    for name, remedy in instead.items():
        value = getattr(recipe, name)
        if value != getattr(Recipe, name):
            raise ValueError(f"recipe.{name} must be left to each cell, got {value}. {remedy}")


def report(settings: Settings, arms: Sequence[Arm]) -> str:
    """Make a Markdown table: mean and standard deviation over the finished seeds."""
    lines = [
        f"{settings.recipe.name}, {settings.recipe.steps} steps, data {settings.recipe.layout}",
        "",
        "| | mIoU, ours | mAcc, ours | seeds | paper (ADE20K, MiT-B0, one run) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in arms:
        done = [s for seed in settings.seeds if (s := scores_of(cell(settings, arm, seed)))]
        ours = (spread([scores[name] for scores in done]) for name in ("mIoU", "mAcc"))
        paper = "{} / {}".format(*arm.paper) if arm.paper else ""
        lines.append(f"| {arm.title} | {' | '.join(ours)} | {len(done)} | {paper} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Write mean and, of more than one value, standard deviation."""
    if not values:
        return "not run"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def command_line() -> None:
    table = {
        name: (description, Settings(recipe)) for name, (description, recipe) in RECIPES.items()
    }
    main(tyro.extras.overridable_config_cli(table))


if __name__ == "__main__":
    run(command_line, "Stopped; the same command goes on from here.")
