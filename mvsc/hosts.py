"""One table: where each library keeps its pixel classifier, and what else is known of it.

Adding a host is one entry here and one case in benchmarks/support_cases.py.
"""

from typing import NamedTuple

from torch import nn

from mvsc.classifier import GIVE_IT_ONE


class Host(NamedTuple):
    """A library of segmenters.

    Attributes:
        library: the top-level module that its segmenters, or their base classes, come from.
        segmenters: how the names of these classes end.
        classifiers: dotted paths at which they keep the classifier, to be tried in order; ``-1``
            is the last of a list.
        pads: names of layers that hold the classifier and pad in front of it.
        ignore_index: names in a segmenter's ``config`` under which its loss ignores a label.
        models: the class that all models of the library derive from, if those of its own that are
            none of these segmenters have no classifier of pixels.
    """

    library: str
    segmenters: tuple[str, ...]
    classifiers: tuple[str, ...]
    pads: tuple[str, ...] = ()
    ignore_index: tuple[str, ...] = ()
    models: str = ""


HOSTS = (
    Host(
        "segmentation_models_pytorch",
        segmenters=("SegmentationModel",),
        classifiers=("segmentation_head.0", "segmentation_head.head.4"),
    ),
    Host(
        "torchvision",
        segmenters=("_SimpleSegmentationModel", "LRASPP"),
        classifiers=("classifier.-1",),
    ),
    Host(
        "transformers",
        segmenters=("SemanticSegmentation",),
        classifiers=(
            "decode_head.classifier",
            "segmentation_head.classifier.convolution",
            "head.head.4",
            "decode_head.predictor",
            "decoder.head",
        ),
        pads=("MobileNetV2ConvLayer",),
        ignore_index=("semantic_loss_ignore_index", "loss_ignore_index"),
        models="PreTrainedModel",
    ),
    Host(
        "mmseg",
        segmenters=("BaseSegmentor",),
        classifiers=("decode_head.conv_seg", "decode_head.-1.conv_seg"),
    ),
    # Its models derive from segmentation_models_pytorch's.
    Host("terratorch", segmenters=("PixelWiseModel",), classifiers=("head.head.2",)),
    Host("torchseg", segmenters=("SegmentationModel",), classifiers=("segmentation_head.0",)),
    Host("torchgeo", segmenters=("FCN",), classifiers=("last",)),
    # Before FarSeg, which ChangeStarFarSeg ends with.
    Host(
        "torchgeo",
        segmenters=("ChangeStar", "ChangeStarFarSeg"),
        classifiers=("seg_classifier.0",),
    ),
    Host("torchgeo", segmenters=("FarSeg",), classifiers=("decoder.classifier.0",)),
    Host("torchgeo", segmenters=("BTC",), classifiers=("final_layer.0",)),
    Host("torchgeo", segmenters=("ChangeViT",), classifiers=("decoder.head",)),
    Host(
        "ultralytics",
        segmenters=("SemanticSegmentationModel",),
        classifiers=("model.-1.classifier.-1",),
    ),
    Host(
        "dynamic_network_architectures",  # nnU-Net's
        segmenters=("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"),
        classifiers=("decoder.seg_layers.-1",),
    ),
    Host("monai", segmenters=("SegResNetDS2",), classifiers=()),  # two equal heads
    Host("monai", segmenters=("BasicUNet",), classifiers=("final_conv",)),
    Host("monai", segmenters=("BasicUNetPlusPlus",), classifiers=("final_conv_0_4",)),
    Host("monai", segmenters=("SegResNet",), classifiers=("conv_final.2.conv",)),
    Host("monai", segmenters=("SegResNetDS",), classifiers=("up_layers.-1.head",)),
    Host("monai", segmenters=("SwinUNETR", "UNETR"), classifiers=("out.conv.conv",)),
    Host("monai", segmenters=("DynUNet",), classifiers=("output_block.conv.conv",)),
    Host("monai", segmenters=("VNet",), classifiers=("out_tr.conv2",)),
    Host("monai", segmenters=("FlexibleUNet",), classifiers=("segmentation_head.0",)),
    Host("monai", segmenters=("AttentionUnet", "Quicknat"), classifiers=("model.-1.conv",)),
    Host("monai", segmenters=("DiNTS",), classifiers=("stem_finals.-1",)),
    Host("monai", segmenters=("AHNet",), classifiers=("final.conv",)),
    Host("monai", segmenters=("MedNeXt",), classifiers=("out_0.conv_out",)),
)


class Refusal(NamedTuple):
    """A kind of model without a layer that classifies pixels, and what to do instead.

    Attributes:
        recipe: what to do.
        modules: names of its modules, at the end of their path, that give it away.
        types: names of the types of its modules that do, each with its library.
    """

    recipe: str
    modules: frozenset[str] = frozenset()
    types: frozenset[tuple[str, str]] = frozenset()


REFUSALS = (
    Refusal(
        "This model classifies queries. Give its pixel embedding an auxiliary 1x1 classifier, "
        "nn.Conv2d(dim, num_classes, 1), with a cross-entropy of its own, and pass the embedding "
        "and that classifier to MVSCRegularizer, as in "
        "examples/integrations/query_models.py of mvsc's repository.",
        modules=frozenset(
            {"class_predictor", "class_embed", "cls_embed", "class_labels_classifier"}
        ),
    ),
    Refusal(
        "LRASPP adds two classifiers up. They are one 1x1 convolution on the concatenated "
        "features, which MVSCRegularizer takes, as in "
        "examples/integrations/torchvision_lraspp.py of mvsc's repository.",
        types=frozenset({("torchvision", "LRASPPHead")}),
    ),
    Refusal(
        "MONAI's UNet ends in a transposed convolution, or with residual units in conv(x) + x, "
        "so no layer turns the features of a pixel into its logits. Give what enters its last "
        f"block {GIVE_IT_ONE}",
        types=frozenset({("monai", "UNet")}),
    ),
    Refusal(
        "The last layer of this model is followed by a norm, by another layer with weights, or "
        f"runs several times. Give the features that enter its last block {GIVE_IT_ONE}",
        types=frozenset(
            {
                ("monai", "HighResNet"),
                ("monai", "DAF3D"),
                ("dynamic_network_architectures", "Primus"),
            }
        ),
    ),
    Refusal(
        "SegGPT paints its answer in colours, so it has no classes and no classifier.",
        types=frozenset({("transformers", "SegGptForImageSegmentation")}),
    ),
)

ASIDE = {
    "aux": "auxiliary, by its name",
    "deep_super": "for deep supervision, by its name",
    "super_head": "for deep supervision, by its name",
    "out_blocks": "for deep supervision, by its name",
    "_ds_": "for deep supervision, by its name",
    "lora_": "a part of an adapter, by its name",
    "original_module": "replaced by an adapter, by its name",
    "qkv": "a projection of an attention, by its name",
    "attn": "a part of an attention, by its name",
    "embed": "an embedding, by its name",
}
"""What speaks against a layer in its name, in lower case, an underscore before each part."""


def speaks_against(path: str) -> str:
    """Return what the name of a layer says against it, or ''."""
    parts = f"_{path.lower()}".replace(".", "._")  # "heads_seg" has no part that begins with ds_
    found = [meaning for part, meaning in ASIDE.items() if part in parts]
    return found[-1] if found else ""


def is_auxiliary(path: str) -> bool:
    """Return whether a layer supervises a map beside that of the logits, by its name."""
    return speaks_against(path).startswith(("auxiliary", "for deep supervision"))


def refusal(model: nn.Module) -> Refusal | None:
    """Return what is known of a model that has no layer that classifies pixels, or None."""
    for path, module in model.named_modules():
        for each in REFUSALS:
            if path.split(".")[-1] in each.modules or _types(module) & each.types:
                return each
    return None


def refused_whole(model: nn.Module) -> bool:
    """Return whether a model is refused for what it is itself, not for a part of it."""
    return any(_types(model) & each.types for each in REFUSALS)


def _types(module: nn.Module) -> set[tuple[str, str]]:
    """Return library and name of a module's class and of its bases."""
    return {(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__}


def host_of(module: nn.Module) -> Host | None:
    """Return the library that a segmenter comes from, or None for any other module."""
    for base in type(module).__mro__:
        library = base.__module__.partition(".")[0]
        for host in HOSTS:
            if library == host.library and base.__name__.endswith(host.segmenters):
                return host
    return None


def is_no_segmenter(module: nn.Module) -> bool:
    """Return whether a module is a library's own model that segments nothing.

    A class of the user's that derives from the library's is the user's.
    """
    library = type(module).__module__.partition(".")[0]
    names = {base.__name__ for base in type(module).__mro__}
    known = any(host.library == library and host.models in names for host in HOSTS)
    return known and host_of(module) is None
