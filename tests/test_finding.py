"""Finding the pixel classifier, or saying why none is certain."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mvsc.attach import ClassifierNotFoundError, attach
from tiny_nets import CLASSES, DIM, Net, NetWithLoss, TwoHeads


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 12, 12)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, CLASSES, (2, 12, 12))


def test_the_only_layer_that_nothing_reads_is_taken_and_said_so_once(caplog):
    with caplog.at_level(logging.INFO, "mvsc"):
        attach(Net())
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "took 'classifier', the only candidate, for the classifier; example= proves it",
        "attached to classifier 'classifier' of Net",
    ]


def test_as_many_classes_as_image_channels_are_no_obstacle():
    assert attach(Net(classes=3)).classifier_path == "classifier"


def test_a_path_or_a_module_names_the_classifier():
    model = TwoHeads()
    assert attach(model, classifier="boundary").classifier_path == "boundary"
    assert attach(model, classifier=model.classifier).classifier_path == "classifier"


def test_a_named_module_may_hold_the_classifier():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, DIM, 3), "head": nn.Sequential()})
    model["head"].extend([nn.Dropout(), nn.Conv2d(DIM, CLASSES, 1), nn.Upsample(scale_factor=2)])
    assert attach(model, classifier="head").classifier_path == "head.1"


def test_a_classifier_with_a_parametrization_is_one(images, labels):
    model = Net(nn.Dropout(0.5))
    nn.utils.parametrizations.weight_norm(model.classifier)
    for name in (None, "classifier"):
        with attach(model, classifier=name) as reg:
            model(images)
            assert reg(labels).item() > 0


def test_a_named_module_without_one_linear_layer_raises():
    with pytest.raises(
        ValueError, match=r"or hold just one, got Sequential 'encoder' with.*0 \(Conv"
    ):
        attach(Net(), classifier="encoder")


def test_a_wrong_path_shows_the_nearest():
    with pytest.raises(ClassifierNotFoundError, match=r"got 'clasifier'.*nearest are 'classifier'"):
        attach(Net(), classifier="clasifier")


def test_a_module_of_another_model_raises():
    with pytest.raises(ValueError, match="a module of the model, got a Conv2d outside of it"):
        attach(Net(), classifier=Net().classifier)


def test_two_heads_are_listed_with_the_line_to_write():
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(TwoHeads())
    message = str(error.value)
    assert "classifier: Conv2d 1x1, 8 -> 5: one of 2 that could be it" in message
    assert "boundary: Conv2d 1x1, 8 -> 5: one of 2 that could be it" in message
    assert 'mvsc.attach(model, classifier="path.of.the.layer")' in message  # neither of the two
    assert "mvsc.attach(model, example=images)" in message


def test_auxiliary_heads_and_linear_layers_are_listed_but_not_taken(images):
    model = Net()
    model.aux_head = nn.Conv2d(DIM, CLASSES, 1)
    model.scene = nn.Linear(DIM, 7)
    assert attach(model).classifier_path == "classifier"
    del model.classifier
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(model)
    assert "aux_head: Conv2d 1x1, 8 -> 5: auxiliary, by its name" in str(error.value)
    assert "scene: Linear, 8 -> 7: a Linear, which may" in str(error.value)


@pytest.mark.parametrize("last", [nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, groups=2)])
def test_a_model_without_a_candidate_says_so(last):
    with pytest.raises(ClassifierNotFoundError, match="none: no linear layer whose output"):
        attach(nn.Sequential(nn.Conv2d(3, 8, 3), last))


def test_an_example_tells_two_heads_apart(images):
    assert attach(TwoHeads(), example=images).classifier_path == "classifier"


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: {"images": x}, lambda x: x])
def test_an_example_may_be_a_tensor_or_arguments(images, wrap):
    assert attach(NetWithLoss(), example=wrap(images)).classifier_path == "classifier"


def test_an_example_refutes_a_wrong_name(images):
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(TwoHeads(), classifier="boundary", example=images)
    assert "boundary: Conv2d 1x1, 8 -> 5: its output is not the logits" in str(error.value)
    assert "classifier: Conv2d 1x1, 8 -> 5: its output is the logits" in str(error.value)


@pytest.mark.parametrize("corners", [False, True])
def test_an_example_looks_through_the_upsampling(images, corners):
    class Upsampling(Net):
        def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
            logits = super().forward(images)
            logits = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=corners)
            return OrderedDict(out=logits)

    assert attach(Upsampling(), example=images).classifier_path == "classifier"


def test_what_an_example_refutes_is_not_proposed(images, labels):
    class Twice(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + super().forward(images.flip(-1))

    with pytest.raises(ClassifierNotFoundError, match="called 2 times in one forward") as error:
        attach(Twice(), example=images)
    assert "Otherwise pass features and a classifier to MVSC" in str(error.value)
    assert "name it" not in str(error.value)
    model = Twice()
    reg = attach(model)
    model(images)
    with pytest.raises(RuntimeError, match=r"calls it more than once, pass the features to MVSC"):
        reg(labels)


def test_an_example_without_logits_raises(images):
    class Pooled(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).mean((2, 3))

    with pytest.raises(ValueError, match=r"example must lead to logits.*got \(2, 5\)"):
        attach(Pooled(), example=images)


def test_an_example_leaves_modes_statistics_and_hooks_as_they_were(images):
    model = Net(nn.Dropout(0.5))
    model.encoder[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attach(model, example=images).detach()
    assert [module.training for module in model.modules()] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_classifier_is_named_by_a_module_or_a_path():
    with pytest.raises(TypeError, match="a module of the model or its path, got 2"):
        attach(Net(), classifier=2)
