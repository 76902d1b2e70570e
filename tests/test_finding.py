"""Finding the pixel classifier, or saying why none is certain."""

import copy
import logging
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from mvsc.attach import ClassifierNotFoundError, attach
from mvsc.hosts import ASIDE
from tiny_nets import CLASSES, DIM, Net, NetWithLoss, TwoHeads


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


def test_a_classifier_that_stands_in_two_places_has_two_names(images, labels):
    model = Net()
    model.heads = nn.ModuleDict({"coarse": nn.Conv2d(DIM, 3, 1), "fine": model.classifier})
    for name in ("classifier", "heads.fine"):
        for example in (None, images):
            with attach(model, classifier=name, example=example) as reg:
                assert reg.classifier_path == name
                model(images)
                assert reg(labels).item() > 0
    assert attach(model, classifier=model.heads["fine"]).classifier_path == "classifier"


def test_a_lazy_classifier_is_found_by_an_example_or_after_a_forward(images):
    def lazy() -> nn.Module:
        layers = [nn.Conv2d(3, DIM, 1), nn.LazyBatchNorm2d(), nn.LazyConv2d(CLASSES, 1)]
        return nn.Sequential(*layers)

    for model, name in ((lazy(), "2"), (nn.Sequential(nn.LazyConv2d(CLASSES, 1)), None)):
        with pytest.raises(ValueError, match="lazy and was not called. Run one .* example=images"):
            attach(model, classifier=name)
    for name in (None, "2"):
        assert attach(lazy(), classifier=name, example=images).regularizer.dim == DIM
    model = lazy()
    model(images)
    assert attach(model, classifier="2").regularizer.dim == DIM


def test_a_named_module_without_one_linear_layer_raises():
    with pytest.raises(
        ValueError, match=r"or hold just one, got Sequential 'encoder' with.*0 \(Conv"
    ):
        attach(Net(), classifier="encoder")


def test_a_wrong_path_shows_the_nearest():
    with pytest.raises(ClassifierNotFoundError, match=r"got 'clasifier'.*nearest are 'classifier'"):
        attach(Net(), classifier="clasifier")


def test_a_model_that_returns_probabilities_is_told_to_name_its_layer(images):
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), nn.Conv2d(DIM, CLASSES, 1), nn.Softmax(1))
    with pytest.raises(ClassifierNotFoundError, match="but the model returns prob") as error:
        attach(model, example=images)
    assert 'name it: mvsc.attach(model, classifier="1").' in str(error.value)


def test_a_path_that_is_near_to_nothing_shows_the_linear_layers():
    with pytest.raises(ClassifierNotFoundError, match="last linear layers are .*, 'classifier'"):
        attach(Net(), classifier="qqq")


def test_a_module_of_another_model_raises():
    with pytest.raises(ValueError, match="a module of the model, got a Conv2d outside of it"):
        attach(Net(), classifier=Net().classifier)


def test_two_heads_are_listed_with_the_line_to_write():
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(TwoHeads())
    message = str(error.value)
    assert "classifier: Conv2d 1x1, 8 -> 5: one of 2 that could be it" in message
    assert "boundary: Conv2d 1x1, 8 -> 5: one of 2 that could be it" in message
    assert "num_classes" not in message  # of both
    assert 'mvsc.attach(model, classifier="path.of.the.layer")' in message  # neither of the two
    assert "mvsc.attach(model, example=images)" in message


def test_of_two_heads_the_only_one_of_the_given_number_of_classes_is_taken():
    model = TwoHeads()
    model.boundary = nn.Conv2d(DIM, 3, 1)
    with pytest.raises(
        ClassifierNotFoundError, match="8 -> 3: one of 2 .*; num_classes=3 takes it"
    ):
        attach(model)
    for classes, path in ((CLASSES, "classifier"), (3, "boundary")):
        with attach(model, num_classes=classes) as reg:
            assert reg.classifier_path == path
    with pytest.raises(ClassifierNotFoundError, match="one of 0 that could be it"):
        attach(model, num_classes=7)


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


class Several(Net):
    """Returns maps of several layers; ``put`` says which, in which order, under which names."""

    def __init__(self, put, classes: int = CLASSES) -> None:
        super().__init__(classes=classes)
        self.put = put
        self.extra = nn.Sequential(nn.Conv2d(DIM, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.depth, self.deeper = nn.Conv2d(DIM, 1, 1), nn.Conv2d(DIM, classes, 1)

    def forward(self, images: Tensor):
        stem = self.encoder[0](images)
        features = self.encoder[1:](stem)
        maps = {name: getattr(self, name)(features) for name in ("extra", "depth", "deeper")}
        logits = F.interpolate(self.classifier(features), images.shape[2:])
        return self.put(SimpleNamespace(**maps, stem=stem, logits=logits))


@pytest.mark.parametrize(
    ("put", "classes"),
    [
        (lambda m: {"extra": m.extra, "seg": m.logits}, CLASSES),
        (lambda m: {"depth": m.depth, "seg": m.logits}, 1),
        (lambda m: {"depth": m.depth, "pixels": m.logits}, CLASSES),
        (lambda m: (m.depth, m.logits), CLASSES),
        (lambda m: (m.stem, m.logits), CLASSES),
        (lambda m: (m.logits, m.deeper), CLASSES),
    ],
    ids=["embedding", "named", "one logit", "depth", "features", "deep supervision"],
)
def test_an_example_does_not_take_what_a_model_returns_before_its_logits(images, put, classes):
    assert attach(Several(put, classes), example=images).classifier_path == "classifier"


@pytest.mark.parametrize(
    ("put", "other", "classes"),
    [
        (lambda m: (m.extra, m.logits), "extra.2", CLASSES),
        (lambda m: (m.logits, m.extra), "extra.2", CLASSES),
        (lambda m: {"depth": m.depth, "pixels": m.logits}, "depth", 1),
    ],
    ids=["embedding", "embedding last", "depth"],
)
def test_an_example_takes_none_of_two_layers_whose_maps_are_returned(images, put, other, classes):
    model = Several(put, classes)
    with pytest.raises(ClassifierNotFoundError, match="one of 2 maps that the model ret") as error:
        attach(model, example=images)
    assert f"  {other}: Conv2d" in str(error.value)
    assert 'name it: mvsc.attach(model, classifier="' in str(error.value)
    assert attach(model, classifier="classifier").classifier_path == "classifier"


@pytest.mark.parametrize(
    ("after", "classes"),
    [
        (lambda z: z.squeeze(1), 1),
        (lambda z: z.flatten(2).movedim(1, -1), CLASSES),
        (lambda z: z.flatten(2), CLASSES),
        (lambda z: z.unflatten(0, (1, 2)), CLASSES),
        (lambda z: F.interpolate(z, scale_factor=4).flatten(2), CLASSES),
        (lambda z: F.interpolate(z, scale_factor=2, mode="bilinear")[..., :-3, :-2], CLASSES),
    ],
    ids=["squeezed", "rows", "folded", "video", "upsampled rows", "cropped"],
)
def test_an_example_looks_through_axes_that_come_or_go(images, after, classes):
    class Folding(Net):
        def forward(self, images: Tensor) -> Tensor:
            return after(super().forward(images))

    assert attach(Folding(classes=classes), example=images).classifier_path == "classifier"


@pytest.mark.parametrize(
    "last", [nn.LogSoftmax(1), nn.PixelShuffle(2)], ids=["logarithms", "shuffle"]
)
def test_an_example_that_can_prove_nothing_says_to_name_the_layer(images, last):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), last)
    with pytest.raises(ClassifierNotFoundError, match="name it: mvsc.attach") as error:
        attach(model, example=images)
    assert "whose output nothing else" not in str(error.value)
    assert attach(model, classifier="2").classifier_path == "2"


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

    class Silent(Net):
        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            super().forward(images)
            return ()

    with pytest.raises(ValueError, match=r"example must lead to logits.*got \(2, 5\)"):
        attach(Pooled(), example=images)
    with pytest.raises(ValueError, match=r"example must lead to logits.*got tuple\."):
        attach(Silent(), example=images)


def test_an_example_leaves_modes_statistics_and_hooks_as_they_were(images):
    model = Net(nn.Dropout(0.5))
    model.encoder[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attach(model, example=images).detach()
    assert [module.training for module in model.modules()] == modes
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_example_leaves_what_moves_in_evaluation_mode_as_it_was(images):
    class Counted(Net):
        def __init__(self) -> None:
            super().__init__()
            for name in ("calls", "grown"):
                self.register_buffer(name, torch.zeros(1))
            self.encoder.register_buffer("same", self.calls)  # the same tensor, twice
            self.register_buffer("cache", None, persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            assert_close(self.encoder.same, self.calls, rtol=0, atol=0)
            self.grown.resize_(3).fill_(7)  # as observers of quantisation-aware training do
            self.cache = torch.zeros(2)
            return super().forward(images)

    model = Counted()
    before, calls = copy.deepcopy(model.state_dict()), model.calls
    attach(model, example=images).detach()
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.calls is calls
    assert model.cache.shape == (2,)  # and what is no state stays consistent
    with pytest.raises(TypeError):
        attach(model, example=[images, images])
    assert model.calls is calls


@pytest.mark.filterwarnings("ignore")
def test_an_example_leaves_the_observers_of_quantisation_aware_training_as_they_were(images):
    model = nn.Sequential(nn.Conv2d(3, DIM, 3), nn.ReLU(), nn.Conv2d(DIM, CLASSES, 1))
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model = torch.ao.quantization.prepare_qat(model.train())
    before = copy.deepcopy(model.state_dict())
    attach(model, example=images).detach()
    assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_classifier_is_named_by_a_module_or_a_path():
    with pytest.raises(TypeError, match="a module of the model or its path, got 2"):
        attach(Net(), classifier=2)


# What must never be proposed.


class Alone(nn.Module):
    """A module with a convolution under some name, and a classifier if it is told to."""

    def __init__(self, name: str, classifier: bool) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        inner = nn.Module()
        inner.add_module("0", nn.Conv2d(DIM, CLASSES, 1))
        self.add_module(name, inner)
        if classifier:
            self.classifier = nn.Conv2d(DIM, CLASSES, 1)


@pytest.mark.parametrize(
    "name",
    [
        "aux_head",
        "auxiliary_classifier",
        "deep_supervision_heads",
        "deep_super_1",
        "ds_out",
        "super_heads",
        "lora_B",
        "lora_embedding_A",
        "original_module",
        "qkv",
        "attn_proj",
        "patch_embed",
    ],
)
def test_a_layer_whose_name_speaks_against_it_is_neither_taken_nor_proposed(name):
    model = Alone(name, classifier=True)
    assert attach(model).classifier_path == "classifier"
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(Alone(name, classifier=False))
    assert f"{name}.0: Conv2d 1x1, 8 -> 5: " in str(error.value)
    assert f'classifier="{name}.0"' not in str(error.value)
    assert "mvsc.attach(model, example=images)" in str(error.value)
    assert any(meaning in str(error.value) for meaning in ASIDE.values())


def test_a_linear_alone_is_not_proposed_and_one_sensible_layer_is():
    model = nn.Sequential(nn.Conv2d(3, DIM, 3), nn.Flatten(), nn.Linear(DIM, CLASSES))
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(model)
    assert 'classifier="path.of.the.layer"' in str(error.value)


def test_a_layer_as_wide_before_as_behind_is_a_classifier(images):
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
            self.narrow = nn.Conv2d(DIM, CLASSES, 3, padding=1)
            self.out = nn.Conv2d(CLASSES, CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.out(self.narrow(self.encoder(images)).relu())

    assert attach(Narrow(), classifier="out").regularizer.dim == CLASSES
    assert attach(Narrow(), example=images).classifier_path == "out"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("Sam2Model", "Sam2Config"),
        ("SegGptForImageSegmentation", "SegGptConfig"),
        ("DPTForDepthEstimation", "DPTConfig"),
        ("GLPNForDepthEstimation", "GLPNConfig"),
        ("ViTForImageClassification", "ViTConfig"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_of_transformers_that_is_no_segmenter_is_refused(model, config, inside):
    hf = pytest.importorskip("transformers")
    with torch.device("meta"):
        made = getattr(hf, model)(getattr(hf, config)())
    made = nn.ModuleDict({"inner": made}) if inside else made
    with pytest.raises(
        ClassifierNotFoundError, match=r'classifier="path\.of\.the\.layer"|no classes'
    ):
        attach(made)


def test_behind_probabilities_no_layer_of_a_model_that_segments_nothing_is_proposed():
    hf = pytest.importorskip("transformers")
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16}

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config_ = hf.ViTConfig(**config, intermediate_size=8, num_labels=CLASSES)
            self.vit = hf.ViTForImageClassification(config_)

        def forward(self, images: Tensor) -> Tensor:
            return self.vit(images).logits.sigmoid()[..., None, None].expand(-1, -1, 4, 4)

    with pytest.raises(ClassifierNotFoundError) as error:
        attach(Sure(), example=torch.randn(2, 3, 16, 16))
    assert "vit.classifier: Linear" in str(error.value)
    assert "classifier=" not in str(error.value)


def test_a_head_of_ones_own_on_a_model_of_transformers_is_found():
    hf = pytest.importorskip("transformers")

    class OnDino(hf.PreTrainedModel):
        config_class = hf.Dinov2Config

        def __init__(self, config) -> None:
            super().__init__(config)
            self.backbone = hf.Dinov2Model(config)
            self.head = nn.Conv2d(config.hidden_size, CLASSES, 1)

    with torch.device("meta"):
        assert attach(OnDino(hf.Dinov2Config())).classifier_path == "head"
        sam = hf.Sam2Model(hf.Sam2Config())
        model = nn.ModuleDict({"sam": sam, "head": nn.Conv2d(256, CLASSES, 1)})
        assert attach(model).classifier_path == "head"


class Queries(nn.Module):
    """Nine queries with their classes and masks, as MaskFormer and its kin have."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.pixels, self.queries = nn.Conv2d(3, DIM, 4, 4), nn.Parameter(torch.randn(9, DIM))
        self.class_predictor = nn.ModuleList([classifier])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pixels = self.pixels(images)
        queries = self.queries + pixels.mean((2, 3))[:, None]
        rows = isinstance(self.class_predictor[0], nn.Linear)
        classes = self.class_predictor[0](queries if rows else queries.mT)
        masks = torch.einsum("bqd,bdhw->bqhw", queries, pixels)
        return {"logits": classes if rows else classes.mT, "masks": masks}


@pytest.mark.parametrize("layer", [nn.Linear(DIM, 6), nn.Conv1d(DIM, 6, 1)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("proved", [False, True])
def test_a_classifier_of_queries_is_refused_also_by_name(images, layer, named, proved):
    options = {"classifier": "class_predictor"} if named else {}
    options |= {"example": images} if proved else {}
    with pytest.raises(ClassifierNotFoundError, match="queries, not pixels\n.*auxiliary 1x1"):
        attach(Queries(layer), **options)


def test_a_classifier_of_maps_may_have_the_name_of_one_of_queries(images):
    layers = OrderedDict(encoder=nn.Conv2d(3, DIM, 1), class_predictor=nn.Conv2d(DIM, CLASSES, 1))
    model = nn.Sequential(layers)
    for options in ({}, {"classifier": "class_predictor"}, {"example": images}):
        with attach(model, **options) as reg:
            assert reg.classifier_path == "class_predictor"


# PEFT.


class Adapted(Net):
    """With projections of an attention, to be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.qkv = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, 3 * DIM, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.query(self.encoder(images)))


SAVED = "base_model.model.classifier.modules_to_save.default"


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"target_modules": ["query"], "modules_to_save": ["classifier"]}, SAVED),
        ({"target_modules": ["query", "classifier"]}, "base_model.model.classifier"),
        ({"target_modules": ["query", "qkv"]}, "base_model.model.classifier"),
        (
            {"target_modules": ["query", "classifier"], "use_dora": True},
            "base_model.model.classifier",
        ),
    ],
    ids=["saved", "adapted", "left alone", "dora"],
)
@pytest.mark.filterwarnings("ignore")
def test_pefts_copy_or_adapter_of_the_classifier_is_trained(images, labels, config, path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Adapted(), peft.LoraConfig(r=2, **config))
    for options in (
        {},
        {"example": images},
        {"classifier": "base_model.model.classifier"},
        {"classifier": model.base_model.model.classifier},
    ):
        with attach(model, **options) as reg:
            assert reg.classifier_path == path
            model(images)
            (F.cross_entropy(model(images), labels)).backward()
            reg.discard()
            model(images)
            reg(labels).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("modules_to_save" in name or "lora" in name for name in trained)


@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_an_adapted_classifier_is_that_of_its_sum(images, labels):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "classifier"], init_lora_weights=False)
    model = peft.get_peft_model(Adapted(), config)
    reg = attach(model, groups=1)
    model(images)
    found = reg.terms(labels).classify
    model.eval()
    logits = model.base_model.model.classifier(reg.regularizer.centroids[0][:, :, None, None])
    present = torch.isin(torch.arange(CLASSES), labels)
    expected = F.cross_entropy(logits.flatten(1)[present], torch.arange(CLASSES)[present])
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "arguments", "path"),
    [
        ("VNet", {"in_channels": 1, "out_channels": 2}, "out_tr.conv2"),
        ("VNet", {"in_channels": 1, "out_channels": 16}, "out_tr.conv2"),
        (
            "DynUNet",
            {
                "in_channels": 1,
                "out_channels": 3,
                "kernel_size": (3, 3, 3),
                "strides": (1, 2, 2),
                "upsample_kernel_size": (2, 2),
                "deep_supervision": True,
            },
            "output_block.conv.conv",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_deep_supervision_and_equal_widths_in_monai_do_not_mislead(name, arguments, path):
    nets = pytest.importorskip("monai.networks.nets")
    assert attach(getattr(nets, name)(2, **arguments)).classifier_path == path


# A library's segmenter that is not the one that classifies.


def unet(classes: int) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.FPN("tu-test_resnet", encoder_weights=None, classes=classes)


class Extractor(nn.Module):
    """A head of the user's own that reads what a library's segmenter gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = unet(16), nn.Conv2d(16, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.net(images))


def subclass() -> nn.Module:
    kind = type(unet(16))

    class Own(kind):
        def __init__(self) -> None:
            super().__init__("tu-test_resnet", encoder_weights=None, classes=16)
            self.head = nn.Conv2d(16, CLASSES, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(super().forward(images))

    return Own()


@pytest.mark.parametrize("make", [Extractor, subclass])
def test_a_librarys_classifier_that_another_layer_reads_is_none(make):
    with pytest.raises(ClassifierNotFoundError, match="'head', behind it, reads as many channels"):
        attach(make())
    assert attach(make(), classifier="head").classifier_path == "head"
    assert attach(make(), example=torch.randn(2, 3, 64, 64)).classifier_path == "head"


class Distilled(nn.Module):
    """A teacher that is a library's, and a student."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = unet(CLASSES).requires_grad_(False), student

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)


def test_a_frozen_teacher_is_not_taken():
    path = "student.segmentation_head.0"
    assert attach(Distilled(unet(CLASSES))).classifier_path == path
    with pytest.raises(ClassifierNotFoundError, match="one of 2 that could be it"):
        attach(Distilled(Net()))
    # Of a whole that is frozen yet nothing is said.
    frozen = Distilled(nn.Identity()).requires_grad_(False)
    assert attach(frozen).classifier_path == "teacher.segmentation_head.0"


def test_a_name_speaks_against_a_layer_where_a_word_of_it_begins():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, DIM, 1), "heads_seg": nn.Conv2d(DIM, CLASSES, 1)})
    assert attach(model).classifier_path == "heads_seg"
    model["ds_1"] = nn.Conv2d(DIM, CLASSES, 1)
    assert attach(model).classifier_path == "heads_seg"


class Nuclei(nn.Module):
    """A mask, which is one logit, and distances along both axes: HoVer-Net's idea."""

    def __init__(self, put) -> None:
        super().__init__()
        self.encoder, self.put = nn.Conv2d(3, DIM, 3, padding=1), put
        self.mask, self.distances = nn.Conv2d(DIM, 1, 1), nn.Conv2d(DIM, 2, 1)

    def forward(self, images: Tensor):
        features = self.encoder(images)
        return self.put(self.mask(features), self.distances(features))


@pytest.mark.parametrize("put", [lambda a, b: (a, b), lambda a, b: {"mask": a, "distances": b}])
def test_a_mask_beside_two_channels_is_no_example_of_either(images, put):
    with pytest.raises(
        ClassifierNotFoundError, match="mask: Conv2d 1x1, 8 -> 1: its output is one"
    ):
        attach(Nuclei(put), example=images)
    assert attach(Nuclei(put), classifier="mask").regularizer.num_classes == 2


@pytest.mark.parametrize("put", [lambda a, b: (a, b), lambda a, b: {"mask": a, "distances": b}])
def test_a_guess_among_several_maps_is_doubted_once_and_a_name_is_not(images, put):
    model = Nuclei(put)
    reg = attach(model)
    doubt = "returns several maps, of other classes than those of 'distances', the only"
    with pytest.warns(UserWarning, match=doubt) as said:
        model(images)
    reg.discard()
    model(images)
    assert len(said) == 1
    reg.detach()
    attach(model, classifier="distances")
    model(images)


def test_the_layer_that_reads_the_image_is_no_candidate(images):
    # ENet's first convolution: what it gives is read only beside the pooled image.
    model = nn.ModuleDict({"first": nn.Conv2d(3, 13, 3), "then": nn.ConvTranspose2d(16, 12, 2, 2)})
    with pytest.raises(ClassifierNotFoundError, match="none: no linear layer whose output"):
        attach(model)
    assert attach(nn.Conv2d(3, CLASSES, 1)).classifier_path == ""


def test_an_example_leaves_what_training_mode_computes_as_it_was(images):
    class Merging(nn.Conv2d):
        """LoRA that merges in evaluation mode, as loralib writes it."""

        merged = False

        def train(self, mode: bool = True) -> nn.Module:
            if self.merged == mode:
                self.weight.data *= 0.5 if mode else 2.0
                self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(3, DIM, 3), nn.Conv2d(DIM, CLASSES, 1))
    model[1].eval()  # On purpose.
    before = model[0].weight.clone()
    attach(model, example=images)
    assert torch.equal(model[0].weight, before)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
