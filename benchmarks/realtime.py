"""BiSeNetV1 with ResNet-18, a real-time network, as its paper and mmseg have it.

Yu et al., "BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation", ECCV 2018.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Make a convolution with batch normalisation and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class AttentionRefinement(nn.Module):
    """Weigh the channels of a map of the context path by what the whole image holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = block(inputs, outputs)
        point = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.weight = nn.Sequential(nn.AdaptiveAvgPool2d(1), point, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv(features)
        return features * self.weight(features).sigmoid()


class ContextPath(nn.Module):
    """A light backbone; its coarse maps brought to 1/8 and 1/16 of the image."""

    def __init__(self) -> None:
        super().__init__()
        net = resnet18(weights=None)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
        self.sixteenth, self.last = net.layer3, net.layer4
        self.refine16, self.refine32 = AttentionRefinement(256, 128), AttentionRefinement(512, 128)
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), block(512, 128, 1))
        self.head16, self.head32 = block(128, 128), block(128, 128)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        eighth = self.stem(images)
        sixteenth = self.sixteenth(eighth)
        last = self.last(sixteenth)
        coarse = self.refine32(last) + self.image(last)
        coarse = self.head32(F.interpolate(coarse, sixteenth.shape[2:]))
        fine = F.interpolate(self.refine16(sixteenth) + coarse, eighth.shape[2:])
        return self.head16(fine), coarse


class Fusion(nn.Module):
    """Join both paths, and weigh the channels of the sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.join = block(dim, dim, 1)
        self.weight = nn.Sequential(nn.AdaptiveAvgPool2d(1), block(dim, dim, 1), nn.Sigmoid())

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        features = self.join(torch.cat([detail, context], 1))
        return features + features * self.weight(features)


class BiSeNet(nn.Module):
    """Return the logits at 1/8 of the image, those of two auxiliary heads, and the features.

    ``features`` are what enters the classifier, ``(batch, 256, height / 8, width / 8)``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.detail = nn.Sequential(
            block(3, 64, 7, 2), block(64, 64, 3, 2), block(64, 64, 3, 2), block(64, 128, 1)
        )
        self.context = ContextPath()
        self.fusion = Fusion(256)
        self.head = block(256, 256)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.ModuleList(
            nn.Sequential(block(128, 64), nn.Dropout2d(0.1), nn.Conv2d(64, num_classes, 1))
            for _ in range(2)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.context(images)
        features = self.head(self.fusion(self.detail(images), maps[0]))
        logits = self.classifier(self.dropout(features))
        first, second = (head(each) for head, each in zip(self.auxiliary, maps, strict=True))
        return {"out": logits, "aux": first, "aux 2": second, "features": features}
