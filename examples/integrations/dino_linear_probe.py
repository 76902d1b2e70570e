"""DINOv2 with a linear head on its patch tokens, probed and then tuned.

MVSC moves features, so something in front of the head must train: here the last block and the
final norm. With the whole backbone frozen there is nothing for it to do, and it says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

import mvsc

CLASSES, PATCH = 21, 8


class LinearProbe(nn.Module):
    """Logits of the patch tokens, in the layout that the Linear gives: (batch, pixels, classes)."""

    def __init__(self, backbone: nn.Module, dim: int, prefix: int) -> None:
        super().__init__()
        self.backbone, self.prefix = backbone, prefix
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Classify each patch."""
        tokens = self.backbone(images).last_hidden_state
        return self.head(tokens[:, self.prefix :])  # without class and register tokens


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=PATCH
    )
    model = LinearProbe(Dinov2Model(config), config.hidden_size, prefix=1).to(device).train()
    model.backbone.requires_grad_(False)
    trained = [model.backbone.encoder.layer[-1], model.backbone.layernorm, model.head]
    for module in trained:
        module.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05)

    reg = mvsc.attach(model, classifier="head", groups=4)
    optimizer.add_param_group(reg.param_group())

    for _ in range(2):
        images = torch.randn(2, 3, 48, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 48, 64), device=device)
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        logits = model(images).mT.unflatten(2, grid)
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        # Without grid= it is the only one that has the ratio of the labels.
        loss = F.cross_entropy(logits, labels) + reg(labels, grid=grid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
