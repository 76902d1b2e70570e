"""Does it work, and how much? Train every arm over seeds on real images, and keep the scores.

    python benchmarks/effect/study.py --data-root DIR
    python benchmarks/effect/study.py --data-root DIR --arms ce mvsc --seeds 0 1 2 --part 0 2
    python benchmarks/effect/report.py

A cell is one training run: (schedule, head, arm, seed). Its scores are one line in results/; a
cell that is there is not run again, one that was killed goes on where it stopped. With
``--part I N`` this process takes every N-th cell, so that several can share the work.

Both runs of a pair have the same initial weights, order of the images and augmentation, since
all of them depend on the seed alone (examples/recipes/loading.py).
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent, HERE.parents[1] / "examples" / "recipes"):
    sys.path.insert(0, str(folder))

import arms  # noqa: E402
import kept  # noqa: E402
import views  # noqa: E402
from data import SegmentationData, open_split  # noqa: E402
from evaluate import evaluate, load_segmenter, pick_device  # noqa: E402
from judge import Judge  # noqa: E402
from measure import machine  # noqa: E402
from models import Segmenter  # noqa: E402
from prior import class_pixels, log_shares  # noqa: E402
from recipes import RECIPES, Recipe  # noqa: E402
from train import Evaluate, cross_entropy, read_metrics, train  # noqa: E402
from weights import write_whole  # noqa: E402

HEADS = {"segformer": "folder-segformer-lite0", "deeplabv3plus": "folder-deeplabv3plus-lite0"}


class Schedule(NamedTuple):
    """How long, on images of which longer and shorter side, and how many in a step."""

    steps: int
    size: tuple[int, int]
    batch_size: int
    every: int = 1
    """Trains on one in so many images; which ones depends on the seed."""
    noise: float = 0.0
    """The share of the labelled regions that have another class of their image."""


SCHEDULES = {  # 4, 12, 48 and 12 epochs of 795 images; then as many steps as short
    "quick": Schedule(396, (128, 96), 8),
    "short": Schedule(1188, (160, 120), 8),
    "long": Schedule(4752, (160, 120), 8),
    "large": Schedule(596, (384, 288), 16),
    "quarter": Schedule(1188, (160, 120), 8, every=4),
    "eighth": Schedule(1188, (160, 120), 8, every=8),
    "noisy": Schedule(1188, (160, 120), 8, noise=0.2),
}
INTERRUPTED = 130  # exit status, as of a shell


@dataclass(frozen=True)
class Settings:
    """Train arms over seeds on a folder of images, and keep the scores."""

    data_root: Path
    """Folder with images/, labels/ and classes.txt."""
    schedules: tuple[str, ...] = ("short",)
    """quick, short, long; large: as many epochs as short, on large images; quarter, eighth and
    noisy: short, on fewer training images or on wrong labels."""
    heads: tuple[str, ...] = tuple(HEADS)
    """segformer, deeplabv3plus."""
    arms: tuple[str, ...] = tuple(arms.ARMS)
    """See arms.py; NAME@STRENGTH changes an arm's strength."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each a pair of runs for every arm."""
    size: tuple[int, int] | None = None
    """Longer and shorter side of the images in training and evaluation; or the schedule's."""
    batch_size: int | None = None
    """Images in a step, instead of the schedule's."""
    steps: int | None = None
    """Instead of the schedule's."""
    results: Path = HERE / "results"
    """Folder of the scores."""
    work: Path = Path("runs/effect")
    """Folder of checkpoints; those of a finished cell are removed."""
    hold_out: bool = False
    """Judge on a fifth of the training images, which are not trained on: to choose strengths."""
    keep_weights: bool = False
    """Leave the weights of a finished cell in the work folder, to look at them later."""
    retrain: bool = False
    """Train the classifier alone, anew, with cross-entropy on the kept weights of each cell, for
    half the steps: what is left of an arm's gain is in the features."""
    judge_again: bool = False
    """Judge the kept weights of each finished cell once more, at the shifts of today."""
    part: tuple[int, int] = (0, 1)
    """This process takes cells I, I + N, ..."""
    workers: int = 0
    """Processes that load images."""
    cell: str | None = None
    """Run this one cell, SCHEDULE/HEAD/ARM/SEED, in this process."""


def main(settings: Settings) -> None:
    check(settings)
    keep_classes(settings)
    cells = [
        f"{schedule}/{head}/{arm}/{seed}"
        for schedule in settings.schedules
        for seed in settings.seeds
        for head in settings.heads
        for arm in settings.arms
    ]
    first, count = settings.part
    for cell in cells[first::count]:
        # Asked for each, since another study may have finished it meanwhile.
        if (cell in kept.cells(settings.results, kind(settings))) != settings.judge_again:
            continue
        print(f"== {cell}", flush=True)
        # A process for each cell: its peak memory is its own, and nothing is left over.
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", cell]
        with subprocess.Popen(command) as process:
            try:
                failed = process.wait()
            except KeyboardInterrupt:  # which the cell had from the terminal, too: it saves
                process.wait()
                raise
        if failed == INTERRUPTED:
            sys.exit(INTERRUPTED)
        if failed:
            sys.exit(f"{cell} failed; the same command goes on from here.")


def check(settings: Settings) -> None:
    for name, known in (("schedules", SCHEDULES), ("heads", HEADS)):
        if wrong := set(getattr(settings, name)) - set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}, got {sorted(wrong)}.")
    for arm in settings.arms:
        arms.find(arm)
    altered = [n for n in settings.schedules if SCHEDULES[n].every > 1 or SCHEDULES[n].noise]
    if settings.hold_out and altered:
        raise ValueError(f"hold_out is for schedules on all images as they are, got {altered}.")
    if settings.retrain and settings.hold_out:
        raise ValueError("retrain must be used without hold_out, whose weights are not kept.")
    if settings.judge_again and (settings.retrain or settings.hold_out):
        raise ValueError("judge_again must be used without retrain and without hold_out.")


def keep_classes(settings: Settings) -> None:
    """Keep the names of the classes and their shares of the labelled training pixels."""
    path = settings.results / "classes.json"
    if not path.exists():
        data = open_split("folder", settings.data_root, "train")
        pixels = class_pixels(data)
        shares = dict(zip(data.classes, (pixels / pixels.sum()).tolist(), strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rounded(shares), indent=1) + "\n"
        write_whole(path, lambda partial: partial.write_text(text, "utf-8"))


def kind(settings: Settings) -> str:
    if settings.retrain:
        return "retrained"
    return "hold_out" if settings.hold_out else "frontier"


def weights_of(settings: Settings, cell: str) -> Path:
    """Return where the weights of a finished cell are kept."""
    return settings.work / "weights" / "frontier" / f"{cell.replace('/', '-')}.safetensors"


def kept_weights(settings: Settings, cell: str) -> Path:
    """Return the file of the weights of a finished cell, or raise."""
    path = weights_of(settings, cell)
    if not path.exists():
        raise ValueError(f"{path} is missing. Run the cell with --keep-weights first.")
    return path


def run(settings: Settings, cell: str) -> None:
    """Train, judge and keep one cell."""
    if settings.judge_again:
        judge_again(settings, cell)
        return
    schedule, head, name, seed = cell.split("/")
    usual = SCHEDULES[schedule]
    steps = settings.steps or (usual.steps // 2 if settings.retrain else usual.steps)
    batch_size = settings.batch_size or usual.batch_size
    longer, shorter = size = settings.size or usual.size
    root = root_of(settings, schedule, int(seed))
    recipe = replace(
        RECIPES[HEADS[head]][1],
        data_root=root,
        out=settings.work / kind(settings) / cell.replace("/", "-"),
        resume=True,
        seed=int(seed),
        steps=steps,
        warmup=steps // 20,
        batch_size=batch_size,
        scale=size,
        crop=(longer, -(-shorter // 32) * 32),
        workers=settings.workers,
        eval_every=2 * steps,  # i.e. at the end alone, of an arm that trains longer, too
        save_every=200,
        log_every=min(50, steps),
    )
    data = open_split("folder", root, "train")
    if settings.retrain:
        criterion, regularize = cross_entropy, arms.classifier_alone(kept_weights(settings, cell))
        recipe = replace(recipe, mvsc=False)
    else:
        recipe, criterion, regularize = arms.ingredients(arms.find(name), recipe, data)
    before = sorted(recipe.folder.glob("last.pt"))
    found = train(recipe, criterion, regularize, judged(log_shares(data)))
    lines = [line for line in read_metrics(recipe.folder / "metrics.jsonl") if "loss" in line]
    result = {
        "cell": cell,
        "steps": recipe.steps,
        "batch_size": batch_size,
        "size": size,
        **found,
        "log": {k: [line[k] for line in lines if k in line] for k in lines[-1]},
        "peak_mib": peak_mib(),
        "resumed": bool(before),
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {p: metadata.version(p) for p in ("mvsc", "torchvision", "timm")},
        "system": platform.platform(terse=True),
    }
    kept.add(settings.results, kind(settings), rounded(result))
    if settings.keep_weights and kind(settings) == "frontier":
        path = weights_of(settings, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        (recipe.folder / "last.safetensors").replace(path)
    shutil.rmtree(recipe.folder)


def judge_again(settings: Settings, cell: str) -> None:
    """Judge the weights of a finished cell anew, and keep the rest of what is known of it."""
    (run,) = (each for each in kept.read(settings.results, "frontier") if each["cell"] == cell)
    device = pick_device("auto")
    segmenter, recipe, _ = load_segmenter(kept_weights(settings, cell), device)
    schedule, *_, seed = cell.split("/")
    val, training = (
        open_split("folder", root_of(settings, schedule, int(seed)), split)
        for split in ("val", "train")
    )
    found = judged(log_shares(training))(segmenter, val, recipe, device)
    kept.add(settings.results, "frontier", rounded({**run, **found}))


def peak_mib() -> float:
    """Return the most memory that was held: the GPU's, if there is one, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judged(log_shares: Tensor) -> Evaluate:
    """Make what stands in for evaluate.evaluate and judges at all shifts in the same pass."""

    def judge(
        segmenter: Segmenter,
        data: SegmentationData,
        recipe: Recipe,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
    ) -> dict[str, Any]:
        judge = Judge(log_shares, device)
        result = evaluate(segmenter, data, recipe, device, rank, processes, look=judge.look)
        found = judge.scores()
        plain = found["frontier"]["tau"].index(0.0)
        return {**result, "boundary_mIoU": found["frontier"]["boundary_mIoU"][plain], **found}

    return judge


def root_of(settings: Settings, schedule: str, seed: int) -> Path:
    """Return the folder of a cell's images: the user's, or a view of it in the work folder."""
    usual, made = SCHEDULES[schedule], settings.work / "data" / f"{schedule}-{seed}"
    if settings.hold_out:
        return views.held_out(settings.data_root, settings.work / "data" / "hold_out")
    if usual.every > 1:
        return views.few(settings.data_root, made, usual.every, seed)
    if usual.noise:
        return views.noisy(settings.data_root, made, usual.noise, seed)
    return settings.data_root


def rounded(value: Any) -> Any:
    """Keep five digits of every float, so that the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = tyro.cli(Settings)
    try:
        run(chosen, chosen.cell) if chosen.cell else main(chosen)
    except ValueError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        if chosen.cell:
            print("\nStopped and saved; the same command goes on from here.", file=sys.stderr)
        sys.exit(INTERRUPTED)
