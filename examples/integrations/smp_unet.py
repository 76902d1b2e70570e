"""segmentation_models_pytorch: any decoder, with one of its losses, for example U-Net and Dice."""

import segmentation_models_pytorch as smp
import torch

import mvsc

CLASSES = 21


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES).to(device)
    criterion = smp.losses.DiceLoss("multiclass", ignore_index=255)
    reg = mvsc.attach(model)
    groups = [{"params": model.parameters()}, reg.param_group()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
    for _ in range(2):
        images = torch.randn(2, 3, 64, 64, device=device)
        labels = torch.randint(0, CLASSES, (2, 64, 64), device=device)
        loss = criterion(model(images), labels) + reg(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    return reg


if __name__ == "__main__":
    main()
