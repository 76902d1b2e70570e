"""The benchmarks run, and the ways that they compare agree; how fast they are is no test."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


NAMES = ("segment_mean", "sums", "step", "scaling", "compile", "import", "loader")


@pytest.mark.parametrize("name", NAMES)
def test_quick_mode_runs_and_writes_nothing(name, monkeypatch, tmp_path):
    if name == "step":
        pytest.importorskip("pytorch_metric_learning")
        pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--device", "cpu"])
    before = set(BENCHMARKS.rglob("*.json"))
    runpy.run_path(str(BENCHMARKS / f"bench_{name}.py"), run_name="__main__")
    assert set(BENCHMARKS.rglob("*.json")) == before


def test_a_way_that_is_wrong_is_found_before_it_is_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = runpy.run_path(str(BENCHMARKS / "bench_segment_mean.py"))
    wrong = {"wrong": lambda *arguments: 2 * bench["ours"](*arguments)}
    with pytest.raises(AssertionError, match="wrong"):
        bench["compare"]("cpu", "contiguous", bench["DTYPES"][0], 8, 3, 2, 1, wrong)
