"""Train a recipe as a job of Ray Train (pip install "ray[train]").

    python examples/recipes/ray_train.py ade20k-segformer-b0 --recipe.data-root DIR --processes 8

Data and the run's folder lie where every node sees them. The state that train.py keeps there is the
checkpoint: after a worker died, and when the same job is sent again, the run goes on from it
exactly. Each image is seen once an epoch, by one of the processes.
"""

from dataclasses import dataclass, replace
from typing import Any

import ray.train
import torch
import tyro
from ray.train.torch import TorchTrainer

from commands import run
from recipes import RECIPES, Recipe
from train import train


@dataclass(frozen=True)
class Settings:
    """A recipe and the processes that train it."""

    recipe: Recipe
    processes: int = 1
    """Workers, each with a GPU where there are some."""
    failures: int = 3
    """Times that the job goes on after a worker died."""


def work(recipe: dict[str, Any]) -> None:
    """Train in one worker, for whom Ray has set up torch.distributed; Accelerate finds it."""
    scores = train(Recipe.from_dict(recipe))
    ray.train.report({name: value for name, value in scores.items() if isinstance(value, float)})


def main(settings: Settings) -> ray.train.Result:
    recipe = settings.recipe
    folder = recipe.folder.resolve()  # A worker has a current directory of its own.
    recipe = replace(recipe, resume=True, out=folder, data_root=recipe.data_root.resolve())
    trainer = TorchTrainer(
        work,
        train_loop_config=recipe.to_dict(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.processes, use_gpu=torch.cuda.is_available() and not recipe.cpu
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=settings.failures),
        ),
    )
    return trainer.fit()


def command_line() -> None:
    table = {
        name: (description, Settings(recipe)) for name, (description, recipe) in RECIPES.items()
    }
    print(main(tyro.extras.overridable_config_cli(table)).metrics)


if __name__ == "__main__":
    run(command_line)
