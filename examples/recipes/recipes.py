"""What is trained, on which data, for how long: every setting of a run, and the named recipes.

The paper's two settings take what it leaves open from the common SegFormer recipe of
MMSegmentation: AdamW at 6e-5 (head: ten times that), 1,500 steps of linear warm-up, poly decay.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from data import Layout


@dataclass(frozen=True)
class RegularizerOptions:
    """Options of mvsc.MVSCRegularizer; see its documentation."""

    groups: int = 4
    """G, the number of centroid groups."""
    temperature: float = 0.07
    """tau of Eq. 2."""
    align_weight: float = 0.1
    """lambda_f of Eq. 2; 0 leaves the term out."""
    pull_weight: float = 1.0
    """lambda_c of Eq. 3."""
    classify_weight: float = 0.05
    """lambda_v of L_v."""
    enhance: bool = True
    """Eq. 4: whether L_v reaches the features."""
    align_to: Literal["global", "group"] = "global"
    """Target of Eq. 2."""
    grid_label: Literal["centre", "commonest"] = "centre"
    """Label of a pixel of the feature map; "commonest" for points, strokes and sparse labels."""
    sync_means: bool = False
    """Whether means are taken over the pixels of all processes."""


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    data_root: Path
    """Folder of the data set; see prepare_data.py."""
    name: tyro.conf.Suppress[str] = "custom"
    layout: Layout = "folder"
    """How the data set lies in its folder."""
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE-mvsc-seed0, or -baseline-."""
    resume: bool = False
    """Continue the run that is in the folder, if there is one."""
    seed: int = 0
    """Of initial weights, order of the images, augmentation and dropout."""

    model: str = "segformer-b0"
    """segformer-b0 to -b5 (transformers), deeplabv3-resnet50 or -resnet101 (torchvision), or
    smp/ARCHITECTURE/ENCODER (segmentation_models_pytorch). The encoder "lite0" is an
    EfficientNet-Lite0 whose ImageNet weights come as a package: it needs no network."""
    decoder_dim: int = 256
    """Width of the decoder, where the model has that choice."""
    pretrained: bool = True
    """Start from ImageNet weights, which are downloaded once."""
    sync_bn: bool = False
    """With several processes: batch norm over all of them."""

    mvsc: bool = True
    """Train with MVSC; --no-mvsc is the baseline."""
    reg: RegularizerOptions = field(default_factory=RegularizerOptions)

    steps: int = 80_000
    """Optimisation steps."""
    batch_size: int = 16
    """Images in a step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is split into, one after the other, where memory is short."""
    lr: float = 6e-5
    """AdamW's, of the encoder."""
    head_lr: float = 10.0
    """Learning rate of decoder, classifier and centroids, as a multiple of the encoder's."""
    weight_decay: float = 0.01
    """None for norm layers and centroids."""
    warmup: int = 1500
    """Steps of linear warm-up, before poly decay to 0."""

    scale: tuple[int, int] = (2048, 512)
    """Longer and shorter side that an image is fitted into, its shape kept; in tests, too."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random factor on that, in training."""
    crop: tuple[int, int] = (512, 512)
    """Width and height of the random crop; multiples of 32."""
    cat_max_ratio: float = 0.75
    """Share of a crop that one class should not exceed; ten tries."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    workers: int = 4
    """Processes that load images, for each process that trains."""
    cpu: bool = False
    """Train on the CPU even if there is something faster."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints."""
    eval_every: int = 8000
    """Steps between validations; there is one at the end in any case."""

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        arm = "mvsc" if self.mvsc else "baseline"
        return self.out or Path("runs") / f"{self.name}-{arm}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return every setting in the types of JSON, for checkpoints."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Read what ``to_dict`` wrote; what is missing has its default."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        known = {each.name for each in (*fields(cls), *fields(RegularizerOptions))}
        if unknown := {*values, *values.get("reg", {})} - known:
            raise ValueError(
                f"the recipe must hold settings of this version, got {', '.join(sorted(unknown))}. "
                "Use the version that wrote it."
            )
        values["data_root"] = Path(values["data_root"])
        values["out"] = Path(values["out"]) if values.get("out") else None
        return cls(**{**values, "reg": RegularizerOptions(**values.get("reg", {}))})


FREE = {"data_root", "out", "resume", "workers", "cpu", "log_every", "save_every", "eval_every"}
"""Settings that may change when a run is resumed, since no weight depends on them."""


def check_recipe(recipe: Recipe) -> None:
    """Refuse settings that cannot be meant, before anything is loaded.

    Raises:
        ValueError: naming the setting, what must hold, and what came.
    """
    counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "eval_every")
    for name in (*counts, "decoder_dim"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(recipe, name)}.")
    for name in ("warmup", "workers", "weight_decay", "lr", "head_lr"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(
                f"{name} must be finite and not negative, got {getattr(recipe, name)}."
            )
    if not -(2**63) <= recipe.seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {recipe.seed}.")
    if min(recipe.crop) < 32 or any(side % 32 for side in recipe.crop):
        raise ValueError(
            f"crop must be a width and a height that are multiples of 32, got {recipe.crop}. "
            "Use for example --crop 160 128."
        )
    if min(recipe.scale) < 1 or recipe.scale[0] < recipe.scale[1]:
        raise ValueError(
            f"scale must be the longer and the shorter side, each at least 1, got {recipe.scale}."
        )
    low, high = recipe.scale_range
    if not 0 < low <= high:
        raise ValueError(f"scale_range must be 0 < low <= high, got {recipe.scale_range}.")


def _folder(model: str) -> dict[str, Any]:
    return {
        "layout": "folder",
        "model": model,
        "decoder_dim": 128,
        "steps": 4000,
        "warmup": 200,
        "lr": 3e-4,
        "scale": (512, 384),
        "crop": (384, 384),
        "eval_every": 1000,
        "save_every": 200,
    }


_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "cocostuff10k-segformer-b4": (
        "The paper's Table 1: MiT-B4, 80k steps.",
        {"layout": "cocostuff10k", "model": "segformer-b4"},
    ),
    "ade20k-segformer-b0": (
        "The paper's Tables 2 and 3: MiT-B0, 20k steps.",
        {"layout": "ade20k", "model": "segformer-b0", "steps": 20_000, "eval_every": 4000},
    ),
    "cocostuff10k-deeplabv3": (
        "DeepLabV3 with ResNet-50 on COCO-Stuff-10k, 80k steps.",
        {"layout": "cocostuff10k", "model": "deeplabv3-resnet50", "lr": 1e-4, "sync_bn": True},
    ),
    "cocostuff164k-segformer-b4": (
        "MiT-B4 on COCO-Stuff-164k, 80k steps.",
        {"layout": "cocostuff164k", "model": "segformer-b4"},
    ),
    "folder-segformer-lite0": (
        "Own images: SegFormer's head on EfficientNet-Lite0; needs no network.",
        _folder("smp/Segformer/lite0"),
    ),
    "folder-deeplabv3plus-lite0": (
        "Own images: DeepLabV3+ on EfficientNet-Lite0; needs no network.",
        _folder("smp/DeepLabV3Plus/lite0"),
    ),
}

RECIPES = {
    name: (description, Recipe(data_root=tyro.MISSING, name=name, **settings))
    for name, (description, settings) in _TABLE.items()
}
"""Name -> (description, settings), all of which the command line can override."""
