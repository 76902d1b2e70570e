"""The benchmarks run, and the ways that they compare agree; how fast they are is no test."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


NAMES = ("segment_mean", "sums", "step", "shapes", "scaling", "compile", "import", "loader")


@pytest.mark.parametrize("name", NAMES)
def test_quick_mode_runs_and_writes_nothing(name, monkeypatch, tmp_path):
    if name == "step":
        pytest.importorskip("pytorch_metric_learning")
        pytest.importorskip("transformers")
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
