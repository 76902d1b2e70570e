"""Trainers that need data on disk: nnU-Net's and ultralytics', on data made here."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mvsc

EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def nnunet_plans(axes):
    """Write plans by hand, as nnU-Net's planner would for a tiny data set."""
    settings = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [[3] * axes] * 3,
        "strides": [[1] * axes, [2] * axes, [2] * axes],
        "n_conv_per_stage": [1] * 3,
        "n_conv_per_stage_decoder": [1] * 2,
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": settings,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {
        f"resampling_fn_{what}{end}": value
        for what in ("data", "seg", "probabilities")
        for end, value in (("", "resample_data_or_seg_to_shape"), ("_kwargs", {}))
    }
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * axes,
        "median_image_size_in_voxels": [16] * axes,
        "spacing": [1] * axes,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": architecture,
        **resampling,
    }
    plans = {
        "dataset_name": "Dataset001_x",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "x",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "continue_training": False,
        "configurations": {"mine": configuration},
    }
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    return plans, dataset


@pytest.mark.parametrize("axes", [2, 3])
def test_nnunets_trainer_trains_saves_and_loads_the_centroids(axes, example, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name / "Dataset001_x").mkdir(parents=True)
    trainers = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    monkeypatch.setattr(trainers, "infer_dataset_class", lambda folder: None)  # no files
    trainer_class = example("nnunet_trainer").nnUNetTrainerMVSC
    plans, dataset = nnunet_plans(axes)

    def make():
        return trainer_class(copy.deepcopy(plans), "mine", 0, dataset, torch.device("cpu"))

    trainer = make()
    trainer.initialize()
    reg = trainer.mvsc.regularizer
    assert trainer.mvsc.classifier_path == "decoder.seg_layers.1"
    assert (reg.num_classes, reg.ignore_index) == (3, 3)
    size, half = [16] * axes, [8] * axes
    target = [torch.randint(0, 4, (2, 1, *s)).to(torch.int16) for s in (size, half)]
    batch = {"data": torch.randn(2, 1, *size), "target": target}
    drawn = reg.centroids.detach().clone()
    trainer.network.train()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(2)]
    assert losses[1] < losses[0]
    assert not torch.equal(reg.centroids, drawn)
    assert trainer.optimizer.param_groups[-1]["weight_decay"] == 0

    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(batch)
    assert reg.step == 2
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed = make()
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert torch.equal(resumed.mvsc.regularizer.centroids, reg.centroids)
    assert resumed.mvsc.regularizer.step == 2
    resumed.network.train()
    trainer.network.train()
    assert resumed.train_step(batch) == trainer.train_step(batch)


def test_ultralytics_trainer_trains_and_its_checkpoint_needs_no_mvsc(
    example, tmp_path, monkeypatch
):
    pytest.importorskip("ultralytics")
    from PIL import Image

    monkeypatch.setenv("YOLO_OFFLINE", "1")
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(4):
            mask = np.zeros((64, 64), np.uint8)
            mask[8:40, 10 + number : 40], mask[40:60, 30:60], mask[:4] = 1, 2, 255
            shades = generator.random((64, 64, 3)) * 60 + mask[..., None] % 3 * 60
            Image.fromarray(shades.astype(np.uint8)).save(f"{tmp_path}/images/{part}/{number}.png")
            Image.fromarray(mask).save(f"{tmp_path}/masks/{part}/{number}.png")
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nmasks_dir: masks\n"
        "names: {0: a, 1: b, 2: c}\n"
    )
    settings = {
        "model": "yolo26n-sem.yaml",
        "data": str(tmp_path / "data.yaml"),
        "epochs": 1,
        "imgsz": 64,
        "batch": 2,
        "device": "cpu",
        "workers": 0,
        "amp": False,
        "plots": False,
        "project": str(tmp_path / "runs"),
        "optimizer": "SGD",
    }
    trainer = example("ultralytics_trainer").MVSCTrainer(overrides=settings)
    trainer.train()
    reg = trainer.mvsc.regularizer
    assert reg.step == 2
    assert not torch.equal(reg.centroids, mvsc.MVSCRegularizer(3, reg.dim).centroids)
    code = (
        "import sys, torch; sys.modules['mvsc'] = None; "
        f"torch.load({str(trainer.best)!r}, weights_only=False)['model' and 'ema']"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
