"""Ray Train: two workers, each sees its own images once an epoch; a job that died goes on.

python examples/integrations/ray_train.py
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import ray.train
import segmentation_models_pytorch as smp
import torch
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mvsc

CLASSES = 21


def train(settings: dict[str, int]) -> None:
    model = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
    parallel = prepare_model(model)
    reg = mvsc.attach(parallel, optimizer="own")
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-4, weight_decay=0.01)
    parts = {"model": model, "optimizer": optimizer, "reg": reg}
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "state.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        first = saved["epoch"] + 1
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(0, CLASSES, (8, 64, 64))
    loader = prepare_data_loader(DataLoader(TensorDataset(images, labels), 2, shuffle=True))
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for epoch in range(first, settings["epochs"]):
        loader.sampler.set_epoch(epoch)
        for pictures, classes in loader:
            loss = criterion(parallel(pictures), classes) + reg(classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mvsc.assert_in_sync(reg)
        with TemporaryDirectory() as folder:
            saved = None
            if ray.train.get_context().get_world_rank() == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "epoch": epoch}, Path(folder) / "state.pt")
                saved = ray.train.Checkpoint.from_directory(folder)
            step = reg.regularizer.step.item()
            ray.train.report({"loss": loss.item(), "step": step}, checkpoint=saved)


def main(storage: str, epochs: int = 2) -> ray.train.Result:
    config = ray.train.RunConfig(name="mvsc", storage_path=storage)
    scaling = ray.train.ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available())
    settings = {"epochs": epochs}
    return TorchTrainer(
        train, train_loop_config=settings, scaling_config=scaling, run_config=config
    ).fit()


if __name__ == "__main__":
    print(main(sys.argv[1] if sys.argv[1:] else str(Path("runs").resolve())).metrics)
