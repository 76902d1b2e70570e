"""MONAI, volumes: trained on patches, predicted by a window that slides over the whole volume."""

from typing import Any

import torch
from monai.data import DataLoader, Dataset, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet
from monai.transforms import EnsureChannelFirstd, RandSpatialCropSamplesd
from monai.transforms.compose import Compose

import mvsc

CLASSES, PATCH = 4, 16


def volumes(count: int, side: int = 24) -> list[dict[str, Any]]:
    labels = torch.randint(0, CLASSES, (count, side, side, side), dtype=torch.uint8)
    return [{"image": y + 0.3 * torch.randn(y.shape), "label": y} for y in labels]


def main() -> mvsc.AttachedRegularizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = ["image", "label"]
    patches = Compose(
        [
            EnsureChannelFirstd(keys, channel_dim="no_channel"),
            RandSpatialCropSamplesd(keys, roi_size=[PATCH] * 3, num_samples=2, random_size=False),
        ]
    )
    loader = DataLoader(Dataset(volumes(2), patches), batch_size=1, collate_fn=list_data_collate)
    model = SegResNet(spatial_dims=3, init_filters=8, out_channels=CLASSES).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)

    reg = mvsc.attach(model, groups=4)
    optimizer.add_param_group(reg.param_group())

    model.train()
    for batch in loader:
        images, labels = batch["image"].to(device), batch["label"].to(device)
        logits = model(images)
        # MONAI's labels have an axis of channels, and are float after some transforms.
        loss = criterion(logits, labels) + reg(labels.squeeze(1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")

    model.eval()
    volume = volumes(1)[0]["image"][None, None].to(device)
    with torch.no_grad():
        logits = sliding_window_inference(volume, [PATCH] * 3, sw_batch_size=2, predictor=model)
    print(f"prediction of {tuple(logits.argmax(1).shape)}")
    return reg


if __name__ == "__main__":
    main()
