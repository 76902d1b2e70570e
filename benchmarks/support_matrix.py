"""Which models `mvsc.attach` supports: build each, train a step, check every claim, write a page.

    python benchmarks/support_matrix.py                 # the libraries that are installed here
    python benchmarks/support_matrix.py torchvision     # one of them
    python benchmarks/support_matrix.py --render        # only write the page again

Models are built from their configuration with random weights; nothing is downloaded. The rows of
a library take the place of its former ones in `benchmarks/support_matrix.jsonl`, and all together
make `docs/support_matrix.md`, so a library may live in an environment of its own. A row works only
if

- attach and detach changed no key of the state dict and no bit of the output in evaluation;
- the tapped features, sent through the picked classifier, gave the model's own logits, and came
  from before a dropout wherever one fed the classifier;
- align and classify changed the gradient of the first encoder layer, and pull did not;
- a step on the sum of all losses moved the centroids and left every parameter finite.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mvsc.attach import AttachedRegularizer, ClassifierNotFoundError, attach

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "support_matrix.md"
CLASSES = 13
QUERIES = "examples/integrations/query_models.py"
LRASPP = "examples/integrations/torchvision_lraspp.py"


@dataclass(frozen=True)
class Row:
    """One line of the table, and of the file that it is made from."""

    library: str
    version: str
    model: str
    path: str = ""
    kernel: str = ""
    dim: int | None = None
    stride: int | None = None
    tap: str = ""
    result: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A model to build; `logits` takes them out of its output, `refused` is in the refusal."""

    model: str
    build: Callable[[], nn.Module]
    logits: Callable[[Any], Tensor] = lambda output: output
    size: int = 64
    refused: str = ""
    note: str = ""


def examine(library: str, release: str, case: Case) -> Row:
    """Build the model of a case, check every claim, and return its row."""
    torch.manual_seed(0)
    model = case.build()
    row = partial(Row, library, release, case.model, note=case.note)
    if case.refused:
        try:
            attach(model)
        except ClassifierNotFoundError as error:
            require(case.refused in str(error), f"the message lacks {case.refused!r}: {error}")
            return row(result="refused")
        raise AssertionError(f"{case.model} must be refused")

    images = torch.randn(2, 3, case.size, case.size)
    labels = torch.randint(0, CLASSES, (2, case.size, case.size))
    keys, logits = list(model.state_dict()), evaluate(model, images, case)
    reg = attach(model)
    require(list(model.state_dict()) == keys, "attach changed the state dict")
    require(torch.equal(evaluate(model, images, case), logits), "attach changed the output")
    features, tap = check_tap(model, reg, images, logits)
    check_step(model, reg, images, labels, case)
    trained = evaluate(model, images, case)
    reg.detach()
    require(list(model.state_dict()) == keys, "detach changed the state dict")
    require(torch.equal(evaluate(model, images, case), trained), "detach changed the output")

    classifier = model.get_submodule(reg.classifier_path)
    if isinstance(classifier, nn.Linear):
        kernel, dim, height = "linear", classifier.in_features, features.shape[1]
    else:
        kernel = "x".join(map(str, classifier.kernel_size))
        dim, height = classifier.in_channels, features.shape[2]
    return row(reg.classifier_path, kernel, dim, case.size // height, tap, result="works")


def check_tap(
    model: nn.Module, reg: AttachedRegularizer, images: Tensor, logits: Tensor
) -> tuple[Tensor, str]:
    """Check that the features are what the logits are made of; say where they were taken."""
    classifier = model.get_submodule(reg.classifier_path)
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    rates = [dropout.p for dropout in dropouts]
    entered: list[Tensor] = []
    dropped: list[tuple[Tensor, _DropoutNd]] = []
    handles = [classifier.register_forward_pre_hook(lambda _, args: entered.append(args[0]))]
    # As in evaluation, but the tap listens. A dropout in front of the classifier drops nothing and
    # shows by its output; at p = 0 it would hand on its very input.
    model.eval()
    classifier.train()
    for dropout in dropouts:
        dropout.train()
        dropout.p = 1e-9
        handles.append(
            dropout.register_forward_hook(lambda m, _, output: dropped.append((output, m)))
        )
    model(images)
    features = reg._tap.features
    for dropout, rate in zip(dropouts, rates, strict=True):
        dropout.p = rate
    for handle in handles:
        handle.remove()
    reg.discard()

    before = [type(module).__name__ for output, module in dropped if same(output, entered[0])]
    taken = "before " + before[-1] if before else "classifier input"
    require((features is not entered[0]) == bool(before), f"the features are not from {taken}")
    with torch.no_grad():
        answer = classifier(features)
    answer = answer.movedim(-1, 1) if isinstance(classifier, nn.Linear) else answer
    resize = partial(F.interpolate, answer, logits.shape[2:], mode="bilinear")
    distance = min(float((resize(align_corners=a) - logits).norm()) for a in (False, True))
    require(distance <= 1e-3 * float(logits.norm()), "the features do not give the logits")
    return features, taken


def check_step(
    model: nn.Module, reg: AttachedRegularizer, images: Tensor, labels: Tensor, case: Case
) -> None:
    """Check where the gradient of each term goes, and take a training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.add_param_group(reg.param_group())
    logits = case.logits(model(images))
    terms = reg.terms(labels)
    first = next(p for p in model.parameters() if p.requires_grad and p.ndim >= 2)
    for name, term in terms._asdict().items():
        (grad,) = torch.autograd.grad(term, first, retain_graph=True, allow_unused=True)
        reached = grad is not None and bool(grad.abs().sum() > 0)
        require(reached == (name != "pull"), f"{name} reaching the encoder is {reached}")
    resized = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    centroids = reg.regularizer.centroids.detach().clone()
    (F.cross_entropy(resized, labels) + reg.total(terms)).backward()
    optimizer.step()
    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    require(finite, "a step left a parameter that is not finite")
    require(not torch.equal(centroids, reg.regularizer.centroids), "the centroids did not move")


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def evaluate(model: nn.Module, images: Tensor, case: Case) -> Tensor:
    with torch.no_grad():
        return case.logits(model.eval()(images))


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise AssertionError(claim)


def torchvision() -> Iterator[Case]:
    models = importlib.import_module("torchvision.models.segmentation")

    def build(name: str, **settings: Any) -> Callable[[], nn.Module]:
        model = getattr(models, name)
        settings |= {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        return partial(model, **settings)

    for name in (
        "fcn_resnet50",
        "fcn_resnet101",
        "deeplabv3_resnet50",
        "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large",
    ):
        yield Case(name, build(name, aux_loss=True), lambda output: output["out"])
    name = "lraspp_mobilenet_v3_large"
    yield Case(name, build(name), refused=LRASPP, note=f"two classifiers; recipe: `{LRASPP}`")


def segmentation_models_pytorch() -> Iterator[Case]:
    smp = importlib.import_module("segmentation_models_pytorch")

    def build(name: str, encoder: str = "resnet18", **settings: Any) -> Callable[[], nn.Module]:
        return partial(
            getattr(smp, name), encoder, encoder_weights=None, classes=CLASSES, **settings
        )

    for name in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    ):
        yield Case(name, build(name))
    yield Case("PAN", build("PAN"), size=128)
    yield Case("DPT", build("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True))
    image_head = {"classes": CLASSES, "dropout": 0.2}
    yield Case(
        "Unet, aux_params",
        build("Unet", aux_params=image_head),
        lambda output: output[0],
        note="not the image classifier beside it",
    )


class SegNet(nn.Module):
    """The SegNet of the paper's table, small: unpooling by the encoder's indices."""

    def __init__(self, widths: tuple[int, ...] = (3, 16, 32, 32)) -> None:
        super().__init__()
        ends = list(pairwise(widths))
        self.encoder = nn.ModuleList(self.block(a, b) for a, b in ends)
        self.decoder = nn.ModuleList(self.block(b, max(a, 16)) for a, b in reversed(ends))
        self.last = nn.Conv2d(16, CLASSES, 3, padding=1)

    @staticmethod
    def block(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        indices = []
        for block in self.encoder:
            x, index = F.max_pool2d(block(x), 2, return_indices=True)
            indices.append(index)
        for block, index in zip(self.decoder, reversed(indices), strict=True):
            x = block(F.max_unpool2d(x, index, 2))
        return self.last(x)


def plain_torch() -> Iterator[Case]:
    yield Case("SegNet, code of one's own", SegNet)


class TimmSegmenter(nn.Module):
    """A timm backbone with a 1x1 head of one's own on its last map."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        timm = importlib.import_module("timm")
        self.backbone = timm.create_model(name, features_only=True, **settings)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[-1], CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1])


def timm() -> Iterator[Case]:
    for name, settings in {
        "resnet18": {},
        "convnext_atto": {},
        "mobilenetv3_small_100": {},
        "vit_tiny_patch16_224": {"img_size": 64},
        "efficientnet_b0": {},
    }.items():
        yield Case(f"{name} + own 1x1 head", partial(TimmSegmenter, name, **settings))


def transformers() -> Iterator[Case]:
    hf = importlib.import_module("transformers")
    stages = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    widths = {"hidden_sizes": [8, 16, 16, 32], **stages}
    swin = {"embed_dim": 16, "num_heads": [1, 2, 2, 2], **stages}
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    vit = {"image_size": 64, "patch_size": 16, "intermediate_size": 64, **small}

    def build(name: str, task: str, **settings: Any) -> Callable[[], nn.Module]:
        def model() -> nn.Module:
            config = getattr(hf, f"{name}Config")(num_labels=CLASSES, **settings)
            return getattr(hf, f"{name}For{task}Segmentation")(config)

        return model

    def case(name: str, title: str = "", **settings: Any) -> Case:
        return Case(
            title or name, build(name, "Semantic", **settings), lambda output: output.logits
        )

    yield case("Segformer", depths=[1] * 4, hidden_sizes=[8, 16, 16, 32])
    for backbone, channels, settings in (
        ("Swin", 64, swin),
        ("Swinv2", 64, swin | {"image_size": 64, "window_size": 2}),
        ("ConvNext", 16, widths),
        ("ConvNextV2", 16, widths),
        ("ResNet", 16, widths | {"embedding_size": 8}),
    ):
        yield case(
            "UperNet",
            f"UperNet, {backbone}",
            backbone_config=getattr(hf, f"{backbone}Config")(**settings),
            auxiliary_in_channels=channels,
            auxiliary_channels=16,
        )
    yield case("Beit", out_indices=[1, 2, 3, 4], **vit)
    yield case("Data2VecVision", out_indices=[1, 2, 3, 4], **vit)
    fusion = {"neck_hidden_sizes": [16, 16, 32, 32]}
    yield case("DPT", backbone_out_indices=[0, 1, 2, 3], **fusion, **vit)
    yield case("MobileNetV2", depth_multiplier=0.35)
    yield case(
        "MobileViT",
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
        aspp_out_channels=32,
    )
    yield case("MobileViTV2", width_multiplier=0.5, aspp_out_channels=32)
    head = {"upsample_out_channels": [16, 16], "conv_out_channels": [16]}
    yield case("Sapiens2", head_config=head, **vit)
    tips = type(hf.Tipsv2DptConfig().backbone_config)(
        image_size=64, patch_size=16, reshape_hidden_states=False, out_indices=[1, 2, 3, 4], **small
    )
    yield case("Tipsv2Dpt", backbone_config=tips, **fusion)

    tiny = {"num_queries": 5, "mask_feature_size": 32}
    detr = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    deformable = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
    backbone = {"backbone_config": hf.SwinConfig(**swin)}
    for name, task, settings in (
        ("MaskFormer", "Instance", {"decoder_config": hf.DetrConfig(**detr), **backbone}),
        ("Mask2Former", "Universal", tiny | deformable | backbone),
        ("OneFormer", "Universal", deformable | backbone | {"is_training": False}),
        ("Eomt", "Universal", vit | {"num_blocks": 1}),
        ("EomtDinov3", "Universal", vit | {"num_blocks": 1}),
    ):
        note = f"classifies queries; recipe: `{QUERIES}`"
        yield Case(name, build(name, task, **settings), refused=QUERIES, note=note)


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "torch": plain_torch,
    "torchvision": torchvision,
    "segmentation_models_pytorch": segmentation_models_pytorch,
    "timm": timm,
    "transformers": transformers,
}


def read_rows() -> list[Row]:
    """Read the kept rows, library by library."""
    return [Row(**json.loads(line)) for line in ROWS.read_text().splitlines()]


def keep(library: str, rows: list[Row]) -> None:
    """Put the rows of a library in the place of its former ones."""
    others = [row for row in read_rows() if row.library != library]
    # The sort keeps the order within a library.
    ordered = sorted(others + rows, key=lambda row: row.library)
    ROWS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in ordered))


def render() -> None:
    """Write the page from the rows of every library."""
    rows = read_rows()
    works = sum(row.result == "works" for row in rows)
    lines = [
        "# Support matrix",
        "",
        "Written by `python benchmarks/support_matrix.py`, which builds each model from its",
        "configuration with random weights, attaches, takes one training step and checks: nothing",
        "of the model changes; the tapped features give the model's own logits; align and classify",
        "reach the first layer of the encoder, and pull does not. The encoders of transformers are",
        "built small, and where the classifier is as wide as the encoder, so is D.",
        "",
        f"{len(rows)} models: {works} work, {len(rows) - works} are refused with a message that "
        "says what to do, none is picked wrong.",
    ]
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        lines += ["", f"## {library} {mine[0].version}", ""]
        lines += ["| model | classifier | kernel | D | stride | tap | result | note |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in mine:
            path = f"`{row.path}`" if row.path else ""
            cells = (
                row.model,
                path,
                row.kernel,
                row.dim,
                row.stride,
                row.tap,
                row.result,
                row.note,
            )
            lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what mvsc.attach supports.")
    parser.add_argument("libraries", nargs="*", help="all that are installed by default")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    for library in [] if arguments.render else arguments.libraries or LIBRARIES:
        with suppress(PackageNotFoundError):
            release = version(library)
            rows = []
            for case in LIBRARIES[library]():
                rows.append(examine(library, release, case))
                print(library, case.model, rows[-1].result, rows[-1].path, flush=True)
            keep(library, rows)
    render()


if __name__ == "__main__":
    main()
