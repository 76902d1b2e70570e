"""torchvision's reference training (references/segmentation/train.py) with three lines more."""

import torch
import torchvision
from torch import Tensor, nn

import mvsc

CLASSES = 21


def criterion(inputs: dict[str, Tensor], target: Tensor) -> Tensor:
    losses = {
        k: nn.functional.cross_entropy(x, target, ignore_index=255) for k, x in inputs.items()
    }
    return losses["out"] + 0.5 * losses["aux"]


def train_one_epoch(model, reg, optimizer, data_loader, lr_scheduler, device) -> None:
    model.train()
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        output = model(image)
        loss = criterion(output, target) + reg(target)  # 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        print(f"loss {loss.item():.3f} lr {optimizer.param_groups[0]['lr']:.4f}")


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, labels = (3, 64, 64), torch.randint(0, CLASSES, (4, 64, 64))
    dataset = torch.utils.data.TensorDataset(torch.randn(4, *size), labels)
    data_loader = torch.utils.data.DataLoader(dataset, batch_size=2, drop_last=True)

    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True
    ).to(device)
    reg = mvsc.attach(model)  # 1
    lr = 0.01
    params_to_optimize = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad]},
        {"params": [p for p in model.classifier.parameters() if p.requires_grad]},
        {
            "params": [p for p in model.aux_classifier.parameters() if p.requires_grad],
            "lr": lr * 10,
        },
        reg.param_group(),  # 2
    ]
    optimizer = torch.optim.SGD(params_to_optimize, lr=lr, momentum=0.9, weight_decay=1e-4)
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, len(data_loader), power=0.9)
    train_one_epoch(model, reg, optimizer, data_loader, lr_scheduler, device)
    return reg


if __name__ == "__main__":
    main()
