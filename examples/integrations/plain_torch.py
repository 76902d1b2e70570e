"""A loop of one's own: three lines, marked, and nothing else changes."""

import torch
import torchvision
from torch import nn

import mvsc

CLASSES = 21


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    criterion = nn.CrossEntropyLoss(ignore_index=255)

    reg = mvsc.attach(model, groups=4)  # 1
    optimizer.add_param_group(reg.param_group())  # 2

    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(images)["out"]
            loss = criterion(logits.float(), labels) + reg(labels)  # 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")

    # What is saved knows nothing of mvsc. To resume, save reg.state_dict() beside it.
    assert not any("centroids" in key for key in model.state_dict())
    return reg


if __name__ == "__main__":
    main()
