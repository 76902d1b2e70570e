"""Train a segmenter by a named recipe, with MVSC or without.

    python examples/recipes/train.py ade20k-segformer-b0 --data-root DIR
    python examples/recipes/train.py ade20k-segformer-b0 --data-root DIR --no-mvsc
    accelerate launch examples/recipes/train.py cocostuff10k-segformer-b4 --data-root DIR
    accelerate launch --config_file examples/recipes/fsdp2.yaml examples/recipes/train.py ...
    accelerate launch --config_file examples/recipes/zero2.yaml examples/recipes/train.py ...
    python examples/recipes/train.py folder-segformer-lite0 --data-root DIR --resume

The run's folder gets ``metrics.jsonl``, ``scores.json``, TensorBoard events,
``best.safetensors`` and ``last.safetensors`` (weights that load without mvsc, with recipe and
classes in their metadata), the centroids beside each, and ``last.pt``, from which ``--resume``
goes on exactly: a step is a function of the state before it and of (seed, step), so a run that
was killed ends with the weights of one that was not. Ctrl-C finishes the step and saves.

Under DeepSpeed the engine's own state lies beside ``last.pt``, a part for each process.
"""

import hashlib
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mvsc
from commands import run
from data import IGNORE, SegmentationData, left_out, open_split
from evaluate import evaluate, print_scores
from loading import key, reading, training_batches
from metrics import read_metrics
from models import (
    AUXILIARY_WEIGHT,
    build,
    check_part,
    check_sizes,
    logits_of,
    parameter_groups,
)
from mvsc import diagnostics
from parallel import (
    Engine,
    described,
    make_accelerator,
    make_engine,
    share_buffers,
    takes_optimizer_apart,
)
from recipes import FREE, RECIPES, Recipe, check_recipe
from weights import check_folder, load_state, save_state, save_weights, write_whole

STATE = "last.pt"
SHOWN = ("loss", "cross_entropy", "align", "pull", "classify", "group_similarity")

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps logits ``(batch, num_classes, h, w)`` and labels ``(batch, h, w)`` to a scalar."""

Regularize = Callable[[nn.Module, Recipe], Any]
"""Makes what mvsc.attach makes: ``terms(labels)``, ``total(terms)``, ``param_group(lr=...)``."""

Evaluate = Callable[..., dict[str, Any]]

AGREE_EVERY = 5
"""Steps after which several processes agree at the latest on whether to stop."""


class StoppedAndSaved(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, once everything is saved."""


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Average over the labelled pixels; 0, where the mean is NaN, if there are none.

    Options are torch's, as ``weight`` and ``label_smoothing``.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum", **options)
    return total / (labels != IGNORE).sum().clamp_min(1)


def regularize(model: nn.Module, recipe: Recipe, **options: Any) -> mvsc.AttachedRegularizer | None:
    """Attach MVSC with the recipe's options, or nothing for a baseline."""
    if not recipe.mvsc:
        return None
    options |= vars(recipe.reg)
    return mvsc.attach(model, ignore_index=IGNORE, seed=recipe.seed, **options)


def train(
    recipe: Recipe,
    criterion: Criterion = cross_entropy,
    regularize: Regularize = regularize,
    evaluate: Evaluate = evaluate,
) -> dict[str, Any]:
    """Train to the end and return the last validation's scores.

    Args:
        recipe: every setting.
        criterion: the pixels' own loss.
        regularize: makes the regularizer, or None.
        evaluate: judges the segmenter, see evaluate.evaluate.

    Raises:
        ValueError: if settings, data, the engine or the run's folder do not fit, or a file is
            broken.
        StoppedAndSaved: after Ctrl-C or SIGTERM.
    """
    check_recipe(recipe)
    check_folder(recipe.folder)
    accelerator = make_accelerator(recipe)
    device = accelerator.device
    rank, processes = accelerator.process_index, accelerator.num_processes
    data, val = (open_split(recipe.layout, recipe.data_root, split) for split in ("train", "val"))

    for folder in dict.fromkeys(each.pairs[0][0].parent for each in (data, val)):
        if rank == 0 and (aside := left_out(folder)):
            print(f"{aside}.", file=sys.stderr)

    # The same initial weights with MVSC and without: its own come from a private stream.
    torch.manual_seed(recipe.seed)
    resumed = recipe.resume and (recipe.folder / STATE).exists()
    segmenter = build(
        replace(recipe, pretrained=recipe.pretrained and not resumed), len(data.classes)
    )
    check_sizes(segmenter, recipe.model, recipe.crop)
    if recipe.sync_bn and processes > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(segmenter.model)
    check_part(segmenter.model, recipe.batch_size // (processes * recipe.accumulate))
    # These take the optimizer apart and know the model's parameters only. What the centroids' own
    # optimizer follows is its last group, the head's: the same learning rate.
    own = takes_optimizer_apart(accelerator)
    reg = regularize(segmenter.model, recipe, **({"optimizer": "own"} if own else {}))
    optimizer = torch.optim.AdamW(parameter_groups(segmenter, recipe), lr=recipe.lr)
    if reg is not None:
        reg.to(device)
        if not own:
            optimizer.add_param_group(reg.param_group(lr=recipe.lr * recipe.head_lr))
    schedule = warmup_then_poly(optimizer, recipe)
    model, optimizer = accelerator.prepare(segmenter.model, optimizer)
    engine = make_engine(accelerator, segmenter.model, model, optimizer)

    run = Run(recipe, accelerator, engine, reg, schedule, data)
    step = run.start()

    def judge(step: int) -> None:
        share_buffers(segmenter.model, processes)
        with engine.whole():
            scores = evaluate(segmenter, val, recipe, device, rank, processes)
        run.validated(step, scores)
        run.save(step)

    loader = training_batches(data, recipe, segmenter.mean, step, rank, processes)
    model.train()
    with (
        interruption() as interrupted,
        closing(run),
        reading(loader) as batches,
        run.progress(step) as bar,
    ):
        if not run.judged:
            judge(step)
        while step < recipe.steps:
            try:
                parts = [next(batches) for _ in range(recipe.accumulate)]
            except ValueError:  # a broken file, which the error names
                if step > 0:
                    run.save(step)
                raise
            # Dropout depends on the step alone, so that no random state has to be kept.
            torch.manual_seed(key("step", recipe.seed, step, rank))
            last, logged = step + 1 == recipe.steps, (step + 1) % recipe.log_every == 0
            run.looking = last or logged
            for images, labels in parts:
                images = segmenter.normalize(images.to(device, non_blocking=True))
                labels = labels.to(device, non_blocking=True).long()
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        terms = losses(model, reg, criterion, images, labels)
                    accelerator.backward(terms["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
                run.count(terms, labels)
            schedule.step()
            step += 1
            bar.update()

            stop = stop_asked(interrupted, accelerator, logged or step % AGREE_EVERY == 0)
            if last or logged:
                line = run.log(step)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in SHOWN if k in line})
            if last or step % recipe.eval_every == 0:
                run.save(step, judged=False)  # A broken file may end what follows.
                judge(step)
            elif stop or step % recipe.save_every == 0:
                run.save(step)
            if stop and not last:
                raise StoppedAndSaved(f"Stopped and saved in {recipe.folder}; go on with --resume.")
    if reg is not None and processes > 1:
        mvsc.assert_in_sync(reg)
    run.finish()
    return run.scores


def losses(
    model: nn.Module, reg: Any, criterion: Criterion, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Compute everything that is trained on: ``loss`` is the sum, the rest its parts."""
    logits, aux = logits_of(model(images), (labels.shape[1], labels.shape[2]))
    own = loss = criterion(logits, labels)
    if aux is not None:
        loss = loss + AUXILIARY_WEIGHT * criterion(aux, labels)
    if reg is None:
        return {"loss": loss, "cross_entropy": own}
    terms = reg.terms(labels)
    return {"loss": loss + reg.total(terms), "cross_entropy": own, **terms._asdict()}


def warmup_then_poly(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """Rise in a line, fall in a line: the toolboxes' poly schedule of power 1."""
    warmup = min(recipe.warmup, recipe.steps - 1)
    if warmup == 0:
        return PolynomialLR(optimizer, total_iters=recipe.steps)
    rise = LinearLR(optimizer, start_factor=1e-6, total_iters=warmup)
    fall = PolynomialLR(optimizer, total_iters=recipe.steps - warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


@contextmanager
def interruption() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that a step can end first; a second one ends at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Signals do not come to a worker's thread, as that of Ray.
        return

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_asked(interrupted: list[int], accelerator: Accelerator, agree: bool) -> bool:
    """Return whether to stop after this step; several processes agree on it now and then."""
    if accelerator.num_processes == 1:
        return bool(interrupted)
    if not agree:
        return False
    asked = torch.tensor(float(bool(interrupted)), device=accelerator.device)
    return bool(accelerator.reduce(asked, "sum") > 0)


class Run:
    """The folder of a run: metrics, weights, and the state from which it goes on."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        engine: Engine,
        reg: Any,
        schedule: Any,
        data: SegmentationData,
    ) -> None:
        self.recipe, self.accelerator, self.classes = recipe, accelerator, list(data.classes)
        # The order of the images hangs on their names and number.
        names = "\n".join(image.name for image, _ in data.pairs)
        self.images = hashlib.sha256(names.encode()).hexdigest()
        self.engine, self.reg, self.schedule = engine, reg, schedule
        parts = {"schedule": schedule, "reg": reg, "scaler": accelerator.scaler}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.folder = recipe.folder
        self.metrics, self.state = self.folder / "metrics.jsonl", self.folder / STATE
        self.main = accelerator.is_main_process
        self.best, self.judged = -1.0, True
        self.scores: dict[str, Any] = {}
        self.sums: dict[str, Tensor] = {}
        self.counted, self.logged, self.since = 0, 0, time.perf_counter()
        self.last_loss: Tensor | None = None
        self.regularizer = getattr(reg, "regularizer", None)
        # At times the features of a forward are kept for diagnostics; always would cost memory.
        self.looking = False
        self.seen: dict[str, Tensor] = {}

    def start(self) -> int:
        """Load the state that is there, if the run is to be resumed; return its step.

        Raises:
            ValueError: if the folder holds a run that this one would overwrite, or another one.
        """
        step = 0
        if self.state.exists() or self.metrics.exists():
            if not self.recipe.resume:
                raise ValueError(
                    f"{self.folder} holds a run already. Continue it with --resume, or choose "
                    "another folder with --out."
                )
            if self.state.exists():
                step = self._load()
        for name in ("best.safetensors", "scores.json"):
            if not self.state.exists() and (self.folder / name).exists():
                raise ValueError(
                    f"{self.folder} holds {name} of a run but no {STATE} from which it could go "
                    "on. Move it away, or choose another folder with --out."
                )
        # Not before all have looked: what the first one writes would be a run already.
        self.accelerator.wait_for_everyone()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_whole(self.metrics, lambda path: path.write_text(text, "utf-8"))
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
        self.logged = step
        self.accelerator.wait_for_everyone()
        return step

    def progress(self, step: int) -> Any:
        """Make the progress bar."""
        return tqdm(
            total=self.recipe.steps,
            initial=step,
            desc=self.folder.name,
            disable=not self.main,
            mininterval=1,
        )

    def count(self, terms: dict[str, Tensor], labels: Tensor) -> None:
        """Add up what is logged, on the device: nothing waits for it."""
        if self.looking and isinstance(self.regularizer, mvsc.MVSCRegularizer):
            self.seen = {"features": self.reg.features, "labels": labels}
        self.last_loss = terms["loss"].detach()
        terms["labelled"] = (labels != IGNORE).float().mean()
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.counted += 1

    def log(self, step: int) -> dict[str, float]:
        """Write the means since the last line."""
        self.check_loss(step)
        line = {
            name: self.accelerator.reduce(total / self.counted, "mean").item()
            for name, total in self.sums.items()
        }
        if line["labelled"] == 0:
            warnings.warn(
                f"no pixel of the images of the last {step - self.logged} steps is labelled: all "
                f"labels are {IGNORE}. Nothing is learned from them; prepare_data.py --check says "
                "more.",
                stacklevel=2,
            )
        if self.seen:
            line |= {name: value.item() for name, value in self._diagnose(**self.seen).items()}
        self.looking, self.seen = False, {}
        line["lr"] = self.schedule.get_last_lr()[0]
        line["seconds_per_step"] = (time.perf_counter() - self.since) / (step - self.logged)
        self.sums, self.counted, self.logged = {}, 0, step
        self._write(step, line, line)
        self.since = time.perf_counter()
        return line

    def check_loss(self, step: int) -> None:
        """Raise if the last loss was not finite: then the weights are not, or will not be."""
        if self.last_loss is None:
            return  # No step was taken since it was looked at.
        total = self.accelerator.reduce(self.last_loss.float(), "sum").item()
        self.last_loss = None
        if not math.isfinite(total):
            raise ValueError(
                f"the loss must be finite, got {total} in step {step}. Take a smaller --lr or "
                f"--head-lr; {self.folder} holds what was saved before."
            )

    def _diagnose(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        centroids, grid_label = self.regularizer.centroids, self.regularizer.grid_label
        means, present = diagnostics.cell_means(
            features, labels, len(self.classes), ignore_index=IGNORE, grid_label=grid_label
        )
        positive, negative = diagnostics.alignment_cosines(means, centroids, present)
        return {
            "group_similarity": diagnostics.group_similarity(centroids),
            "alignment_accuracy": diagnostics.alignment_accuracy(means, centroids, present),
            "cosine_to_own": positive,
            "cosine_to_others": negative,
        }

    def validated(self, step: int, scores: dict[str, Any]) -> None:
        """Write the scores, and keep the weights if they are the best."""
        self.scores = scores
        means = {f"val/{name}": value for name, value in scores.items() if isinstance(value, float)}
        self._write(step, {"val": scores}, means)
        if self.main:
            tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.2f}" for k, v in means.items()))
        if scores["mIoU"] > self.best:
            self.best = scores["mIoU"]
            self._save_weights("best", step, self.engine.weights())
        self.since = time.perf_counter()

    def save(self, step: int, judged: bool = True) -> None:
        """Write weights and state; the state last, so that what it speaks of is there.

        A run that goes on from a state which is not ``judged`` begins with its validation.
        """
        self.check_loss(step)
        weights = self.engine.weights()
        self._save_weights("last", step, weights)
        states = self.engine.save(self.folder, step, weights)
        if self.main:
            states |= {name: part.state_dict() for name, part in self.parts.items()}
            about = {"recipe": self.recipe.to_dict(), "classes": self.classes, "judged": judged}
            about["images"] = self.images
            found = {"best": self.best, "scores": self.scores, "files": self.engine.files}
            save_state(self.state, {"step": step, **about, **found, **states})
            self.engine.tidy(self.folder, step)
        self.since = time.perf_counter()

    def finish(self) -> None:
        """Leave the last scores in a small file of their own."""
        if self.main:
            about = {"classes": self.classes, "recipe": self.recipe.to_dict()}
            text = json.dumps({**about, **self.scores}, indent=1)
            write_whole(self.folder / "scores.json", lambda path: path.write_text(text, "utf-8"))
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Close the files that are written along the way, however the run ended."""
        if self.main:
            self.board.close()
            if not self.state.exists() and not self.metrics.stat().st_size:
                self.metrics.unlink()  # Nothing came of it: the folder is no run's.

    def _load(self) -> int:
        state = load_state(self.state)
        if not {"recipe", "classes", "step"} <= state.keys():
            raise ValueError(f"{self.state} is no state of train.py. Move it away.")
        check_same(self.recipe, state["recipe"])
        if state["classes"] != self.classes:
            raise ValueError(
                f"{self.folder} holds a run on the classes {', '.join(state['classes'])}, the data "
                f"have {', '.join(self.classes)}. Choose another folder with --out."
            )
        if state.get("images", self.images) != self.images:
            raise ValueError(
                f"{self.folder} holds a run on other images than those of "
                f"{self.recipe.data_root}, by their names. Give the data that it was trained on, "
                "or choose another folder with --out."
            )
        if (files := state.get("files", 0)) != self.engine.files:
            raise ValueError(
                f"{self.folder} holds a run of {described(files)}, this is one of "
                f"{described(self.engine.files)}. Go on with that, or choose another folder with "
                "--out."
            )
        self.engine.load(self.folder, state)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best, self.scores, self.judged = state["best"], state["scores"], state["judged"]
        return int(state["step"])

    def _save_weights(self, name: str, step: int, weights: dict[str, Tensor]) -> None:
        if not self.main:
            return
        about = {"recipe": self.recipe.to_dict(), "classes": self.classes, "step": step}
        save_weights(self.folder / f"{name}.safetensors", weights, **about)
        if self.reg is not None:
            path = self.folder / f"{name}.centroids.safetensors"
            save_weights(path, self.reg.state_dict(), step=step)

    def _write(self, step: int, line: dict[str, Any], numbers: dict[str, float]) -> None:
        line = {k: None if v != v else v for k, v in line.items()}  # JSON has no NaN
        if self.main:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)


def check_same(recipe: Recipe, before: dict[str, Any]) -> None:
    """Raise if the run in a recipe's folder was made with other settings."""
    now = recipe.to_dict()
    before = Recipe.from_dict(before).to_dict()  # with settings that were not there then
    changed = [name for name in now if name not in FREE and now[name] != before[name]]
    if changed:
        listed = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed)
        raise ValueError(
            f"{recipe.folder} holds a run with other settings: {listed}. Resume it with its own, "
            "or choose another folder with --out."
        )


def command_line() -> None:
    recipe = tyro.extras.overridable_config_cli(RECIPES)
    scores = train(recipe)
    print_scores(scores, open_split(recipe.layout, recipe.data_root, "val").classes)


if __name__ == "__main__":
    run(command_line, "Stopped; what was not saved before is lost.")
