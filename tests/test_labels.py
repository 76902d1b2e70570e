"""Each remedy of an error about labels, followed literally, ends in right labels."""

import ast
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from mvsc import MVSCRegularizer

CLASSES, DIM = 4, 8


def remedies(message: str) -> list[str]:
    """Return the expressions that a message says to use, the longest at each place."""
    assigned = re.search(r"(\w+) = (labels.*?) and ", message)
    text = message if assigned is None else message[assigned.end() :]
    found, place = [], 0
    while place < len(text):
        starts = re.match(r"\(+labels|labels|torch\.\w+\(", text[place:])
        ends = [m.end() for m in re.finditer(r"\)", text[place:])] if starts else []
        for end in reversed(ends):
            expression = text[place : place + end]
            if isinstance(parsed(expression), ast.Call):
                found.append(expression)
                place += end
                break
        else:
            place += 1
    if assigned is not None:
        found = [each.replace(assigned[1], f"({assigned[2]})") for each in found]
    return found


def parsed(expression: str) -> ast.AST | None:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError:
        return None


def ask(labels: object, grid=(8, 8), batch: int = 2, classes: int = CLASSES):
    """Return the error about labels, or None if they are taken."""
    classifier = (nn.Conv3d if len(grid) == 3 else nn.Conv2d)(DIM, classes, 1)
    reg = MVSCRegularizer(classes, DIM, 1)
    try:
        reg(torch.randn(batch, DIM, *grid), labels, classifier)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def follow(labels: object, **options) -> list[object]:
    """Follow all remedies, one after the other, until labels are taken or none is offered."""
    message = ask(labels, **options)
    if message is None:
        return [labels]
    ends: list[object] = []
    for expression in remedies(message):
        names = {"labels": labels, "torch": torch, "np": np, "ignore_index": 255}
        ends += follow(eval(expression, names), **options)
    return ends or [message]


def right(batch=2, size=(8, 8), classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, (batch, *size))


def test_the_remedies_of_a_message_are_found():
    found = remedies(
        "got x. Use (labels.squeeze(1) * 255).round().long(): ToTensor has divided. pil_to_tensor, "
        "or v2.PILToTensor, does not."
    )
    assert found == ["(labels.squeeze(1) * 255).round().long()"]
    found = remedies("For one-hot use labels.argmax(1) if second, labels.argmax(-1) if last: both.")
    assert found == ["labels.argmax(1)", "labels.argmax(-1)"]


FORMS = {
    "(B, H, W)": lambda y: y,
    "uint8": lambda y: y.byte(),
    "float": lambda y: y.float(),
    "half": lambda y: y.half(),
    "ToTensor": lambda y: y.byte().float() / 255,
    "ToTensor, half": lambda y: (y.byte().float() / 255).half(),
    "(B, 1, H, W)": lambda y: y[:, None],
    "(B, 1, H, W) float": lambda y: y[:, None].float(),
    "(B, 1, H, W) ToTensor": lambda y: y[:, None] / 255,
    "(B, H, W, 1)": lambda y: y[..., None],
    "(B, H, W, 1) float": lambda y: y[..., None].float(),
    "one-hot first": lambda y: F.one_hot(y, CLASSES).movedim(-1, 1),
    "one-hot last": lambda y: F.one_hot(y, CLASSES),
    "one-hot first, float": lambda y: F.one_hot(y, CLASSES).movedim(-1, 1).float(),
    "one-hot first, bool": lambda y: F.one_hot(y, CLASSES).movedim(-1, 1).bool(),
    "one-hot last, bool": lambda y: F.one_hot(y, CLASSES).bool(),
    "probabilities": lambda y: F.one_hot(y, CLASSES).movedim(-1, 1) * 0.6 + 0.1,
    "probabilities last": lambda y: F.one_hot(y, CLASSES) * 0.6 + 0.1,
    "probabilities, half": lambda y: (F.one_hot(y, CLASSES).movedim(-1, 1) * 0.6 + 0.1).half(),
    "an array": lambda y: y.numpy(),
    "a flipped array": lambda y: y.flip(-1).numpy()[..., ::-1],
    "PIL's pictures": lambda y: [Image.fromarray(each) for each in y.byte().numpy()],
    "a list": lambda y: y.tolist(),
    "a list of maps": lambda y: list(y),
    "a tuple of float maps": lambda y: tuple(y.float()),
    "one-hot first, 0 and 255": lambda y: F.one_hot(y, CLASSES).movedim(-1, 1).byte() * 255,
    "one-hot last, 0 and 255": lambda y: F.one_hot(y, CLASSES).float() * 255,
    "(B, N)": lambda y: y.flatten(1),
    "(B, N) float": lambda y: y.flatten(1).float(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(8, 8), (8, 6), (4, 4)])
def test_following_the_remedies_ends_in_the_right_labels_or_a_true_error(form, size):
    y = right(size=size)
    ends = follow(FORMS[form](y), grid=size)
    assert ends
    taken = [end for end in ends if isinstance(end, Tensor)]
    assert taken, ends
    # Where two layouts are possible both are offered, each with its condition.
    assert any(torch.equal(end.long(), y) for end in taken)
    if len(ends) == 1:
        assert torch.equal(taken[0].long(), y)


@pytest.mark.parametrize("form", ["one-hot first", "one-hot last", "one-hot first, bool"])
def test_one_hot_labels_of_a_square_as_wide_as_the_classes_are_told_apart(form):
    y = right(size=(4, 4))
    y[0, 0] = 0  # A row of one class: only one of the two readings is one-hot.
    y[0, :, 0] = 0
    (end,) = follow(FORMS[form](y), grid=(4, 4))
    assert torch.equal(end, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_pixels_of_several_or_no_classes_are_left_out(dtype):
    y = torch.rand(2, CLASSES, 8, 8) > 0.6
    one = y.sum(1) == 1
    (end,) = follow(y.to(dtype))
    assert torch.equal(end, torch.where(one, y.long().argmax(1), 255))
    assert not bool(one.all())


def test_one_hot_labels_with_void_pixels_stay_void():
    y = right()
    hot = F.one_hot(y, CLASSES).movedim(-1, 1)
    hot[:, :, :3] = 0  # As one-hot codes what has no class.
    (end,) = follow(hot)
    y[:, :3] = 255
    assert torch.equal(end, y)


@pytest.mark.parametrize("axis", [1, -1])
def test_void_pixels_of_one_hot_labels_stay_void_on_a_square_as_wide_as_the_classes(axis):
    y = right(size=(4, 4))
    y[0, 1:] = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [3, 3, 2, 2]])  # No other reading of it.
    hot = F.one_hot(y, CLASSES)
    hot[:, :1] = 0
    (end,) = follow(hot.movedim(-1, axis), grid=(4, 4))
    y[:, :1] = 255
    assert torch.equal(end, y)


def test_void_pixels_of_one_hot_labels_that_can_be_read_both_ways_are_asked_about():
    hot = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    hot[0, 0, 0, 0] = hot[0, 2, 1, 3] = 1
    first, last = follow(hot, grid=(4, 4), batch=1)
    assert (first[0, 0, 0], first[0, 1, 3], last[0, 0, 0], last[0, 2, 1]) == (0, 2, 0, 3)
    assert (first != 255).sum() == (last != 255).sum() == 2


@pytest.mark.parametrize("axis", [1, -1])
def test_void_pixels_of_one_hot_labels_stay_void_whichever_axis_the_classes_have(axis):
    y = right()
    hot = F.one_hot(y, CLASSES)
    hot[:, :3] = 0
    (end,) = follow(hot.movedim(-1, axis))
    y[:, :3] = 255
    assert torch.equal(end, y)


COLOURS = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 255], [255, 255, 0]])


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("form", [lambda y: y.byte(), lambda y: y / 255])
@pytest.mark.parametrize("colours", [COLOURS, COLOURS.roll(1, -1), 255 * torch.eye(3).long()])
def test_saturated_colours_are_not_a_channel_for_each_class(colours, form, axis):
    labels = form(colours[right() % len(colours)].movedim(-1, axis))
    assert "no axis with a channel for each of the 4 classes: colours" in ask(labels)
    assert follow(labels) == [ask(labels)]


def test_one_hot_labels_without_a_background_are_not_taken_for_the_first_classes():
    hot = F.one_hot(right(), CLASSES)[..., 1:].movedim(-1, 1)
    assert "channels of which the background has none" in ask(hot)
    assert remedies(ask(hot)) == []


def test_bfloat16_rounds_probabilities_whose_sum_is_still_one():
    y = right()
    noise = torch.rand(2, CLASSES, 8, 8)
    soft = (2 * F.one_hot(y, CLASSES).movedim(-1, 1) + noise).softmax(1).bfloat16()
    assert (soft.double().sum(1) - 1).abs().max() > 1e-3
    (end,) = follow(soft)
    assert torch.equal(end, y)


@pytest.mark.parametrize("form", [lambda y: y, lambda y: y[:, None]])
def test_nan_is_what_has_no_label(form):
    y = right().float()
    y[:, :2] = torch.nan
    (end,) = follow(form(y))
    assert torch.equal(end, y.nan_to_num(255).long())


def test_a_batch_of_background_does_not_show_whether_totensor_has_made_it():
    ends = follow(torch.zeros(2, 8, 8))
    assert len(ends) == 2
    assert "if ToTensor has made them: 0 does not show whether" in ask(torch.zeros(2, 8, 8))


@pytest.mark.parametrize(
    "form", ["float", "(B, 1, H, W)", "(B, 1, H, W) float", "one-hot first", "probabilities"]
)
def test_volumes_too(form):
    forms = FORMS | {"float": lambda y: y.float()}
    y = right(size=(4, 6, 5))
    assert all(torch.equal(end.long(), y) for end in follow(forms[form](y), grid=(4, 6, 5)))


def test_labels_of_0_and_255_through_totensor_are_not_silently_classes_0_and_1():
    y = torch.tensor([0, 255])[torch.randint(0, 2, (2, 8, 8))]
    classes, unlabelled = follow(y.byte().float() / 255)
    assert torch.equal(classes, y // 255)  # if 1 is a class
    assert torch.equal(unlabelled, y)


def test_one_hot_labels_of_a_sequence_of_another_size_are_no_map():
    y = torch.randint(0, CLASSES, (2, 64))
    reg, features = MVSCRegularizer(CLASSES, DIM, 1), torch.randn(2, DIM, 16)
    hot = F.one_hot(y, CLASSES)
    for labels, axis in ((hot.transpose(1, 2), 1), (hot, -1)):
        with pytest.raises(ValueError, match=rf"one-hot labels use labels.argmax\({axis}\)"):
            reg(features, labels, nn.Conv1d(DIM, CLASSES, 1))


@pytest.mark.parametrize("grid", [None, (14, 14)])
def test_tokens_that_come_sequence_first_are_to_be_turned(grid):
    reg, linear = MVSCRegularizer(CLASSES, DIM, 1), nn.Linear(DIM, CLASSES)
    tokens, labels = torch.randn(196, 2, DIM), torch.randint(0, CLASSES, (2, *(grid or (196,))))
    with pytest.raises(ValueError, match=r"use features\.transpose\(0, 1\); in an attached"):
        reg(tokens, labels, linear)
    assert reg(tokens.transpose(0, 1), labels, linear, grid=grid) > 0


def test_two_label_maps_of_one_forward_are_two_losses():
    with pytest.raises(TypeError, match=r"MixUp, .*pass features and classifier .*once for each"):
        MVSCRegularizer(CLASSES, DIM)(
            torch.randn(2, DIM, 8, 8), (right(), right()), nn.Conv2d(DIM, CLASSES, 1)
        )


def test_minus_one_for_unlabelled_pixels_has_its_remedy():
    y = right()
    y[:, :2] = -1
    assert "use attach(model, ignore_index=-1) or MVSCRegularizer(..., ignore_index=-1)." in ask(y)


def test_a_mask_is_two_classes():
    y = right(classes=2)
    for labels in (y.bool(), y[:, None].bool(), y[:, None].float(), y.float()):
        (end,) = follow(labels, classes=2)
        assert torch.equal(end, y)


def test_probabilities_of_two_classes_are_cut_at_a_half():
    y = right(classes=2)
    for labels in (0.21 + 0.6 * y, (0.21 + 0.6 * y)[:, None]):
        assert torch.equal(follow(labels, classes=2)[0].long(), y)


def test_a_mask_of_0_and_255_through_totensor_is_not_silently_unlabelled():
    y = right(classes=2).float()  # 255 / 255 = 1
    (end,) = follow(y, classes=2)
    assert torch.equal(end, y.long())


@pytest.mark.parametrize(
    "labels",
    [
        torch.randn(2, 8, 8),
        torch.randn(2, 3, 8, 8),
        torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8),
        torch.rand(2, 3, 8, 8) * 255,
        torch.rand(2, 8, 8) * 3,
        torch.full((2, 8, 8), float("nan")),
        torch.full((2, 1, 8, 8), float("inf")),
        torch.full((2, 4, 8, 8), float("nan")),
    ],
    ids=["normal", "logits", "colours", "colours as floats", "fractions", "nan", "inf", "nan 4"],
)
def test_what_are_no_labels_ends_in_an_error(labels):
    ends = follow(labels)
    assert all(isinstance(end, str) for end in ends), ends


def test_a_single_image_without_its_batch_gets_one():
    y = right(1)
    (end,) = follow(y[0], batch=1)
    assert torch.equal(end, y)
    (end,) = follow(y[0].float(), batch=1)
    assert torch.equal(end, y)


@pytest.mark.parametrize("batch", [1, 2])
def test_labels_in_rows_are_unfolded_and_not_taken_for_an_image(batch):
    y = right(batch)
    for labels in (y.flatten(1), y.flatten(1).float()):
        (end,) = follow(labels, batch=batch)
        assert torch.equal(end, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_classes_that_totensor_scaled_come_back_as_they_were(dtype):
    y = right(classes=150)
    (end,) = follow((y / 255).to(dtype), classes=150)
    assert torch.equal(end, y)


def test_features_are_to_be_unfolded_only_if_they_were_folded():
    y = torch.randint(0, CLASSES, (2, 5, 8, 8))
    assert "if they were folded; else one class index for each pixel." in ask(y)


@pytest.mark.parametrize("made", [lambda f: torch.cat([f, f]), lambda f: f.repeat_interleave(2, 0)])
def test_labels_of_views_are_repeated_as_the_views_are(made):
    order = made(torch.arange(2)).tolist()
    y = right()
    ends = follow(y, batch=4)
    assert sum(torch.equal(end, y[order]) for end in ends) == 1
    message = ask(y, batch=4)
    assert "repeat_interleave(2, 0) if they come one after the other, torch.cat" in message


def test_labels_of_all_points_in_one_row_get_their_batch():
    y = right(size=(10,))
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    batch, classifier = torch.randn(2, DIM, 10), nn.Conv1d(DIM, CLASSES, 1)
    with pytest.raises(ValueError, match=r"Use labels\.view\(2, 10\)\."):
        reg(batch, y.flatten(), classifier)
    assert_close(reg(batch, y.flatten().view(2, 10), classifier).isfinite(), torch.tensor(True))


def test_labels_of_one_slice_are_not_silently_those_of_all():
    reg, layer = MVSCRegularizer(CLASSES, DIM, 1), nn.Conv3d(DIM, CLASSES, 1)
    with pytest.raises(ValueError, match=r"labels\.unsqueeze\(1\) if all slices have these lab"):
        reg(torch.randn(1, DIM, 4, 8, 8), right(1), layer)


def test_tiles_of_an_image_are_not_views_of_it():
    assert "of tiles the labels, cut as the images are" in ask(right(), batch=4)


def test_nested_and_sparse_tensors_say_how_they_become_dense():
    y, classifier = right(size=(6,)), nn.Conv1d(DIM, CLASSES, 1)
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    points, rows = torch.randn(2, DIM, 6), [y[0], y[1, :4]]
    ragged = torch.nested.nested_tensor([points[0].T, points[1, :, :4].T], layout=torch.jagged)
    labels = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(TypeError, match=r"features.*got a nested.*to_padded_tensor\(features, 0"):
        reg(ragged, y, nn.Linear(DIM, CLASSES))
    with pytest.raises(TypeError, match=r"labels.*got a nested.*to_padded_tensor\(labels, ignore"):
        reg(points, labels, classifier)
    with pytest.raises(TypeError, match=r"torch.sparse_coo one\. Use features\.to_dense\(\)\."):
        reg(points.to_sparse(), y, classifier)
    padded = torch.nested.to_padded_tensor(labels, 255)
    dense = torch.nested.to_padded_tensor(ragged, 0.0)
    assert torch.equal(padded[1, 4:], torch.full((2,), 255))
    assert reg(dense, padded, nn.Linear(DIM, CLASSES)).isfinite()


@pytest.mark.parametrize("batch", [4, 5])
def test_images_without_labels_get_maps_of_the_ignored_kind(batch):
    assert "of images without labels append maps of ignore_index." in ask(right(), batch=batch)
    assert "append" not in ask(right(), batch=1)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("form", [lambda y: y, lambda y: y.float(), lambda y: y / 255])
def test_a_grey_picture_that_was_read_in_colour_has_one_channel_that_counts(axis, form):
    y = right()
    (end,) = follow(form(torch.stack([y] * 3, axis)))
    assert torch.equal(end.long(), y)


def test_maps_of_several_resolutions_are_not_to_be_stacked():
    y = right()
    message = ask([y, y[:, ::2, ::2]])
    assert "as for deep supervision, pass the finest" in message
    assert "stack" not in message


@pytest.mark.parametrize("layer", [nn.Linear(DIM, CLASSES), nn.Conv1d(DIM, CLASSES, 1)])
def test_rows_of_pixels_are_one_place_each_as_the_error_says(layer):
    reg = MVSCRegularizer(CLASSES, DIM, 1)
    maps, labels = torch.randn(2, DIM, 4, 6), right(size=(4, 6))
    features = maps.movedim(1, -1).reshape(-1, DIM)
    with pytest.raises(ValueError, match="For a row of each pixel use") as error:
        reg.terms(features, labels, layer)
    names = {"features": features, "labels": labels}
    told = [
        eval(each, names)
        for each in re.findall(
            r"(?:features|labels)\.[a-z.]+\(.*?\)(?:\.\w+\(-1\))?", str(error.value)
        )
    ]
    same = MVSCRegularizer(CLASSES, DIM, 1).terms(maps, labels, nn.Conv2d(DIM, CLASSES, 1))
    assert_close(reg.terms(*told, layer).align, same.align)


# Which label means unlabelled.


@pytest.mark.parametrize(("classes", "ignored"), [(2, 255), (255, 255), (256, -100), (300, -100)])
def test_the_default_ignore_index_is_no_class(classes, ignored):
    assert MVSCRegularizer(classes, DIM).ignore_index == ignored
    assert MVSCRegularizer(classes, DIM, ignore_index=7).ignore_index == 7
    assert MVSCRegularizer(300, DIM, ignore_index=255).ignore_index == 255


def test_class_255_of_300_counts():
    labels = torch.full((1, 8, 8), 255)
    labels[:, :4] = 254
    reg = MVSCRegularizer(300, DIM, 1)
    terms = reg.terms(torch.randn(1, DIM, 8, 8), labels, nn.Conv2d(DIM, 300, 1))
    assert terms.align.item() > 0  # Of one class alone it is 0.


def test_unlabelled_images_in_a_batch_are_labels_of_the_ignored_kind():
    features, classifier = torch.randn(2, DIM, 8, 8, requires_grad=True), nn.Conv2d(DIM, CLASSES, 1)
    y = right()
    y[1] = 255
    MVSCRegularizer(CLASSES, DIM, 1)(features, y, classifier).backward()
    assert bool((features.grad[0] != 0).any())
    assert not bool((features.grad[1] != 0).any())
