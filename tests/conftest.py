import os

# Maps are tiny here: a second thread gains nothing, and beside other processes it costs most of
# the time. Before torch is imported, and in the environment, so that every process that a test
# starts has it too.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import Phase, settings

from tiny_nets import CLASSES

# For tests/mutations.py, which asks only whether a test fails: the smallest example that shows
# it would take longer to find than the first.
settings.register_profile(
    "no shrinking", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Hide a GPU from all tests but those of test_cuda.py: bitwise claims are about a CPU."""
    if request.module.__name__ != "test_cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def images():
    """A batch for the segmenters of tiny_nets.py."""
    return torch.randn(2, 3, 12, 12)


@pytest.fixture
def labels():
    return torch.randint(0, CLASSES, (2, 12, 12))
