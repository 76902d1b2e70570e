"""The recipes on real images in the published layouts, which are no part of the tree.

Run where MVSC_REAL_DATA names a folder that holds cocostuff_sample/{10k,164k} and ade20k_sample.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import predict
import prepare_data
import train
import visualize
from recipes import Recipe

FOLDER = Path(os.environ.get("MVSC_REAL_DATA", "none"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs MVSC_REAL_DATA")
SAMPLES = {
    "cocostuff10k": (FOLDER / "cocostuff_sample" / "10k", 13, 8),
    "cocostuff164k": (FOLDER / "cocostuff_sample" / "164k", 13, 8),
    "ade20k": (FOLDER / "ade20k_sample", 2, 1),
}


@pytest.mark.parametrize("layout", SAMPLES)
def test_a_check_finds_nothing_but_that_a_sample_lacks_classes(layout, capsys):
    root, *counts = SAMPLES[layout]
    settings = prepare_data.Settings(layout, root, check=True)
    assert prepare_data.main(settings) == 1
    lines = capsys.readouterr().out.splitlines()
    published = data.DATA_SETS[layout].published
    for line, split, count in zip(lines, ("train", "val"), counts, strict=False):
        assert line == f"{split}: {count} images, of {published[split]} published"
    assert "must show every class" in lines[-2]


def test_both_layouts_of_coco_stuff_hold_the_same_labels():
    found = [data.open_split(name, SAMPLES[name][0], "train") for name in list(SAMPLES)[:2]]
    first, second = ({pair[0].stem[-12:]: i for i, pair in enumerate(each.pairs)} for each in found)
    assert first.keys() == second.keys()
    for stem, i in first.items():
        for ours, theirs in zip(found[0][i], found[1][second[stem]], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("layout", SAMPLES)
def test_a_run_is_trained_evaluated_and_drawn(layout, tmp_path, capsys):
    root, *_ = SAMPLES[layout]
    recipe = Recipe(
        data_root=root,
        layout=layout,
        out=tmp_path / "run",
        model="smp/Segformer/tu-test_resnet",
        decoder_dim=16,
        pretrained=False,
        steps=2,
        batch_size=2,
        scale=(256, 128),
        crop=(128, 128),
        workers=0,
        cpu=True,
    )
    scores = train.train(recipe)
    weights = tmp_path / "run" / "last.safetensors"
    evaluate.main(evaluate.Settings(weights, workers=0, device="cpu"))
    assert f"mIoU {scores['mIoU']:.2f}" in capsys.readouterr().out
    image = data.open_split(layout, root, "val").pairs[0][0]
    predict.main(predict.Settings(weights, (image,), out=tmp_path / "out", device="cpu"))
    with Image.open(image) as photo, Image.open(tmp_path / f"out/{image.stem}_mask.png") as mask:
        assert mask.size == photo.size
        assert np.array(mask).max() < len(scores["iou"])
    visualize.main(visualize.Settings(weights, count=1, device="cpu"))
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
