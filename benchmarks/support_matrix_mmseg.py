"""The rows of MMSegmentation in the support matrix, which needs an environment of its own.

    # mmdet for the mask classifiers
    pip install -r examples/integrations/mmseg/requirements.txt mmdet==3.3.0
    python benchmarks/support_matrix_mmseg.py

Each model is built from mmseg's own config with random weights and as many classes as the images
here have; only the plain vision transformers lose most of their layers. Checked is all that
`support_matrix.py` checks of `mvsc.attach`, and that `MVSCEncoderDecoder`

- has the same loss as the attached regularizer, in a training step with the model's own losses;
- predicts the same bits as the plain model;
- refuses what `mvsc.attach` refuses.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mvsc.attach import attach
from mvsc.integrations.mmseg import MVSCEncoderDecoder
from support_cases import CLASSES, QUERIES, UNCERTAIN, Case
from support_matrix import Row, examine, keep, require

ADE = "4xb4-80k_ade20k-512x512"


def main_output(output: Any) -> Tensor:
    """Return the logits that count from what a decode head returns."""
    return output[0] if isinstance(output, tuple) else output


def pidnet_output(output: Any) -> Tensor:
    """PIDNet's are the second of three in training."""
    return output[1] if isinstance(output, tuple) else output


def configs() -> Iterator[tuple[Case, ConfigDict]]:
    """Yield each model with its config; `build` of the case is still to be filled in."""
    vit = {"num_layers": 4, "out_indices": (0, 1, 2, 3)}
    for title, name, settings in (
        ("FCN, ResNet-50", f"fcn/fcn_r50-d8_{ADE}", {}),
        ("PSPNet, ResNet-50", f"pspnet/pspnet_r50-d8_{ADE}", {}),
        ("DeepLabV3, ResNet-50", f"deeplabv3/deeplabv3_r50-d8_{ADE}", {}),
        ("DeepLabV3+, ResNet-50", f"deeplabv3plus/deeplabv3plus_r50-d8_{ADE}", {}),
        ("DANet, ResNet-50", f"danet/danet_r50-d8_{ADE}", {}),
        ("OCRNet, HRNet-W18", f"ocrnet/ocrnet_hr18_{ADE}", {}),
        ("FCN, HRNet-W18", f"hrnet/fcn_hr18_{ADE}", {}),
        ("SegFormer, MiT-B0", "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512", {}),
        ("SegFormer, MiT-B4", "segformer/segformer_mit-b4_8xb2-160k_ade20k-512x512", {}),
        ("SETR-Naive, ViT-L", "setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512", vit),
        ("SETR-PUP, ViT-L", "setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512", vit),
        ("SETR-MLA, ViT-L", "setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512", vit),
        ("UPerNet, ResNet-50", f"upernet/upernet_r50_{ADE}", {}),
        (
            "UPerNet, Swin-T",
            "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512",
            {},
        ),
        ("UPerNet, ViT-B", "vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512", vit),
        ("DPT, ViT-B", "dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512", vit),
        ("Segmenter linear, ViT-S", "segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512", {}),
        ("SegNeXt, MSCAN-T", "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512", {}),
        ("ISANet, ResNet-50", f"isanet/isanet_r50-d8_{ADE}", {}),
        ("EncNet, ResNet-50", f"encnet/encnet_r50-d8_{ADE}", {}),
        ("EMANet, ResNet-50", "emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024", {}),
        ("BiSeNetV1, ResNet-18", "bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024", {}),
        ("ICNet, ResNet-50", "icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832", {}),
        ("PIDNet-S", "pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes", {}),
        (
            "LRASPP, MobileNetV3-S",
            "mobilenet_v3/mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024",
            {},
        ),
        ("Semantic FPN, ResNet-50", "sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512", {}),
    ):
        logits = pidnet_output if title.startswith("PIDNet") else main_output
        note = "4 transformer layers" if settings is vit else ""
        size = 416 if title.startswith("LRASPP") else 64  # It pools 49x49 windows at stride 8.
        yield Case(title, nn.Module, logits, size, note=note), prepared(name, settings)

    masks = f"classifies queries; recipe: `{QUERIES}`"
    for title, name, refused, note in (
        (
            "K-Net, ResNet-50",
            "knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512",
            UNCERTAIN,
            "the last classifier is a kernel that depends on the image",
        ),
        (
            "Segmenter mask, ViT-T",
            "segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512",
            UNCERTAIN,
            "classifies by products with class tokens",
        ),
        (
            "PointRend, ResNet-50",
            "point_rend/pointrend_r50_4xb4-160k_ade20k-512x512",
            UNCERTAIN,
            "the last classifier answers for points",
        ),
        (
            "MaskFormer, ResNet-50",
            "maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512",
            QUERIES,
            masks,
        ),
        (
            "Mask2Former, ResNet-50",
            "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512",
            QUERIES,
            masks,
        ),
    ):
        yield Case(title, nn.Module, refused=refused, note=note), prepared(name, {})


def prepared(name: str, backbone: dict[str, Any]) -> ConfigDict:
    """Return mmseg's config of a model, with random weights and the classes of this matrix."""
    model = get_config(f"mmseg::{name}.py").model
    model.pretrained = None
    model.backbone.update(backbone)

    def visit(node: Any) -> None:
        for key, value in list(node.items()) if isinstance(node, dict) else ():
            if key == "num_classes":
                node[key] = CLASSES
            elif key == "class_weight":  # One for each class, and of queries one for no object.
                node[key] = [1.0] * CLASSES + ([0.1] if node.type.startswith("mmdet") else [])
            elif key == "init_cfg" and "Pretrained" in str(value):
                node[key] = None
            visit(value)
        for value in node if isinstance(node, list | tuple) else ():
            visit(value)

    visit(model)
    return model


def restart(*_: Any) -> None:
    """Seed what SegNeXt's factorization starts from in each forward, in evaluation too."""
    torch.manual_seed(0)


def build(config: ConfigDict, kind: str = "") -> nn.Module:
    """Build a model, with centroids if `kind` is "MVSC"."""
    config = copy.deepcopy(config)
    config.type = kind + config.type
    model = revert_sync_batchnorm(MODELS.build(config))
    if not getattr(model.backbone, "with_cls_token", True):
        model.backbone.cls_token.requires_grad_(False)  # SETR-MLA has it and does not use it.
    if hasattr(model.decode_head, "hamburger"):
        model.decode_head.hamburger.register_forward_pre_hook(restart)
    return model


def check_integration(case: Case, config: ConfigDict) -> str:
    """Check the segmentor with centroids, and return its name."""
    kind = f"MVSC{config.type}"
    if case.refused:
        try:
            build(config, "MVSC")
        except ValueError as error:
            require("decode_head must have a convolution conv_seg" in str(error), str(error))
            return ""
        raise AssertionError(f"{kind} must refuse {case.model}")

    model, plain = build(config, "MVSC"), build(config)
    require(isinstance(model, MVSCEncoderDecoder), f"{kind} is not mvsc's")
    plain.load_state_dict(model.state_dict(), strict=False)
    images, samples = torch.randn(2, 3, case.size, case.size), []
    for labels in torch.randint(0, CLASSES, (2, 1, case.size, case.size)):
        samples.append(SegDataSample(metainfo={"img_shape": images.shape[2:]}))
        samples[-1].gt_sem_seg = PixelData(data=labels)
        samples[-1].gt_edge_map = PixelData(data=(labels == 0).long())  # PIDNet alone reads it.
    with torch.no_grad():
        predictions = [each.eval().predict(images) for each in (model, plain)]
    for mine, theirs in zip(*predictions, strict=True):
        same = torch.equal(mine.seg_logits.data, theirs.seg_logits.data)
        require(same, "the prediction is another than that of the plain model")

    reg = attach(model.train())
    reg.regularizer.load_state_dict(model.mvsc_head.state_dict())
    total, logged = model.parse_losses(model.loss(images, samples))
    attached = reg(torch.cat([sample.gt_sem_seg.data for sample in samples]))
    own = sum(value for key, value in logged.items() if key.startswith("mvsc.loss_"))
    torch.testing.assert_close(own, attached)
    total.backward()
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    for parameter in (first, model.mvsc_head.centroids):
        require(bool(parameter.grad.abs().sum() > 0), "a gradient is missing")
    return kind


def main() -> None:
    init_default_scope("mmseg")
    rows: list[Row] = []
    release = version("mmsegmentation")
    for case, config in configs():
        torch.manual_seed(0)
        row = examine("mmsegmentation", release, replace(case, build=partial(build, config)))
        kind = check_integration(case, config)
        notes = [note for note in (kind and f"`{kind}`", row.note) if note]
        rows.append(replace(row, note="; ".join(notes)))
        print(row.model, row.result, row.path, flush=True)
    keep("mmsegmentation", rows)


if __name__ == "__main__":
    main()
