"""Every error at the public door: what is named, what must hold, what came, and the remedy."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from mvsc import MVSCRegularizer, diagnostics, segment_mean

FEATURES = torch.zeros(2, 6, 4, 4)
LABELS = torch.zeros(2, 8, 8, dtype=torch.int64)
HEAD = nn.Conv2d(6, 5, 1)


def call(features=FEATURES, labels=LABELS, classifier=HEAD, **options):
    return MVSCRegularizer(5, 6, **options)(features, labels, classifier)


@pytest.mark.parametrize("name", ["num_classes", "dim", "groups"])
def test_sizes_are_positive_whole_numbers(name):
    sizes = {"num_classes": 5, "dim": 6, "groups": 4}
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            MVSCRegularizer(**{**sizes, name: value})
    for value in (2.0, "4", None, True, np.float64(3), np.bool_(True)):
        with pytest.raises(TypeError, match=f"{name} must be an int, got .*whole number"):
            MVSCRegularizer(**{**sizes, name: value})
    with pytest.raises(
        TypeError, match=rf"{name} must be an int, got int64.*\. Use int\({name}\)\."
    ):
        MVSCRegularizer(**{**sizes, name: np.int64(3)})


def test_one_class_is_refused_since_nothing_would_be_learned():
    with pytest.raises(ValueError, match=r"at least 2, got 1. One logit .* with num_classes=2\."):
        MVSCRegularizer(1, 6)


def test_the_temperature_is_above_zero():
    for value in (0, -0.1):
        with pytest.raises(
            ValueError, match=f"temperature must be at least 1e-30, got {value}. The pap"
        ):
            MVSCRegularizer(5, 6, temperature=value)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be finite"):
            MVSCRegularizer(5, 6, temperature=value)
    for single in (np.float32(0.1), np.float64(0.1), np.int64(1), torch.tensor(0.1)):
        with pytest.raises(TypeError, match=r"Use float\(temperature\)"):
            MVSCRegularizer(3, 8, temperature=single)
    with pytest.raises(TypeError, match="temperature must be a number, got str 'warm'"):
        MVSCRegularizer(5, 6, temperature="warm")


@pytest.mark.parametrize("name", ["align_weight", "pull_weight", "classify_weight"])
def test_weights_are_not_negative(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1. Use 0 to switch"):
        MVSCRegularizer(5, 6, **{name: -1})
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        MVSCRegularizer(5, 6, **{name: float("nan")})
    with pytest.raises(TypeError, match=f"{name} must be a number, got list"):
        MVSCRegularizer(5, 6, **{name: [1]})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("call", [segment_mean, diagnostics.cell_means])
def test_features_that_are_not_dense_or_too_narrow_are_named(call):
    labels = torch.zeros(2, 3, 3, dtype=torch.long)
    dense = torch.randn(2, 4, 3, 3)
    for features, word in (
        (dense.to_sparse(), r"got a torch\.sparse_coo one\. Use features\.to_dense"),
        (torch.nested.nested_tensor([*dense]), "got a nested one"),
        (dense.to(torch.float8_e4m3fn), r"16 bits or more, got torch\.float8.*\.bfloat16"),
    ):
        with pytest.raises(TypeError, match=f"features must .*{word}"):
            call(features, labels, 5)


def test_a_volume_without_a_batch_is_told_to_get_one():
    with pytest.raises(ValueError, match=r"one volume alone use volumes\.unsqueeze\(0\)"):
        MVSCRegularizer(5, 6)(
            torch.randn(6, 2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long), nn.Conv3d(6, 5, 1)
        )


def test_choices_are_named():
    with pytest.raises(ValueError, match="align_to must be 'global' or 'group', got 'class'"):
        MVSCRegularizer(5, 6, align_to="class")
    with pytest.raises(TypeError, match=r"process_group must be a .*ProcessGroup, got int\. Of a"):
        MVSCRegularizer(5, 6, process_group=2)
    with pytest.raises(ValueError, match="sync must be 'auto' or False, got 'never'"):
        MVSCRegularizer(5, 6, sync="never")
    with pytest.raises(ValueError, match="enhance must be True or False, got 'yes'"):
        MVSCRegularizer(5, 6, enhance="yes")
    with pytest.raises(TypeError, match="ignore_index must be an int, got str '255'"):
        MVSCRegularizer(5, 6, ignore_index="255")
    with pytest.raises(TypeError, match="seed must be an int, got float 0.5"):
        MVSCRegularizer(5, 6, seed=0.5)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([1.0], TypeError, r"features must be a floating-point tensor, got list \[1.0\]"),
        (LABELS, TypeError, r"features must be a floating-point tensor, got torch.int64. Pass the"),
        (torch.zeros(2, 16, 6), ValueError, r"got \(2, 16, 6\). Pass channels_last=True if"),
        (torch.zeros(6, 4), ValueError, r"features must have shape \(batch, dim, \*spatial\)"),
        (torch.zeros(2, 6, 4, 4, 4, 4), ValueError, r"one to three spatial axes, got \(2, 6, 4"),
        (torch.zeros(2, 6, 0, 4), ValueError, r"one channel and one place in each spatial axis"),
        (torch.zeros(2, 9, 4, 4), ValueError, r"dim=6, got \(2, 9, 4, 4\). Build .* with dim=9 or"),
        (torch.zeros(2, 6, 4, 4, device="meta"), ValueError, r"device of the centroids, cpu, got"),
    ],
)
def test_wrong_features_are_named_with_the_remedy(features, error, message):
    with pytest.raises(error, match=message):
        call(features=features)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0], TypeError, r"labels must be an integer tensor of class indices, got list \[0\]"),
        (LABELS[0].numpy(), TypeError, r"got ndarray. Use torch.as_tensor\(np.array\(labels\)\)\."),
        (None, TypeError, r"got NoneType None. Pass the label map of the batch\."),
        (LABELS.float(), TypeError, r"got torch.float32. Use labels.long\(\)"),
        (LABELS.bool(), TypeError, r"got torch.bool. Use labels.long\(\)"),
        (LABELS.unsqueeze(1), ValueError, r"got \(2, 1, 8, 8\). Use labels.squeeze\(1\)"),
        (LABELS.unsqueeze(3), ValueError, r"got \(2, 8, 8, 1\). Use labels.squeeze\(-1\)"),
        (LABELS[0], ValueError, r"got \(8, 8\). Pass one class index for each pixel"),
        (LABELS[0, 0], ValueError, r"got \(8,\). Pass one class index for each pixel"),
        (LABELS[:1], ValueError, r"batch size of the features, 2, got 1. Pass the labels of the"),
        (LABELS[:, :0], ValueError, r"at least one place in each axis, got \(2, 0, 8\)"),
        (LABELS.to("meta"), ValueError, r"device of the features, cpu, got meta. Use labels.to"),
    ],
)
def test_wrong_labels_are_named_with_the_remedy(labels, error, message):
    with pytest.raises(error, match=message):
        call(labels=labels)


def test_a_number_that_often_means_unlabelled_is_named_with_the_line():
    for mark, options in ((-100, {}), (255, {"ignore_index": -100})):
        line = rf"attach\(model, ignore_index={mark}\) or .*\(\.\.\., ignore_index={mark}\)\.$"
        with pytest.raises(ValueError, match=line):
            call(labels=torch.where(LABELS < 9, mark, LABELS), **options)
    both = torch.tensor([[-100, 255], [0, 1]]).expand(2, 2, 2)
    for ignored, other, kept in ((7, 255, -100), (255, -100, 255), (-100, 255, -100)):
        line = f"labels.masked_fill(labels == {other}, {kept}) with ignore_index={kept}."
        with pytest.raises(ValueError, match=rf"If .* mark .* pass {re.escape(line)}$"):
            call(labels=both, ignore_index=ignored)
        call(labels=both.masked_fill(both == other, kept), ignore_index=kept)
    two = MVSCRegularizer(2, 6, ignore_index=-100)
    with pytest.raises(ValueError, match=r"For a mask of 0 and 255 pass labels // 255\.$"):
        two(FEATURES, LABELS + 255, nn.Conv2d(6, 1, 1))


def test_labels_out_of_range_are_listed_with_the_usual_causes():
    labels = LABELS.clone()
    labels[0, 0, :3] = 5
    labels[1, 0, 0] = -1
    with pytest.raises(ValueError, match=r"0 \.\. 4 or ignore_index=255, got -1 \(1 px\), 5 \(3 p"):
        call(labels=labels)
    with pytest.raises(ValueError, match="reduce_zero_label.*num_classes.*ignore_index"):
        call(labels=labels)
    with pytest.raises(ValueError, match="got 10 .* and 5 more values"):
        call(labels=torch.arange(10, 20).reshape(1, 2, 5).expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"14 \(2 px\)\. The usual"):
        call(labels=torch.arange(10, 15).expand(2, 2, -1).contiguous()[:, :1])


def test_a_wrong_label_that_the_grid_does_not_sample_is_found_too():
    labels = LABELS.clone()
    labels[0, 0, 0] = 99  # each 2 x 2 block is sampled at its last pixel
    with pytest.raises(ValueError, match=r"got 99 \(1 px\)"):
        call(labels=labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_labels_are_widened_before_they_are_compared(dtype):
    # uint8 == -100 is true for class 156, which would then silently vanish.
    labels = torch.full((1, 4, 4), 156).to(dtype)
    reg = MVSCRegularizer(171, 6, ignore_index=-100)
    terms = reg.terms(FEATURES[:1], labels, nn.Conv2d(6, 171, 1))
    assert terms.classify > 0


@pytest.mark.parametrize(
    ("classifier", "error", "message"),
    [
        ("head", TypeError, r"classifier must be the model's last layer, .* got str 'head'"),
        (nn.Conv2d(6, 7, 1), ValueError, r"return num_classes=5 logits, got 7. Build .*_classes=7"),
        (nn.Conv2d(9, 5, 1), ValueError, r"take dim=6 features, got one that takes 9"),
        (nn.Linear(6, 7), ValueError, r"return num_classes=5 logits, got 7"),
        (nn.Conv2d(12, 5, 1, groups=1), ValueError, r"takes 12"),
        (nn.Sequential(nn.Conv2d(6, 7, 1)), ValueError, r"return num_classes=5 logits, got 7"),
        (lambda v: v, ValueError, r"return num_classes=5 logits, got 6"),
        (lambda v: v[:, :5].sum(0), ValueError, r"to \(20, 5, 1, 1\), got \(5, 1, 1\)"),
        (
            lambda v: v[:, :5].repeat(1, 1, 4, 4),
            ValueError,
            r"without upsampling; where a PixelSh.*auxiliary 1x1",
        ),
        (lambda v: (v,), TypeError, r"classifier must return a tensor of logits, got tuple"),
    ],
)
def test_wrong_classifiers_are_named_with_the_remedy(classifier, error, message):
    with pytest.raises(error, match=message):
        call(classifier=classifier)


def test_a_failed_call_is_not_a_step():
    reg = MVSCRegularizer(5, 6)
    with pytest.raises(ValueError, match="labels"):
        reg(FEATURES, LABELS[:1], HEAD)
    assert reg.step.item() == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0, "temperature must be at least 1e-30"),
        ("align_weight", -1, "align_weight must be at least 0"),
        ("align_to", "own", "align_to must be 'global' or 'group'"),
        ("grid_label", "common", "grid_label must be 'centre' or 'commonest'"),
        ("groups", 2, "num_classes, dim, groups must stay what they were"),
    ],
)
def test_a_setting_that_is_changed_later_is_checked_too(name, value, message):
    reg = MVSCRegularizer(5, 6)
    setattr(reg, name, value)
    with pytest.raises(ValueError, match=message):
        reg(FEATURES, LABELS, HEAD)
    assert reg.step.item() == 0


@pytest.mark.parametrize("name", ["align_weight", "pull_weight", "classify_weight"])
@pytest.mark.parametrize("value", [None, "0.1"])
def test_a_weight_that_is_no_number_later_is_named(name, value):
    reg = MVSCRegularizer(5, 6)
    setattr(reg, name, value)
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        reg(FEATURES, LABELS, HEAD)
