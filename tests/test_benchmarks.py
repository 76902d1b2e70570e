"""The benchmarks run, and the ways that they compare agree; how fast they are is no test."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batches import Launches
from mvsc import MVSCRegularizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


NAMES = ("segment_mean", "sums", "step", "shapes", "scaling", "compile", "import", "loader")


@pytest.mark.parametrize("name", NAMES)
def test_quick_mode_runs_and_writes_nothing(name, monkeypatch, tmp_path):
    if name == "step":
        for host in ("pytorch_metric_learning", "segmentation_models_pytorch", "transformers"):
            pytest.importorskip(host)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--device", "cpu"])
    before = set(BENCHMARKS.glob("results/*"))
    runpy.run_path(str(BENCHMARKS / f"bench_{name}.py"), run_name="__main__")
    assert set(BENCHMARKS.glob("results/*")) == before


def test_volumes_are_trained_with_and_without(monkeypatch, capsys):
    pytest.importorskip("monai")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--device", "cpu"])
    runpy.run_path(str(BENCHMARKS / "train_volumes.py"), run_name="__main__")
    assert "mIoU with MVSC" in capsys.readouterr().out


def test_a_way_that_is_wrong_is_found_before_it_is_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = runpy.run_path(str(BENCHMARKS / "bench_segment_mean.py"))
    wrong = {"wrong": lambda *arguments: 2 * bench["ours"](*arguments)}
    with pytest.raises(AssertionError, match="wrong"):
        bench["compare"]("cpu", "contiguous", bench["DTYPES"][0], 8, 3, 2, 1, wrong)


def test_operators_are_counted_as_the_tests_count_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    features, labels = torch.randn(2, 4, 6, 6, requires_grad=True), torch.zeros(2, 6, 6).long()
    reg, classifier = MVSCRegularizer(3, 4), torch.nn.Conv2d(4, 3, 1)

    def step():
        reg(features, labels, classifier).backward()

    step()  # The first step makes what is kept.
    with Launches() as launches:
        step()
    assert measure.count_operators(step) == launches.count > 0


def test_the_real_time_network_hands_out_what_enters_its_classifier(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(BENCHMARKS)
    model = importlib.import_module("realtime").BiSeNet(5).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96))
        again = model.classifier(output["features"])
    assert output["features"].shape == (1, 256, 8, 12)
    torch.testing.assert_close(output["out"], again)
    assert output["aux"].shape == (1, 5, 8, 12)
    assert output["aux 2"].shape == (1, 5, 4, 6)


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_sums")


def cells_of(kind):
    """Cells 0 to 6 of 2 x 90 pixels."""
    if kind == "one cell":
        return torch.full((2, 90), 3)
    cells = torch.randint(0, 7, (2, 90), generator=torch.Generator().manual_seed(0))
    # Cells without a pixel, first, last and between, and one of many bags.
    return cells.where((cells > 0) & (cells != 4) & (cells < 6), 2)


@pytest.mark.filterwarnings("ignore:Sparse")  # torch calls its own sparse tensors a beta
@pytest.mark.parametrize("kind", ["one cell", "some without pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_way_gives_the_sums_of_a_loop(sums, monkeypatch, layout, dtype, kind):
    monkeypatch.setattr(sums, "_ONE_HOT", 7 * 40)  # products by parts of an image
    cells = cells_of(kind)
    # Whole numbers: float32 adds them exactly, in any order.
    features = torch.arange(2 * 8 * 90).remainder(251).sub(125).view(2, 8, 90).to(dtype)
    if layout == "channels_last":
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.zeros(7, 8)
    for image, its_cells in zip(features.float(), cells, strict=True):
        for pixel, cell in enumerate(its_cells.tolist()):
            expected[cell] += image[:, pixel]
    order = sums.cell_order(cells, 7)
    shuffled = sums.cell_order(cells, 7, torch.Generator().manual_seed(0))
    for name, add in sums.SUMS.items():
        torch.testing.assert_close(add(features, cells, 7), expected, rtol=0, atol=0, msg=name)
    for name, add in sums.ORDERED.items():
        for each in (order, shuffled):
            torch.testing.assert_close(add(features, each), expected, rtol=0, atol=0, msg=name)


def test_three_parts_are_the_float32_they_were_cut_from(sums):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1000
    high, middle, low = sums.exact_parts(values)
    assert high.dtype == middle.dtype == low.dtype == torch.bfloat16
    exact = high.double() + middle.double() + low.double()
    torch.testing.assert_close(exact, values.double(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sum_that_is_not_repeatable_is_found_out(sums, monkeypatch):
    def noisy(features, cells, num_cells):
        return sums.index_add_rows(features, cells, num_cells) + 1e-6 * torch.rand(1)

    monkeypatch.setattr(sums, "SUMS", {"noisy": noisy})
    sums.compare(torch.device("cpu"), (2, 8, 8, 3), "contiguous", torch.float32)
    monkeypatch.setattr(sums, "DETERMINISTIC", {"noisy"})
    with pytest.raises(AssertionError, match="not deterministic"):
        sums.compare(torch.device("cpu"), (2, 8, 8, 3), "contiguous", torch.float32)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_way_that_a_device_lacks_is_a_word_in_the_table_and_never_wins(sums, monkeypatch):
    def lacking(*arguments):
        raise NotImplementedError("not here")

    monkeypatch.setitem(sums.SUMS, "lacking", lacking)
    arguments = torch.device("cpu"), (2, 8, 8, 3), "contiguous", torch.float32
    times = sums.compare(*arguments, strict=False)
    assert times["sum: lacking"] == "fails"
    assert sums.fastest(times)["sum"] in {*sums.SUMS, *sums.ORDERED} - {"lacking"}
    with pytest.raises(NotImplementedError):
        sums.compare(*arguments)


def test_the_winner_is_named_with_its_distance_from_todays_and_from_the_limits(sums):
    times = {"a plain read": 1.0, "a plain write": 2.0, "sum: today's": 6.0, "sum: a": 3.0}
    times |= {"sum: one-hot products": 4.0, "sum: b": "wrong", "gradient: today's": 5.0}
    found = sums.fastest(times)
    assert (found["sum"], found["sum: ms"], found["sum: over a plain read"]) == ("a", 3, 3)
    assert found["sum: today's over it"] == 2
    assert found["deterministic sum"] == "one-hot products"
    assert found["deterministic over fastest"] == pytest.approx(4 / 3)
    assert (found["gradient"], found["gradient: over a plain write"]) == ("today's", 2.5)


def test_a_result_is_one_file_that_the_docs_show(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.write("bench_x", torch.device("cpu"), {"Times": [{"what": "a", "ms": 1.23456}], "": []})
    (path,) = tmp_path.iterdir()
    assert path.name == "bench_x-cpu.md"
    assert path.read_text().endswith("**Times**\n\n| what | ms |\n| --- | --- |\n| a | 1.23 |\n")
    # All that is kept is shown somewhere; what a run on one's own machine adds is one's own.
    pages = "".join(page.read_text("utf-8") for page in (BENCHMARKS.parent / "docs").glob("*.md"))
    listed = subprocess.run(
        ["git", "ls-files", "results"], cwd=BENCHMARKS, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        assert Path(name).name.rpartition("-")[0] in pages
