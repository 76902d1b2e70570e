"""The integration with MMSegmentation, run by its own Runner on the shipped configs.

mmseg needs old pins of its own, so it is no part of the extra `test`: these tests run where
examples/integrations/mmseg/requirements.txt is installed.
"""

import copy
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmengine", reason="needs examples/integrations/mmseg/requirements.txt")
warnings.simplefilter("ignore")  # Hosts of these pins warn as they are imported, and later.
pytestmark = pytest.mark.filterwarnings("ignore")

from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.model import MMDistributedDataParallel
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmengine.utils.dl_utils import mmcv_full_available
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mvsc import MVSCRegularizer
from mvsc.integrations.mmseg import MVSCEncoderDecoder

EXAMPLE = Path(__file__).parents[1] / "examples/integrations/mmseg"
CONFIGS = EXAMPLE / "configs"
SEGFORMER_B0_ADE20K = "mvsc_segformer_mit-b0_1xb16-20k_ade20k-512x512.py"
SEGFORMER_B4_COCO = "mvsc_segformer_mit-b4_1xb16-80k_coco-stuff10k-512x512.py"
DEEPLAB_COCO = "mvsc_deeplabv3plus_r50-d8_1xb16-80k_coco-stuff10k-512x512.py"
ALL = [SEGFORMER_B0_ADE20K, SEGFORMER_B4_COCO, DEEPLAB_COCO]
BASE = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
README_BLOCKS = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
TERMS = ["mvsc.loss_align", "mvsc.loss_pull", "mvsc.loss_classify"]


@pytest.fixture(autouse=True)
def mmseg_scope() -> None:
    init_default_scope("mmseg")


def write_images(config: Config, size: tuple[int, int] = (48, 64)) -> None:
    """Make a few images where the config looks for its data set."""
    rng = np.random.default_rng(0)
    for loader, count in ((config.train_dataloader, 4), (config.val_dataloader, 2)):
        data = loader.dataset
        suffix = "_labelTrainIds.png" if data.type == "COCOStuffDataset" else ".png"
        classes = config.model.decode_head.num_classes
        for prefix in data.data_prefix.values():
            (Path(data.data_root) / prefix).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            # 0 is 'no class' in the files of both data sets; here it is the upper left corner.
            labels = rng.integers(0, classes + 1, (6, 8), dtype=np.uint8)
            labels[0, 0], labels[-1, -1] = 0, classes
            labels = labels.repeat(8, axis=0).repeat(8, axis=1)
            root = Path(data.data_root)
            Image.fromarray(image).save(root / data.data_prefix.img_path / f"{index}.jpg")
            Image.fromarray(labels).save(root / data.data_prefix.seg_map_path / f"{index}{suffix}")


def shrunk(name: str | Path) -> Config:
    """Load a shipped config and make it small enough for a CPU: nothing else is changed."""
    config = Config.fromfile(CONFIGS / name)
    model = config.model
    model.data_preprocessor.size = (32, 32)
    model.pretrained = model.backbone.init_cfg = None
    model.decode_head.channels = 16
    if model.backbone.type == "MixVisionTransformer":
        model.backbone.update(embed_dims=8, num_layers=[1, 1, 1, 1])
        model.decode_head.in_channels = [8, 16, 40, 64]
    else:
        model.backbone.base_channels = 4
        model.decode_head.update(in_channels=128, c1_in_channels=16, c1_channels=4)
        model.auxiliary_head.update(in_channels=64, channels=8)
    for transform in config.train_dataloader.dataset.pipeline:
        if transform.type == "RandomResize":
            transform.scale = (64, 48)
        if transform.type == "RandomCrop":
            transform.crop_size = (32, 32)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        for transform in loader.dataset.pipeline:
            if transform.type == "Resize":
                transform.scale = (64, 48)
    config.train_dataloader.batch_size = 2
    if len(config.param_scheduler) == 2:
        # The second iteration has the full rate already, not one that float32 rounds away.
        config.param_scheduler[0].end = config.param_scheduler[1].begin = 2
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint.interval = 2
    config.default_hooks.logger.interval = 1
    config.env_cfg.dist_cfg.backend = "gloo"
    config.randomness = {"seed": 0}
    return config


def build(model: ConfigDict) -> MVSCEncoderDecoder:
    built = MODELS.build(copy.deepcopy(model))
    built.init_weights()
    return revert_sync_batchnorm(built)


def plain(model: ConfigDict) -> torch.nn.Module:
    """Build the same model as mmseg does without mvsc."""
    model = copy.deepcopy(model)
    model.type = "EncoderDecoder"
    del model.mvsc
    return build(model)


def batch(classes: int, size: int = 32) -> tuple[torch.Tensor, list[SegDataSample]]:
    images = torch.randn(2, 3, size, size)
    samples = []
    for labels in torch.randint(0, classes, (2, 1, size, size)):
        labels[:, :4] = 255
        samples.append(SegDataSample(metainfo={"img_shape": (size, size)}))
        samples[-1].set_data({"gt_sem_seg": PixelData(data=labels)})
    return images, samples


@pytest.fixture(scope="module", params=ALL)
def run(request: Any, tmp_path_factory: Any) -> SimpleNamespace:
    """Train a shipped config for two iterations, with validation and a checkpoint."""
    folder = tmp_path_factory.mktemp("mmseg")
    config = shrunk(request.param)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(folder / loader.dataset.data_root)
    write_images(config)
    config.work_dir = str(folder / "work")
    config.visualizer.name = request.param  # There is one for each name in a process.
    runner = Runner.from_cfg(config)
    before = runner.model.mvsc_head.centroids.detach().clone()
    runner.train()
    (scalars,) = Path(runner.log_dir).glob("vis_data/scalars.json")
    log = [json.loads(line) for line in scalars.read_text().splitlines()]
    return SimpleNamespace(
        config=config,
        runner=runner,
        before=before,
        train=[line for line in log if "loss" in line],
        validation=[line for line in log if "mIoU" in line],
        checkpoint=Path(config.work_dir) / "iter_2.pth",
    )


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=False)["state_dict"]
    return state


def test_the_runner_trains_validates_and_saves(run: SimpleNamespace) -> None:
    assert [line["iter"] for line in run.train] == [1, 2]
    assert len(run.validation) == 1
    assert run.checkpoint.exists()


def test_the_terms_are_logged_one_by_one_and_are_part_of_the_loss(run: SimpleNamespace) -> None:
    for line in run.train:
        assert set(TERMS) <= set(line)
        assert all(line[term] > 0 for term in TERMS)
        parts = [value for key, value in line.items() if "loss_" in key]
        assert_close(sum(parts), line["loss"], rtol=1e-4, atol=1e-4)


def test_classes_and_width_come_from_the_head(run: SimpleNamespace) -> None:
    classes = run.config.model.decode_head.num_classes
    assert classes == (150 if "ADE" in run.config.train_dataloader.dataset.type else 171)
    assert run.runner.model.mvsc_head.centroids.shape == (4, classes, 16)


def test_centroids_learn_like_the_head_and_do_not_decay(run: SimpleNamespace) -> None:
    model = run.runner.model
    groups = run.runner.optim_wrapper.param_groups

    def group_of(parameter: torch.Tensor) -> dict[str, Any]:
        (found,) = [group for group in groups if any(p is parameter for p in group["params"])]
        return found

    centroids = group_of(model.mvsc_head.centroids)
    assert centroids["lr"] == group_of(model.decode_head.conv_seg.weight)["lr"]
    assert centroids["weight_decay"] == 0
    assert group_of(model.decode_head.conv_seg.weight)["weight_decay"] > 0


def test_centroids_move_and_are_in_the_checkpoint(run: SimpleNamespace) -> None:
    state = load(run.checkpoint)
    assert_close(state["mvsc_head.centroids"], run.runner.model.mvsc_head.centroids.detach())
    assert state["mvsc_head.step"] == 2
    assert not torch.equal(state["mvsc_head.centroids"], run.before)


def test_a_plain_encoder_decoder_predicts_the_same_bits_from_the_checkpoint(
    run: SimpleNamespace,
) -> None:
    model = plain(run.config.model)
    keys = model.load_state_dict(load(run.checkpoint), strict=False)
    assert keys.missing_keys == []
    assert sorted(keys.unexpected_keys) == ["mvsc_head.centroids", "mvsc_head.step"]
    images, _ = batch(classes=3)
    with torch.no_grad():
        expected = model.eval()(images, mode="tensor")
        assert_close(run.runner.model.eval()(images, mode="tensor"), expected, rtol=0, atol=0)


def test_the_runner_resumes_centroids_and_step(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmengine 0.10.7 reads its own checkpoints with torch.load, which refuses them by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = copy.deepcopy(run.config)
    config.resume = True
    config.train_cfg.update(max_iters=4, val_interval=4)
    config.default_hooks.checkpoint.interval = 4
    config.experiment_name = "resumed"
    runner = Runner.from_cfg(config)
    runner.load_or_resume()
    first = load(run.checkpoint)["mvsc_head.centroids"]
    assert_close(runner.model.mvsc_head.centroids.detach(), first, rtol=0, atol=0)
    assert runner.model.mvsc_head.step == 2
    runner.train()
    assert runner.iter == 4
    state = load(Path(config.work_dir) / "iter_4.pth")
    assert state["mvsc_head.step"] == 4
    assert not torch.equal(state["mvsc_head.centroids"], first)


@pytest.mark.parametrize("name", ALL)
def test_the_model_starts_with_the_weights_of_the_plain_one(name: str) -> None:
    config = shrunk(name).model
    torch.manual_seed(0)
    expected = plain(config).state_dict()
    torch.manual_seed(0)
    state = build(config).state_dict()
    assert_close({key: state[key] for key in expected}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("lines", [2, 3])
def test_the_lines_of_the_readme_turn_a_config_of_mmseg_into_one_with_centroids(
    tmp_path: Path, lines: int
) -> None:
    written = README_BLOCKS[0] if lines == 3 else README_BLOCKS[0].partition("optim_wrapper")[0]
    (tmp_path / "config.py").write_text(f"_base_ = {BASE!r}\n{written}")
    config = shrunk(tmp_path / "config.py")
    model = build(config.model)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    (group,) = [g for g in wrapper.param_groups if g["params"][0] is model.mvsc_head.centroids]
    head = config.optim_wrapper.paramwise_cfg.custom_keys["head"]
    assert group["lr"] == head.lr_mult * config.optim_wrapper.optimizer.lr
    assert group["weight_decay"] == (
        0 if lines == 3 else config.optim_wrapper.optimizer.weight_decay
    )
    assert set(TERMS) <= set(model.loss(*batch(classes=150)))


def test_the_readme_makes_a_file_that_needs_no_mvsc(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("iter_20000.pth").symlink_to(run.checkpoint)
    exec(README_BLOCKS[1])
    checkpoint = torch.load("model.pth", weights_only=True)
    assert len(checkpoint["meta"]["dataset_meta"]["classes"]) in (150, 171)
    plain(run.config.model).load_state_dict(checkpoint["state_dict"], strict=True)


def spy_on_terms(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record what the regularizer gets, and call it."""
    calls: list[tuple[Any, ...]] = []
    terms = model.mvsc_head.terms

    def recorded(*args: Any) -> Any:
        calls.append(args)
        return terms(*args)

    monkeypatch.setattr(model.mvsc_head, "terms", recorded)
    return calls


def test_the_tap_is_what_conv_seg_reads_before_its_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.decode_head.dropout_ratio = 0.5
    model = build(config).train()
    calls = spy_on_terms(model, monkeypatch)
    read: list[torch.Tensor] = []
    model.decode_head.conv_seg.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    images, samples = batch(classes=150)
    model.loss(images, samples)
    ((features, labels, classifier),) = calls
    assert classifier is model.decode_head.conv_seg
    assert labels.tolist() == [sample.gt_sem_seg.data[0].tolist() for sample in samples]
    dropped = read[0]
    kept = dropped.flatten(2).abs().sum(2, keepdim=True).unsqueeze(3) > 0
    assert 0 < kept.sum() < kept.numel()
    assert_close(dropped, torch.where(kept, features * 2, 0))


def test_the_loss_is_that_of_the_regularizer_on_the_same_draws() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.mvsc = {"groups": 2, "align_weight": 0.3, "classify_weight": 0.2}
    config.decode_head.dropout_ratio = 0
    config.backbone.drop_path_rate = 0
    model = build(config).train()
    images, samples = batch(classes=150)
    read: list[torch.Tensor] = []
    model.decode_head.conv_seg.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    losses = model.loss(images, samples)
    reg = MVSCRegularizer(150, 16, groups=2, align_weight=0.3, classify_weight=0.2)
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in samples])
    expected = reg(read[0], labels, model.decode_head.conv_seg)
    assert_close(sum(losses[term] for term in TERMS), expected)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.mvsc = {"pull_weight": 0}
    losses = build(config).train().loss(*batch(classes=150))
    assert [key for key in losses if key.startswith("mvsc")] == [TERMS[0], TERMS[2]]


def test_without_options_the_regularizer_has_the_values_of_the_paper() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    del config.mvsc
    reg = build(config).mvsc_head
    assert (reg.groups, reg.align_weight, reg.pull_weight, reg.classify_weight) == (4, 0.1, 1, 0.05)


def test_ignore_index_comes_from_the_head_unless_given() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.decode_head.ignore_index = 7
    assert build(config).mvsc_head.ignore_index == 7
    config.mvsc = {"ignore_index": 255}
    assert build(config).mvsc_head.ignore_index == 255


def test_the_model_can_be_copied_after_a_loss_and_the_copy_is_its_own() -> None:
    model = build(shrunk(SEGFORMER_B0_ADE20K).model).train()
    images, samples = batch(classes=150)
    model.loss(images, samples)
    teacher = copy.deepcopy(model)
    teacher.loss(images, samples)
    assert (model.mvsc_head.step, teacher.mvsc_head.step) == (1, 2)
    assert "cls_seg" not in vars(model.decode_head)


def test_a_cascade_reads_its_last_head(monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_config("mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py").model
    config.type = "MVSCCascadeEncoderDecoder"
    config.pretrained = None
    config.backbone.update(depth=50, base_channels=4)
    fcn, ocr = config.decode_head
    fcn.update(in_channels=64, channels=8)
    ocr.update(in_channels=128, channels=16, ocr_channels=8)
    model = build(config).train()
    calls = spy_on_terms(model, monkeypatch)
    losses = model.loss(*batch(classes=19))
    assert calls[0][2] is model.decode_head[1].conv_seg
    assert set(TERMS) | {"decode_0.loss_ce", "decode_1.loss_ce"} <= set(losses)


def train_on_a_rank(rank: int, folder: Path) -> None:
    init_default_scope("mmseg")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    config = shrunk(SEGFORMER_B0_ADE20K)
    torch.manual_seed(rank)
    model = MMDistributedDataParallel(build(config.model))
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    images, samples = batch(classes=150)
    for _ in range(2):
        model.train_step({"inputs": list(images), "data_samples": samples}, wrapper)
    torch.save(dict(model.module.named_parameters()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_in_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_a_rank, (tmp_path,), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_close(one, other, rtol=0, atol=0)
    start = build(shrunk(SEGFORMER_B0_ADE20K).model).mvsc_head.centroids
    assert not torch.equal(one["mvsc_head.centroids"], start)


def test_a_head_without_a_pixel_classifier_is_refused() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.decode_head = ConfigDict(
        type="SegmenterMaskTransformerHead",
        in_channels=64,
        channels=64,
        num_classes=5,
        num_layers=1,
        num_heads=1,
        embed_dims=64,
    )
    with pytest.raises(ValueError, match="one output for each of its 5 classes, got Segmenter"):
        build(config)


def test_a_sigmoid_classifier_for_two_classes_is_refused() -> None:
    config = shrunk(SEGFORMER_B0_ADE20K).model
    config.decode_head.update(num_classes=2, out_channels=1, threshold=0.5)
    with pytest.raises(ValueError, match=r"softmax for two classes too \(out_channels=2\)"):
        build(config)


def test_a_head_that_does_not_call_cls_seg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(shrunk(SEGFORMER_B0_ADE20K).model)
    conv_seg = model.decode_head.conv_seg
    monkeypatch.setattr(
        model.decode_head, "forward", lambda inputs: conv_seg(inputs[0].repeat(1, 2, 1, 1))
    )
    with pytest.raises(ValueError, match="call its cls_seg once in a forward, got 0 calls"):
        model.loss(*batch(classes=150))
    assert "cls_seg" not in vars(model.decode_head)


def test_features_without_a_gradient_are_refused() -> None:
    model = build(shrunk(SEGFORMER_B0_ADE20K).model).train()
    model.requires_grad_(False)
    model.decode_head.conv_seg.requires_grad_(True)
    with pytest.raises(ValueError, match="what enters cls_seg of SegformerHead must carry"):
        model.loss(*batch(classes=150))


@pytest.mark.skipif(mmcv_full_available(), reason="the real operators are installed")
def test_an_operator_that_mmcv_lite_lacks_says_what_to_install() -> None:
    from mmcv.ops import nms, point_sample

    assert point_sample(torch.ones(1, 1, 2, 2), torch.rand(1, 3, 2)).shape == (1, 1, 3)
    with pytest.raises(ImportError, match=r"nms is a compiled operator .* Install mmcv==2\.1\.0"):
        nms(torch.rand(3, 4), torch.rand(3), 0.5)
