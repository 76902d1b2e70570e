"""The models of the support matrix: one function a library, one entry a model.

Each is built small, from its configuration and with random weights; nothing is downloaded.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 13
QUERIES = "examples/integrations/query_models.py"
LRASPP = "examples/integrations/torchvision_lraspp.py"
TRANSPOSED = "examples/integrations/monai_transposed_head.py"
UNCERTAIN = "No pixel classifier is certain"


@dataclass(frozen=True)
class Case:
    """A model to build, and what is right for it.

    Attributes:
        model: its name in the table.
        build: makes it.
        logits: takes the main ones out of its output, as ``(batch, classes, *spatial)``.
        size: of square images with three channels, unless there are ``inputs``.
        refused: what the refusal says, of a model that has no classifier.
        note: for the table.
        path: where the classifier is, if that is known beforehand.
        inputs: makes what the model takes: a tensor, or a mapping of arguments.
        answers: how often the classifier answers for each image.
    """

    model: str
    build: Callable[[], nn.Module]
    logits: Callable[[Any], Tensor] = lambda output: output
    size: int = 64
    refused: str = ""
    note: str = ""
    path: str = ""
    inputs: Callable[[], Any] | None = None
    answers: int = 1


def case(build: Callable[[], nn.Module], inputs: Callable[[], Any], **rest: Any) -> Case:
    """Make a case that :func:`named` gives its name."""
    return Case("", build, inputs=inputs, **rest)


def named(cases: dict[str, Case]) -> Iterator[Case]:
    for model, each in cases.items():
        yield replace(each, model=model)


def images(
    size: int = 64, channels: int = 3, axes: int = 2, batch: int = 2
) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, *[size] * axes)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, list | tuple) else output


def channels_second(output: Tensor) -> Tensor:
    return output.movedim(-1, 1)


def first_of_stack(output: Tensor) -> Tensor:
    return output if output.shape[1] == CLASSES else output[:, 0]


def last(output: Any) -> Tensor:
    return output[-1] if isinstance(output, list | tuple) else output


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


def task_given() -> dict[str, Tensor]:
    task = torch.ones(2, 77, dtype=torch.long)
    return {"pixel_values": torch.randn(2, 3, 64, 64), "task_inputs": task}


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
        given = {"OneFormer": task_given}.get(name)
        yield Case(name, build(name, task, **settings), refused=QUERIES, note=note, inputs=given)


def monai() -> Iterator[Case]:
    nets = importlib.import_module("monai.networks.nets")
    hosts: dict[str, Case] = {}

    def both(name: str, build: Callable[[int], nn.Module], size: int = 32, **rest: Any) -> None:
        for axes in (2, 3):
            hosts[f"{name}, {axes}-D"] = case(partial(build, axes), images(size, 1, axes), **rest)

    def unet(axes: int, res: int, **more: Any) -> nn.Module:
        return nets.UNet(axes, 1, CLASSES, (8, 16, 32), (2, 2), num_res_units=res, **more)

    both(
        "UNet",
        partial(unet, res=0),
        refused=TRANSPOSED,
        note=f"ends in a ConvTranspose; recipe: `{TRANSPOSED}`",
    )
    both(
        "UNet, residual units",
        partial(unet, res=2),
        refused=TRANSPOSED,
        note=f"ends in conv(x) + x; recipe: `{TRANSPOSED}`",
    )
    both(
        "UNet, residual units and dropout",
        partial(unet, res=2, dropout=0.2),
        refused=TRANSPOSED,
        note=f"ends in conv(x) + x; recipe: `{TRANSPOSED}`",
    )
    both(
        "BasicUNet",
        lambda d: nets.BasicUNet(d, 1, CLASSES, (8, 8, 16, 16, 16, 8), dropout=0.2),
        path="final_conv",
    )
    for ds in (False, True):
        both(
            "BasicUNetPlusPlus" + ", deep supervision" * ds,
            lambda d, ds=ds: nets.BasicUNetPlusPlus(
                d, 1, CLASSES, (8, 8, 16, 16, 16, 8), deep_supervision=ds
            ),
            path="final_conv_0_4",
            logits=last,
        )
    both(
        "SegResNet",
        lambda d: nets.SegResNet(d, 8, 1, CLASSES, dropout_prob=0.2),
        path="conv_final.2.conv",
    )
    both(
        "SegResNetVAE",
        lambda d: nets.SegResNetVAE(
            (32,) * d, spatial_dims=d, init_filters=8, in_channels=1, out_channels=CLASSES
        ),
        path="conv_final.2.conv",
        logits=first,
    )
    both(
        "SegResNetDS",
        lambda d: nets.SegResNetDS(d, 8, 1, CLASSES, blocks_down=(1, 1, 1), dsdepth=1),
        path="up_layers.1.head",
    )
    both(
        "SegResNetDS, dsdepth=2",
        lambda d: nets.SegResNetDS(d, 8, 1, CLASSES, blocks_down=(1, 1, 1), dsdepth=2),
        path="up_layers.1.head",
        logits=first,
    )
    both(
        "SegResNetDS2",
        lambda d: nets.SegResNetDS2(d, 8, 1, CLASSES, blocks_down=(1, 1, 1), dsdepth=1),
        logits=first,
        path="up_layers.1.head",
        note="two decoders with a head each: name one",
    )
    both(
        "SwinUNETR",
        lambda d: nets.SwinUNETR(
            in_channels=1,
            out_channels=CLASSES,
            feature_size=12,
            spatial_dims=d,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
            window_size=4,
        ),
        path="out.conv.conv",
        size=64,
    )
    both(
        "UNETR",
        lambda d: nets.UNETR(
            1,
            CLASSES,
            (32,) * d,
            feature_size=8,
            hidden_size=24,
            mlp_dim=32,
            num_heads=2,
            spatial_dims=d,
            dropout_rate=0.1,
        ),
        path="out.conv.conv",
    )

    def dynunet(axes: int, **more: Any) -> nn.Module:
        return nets.DynUNet(
            axes, 1, CLASSES, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[8, 12, 16, 20], **more
        )

    both("DynUNet", dynunet, path="output_block.conv.conv")
    both("DynUNet, dropout", partial(dynunet, dropout=0.2), path="output_block.conv.conv")
    both(
        "DynUNet, deep supervision",
        partial(dynunet, deep_supervision=True, deep_supr_num=2),
        path="output_block.conv.conv",
        logits=first_of_stack,
    )
    both(
        "DynUNet, deep supervision, residual blocks",
        partial(dynunet, deep_supervision=True, deep_supr_num=1, res_block=True),
        path="output_block.conv.conv",
        logits=first_of_stack,
    )
    both(
        "VNet",
        lambda d: nets.VNet(d, 1, CLASSES, dropout_prob_down=0.5, dropout_prob_up=(0.5, 0.5)),
        path="out_tr.conv2",
        note="D = number of classes (1x1 C -> C)",
    )
    both(
        "FlexibleUNet",
        lambda d: nets.FlexibleUNet(
            1,
            CLASSES,
            "efficientnet-b0",
            spatial_dims=d,
            decoder_channels=(32, 24, 16, 12, 8),
            dropout=0.2,
        ),
        path="segmentation_head.0",
        size=32,
    )
    both(
        "FlexibleUNet, resnet18",
        lambda d: nets.FlexibleUNet(
            1, CLASSES, "resnet18", spatial_dims=d, decoder_channels=(32, 24, 16, 12, 8)
        ),
        path="segmentation_head.0",
        size=32,
    )
    both(
        "AttentionUnet",
        lambda d: nets.AttentionUnet(d, 1, CLASSES, (8, 12, 16), (2, 2), dropout=0.2),
        path="model.2.conv",
    )
    both(
        "HighResNet",
        lambda d: nets.HighResNet(
            d,
            1,
            CLASSES,
            norm_type=("batch", {"affine": True}),
            layer_params=(
                {"name": "conv_0", "n_features": 8, "kernel_size": 3},
                {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                {"name": "conv_1", "n_features": 16, "kernel_size": 1},
                {"name": "conv_2", "kernel_size": 1},
            ),
        ),
        refused=TRANSPOSED,
        note="norm and activation follow the last convolution",
        size=16,
    )
    for ds in (False, True):
        both(
            "MedNeXt" + ", deep supervision" * ds,
            lambda d, ds=ds: nets.MedNeXt(
                d,
                8,
                1,
                CLASSES,
                kernel_size=3,
                deep_supervision=ds,
                blocks_down=(1, 1),
                blocks_bottleneck=1,
                blocks_up=(1, 1),
            ),
            path="out_0.conv_out",
            logits=first,
            note="ConvTranspose of kernel 1 and stride 1: exactly a 1x1 convolution",
        )
    both(
        "AHNet, transpose",
        lambda d: nets.AHNet(
            layers=(1, 1, 1, 1),
            spatial_dims=d,
            in_channels=1,
            out_channels=CLASSES,
            psp_block_num=0,
        ),
        size=32,
        refused=UNCERTAIN,
        note="ends in a ConvTranspose of stride 2",
    )
    both(
        "AHNet, linear upsampling",
        lambda d: nets.AHNet(
            layers=(1, 1, 1, 1),
            spatial_dims=d,
            in_channels=1,
            out_channels=CLASSES,
            psp_block_num=0,
            upsample_mode="bilinear" if d == 2 else "trilinear",
        ),
        size=32,
        path="final.conv",
    )

    def dints(axes: int) -> nn.Module:
        topology = nets.TopologyInstance(
            channel_mul=0.2,
            num_blocks=4,
            num_depths=3,
            use_downsample=True,
            spatial_dims=axes,
            device="cpu",
        )
        return nets.DiNTS(topology, 1, CLASSES, use_downsample=True, spatial_dims=axes)

    both("DiNTS", dints, path="stem_finals.1")
    hosts["Quicknat, 2-D"] = case(
        lambda: nets.Quicknat(num_classes=CLASSES, num_channels=1, num_filters=8, se_block="None"),
        images(32, 1),
        path="model.3.conv",
        logits=first,
    )
    hosts["DAF3D, 3-D"] = case(
        lambda: nets.DAF3D(1, CLASSES),
        images(32, 1, 3),
        refused=TRANSPOSED,
        note="the last classifier runs nine times a forward",
    )
    yield from named(hosts)


def dynamic_network_architectures() -> Iterator[Case]:
    unet = importlib.import_module("dynamic_network_architectures.architectures.unet")
    primus = importlib.import_module("dynamic_network_architectures.architectures.primus")
    hosts = {}

    def build(name: str, axes: int, ds: bool, dropout: bool = False) -> nn.Module:
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        norm = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes]
        drop = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}[axes]
        blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
        return getattr(unet, name)(
            input_channels=1,
            n_stages=4,
            features_per_stage=[8, 12, 16, 20],
            conv_op=conv,
            kernel_sizes=3,
            strides=[1, 2, 2, 2],
            num_classes=CLASSES,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=norm,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            dropout_op=drop if dropout else None,
            dropout_op_kwargs={"p": 0.2, "inplace": True} if dropout else None,
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=ds,
            **{blocks: 1},
        )

    for name in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet"):
        for axes in (1, 2, 3):
            for ds in (False, True):
                if axes == 1 and name != "PlainConvUNet":
                    continue
                hosts[f"{name}, {axes}-D" + ", deep supervision" * ds] = case(
                    partial(build, name, axes, ds),
                    images(32, 1, axes),
                    path="decoder.seg_layers.2",
                    logits=first,
                )
        hosts[f"{name}, 2-D, dropout in place"] = case(
            partial(build, name, 2, True, True),
            images(32, 1),
            path="decoder.seg_layers.2",
            logits=first,
        )
    hosts["Primus, 3-D"] = case(
        lambda: primus.Primus(
            1,
            66,
            (8, 8, 8),
            CLASSES,
            eva_depth=1,
            eva_numheads=1,
            input_shape=(32, 32, 32),
        ),
        images(32, 1, 3, batch=1),
        refused=TRANSPOSED,
        note="ends in a ConvTranspose of stride 2",
    )
    yield from named(hosts)


def torchgeo() -> Iterator[Case]:
    models = importlib.import_module("torchgeo.models")
    trainers = importlib.import_module("torchgeo.trainers")
    pair = lambda: torch.randn(2, 2, 3, 64, 64)  # noqa: E731
    hosts = {
        "FCN": case(lambda: models.FCN(3, CLASSES, 16), images(), path="last"),
        "FarSeg": case(
            lambda: models.FarSeg("resnet18", CLASSES, backbone_pretrained=False),
            images(),
            path="decoder.classifier.0",
        ),
        "ChangeStarFarSeg": case(
            lambda: models.ChangeStarFarSeg("resnet18", CLASSES, backbone_pretrained=False),
            pair,
            path="seg_classifier.0",
            logits=lambda output: output["bi_seg_logit"].flatten(0, 1),
            note="of both dates: `labels.flatten(0, 1)`",
        ),
        "FCSiamConc": case(
            lambda: models.FCSiamConc("resnet18", encoder_weights=None, classes=CLASSES),
            pair,
            path="segmentation_head.0",
        ),
        "FCSiamDiff": case(
            lambda: models.FCSiamDiff("resnet18", encoder_weights=None, classes=CLASSES),
            pair,
            path="segmentation_head.0",
        ),
        "BTC": case(
            lambda: models.BTC("swin_tiny", classes=CLASSES),
            images(64, 6),
            path="final_layer.0",
        ),
        "ChangeViT": case(
            lambda: models.ChangeViT("vit_tiny_patch16_224", img_size=64, num_classes=CLASSES),
            pair,
            path="decoder.head",
            note="answers twice for each pair: `torch.cat([labels, labels])`",
            answers=2,
        ),
        "unet": case(
            lambda: models.unet(classes=CLASSES, encoder_name="resnet18", encoder_weights=None),
            images(),
            path="segmentation_head.0",
        ),
    }
    for model in ("unet", "deeplabv3+", "fcn", "upernet", "segformer", "dpt"):
        backbone = "tu-vit_tiny_patch16_224" if model == "dpt" else "resnet18"
        hosts[f"SemanticSegmentationTask, {model}"] = case(
            lambda model=model, backbone=backbone: trainers.SemanticSegmentationTask(
                model=model, backbone=backbone, num_classes=CLASSES, num_filters=16, ignore_index=0
            ),
            images(224 if model == "dpt" else 64),
            path={"fcn": "model.last", "dpt": "model.segmentation_head.head.4"}.get(
                model, "model.segmentation_head.0"
            ),
        )
    yield from named(hosts)


def terratorch() -> Iterator[Case]:
    tasks = importlib.import_module("terratorch.tasks")

    def build(decoder: str, **settings: Any) -> nn.Module:
        task = tasks.SemanticSegmentationTask(
            model_factory="EncoderDecoderFactory",
            model_args={
                "backbone": "timm_resnet18",
                "backbone_pretrained": False,
                "backbone_in_chans": 3,
                "decoder": decoder,
                "num_classes": CLASSES,
                **settings,
            },
        )
        task.configure_models()
        model: nn.Module = task.model
        return model

    deep = {"backbone_out_indices": [1, 2, 3, 4]}
    last = deep | {"necks": [{"name": "SelectIndices", "indices": [-1]}]}
    hosts = {
        "FCNDecoder": last | {"decoder_channels": 16},
        "UNetDecoder": deep | {"decoder_channels": [64, 32, 16, 8]},
        "UperNetDecoder": deep | {"decoder_channels": 16},
    }
    yield from named(
        {
            f"SemanticSegmentationTask, {name}": case(
                lambda name=name, settings=settings: build(name, **settings),
                images(),
                logits=lambda output: output.output,
                path="head.head.2",
            )
            for name, settings in hosts.items()
        }
    )


def torchseg() -> Iterator[Case]:
    seg = importlib.import_module("torchseg")
    hosts = {}
    for name in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
    ):
        hosts[name] = case(
            lambda name=name: getattr(seg, name)("resnet18", encoder_weights=None, classes=CLASSES),
            images(128 if name == "PAN" else 64),
            path="segmentation_head.0",
        )
    hosts["Unet, aux_params"] = case(
        lambda: seg.Unet(
            "resnet18",
            encoder_weights=None,
            classes=CLASSES,
            aux_params={"classes": CLASSES, "dropout": 0.2},
        ),
        images(),
        path="segmentation_head.0",
        logits=first,
    )
    yield from named(hosts)


def ultralytics() -> Iterator[Case]:
    tasks = importlib.import_module("ultralytics.nn.tasks")

    def inner() -> nn.Module:
        return tasks.SemanticSegmentationModel("yolo26n-sem.yaml", nc=CLASSES, verbose=False)

    hosts = {
        "SemanticSegmentationModel, yolo26n-sem": case(
            inner, images(), path="model.17.classifier.1", logits=first
        ),
        # YOLO("yolo26n-sem.yaml") itself is no host: its train() starts a training run, and builds
        # another model for it; attach to the trainer's model.
        "SegmentationModel, yolo26n-seg": case(
            lambda: tasks.SegmentationModel("yolo26n-seg.yaml", nc=CLASSES, verbose=False),
            images(),
            refused=UNCERTAIN,
            note="instance segmentation: classifies anchors",
        ),
    }
    yield from named(hosts)


class LinearProbe(nn.Module):
    """Backbone, then one linear layer on its patch tokens; five ways people write it."""

    def __init__(self, backbone: nn.Module, dim: int, prefix: int, patch: int, kind: str) -> None:
        super().__init__()
        self.backbone, self.prefix, self.patch, self.kind = backbone, prefix, patch, kind
        if kind == "conv":
            self.head: nn.Module = nn.Conv2d(dim, CLASSES, 1)
        elif kind == "bn conv dropout":  # DINOv2's own linear head: BNHead of mmseg
            self.bn, self.dropout = nn.BatchNorm2d(dim), nn.Dropout2d(0.1)
            self.head = nn.Conv2d(dim, CLASSES, 1)
        else:
            self.head = nn.Linear(dim, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        if hasattr(self.backbone, "forward_features"):  # timm
            return self.backbone.forward_features(images)[:, self.prefix :]
        return self.backbone(images).last_hidden_state[:, self.prefix :]

    def forward(self, images: Tensor) -> Tensor:
        h, w = (size // self.patch for size in images.shape[2:])
        tokens = self.tokens(images)
        if self.kind == "tokens":
            logits = self.head(tokens).transpose(1, 2).unflatten(2, (h, w))
        elif self.kind == "tokens out":
            return self.head(tokens)
        elif self.kind == "channel-last":
            logits = self.head(tokens.unflatten(1, (h, w))).permute(0, 3, 1, 2)
        elif self.kind == "channel-last out":
            return self.head(tokens.unflatten(1, (h, w)))
        else:
            x = tokens.transpose(1, 2).unflatten(2, (h, w))
            x = self.dropout(self.bn(x)) if self.kind == "bn conv dropout" else x
            logits = self.head(x)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


OUT: dict[str, Any] = {
    "tokens out": {"logits": channels_second},
    "channel-last out": {"logits": channels_second},
}

KINDS = ("conv", "bn conv dropout", "tokens", "tokens out", "channel-last", "channel-last out")


def dino() -> Iterator[Case]:
    hf = importlib.import_module("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}

    def backbone(name: str) -> tuple[nn.Module, int]:
        config = getattr(hf, f"{name}Config")(patch_size=8, **small)
        prefix = 1 + getattr(config, "num_register_tokens", 0)
        return getattr(hf, f"{name}Model")(config), prefix

    hosts = {}
    for name in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT"):
        for kind in KINDS:
            if kind.startswith("bn") and name != "Dinov2":
                continue

            def build(name: str = name, kind: str = kind) -> nn.Module:
                model, prefix = backbone(name)
                return LinearProbe(model, 24, prefix, 8, kind)

            hosts[f"{name}Model + {'Conv2d' if 'conv' in kind else 'Linear'}, {kind}"] = case(
                build, images(), path="head", **OUT.get(kind, {})
            )

    class OwnHead(hf.Dinov2PreTrainedModel):
        """As in the tutorials: Dinov2ForSemanticSegmentation of one's own."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.dinov2 = hf.Dinov2Model(config)
            self.classifier = nn.Conv2d(config.hidden_size, CLASSES, 1)

        def forward(self, pixel_values: Tensor) -> Tensor:
            tokens = self.dinov2(pixel_values).last_hidden_state[:, 1:]
            logits = self.classifier(tokens.transpose(1, 2).unflatten(2, (8, 8)))
            return F.interpolate(logits, pixel_values.shape[2:], mode="bilinear")

    OwnHead.__name__ = "Dinov2ForSemanticSegmentation"
    hosts["own Dinov2ForSemanticSegmentation(Dinov2PreTrainedModel)"] = case(
        lambda: OwnHead(hf.Dinov2Config(patch_size=8, **small)), images(), path="classifier"
    )
    yield from named(hosts)


def timm_tokens() -> Iterator[Case]:
    timm = importlib.import_module("timm")
    hosts = {}

    def build(name: str, kind: str, classes: int = 0) -> nn.Module:
        model = timm.create_model(name, img_size=64, num_classes=classes, depth=2)
        return LinearProbe(
            model, model.embed_dim, model.num_prefix_tokens, model.patch_embed.patch_size[0], kind
        )

    for name in ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch8_224"):
        for kind in ("tokens", "tokens out", "channel-last", "conv"):
            hosts[f"{name}, {kind}"] = case(
                partial(build, name, kind), images(), path="head", **OUT.get(kind, {})
            )
    hosts["vit_tiny_patch16_224 with its own image classifier, tokens"] = case(
        partial(build, "vit_tiny_patch16_224", "tokens", 1000),
        images(),
        path="head",
        note="timm's own `backbone.head` is never called",
    )

    class TimmConvMap(nn.Module):
        """features_only ConvNeXt, Linear on the channel-last map."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(
                "swin_tiny_patch4_window7_224", features_only=True, img_size=64
            )
            self.head = nn.Linear(self.backbone.feature_info.channels()[-1], CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.backbone(images)[-1]).permute(0, 3, 1, 2)

    hosts["swin_tiny features_only (channel-last) + Linear"] = case(
        TimmConvMap, images(), path="head"
    )
    yield from named(hosts)


def transformers_more() -> Iterator[Case]:
    hf = importlib.import_module("transformers")
    hosts = {}
    vit = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "intermediate_size": 64,
    }

    def sam2() -> nn.Module:
        back = hf.Sam2HieraDetConfig(
            hidden_size=12,
            num_attention_heads=1,
            blocks_per_stage=[1, 1, 1, 1],
            embed_dim_per_stage=[12, 24, 48, 96],
            num_attention_heads_per_stage=[1, 1, 1, 1],
            window_size_per_stage=[4, 4, 4, 4],
            global_attention_blocks=[],
            image_size=[64, 64],
            window_positional_embedding_background_size=[4, 4],
        )
        vision = hf.Sam2VisionConfig(
            backbone_config=back,
            backbone_channel_list=[96, 48, 24, 12],
            fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        )
        prompt = hf.Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16)
        mask = hf.Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
        )
        return hf.Sam2Model(
            hf.Sam2Config(
                vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask
            )
        )

    hosts["Sam2Model"] = case(
        sam2,
        lambda: {
            "pixel_values": torch.randn(1, 3, 64, 64),
            "input_points": torch.rand(1, 1, 1, 2) * 64,
            "input_labels": torch.ones(1, 1, 1, dtype=torch.int),
        },
        refused=UNCERTAIN,
        note="answers prompts with masks, has no classes",
        logits=lambda o: o.pred_masks.flatten(0, 1),
    )

    def seggpt() -> nn.Module:
        return hf.SegGptForImageSegmentation(
            hf.SegGptConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=[64, 32],
                patch_size=8,
                decoder_hidden_size=8,
                merge_index=0,
                mlp_dim=32,
                intermediate_hidden_state_indices=[0, 1],
                pretrain_image_size=32,
            )
        )

    hosts["SegGptForImageSegmentation"] = case(
        seggpt,
        lambda: {
            "pixel_values": torch.randn(1, 3, 32, 32),
            "prompt_pixel_values": torch.randn(1, 3, 32, 32),
            "prompt_masks": torch.randn(1, 3, 32, 32),
        },
        refused="paints its answer in colours",
        note="paints colours, has no classes",
        logits=lambda o: o.pred_masks,
    )
    hosts["DepthAnythingForDepthEstimation"] = case(
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=hf.Dinov2Config(
                    hidden_size=24,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    image_size=56,
                    patch_size=14,
                    out_indices=[1, 2, 3, 4],
                    reshape_hidden_states=False,
                ),
                reassemble_hidden_size=24,
                neck_hidden_sizes=[8, 8, 16, 16],
                fusion_hidden_size=16,
            )
        ),
        images(56),
        refused=UNCERTAIN,
        note="regresses depth",
        logits=lambda o: o.predicted_depth[:, None],
    )

    def clipseg() -> nn.Module:
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 99,
        }
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        }
        return hf.CLIPSegForImageSegmentation(
            hf.CLIPSegConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=16,
                reduce_dim=16,
                extract_layers=[0, 1],
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            )
        )

    hosts["CLIPSegForImageSegmentation"] = case(
        clipseg,
        lambda: {
            "pixel_values": torch.randn(2, 3, 64, 64),
            "input_ids": torch.ones(2, 5, dtype=torch.long),
        },
        refused=UNCERTAIN,
        note="one logit for a prompt, ConvTranspose",
        logits=lambda o: o.logits[:, None],
    )

    def upernet(config: str, **settings: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            back = getattr(hf, config)(
                out_indices=[1, 2, 3, 4],
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=64,
                patch_size=16,
                **settings,
            )
            return hf.UperNetForSemanticSegmentation(
                hf.UperNetConfig(
                    backbone_config=back,
                    num_labels=CLASSES,
                    auxiliary_in_channels=32,
                    auxiliary_channels=16,
                    hidden_size=16,
                    pool_scales=[1, 2],
                )
            )

        return build

    for name, settings in (("DINOv3ViT", {"intermediate_size": 64}), ("Dinov2", {})):
        hosts[f"UperNet, {name} backbone"] = case(
            upernet(f"{name}Config", **settings),
            images(),
            path="decode_head.classifier",
            logits=lambda o: o.logits,
        )

    def videomt() -> nn.Module:
        return hf.VideomtForUniversalSegmentation(
            hf.VideomtConfig(num_labels=CLASSES, num_blocks=1, num_queries=5, **vit)
        )

    hosts["VideomtForUniversalSegmentation"] = case(
        videomt,
        lambda: torch.randn(1, 2, 3, 64, 64),
        refused=QUERIES,
        note=f"classifies queries; recipe: `{QUERIES}`",
        logits=lambda o: (
            o.masks_queries_logits.flatten(0, 1)
            if o.masks_queries_logits.ndim == 5
            else o.masks_queries_logits
        ),
    )

    def detr() -> nn.Module:
        back = hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return hf.DetrForSegmentation(
            hf.DetrConfig(
                backbone_config=back,
                use_timm_backbone=False,
                backbone=None,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                encoder_attention_heads=8,
                decoder_attention_heads=8,
                num_queries=5,
                num_labels=CLASSES,
            )
        )

    hosts["DetrForSegmentation"] = case(
        detr,
        images(),
        refused=QUERIES,
        note=f"classifies queries; recipe: `{QUERIES}`",
        logits=lambda o: o.pred_masks,
    )
    yield from named(hosts)


def peft() -> Iterator[Case]:
    hf = importlib.import_module("transformers")
    lib = importlib.import_module("peft")

    def segformer() -> nn.Module:
        return hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_labels=CLASSES,
                depths=[1] * 4,
                hidden_sizes=[8, 16, 16, 32],
                decoder_hidden_size=24,
            )
        )

    # transformers 5 named the attention's projections anew; both fit by their ends.
    def wrap(**settings: Any) -> nn.Module:
        model = segformer()
        linears = {
            n.split(".")[-1]
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and "attention" in n
        }
        targets = sorted(linears & {"query", "value", "q_proj", "v_proj"}) or sorted(linears)
        targets += settings.pop("more", [])
        return lib.get_peft_model(
            model, lib.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **settings)
        )

    out = lambda o: o.logits  # noqa: E731
    root = "base_model.model.decode_head"
    hosts = {
        "LoRA Segformer, modules_to_save decode_head": case(
            lambda: wrap(modules_to_save=["decode_head"]),
            images(),
            logits=out,
            path=f"{root}.modules_to_save.default.classifier",
        ),
        "LoRA Segformer, modules_to_save classifier": case(
            lambda: wrap(modules_to_save=["classifier"]),
            images(),
            logits=out,
            path=f"{root}.classifier.modules_to_save.default",
        ),
        "LoRA Segformer, head frozen": case(wrap, images(), logits=out, path=f"{root}.classifier"),
        "LoRA Segformer, LoRA on the classifier too": case(
            lambda: wrap(more=["classifier"]),
            images(),
            logits=out,
            path=f"{root}.classifier",
            note="the LoRA layer is the classifier",
        ),
    }
    yield from named(hosts)


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "torch": plain_torch,
    "torchvision": torchvision,
    "segmentation_models_pytorch": segmentation_models_pytorch,
    "timm": lambda: chain(timm(), timm_tokens()),
    "transformers": lambda: chain(transformers(), dino(), transformers_more()),
    "monai": monai,
    "dynamic_network_architectures": dynamic_network_architectures,
    "torchgeo": torchgeo,
    "terratorch": terratorch,
    "torchseg": torchseg,
    "ultralytics": ultralytics,
    "peft": peft,
}
"""By the name that the library is installed under."""
