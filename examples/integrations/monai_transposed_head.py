"""Models that end in a transposed convolution, or in conv(x) + x: an auxiliary 1x1 head.

The last block of MONAI's UNet gives the places of a pixel different logits, so no answer for a
pixel alone exists. What enters that block is dense, too: a 1x1 head of its own answers for it.
Drop the head after training. For nnU-Net's Primus, HighResNet and the like it is the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn

import mvsc

CLASSES, CHANNELS = 4, (8, 16, 32)


class WithAuxiliaryHead(nn.Module):
    """A model, the features that enter one of its blocks, and a 1x1 head on them."""

    def __init__(self, model: nn.Module, block: nn.Module, dim: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Conv3d(dim, CLASSES, 1)
        self.features: Tensor | None = None
        block.register_forward_pre_hook(self._keep)

    def _keep(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.features = args[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the model's logits, the features, and the logits of the head."""
        logits, features = self.model(images), self.features
        self.features = None
        return logits, features, self.head(features)


def main() -> mvsc.MVSCRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet(3, 1, CLASSES, CHANNELS, strides=(2, 2), num_res_units=2)
    dim = 2 * CHANNELS[0]  # what the last skip connection and the level below bring
    model = WithAuxiliaryHead(unet, unet.model[-1], dim).to(device).train()
    reg = mvsc.MVSCRegularizer(CLASSES, dim).to(device)
    groups = [{"params": model.parameters()}, reg.param_group()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(2):
        images = torch.randn(2, 1, 16, 16, 16, device=device)
        labels = torch.randint(0, CLASSES, (2, 16, 16, 16), device=device)
        logits, features, auxiliary = model(images)
        auxiliary = F.interpolate(auxiliary, labels.shape[1:], mode="trilinear")
        loss = F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)
        loss = loss + reg(features, labels, model.head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
