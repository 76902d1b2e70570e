import sys
from pathlib import Path

import pytest
import torch

# The oracle and the strategies are plain modules beside the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
