"""What tests share: segmenters of a few layers, as a user would write them."""

from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, DIM = 5, 8


class Net(nn.Module):
    """An encoder, perhaps a dropout, and a 1x1 classifier, as a user would write them."""

    def __init__(self, dropout: nn.Module | None = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, DIM, 3, padding=1), nn.BatchNorm2d(DIM), nn.ReLU(inplace=True)
        )
        self.dropout = dropout or nn.Identity()
        self.classifier = nn.Conv2d(DIM, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.encoder(images)))


class NetWithLoss(Net):
    """A model that computes its own loss, in the way of transformers."""

    def forward(
        self, images: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> SimpleNamespace | tuple[Tensor, Tensor]:
        logits = super().forward(images)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits) if return_dict else (loss, logits)


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.boundary = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(images)
        return self.classifier(features), self.boundary(features)
