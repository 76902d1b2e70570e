"""MaskFormer, Mask2Former, OneFormer, EoMT: an auxiliary 1x1 head on the pixel embedding.

The masks are made of that embedding. The head answers for its pixels; drop it after training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import mvsc

CLASSES, SIDE = 21, 64


def pixel_embedding(output: Any) -> Tensor:
    if "pixel_decoder_last_hidden_state" in output:  # MaskFormer, Mask2Former
        return output.pixel_decoder_last_hidden_state
    if "pixel_decoder_hidden_states" in output:  # OneFormer
        return output.pixel_decoder_hidden_states[0]
    side = SIDE // 16  # EoMT, here with patches of 16: its tokens are queries, prefix, patches.
    return output.last_hidden_state[:, -side * side :].mT.unflatten(2, (side, side))


def train(model: nn.Module, dim: int, **inputs: Tensor) -> mvsc.MVSCRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.Conv2d(dim, CLASSES, 1)
    reg = mvsc.MVSCRegularizer(CLASSES, dim).to(device)
    parameters = nn.ModuleList([model, head]).to(device).train().parameters()
    groups = [{"params": parameters}, reg.param_group()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)
    for _ in range(2):
        images = torch.randn(2, 3, SIDE, SIDE, device=device)
        labels = torch.randint(0, CLASSES, (2, SIDE, SIDE), device=device)
        classes = [image.unique() for image in labels]
        masks = [(y == c[:, None, None]).float() for y, c in zip(labels, classes, strict=True)]
        output = model(
            images, mask_labels=masks, class_labels=classes, output_hidden_states=True, **inputs
        )
        features = pixel_embedding(output)
        logits = F.interpolate(head(features), labels.shape[1:], mode="bilinear")
        auxiliary = F.cross_entropy(logits, labels) + reg(features, labels, head)
        optimizer.zero_grad()
        (output.loss + auxiliary).backward()
        optimizer.step()
        print(f"loss {output.loss.item():.3f} auxiliary {auxiliary.item():.3f}")
    return reg


def main() -> mvsc.MVSCRegularizer:
    stages = {"depths": [1] * 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = SwinConfig(embed_dim=16, num_heads=[1, 2, 2, 2], **stages)
    small = {"hidden_dim": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, num_labels=CLASSES, **small)
    return train(Mask2FormerForUniversalSegmentation(config), dim=32)


if __name__ == "__main__":
    main()
