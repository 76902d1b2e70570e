"""The hosts that people use: every example runs, and what `attach` promises holds in them."""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

import engines
import mvsc
from mvsc.attach import ClassifierNotFoundError, attach
from mvsc.tap import Hook

ROOT = Path(__file__).parents[1]
CLASSES = 13


def load(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))  # A script imports what lies beside it.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Dataclasses look their module up there.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return load(ROOT / "benchmarks" / "support_matrix.py")


def tiny_segformer(**settings):
    hf = pytest.importorskip("transformers")
    config = hf.SegformerConfig(
        num_labels=CLASSES,
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
        **settings,
    )
    return hf.SegformerForSemanticSegmentation(config)


def tiny_upernet():
    """A model that a Trainer resumes; transformers 5.23 itself loses SegFormer's weights then."""
    hf = pytest.importorskip("transformers")
    stages = {"depths": [1] * 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    config = hf.UperNetConfig(
        num_labels=CLASSES,
        backbone_config=hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], **stages),
        hidden_size=16,
        auxiliary_in_channels=8,
        auxiliary_channels=8,
    )
    return hf.UperNetForSemanticSegmentation(config)


def batch():
    return torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32))


# Examples.


@pytest.mark.parametrize(
    ("example", "host"),
    [
        ("plain_torch", "torchvision"),
        ("torchvision_reference", "torchvision"),
        ("torchvision_lraspp", "torchvision"),
        ("smp_unet", "segmentation_models_pytorch"),
        ("timm_own_head", "timm"),
        ("transformers_loop", "transformers"),
        ("transformers_trainer", "transformers"),
        ("query_models", "transformers"),
        ("lightning_module", "lightning"),
        ("accelerate_loop", "accelerate"),
        ("point_cloud", "torch"),
        ("dino_linear_probe", "transformers"),
        ("monai_3d", "monai"),
        ("monai_transposed_head", "monai"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs_and_moves_its_centroids(example, host):
    pytest.importorskip(host)
    reg = load(ROOT / "examples" / "integrations" / f"{example}.py").main()
    reg = getattr(reg, "regularizer", reg)
    drawn = mvsc.MVSCRegularizer(reg.num_classes, reg.dim, reg.groups).centroids
    assert reg.step.item() == 2
    assert reg.centroids.isfinite().all()
    assert not torch.equal(reg.centroids.cpu(), drawn)


def test_every_example_is_run():
    examples = {path.stem for path in (ROOT / "examples" / "integrations").glob("*.py")}
    marks = test_an_example_runs_and_moves_its_centroids.pytestmark
    (cases,) = (mark.args[1] for mark in marks if mark.name == "parametrize")
    # Those of trainers need data on disk: test_trainers.py runs them. Those for several processes
    # are run by test_engines.py.
    elsewhere = {"nnunet_trainer", "ultralytics_trainer", "ray_train", *engines.EXAMPLES}
    assert {example for example, _ in cases} == examples - elsewhere


@pytest.mark.parametrize(
    ("model", "width", "inputs"),
    [
        ("MaskFormer", 256, {}),
        ("OneFormer", 256, {"task_inputs": torch.ones(2, 77)}),
        ("Eomt", 32, {}),
        ("EomtDinov3", 32, {}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_query_models_trains_the_other_ones_too(matrix, model, width, inputs):
    pytest.importorskip("transformers")
    if model == "OneFormer" and version("transformers").split(".")[:2] < ["5", "24"]:
        pytest.skip("Older ones ask for texts whenever there are labels.")
    recipe = load(ROOT / "examples" / "integrations" / "query_models.py")
    recipe.CLASSES = matrix.CLASSES
    (case,) = (case for case in matrix.LIBRARIES["transformers"]() if case.model == model)
    assert recipe.train(case.build(), width, **inputs).step.item() == 2


# The support matrix.


@pytest.mark.parametrize(
    ("library", "model"),
    [
        ("torchvision", "deeplabv3_mobilenet_v3_large"),
        ("torchvision", "lraspp_mobilenet_v3_large"),
        ("segmentation_models_pytorch", "FPN"),
        ("segmentation_models_pytorch", "DPT"),
        ("torch", "SegNet, code of one's own"),
        ("timm", "resnet18 + own 1x1 head"),
        ("transformers", "Segformer"),
        ("transformers", "UperNet, Swin"),
        ("transformers", "MobileNetV2"),
        ("transformers", "Tipsv2Dpt"),
        ("transformers", "Mask2Former"),
        ("transformers", "Dinov2Model + Linear, tokens out"),
        ("monai", "BasicUNet, 3-D"),
        ("monai", "UNet, residual units, 3-D"),
        ("monai", "MedNeXt, deep supervision, 3-D"),
        ("monai", "BasicUNetPlusPlus, deep supervision, 2-D"),
        ("monai", "SegResNetDS2, 3-D"),
        ("monai", "Quicknat, 2-D"),
        ("dynamic_network_architectures", "PlainConvUNet, 3-D, deep supervision"),
        ("torchgeo", "ChangeStarFarSeg"),
        ("torchgeo", "ChangeViT"),
        ("torchseg", "FPN"),
        ("ultralytics", "SemanticSegmentationModel, yolo26n-sem"),
        ("transformers", "DetrForSegmentation"),
        ("transformers", "SegGptForImageSegmentation"),
        ("peft", "LoRA Segformer, modules_to_save decode_head"),
        ("peft", "LoRA Segformer, modules_to_save classifier"),
        ("peft", "LoRA Segformer, LoRA on the classifier too"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_row_of_the_support_matrix_holds(matrix, library, model):
    pytest.importorskip(library)
    (case,) = (case for case in matrix.LIBRARIES[library]() if case.model == model)
    row = matrix.examine(library, version(library), case)
    (kept,) = (r for r in matrix.read_rows() if (r.library, r.model) == (library, model))
    assert replace(row, version="") == replace(kept, version="")


def test_the_page_is_what_the_rows_say(matrix, tmp_path, monkeypatch):
    page = matrix.PAGE.read_text()
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "page.md")
    matrix.render()
    assert matrix.PAGE.read_text() == page
    assert page.count("| works |") >= 35


def test_a_wrong_pick_fails_the_matrix(matrix):
    """The checks of the matrix can fail: here the tap is on the auxiliary head."""
    pytest.importorskip("torchvision")
    cases = matrix.LIBRARIES["torchvision"]()
    (case,) = (case for case in cases if case.model == "deeplabv3_mobilenet_v3_large")
    model, images = case.build(), torch.randn(2, 3, 64, 64)
    reg = attach(model, classifier="aux_classifier.4")
    with pytest.raises(AssertionError, match="the features do not give the logits"):
        matrix.check_tap(model, reg, images, matrix.evaluate(model, images, case))


# torchvision and transformers in particular.


def test_lraspp_is_refused_with_its_recipe_and_both_candidates():
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(model)
    assert "classifier.low_classifier: Conv2d 1x1, 40 -> 13: not where" in str(error.value)
    assert "classifier.high_classifier: Conv2d 1x1, 128 -> 13: not where" in str(error.value)
    assert "examples/integrations/torchvision_lraspp.py" in str(error.value)


def test_an_example_does_not_take_one_half_of_lraspp():
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )
    with pytest.raises(ClassifierNotFoundError, match="its output is not the logits"):
        attach(model, example=torch.randn(1, 3, 64, 64))


def test_the_auxiliary_head_of_dpt_is_refuted_by_an_example(matrix):
    pytest.importorskip("transformers")
    (case,) = (case for case in matrix.LIBRARIES["transformers"]() if case.model == "DPT")
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    model = case.build()
    assert attach(model, example=example).classifier_path == "head.head.4"
    with pytest.raises(ClassifierNotFoundError, match=r"auxiliary_head\.head\.4.*not the logits"):
        attach(case.build(), classifier="auxiliary_head.head.4", example=example)


def test_a_segmenter_inside_a_module_of_ones_own_is_found():
    model = torch.nn.ModuleDict({"network": tiny_segformer()})
    assert attach(model).classifier_path == "network.decode_head.classifier"


def test_an_example_proves_a_known_layout_too():
    """With an activation behind it the classifier gives no longer what the model returns."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    settings = {"encoder_weights": None, "classes": CLASSES, "activation": "softmax2d"}
    model = smp.Linknet("resnet18", **settings)
    with pytest.raises(ClassifierNotFoundError, match="not the logits; .* probabilities") as error:
        attach(model, example=torch.randn(1, 3, 64, 64))
    assert 'name it: mvsc.attach(model, classifier="segmentation_head.0")' in str(error.value)
    assert attach(model).classifier_path == "segmentation_head.0"


def test_two_segmenters_in_one_module_are_told_apart_by_the_user_only():
    model = torch.nn.ModuleDict({"student": tiny_segformer(), "teacher": tiny_segformer()})
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(model)
    assert "student.decode_head.classifier: Conv2d 1x1, 16 -> 13: in one of 2" in str(error.value)
    path = "student.decode_head.classifier"
    assert attach(model, classifier=path).classifier_path == path


def test_a_longer_head_of_ones_own_is_not_cut_short():
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)
    model.classifier.extend([torch.nn.ReLU(), torch.nn.Conv2d(CLASSES, 7, 1)])
    assert attach(model).classifier_path == "classifier.6"
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
    model.segmentation_head.append(torch.nn.Conv2d(CLASSES, 7, 1))
    with pytest.raises(ClassifierNotFoundError, match=r'classifier="segmentation_head\.3"'):
        attach(model)


def test_a_segmenter_with_a_replaced_head_is_not_guessed_at():
    model = tiny_segformer()
    model.decode_head.classifier = torch.nn.Sequential(
        torch.nn.Conv2d(16, 16, 1), torch.nn.Conv2d(16, CLASSES, 1)
    )
    with pytest.raises(ClassifierNotFoundError) as error:
        attach(model)
    assert 'classifier="decode_head.classifier.1"' in str(error.value)
    assert attach(model, classifier="decode_head.classifier.1").regularizer.dim == 16


def test_the_ignored_label_is_that_of_the_models_config():
    model = torch.nn.ModuleDict({"network": tiny_segformer(semantic_loss_ignore_index=7)})
    assert attach(model).regularizer.ignore_index == 7


def test_a_second_attach_is_noticed_where_the_entrance_is_a_wrapper(matrix):
    pytest.importorskip("transformers")
    (case,) = (case for case in matrix.LIBRARIES["transformers"]() if case.model == "MobileNetV2")
    model = case.build()
    reg = attach(model)
    with pytest.raises(ValueError, match="one regularizer at a time"):
        attach(model)
    reg.detach()
    attach(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_of_transformers_changes_nothing():
    images, labels = batch()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_segformer().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        attach(model, add_to_loss=True)
        torch.manual_seed(1)
        model(images, labels=labels).loss.backward()
        gradients.append(next(model.parameters()).grad)
    assert_close(*gradients)


# The Trainer.


@pytest.fixture
def make_trainer(tmp_path):
    hf = pytest.importorskip("transformers")
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, CLASSES, (8, 32, 32))
    dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]

    def make(folder="run", max_steps=4, optimizers=(None, None), **settings):
        torch.manual_seed(0)
        model = tiny_upernet()
        args = hf.TrainingArguments(
            str(tmp_path / folder),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        return hf.Trainer(model=model, args=args, train_dataset=dataset, optimizers=optimizers)

    return make


def attach_to_trainer(trainer, **options):
    from mvsc.integrations import transformers

    return transformers.attach_to_trainer(trainer, **options)


def test_a_trainer_trains_the_centroids_without_weight_decay(make_trainer):
    trainer = make_trainer(max_steps=2)
    reg = attach_to_trainer(trainer, groups=2)
    drawn = reg.regularizer.centroids.detach().clone()
    trainer.train()
    assert not torch.equal(reg.regularizer.centroids, drawn)
    (group,) = (
        group
        for group in trainer.optimizer.param_groups
        if any(p is reg.regularizer.centroids for p in group["params"])
    )
    assert group["weight_decay"] == 0
    assert group["lr"] == trainer.optimizer.param_groups[0]["lr"]


def test_detach_takes_everything_off_the_model_of_a_trainer(make_trainer):
    trainer = make_trainer(max_steps=1)
    attach_to_trainer(trainer)
    mvsc.detach(trainer.model)
    modules = [*trainer.model.modules()]
    hooks = [hook for m in modules for hook in (m._forward_pre_hooks | m._forward_hooks).values()]
    assert not [hook for hook in hooks if isinstance(hook, Hook)]
    mvsc.attach(trainer.model)


def test_the_models_own_checkpoint_does_not_know_of_the_centroids(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    reg = attach_to_trainer(trainer)
    trainer.train()
    model = type(trainer.model).from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert_close(model.state_dict(), trainer.model.state_dict())
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "mvsc.pt", weights_only=True)
    assert_close(saved, dict(reg.state_dict()))


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(make_trainer, tmp_path):
    trainer = make_trainer("whole")
    reg = attach_to_trainer(trainer)
    trainer.train()
    resumed = make_trainer("whole")
    reg_resumed = attach_to_trainer(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_close(dict(reg_resumed.state_dict()), dict(reg.state_dict()), rtol=0, atol=0)
    assert_close(resumed.model.state_dict(), trainer.model.state_dict())


def test_a_trainer_resumes_from_a_checkpoint_of_another_folder(make_trainer, tmp_path):
    regs = []
    for seed, folder in enumerate(("one", "two")):
        trainer = make_trainer(folder)
        regs.append(attach_to_trainer(trainer, seed=seed))
        trainer.train()
    resumed = make_trainer("two")
    reg = attach_to_trainer(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert_close(dict(reg.state_dict()), dict(regs[0].state_dict()), rtol=0, atol=0)


def test_a_trainer_that_makes_its_model_later_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.model_init = lambda: trainer.model
    with pytest.raises(ValueError, match=r"Pass model= instead"):
        attach_to_trainer(trainer)


def test_a_compute_loss_of_ones_own_trains_the_centroids(make_trainer):
    trainer = make_trainer(max_steps=2, label_smoothing_factor=0.1)
    reg = attach_to_trainer(trainer, add_to_loss=False)
    drawn = reg.regularizer.centroids.detach().clone()

    def compute_loss(model, inputs, return_outputs=False, **_):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        logits = torch.nn.functional.interpolate(logits, labels.shape[1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss + reg(labels)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert not torch.equal(reg.regularizer.centroids, drawn)
    assert reg.regularizer.step == 2


def test_a_resumed_trainer_without_its_centroids_raises(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    attach_to_trainer(trainer)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "mvsc.pt").unlink()
    resumed = make_trainer()
    attach_to_trainer(resumed)
    with pytest.raises(FileNotFoundError, match="needs its centroids"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_trainer_with_its_own_optimizer_gets_the_centroids_too(make_trainer):
    trainer = make_trainer(max_steps=1)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.optimizer = optimizer
    reg = attach_to_trainer(trainer)
    trainer.train()
    assert any(p is reg.regularizer.centroids for p in optimizer.param_groups[-1]["params"])


def test_beside_a_layer_wise_optimizer_the_centroids_have_their_own(make_trainer):
    # The Trainer sees a dummy that never steps.
    trainer = make_trainer(optim="galore_adamw_layerwise", optim_target_modules=["mlp"])
    reg = attach_to_trainer(trainer)
    assert not [*reg.parameters()]
    reg.detach()
    with pytest.raises(ValueError, match='"own" with FSDP, DeepSpeed and layer-wise optimizers'):
        attach_to_trainer(trainer, optimizer="host")


def test_a_trainer_with_its_own_scheduler_is_refused(make_trainer):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer(optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        attach_to_trainer(trainer)


def test_a_trainer_that_keeps_the_labels_from_the_model_is_refused(make_trainer):
    trainer = make_trainer(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="the model gets no labels"):
        attach_to_trainer(trainer)


def counting(kind):
    """Return a tiny model whose loss is divided by the items of the whole accumulated batch."""
    if kind != "counts":
        model = tiny_segformer()
        if kind == "no kwargs":
            model.accepts_loss_kwargs = False
        return model
    hf = pytest.importorskip("transformers")

    class Counts(hf.SegformerForSemanticSegmentation):
        def forward(self, pixel_values, labels=None, num_items_in_batch=None, **_):
            output = super().forward(pixel_values=pixel_values)
            logits = torch.nn.functional.interpolate(output.logits, labels.shape[1:])
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            output.loss = loss / (num_items_in_batch or labels.numel())
            return output

    return Counts(tiny_segformer().config)


@pytest.mark.parametrize("kind", ["counts", "mean", "no kwargs", "own mean", "own sum"])
@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_weight_does_not_grow_with_the_parts_of_an_accumulated_batch(tmp_path, kind):
    hf = pytest.importorskip("transformers")
    images, labels = torch.randn(6, 3, 32, 32), torch.randint(0, CLASSES, (6, 32, 32))
    dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    gradients = {}
    for parts in (1, 2, 4):  # The second step of 4 parts has two of them.
        torch.manual_seed(0)
        args = hf.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            num_train_epochs=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            optim="sgd",
            learning_rate=0.0,
            max_grad_norm=0.0,
        )
        trainer = hf.Trainer(counting(kind), args, train_dataset=dataset)
        # Eq. (3) alone does not depend on the batch, and with two groups not on the draw.
        own = kind.startswith("own")
        weights = {"align_weight": 0.0, "classify_weight": 0.0}
        reg = attach_to_trainer(trainer, add_to_loss=not own, groups=2, **weights)

        def compute_loss(model, inputs, *_, trainer=trainer, reg=reg, **__):
            loss = model(**inputs).loss
            parts = trainer.current_gradient_accumulation_steps if kind == "own sum" else 1
            return loss + reg(inputs["labels"]) / parts

        if own:
            trainer.compute_loss = compute_loss
        if kind == "own mean":
            trainer.model_accepts_loss_kwargs = False
        seen = []
        hook = reg.regularizer.centroids.register_post_accumulate_grad_hook(
            lambda p, seen=seen: seen.append(p.grad.clone())
        )
        noticed = kind == "mean" and parts > 1  # how the cross-entropy grows, and MVSC does not
        with pytest.warns(UserWarning, match="adds up") if noticed else nullcontext():
            trainer.train()
        hook.remove()
        gradients[parts] = [seen[parts - 1], seen[-1]]
    for parts in (2, 4):
        assert_close(gradients[parts], gradients[1])
    centroids = reg.regularizer.centroids
    (expected,) = torch.autograd.grad(reg.regularizer.pull(centroids), centroids)
    assert_close(gradients[1], [expected, expected])


def test_losses_that_the_trainer_adds_up_as_sums_are_noticed(make_trainer):
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2)
    attach_to_trainer(trainer)
    told = "adds up the losses of UperNetForSemanticSegmentation over the parts and processes"
    with pytest.warns(UserWarning, match=told):
        trainer.train()
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2)
    trainer.model_accepts_loss_kwargs = False  # as it says
    attach_to_trainer(trainer)
    trainer.train()


def test_an_optimizer_without_the_centroids_is_refused_when_the_training_begins(make_trainer):
    trainer = make_trainer(max_steps=1)
    attach_to_trainer(trainer)
    make_own = trainer.create_optimizer

    def create_optimizer(*args, **kwargs):
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer
    with pytest.raises(ValueError, match="an optimizer that knows the centroids, got one without"):
        trainer.train()
    trainer.optimizer, trainer.create_optimizer = None, make_own
    trainer.train()


def test_the_weight_is_that_of_a_mean_over_processes_whatever_the_trainer_does(make_trainer):
    from mvsc.integrations.transformers import _Share

    trainer = make_trainer(gradient_accumulation_steps=4)
    share = _Share(trainer)
    trainer.current_gradient_accumulation_steps = 2
    trainer.accelerator.state.num_processes = 3
    found = {}
    for takes in (True, False):
        for average in (True, False):
            trainer.model_accepts_loss_kwargs = share.counted = takes
            trainer.args.average_tokens_across_devices = average
            # What the Trainer multiplies a loss by, from the same attributes.
            factor = (3 if takes and average else 1) / (1 if takes else 2)
            found[takes, average] = share() * factor
    trainer.accelerator.state.num_processes = 1
    assert_close(found, dict.fromkeys(found, 0.5))


def test_a_trainer_of_an_older_transformers_has_its_parts_in_its_arguments(make_trainer):
    from types import SimpleNamespace

    from mvsc.integrations.transformers import _Share

    class Old:
        args = SimpleNamespace(gradient_accumulation_steps=4)

    old = Old()
    assert _Share(old)() == 1
    old.model_accepts_loss_kwargs = True
    assert _Share(old)() == 0.25


def test_a_model_that_outlives_its_trainer_can_have_another(make_trainer):
    model = tiny_upernet()
    for groups in (1, 2):
        trainer = make_trainer(max_steps=1)
        trainer.model = trainer.model_wrapped = model
        reg = attach_to_trainer(trainer, groups=groups)
        trainer.train()
        assert reg.regularizer.centroids.grad is None  # as that of the model's parameters
        del trainer, reg
    images, labels = batch()
    model(images, labels=labels).loss.backward()  # In a loop of one's own, whose loss is whole.


@pytest.mark.parametrize("saved", ["decode_head", "decode_head.classifier"])
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_trains_pefts_copy_of_the_head(tmp_path, saved):
    peft = pytest.importorskip("peft")
    hf = pytest.importorskip("transformers")
    base = tiny_segformer()
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = [name for name in ("query", "value", "q_proj", "v_proj") if name in names]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[saved])
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, CLASSES, (4, 32, 32))
    dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    args = hf.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        learning_rate=0.1,
    )
    trainer = hf.Trainer(model, args, train_dataset=dataset)
    reg = attach_to_trainer(trainer)
    drawn = reg.regularizer.centroids.detach().clone()
    classifier = model.get_submodule(reg.classifier_path).weight.detach().clone()
    trainer.train()
    assert "modules_to_save.default" in reg.classifier_path
    assert reg.regularizer.step == 2
    assert not torch.equal(reg.regularizer.centroids, drawn)
    assert not torch.equal(model.get_submodule(reg.classifier_path).weight, classifier)
    assert (tmp_path / "checkpoint-2" / "mvsc.pt").exists()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


# Lightning.


@pytest.mark.filterwarnings("ignore")
def test_lightning_saves_the_centroids_and_the_model_apart(tmp_path):
    lightning = pytest.importorskip("lightning")
    example = load(ROOT / "examples" / "integrations" / "lightning_module.py")
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, example.CLASSES, (2, 64, 64))
    data = torch.utils.data.DataLoader([(images[0], labels[0]), (images[1], labels[1])], 2)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module = example.Segmenter()
    trainer.fit(module, data)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    restored = example.Segmenter()
    restored.load_state_dict(saved["state_dict"])
    assert_close(restored.reg.regularizer.centroids, module.reg.regularizer.centroids)
    apart = {key for key in saved["state_dict"] if not key.startswith("model.")}
    assert apart == {"reg.regularizer.centroids", "reg.regularizer.step"}
