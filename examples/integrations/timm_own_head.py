"""A timm backbone with a head of one's own: the explicit form, with no hook anywhere."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvsc

CLASSES = 21


class Segmenter(nn.Module):
    """Three stages of a backbone, summed at the finest, and a 1x1 classifier."""

    def __init__(self, backbone: str, dim: int = 64) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3))
        widths = self.backbone.feature_info.channels()
        self.project = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.classifier = nn.Conv2d(dim, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the features that they are made of."""
        maps = [p(x) for p, x in zip(self.project, self.backbone(images), strict=True)]
        size = maps[0].shape[2:]
        features = F.gelu(sum(F.interpolate(x, size, mode="bilinear") for x in maps))
        return self.classifier(features), features


def main() -> mvsc.MVSCRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Segmenter("convnext_atto").to(device)
    reg = mvsc.MVSCRegularizer(CLASSES, model.classifier.in_channels, groups=4).to(device)
    groups = [{"params": model.parameters()}, reg.param_group()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=device)
        logits, features = model(images)
        loss = F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels)
        loss = loss + reg(features, labels, model.classifier)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
