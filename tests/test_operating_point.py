"""A prior is shifted as the curve says: at the logits, or in the bias of written weights."""

from dataclasses import replace

import pytest
import torch

import tiny_data

pytest.importorskip("segmentation_models_pytorch")

import curve
import evaluate
import operating_point
import prior
import weights
from data import open_split
from operating_point import Settings, chosen_at, main, on_unseen
from recipes import Recipe
from train import train

TAUS = (-2.0, 0.0, 2.0)
POINTS = {"mIoU": [9.0, 10.0, 12.0, 11.0], "aAcc": [51.0, 50.0, 48.0, 49.5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_data.make_folder(tmp_path_factory.mktemp("data") / "folder", train=5)


@pytest.fixture(scope="module", params=["smp/Segformer/tu-test_resnet", "segformer-b0"])
def trained(request, folder, tmp_path_factory):
    """Weights of a model with a 3x3 or a 1x1 classifier, trained for a moment with MVSC."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of other tests in this process
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {"model": request.param, "decoder_dim": 16, "pretrained": False, "workers": 0}
    sizes = {"scale": (64, 48), "crop": (32, 32), "steps": 4, "batch_size": 4, "warmup": 1}
    train(Recipe(data_root=folder, out=out, cpu=True, lr=1e-3, **settings, **sizes))
    AcceleratorState._reset_state()
    return out / "last.safetensors"


def judge(path, folder, **options):
    device = torch.device("cpu")
    segmenter, recipe, _ = evaluate.load_segmenter(path, device)
    data = open_split("folder", folder, "val")
    return evaluate.evaluate(segmenter, data, replace(recipe, workers=0), device, **options)


def quiet(trained, tmp_path, **options):
    """Settings of a run in this process."""
    out = tmp_path / "out.safetensors"
    return Settings(trained, taus=TAUS, out=out, workers=0, device="cpu", **options)


def test_what_is_written_is_the_model_with_the_shift_in_its_bias(
    trained, folder, tmp_path, monkeypatch
):
    shares = prior.log_shares(open_split("folder", folder, "train"))
    shifted = judge(trained, folder, shift=2.0 * shares)
    assert shifted["iou"] != judge(trained, folder)["iou"]
    monkeypatch.setattr(operating_point, "chosen_at", lambda *_: TAUS.index(2.0))
    settings = quiet(trained, tmp_path)
    main(settings)
    assert judge(settings.out, folder)["iou"] == pytest.approx(shifted["iou"], abs=0.05)
    (before, about), (after, kept) = map(weights.load_weights, (trained, settings.out))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert (before.keys(), about | {"tau": 2.0}) == (after.keys(), kept)
    assert [name.rpartition(".")[2] for name in changed] == ["bias"]
    torch.testing.assert_close(before[changed[0]] - after[changed[0]], 2.0 * shares)
    assert settings.out.with_suffix(".png").stat().st_size > 1000


def test_the_curve_has_the_scores_of_each_shift_and_of_each_half(trained, folder):
    shares = prior.log_shares(open_split("folder", folder, "train"))
    found = curve.Curve(shares, torch.device("cpu"), TAUS)
    plain = judge(trained, folder, look=found.look)
    points = found.points()
    assert {name: points[name][1] for name in points} == {name: plain[name] for name in points}
    for number, tau in enumerate(TAUS):
        shifted = judge(trained, folder, shift=tau * shares)
        assert points["mIoU"][number] == pytest.approx(shifted["mIoU"], abs=0.05)
    assert len(found.halves()) == 2
    whole = found.confusions.sum(dim=0)
    assert whole.sum(dim=(1, 2)).unique().numel() == 1
    assert (found.confusions.sum(dim=(2, 3)) > 0).all()


def test_the_table_says_what_is_chosen_and_what_it_gains_elsewhere(
    trained, folder, tmp_path, capsys
):
    main(quiet(trained, tmp_path, max_loss=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tau", "mIoU", "mAcc", "aAcc"]
    rows = [line.split() for line in lines[1:4]]
    assert [float(row[0]) for row in rows] == list(TAUS)
    (chosen,) = (row for row in rows if row[-1] == "chosen")
    assert float(chosen[3]) >= float(rows[1][3])
    assert lines[4].startswith("Chosen on one half of the images and judged on the other: mIoU")


def test_a_tau_is_chosen_within_the_budget():
    taus = (-1.0, 0.0, 1.0, 2.0)
    chosen = [taus[chosen_at(POINTS, taus, loss)] for loss in (None, 2.0, 1.0, 0.5, 0.4, 0.0)]
    assert chosen == [1.0, 1.0, 2.0, 2.0, 0.0, 0.0]


def test_what_is_gained_is_judged_on_the_other_half():
    taus = (-1.0, 0.0, 1.0, 2.0)
    other = {"mIoU": [5.0, 4.0, 3.0, 2.0], "aAcc": [30.0, 31.0, 32.0, 33.0]}
    # The first half chooses 1.0, which gives -1 and +1 on the second; the second -1.0.
    assert on_unseen([POINTS, other], taus, None) == ((-1 - 1) / 2, (1 + 1) / 2)


def test_evaluate_shifts_the_prior_too(trained, folder, capsys):
    settings = evaluate.Settings(trained, tau=2.0, workers=0, device="cpu")
    evaluate.main(settings)
    shares = prior.log_shares(open_split("folder", folder, "train"))
    expected = judge(trained, folder, shift=2.0 * shares)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"mIoU {expected['mIoU']:.2f}  ")


def test_a_classifier_without_bias_gets_one_only_if_asked(trained, folder, tmp_path, monkeypatch):
    build = evaluate.build

    def without_bias(recipe, classes):
        segmenter = build(recipe, classes)
        path = operating_point.find_classifier(segmenter.model)
        segmenter.model.get_submodule(path).bias = None
        return segmenter

    monkeypatch.setattr(evaluate, "build", without_bias)
    tensors, about = weights.load_weights(trained)
    with torch.device("meta"):
        path = operating_point.find_classifier(build(Recipe.from_dict(about["recipe"]), 3).model)
    del tensors[f"{path}.bias"]
    bare = tmp_path / "bare.safetensors"
    weights.save_weights(bare, tensors, **about)
    with pytest.raises(ValueError, match="must have a bias .* Use --add-bias to give it one"):
        main(quiet(bare, tmp_path))
    settings = quiet(bare, tmp_path, add_bias=True)
    monkeypatch.setattr(operating_point, "chosen_at", lambda *_: TAUS.index(2.0))
    main(settings)
    shares = prior.log_shares(open_split("folder", folder, "train"))
    added = weights.load_weights(settings.out)[0][f"{path}.bias"]
    torch.testing.assert_close(added, -2.0 * shares)
    expected = judge(bare, folder, shift=2.0 * shares)
    assert judge(settings.out, folder)["iou"] == pytest.approx(expected["iou"], abs=0.05)


def test_a_class_that_never_occurs_has_no_share(tmp_path):
    folder = tiny_data.make_folder(tmp_path / "folder", train=3)
    with (folder / "classes.txt").open("a") as file:
        file.write("unicorn\n")
    with pytest.raises(ValueError, match="no training image shows unicorn"):
        prior.log_shares(open_split("folder", folder, "train"))


def test_a_negative_budget_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_loss must be at least 0 points .* got -1"):
        main(Settings(tmp_path / "none.safetensors", max_loss=-1.0))
    with pytest.raises(ValueError, match="max_loss must be at least 0 points .* got nan"):
        main(Settings(tmp_path / "none.safetensors", max_loss=float("nan")))
    with pytest.raises(ValueError, match=r"taus must be numbers from -100 to 100, got \(nan,\)"):
        main(Settings(tmp_path / "none.safetensors", taus=(float("nan"),)))
    for tau in (float("nan"), 1e39):
        with pytest.raises(ValueError, match="tau must be a number from -100 to 100, got"):
            evaluate.main(evaluate.Settings(tmp_path / "none.safetensors", tau=tau, device="cpu"))


def test_a_prior_is_not_shifted_twice(trained, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(operating_point, "chosen_at", lambda *_: TAUS.index(2.0))
    settings = quiet(trained, tmp_path)
    main(settings)
    again = quiet(settings.out, tmp_path / "again")
    with pytest.raises(
        ValueError, match=r"shifted by tau=2\.0\. Name the weights that it was made"
    ):
        main(again)
    with pytest.raises(ValueError, match=r"shifted by tau=2\.0"):
        evaluate.main(evaluate.Settings(settings.out, tau=0.5, workers=0, device="cpu"))
    evaluate.main(evaluate.Settings(settings.out, workers=0, device="cpu"))


def test_of_taus_that_are_equal_the_model_as_it_is_is_taken():
    points = {"mIoU": [5.0, 5.0, 5.0], "aAcc": [9.0, 9.0, 9.0]}
    assert chosen_at(points, (-1.0, 0.0, 1.0), None) == 1


def test_a_half_without_a_label_judges_nothing(trained, folder, tmp_path):
    curve = operating_point.Curve(torch.zeros(2), torch.device("cpu"), (0.0,))
    labelled, ignored = torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255)
    for label in (labelled, ignored):
        curve.look(torch.randn(2, 2, 2), label)
    assert curve.halves() == []
    curve.look(torch.randn(2, 2, 2), labelled)
    curve.look(torch.randn(2, 2, 2), labelled)
    assert len(curve.halves()) == 2


@pytest.mark.parametrize("out", ["curve.png", "folder.safetensors"])
def test_weights_are_written_to_a_file_of_weights_alone(trained, folder, tmp_path, out):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"out must be a file that ends in \.safetensors"):
        main(replace(quiet(trained, tmp_path), out=tmp_path / out))


def test_the_weights_themselves_are_not_written_over(trained, folder, tmp_path):
    settings = quiet(trained, tmp_path)
    before = settings.weights.read_bytes()
    with pytest.raises(ValueError, match="out must be another file than the weights, which are"):
        main(replace(settings, out=settings.weights.parent / "." / settings.weights.name))
    assert settings.weights.read_bytes() == before


def test_the_folder_of_what_is_written_is_made(trained, folder, tmp_path):
    out = tmp_path / "new" / "x.safetensors"
    main(replace(quiet(trained, tmp_path), out=out))
    assert out.is_file()
    assert out.with_suffix(".png").is_file()
