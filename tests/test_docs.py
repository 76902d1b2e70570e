"""What README and docs say is run."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mutations
import mvsc

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Segmenter(nn.Module):
    """A model as a reader of the page has one."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(16, 21, 1)

    def forward(self, images):
        logits = self.classifier(self.encoder(images))
        return nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")


def blocks(page):
    found = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [pytest.param(block, id=f"{page.name}-{number}") for number, block in enumerate(found)]


def setting():
    """The names that a block may take for granted: those of any training loop."""
    model = Segmenter()
    features, labels = torch.randn(2, 16, 8, 8), torch.randint(0, 21, (2, 32, 32))
    return {
        "mvsc": mvsc,
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-4),
        "criterion": nn.CrossEntropyLoss(ignore_index=255),
        "images": torch.randn(2, 3, 32, 32),
        "labels": labels,
        "features": features.requires_grad_(),
        "logits": nn.functional.interpolate(model.classifier(features), labels.shape[1:]),
        "classifier": model.classifier,
    }


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)])
def test_a_python_block_runs_as_it_stands(block):
    names = setting()
    exec(compile(block, "block", "exec"), names)
    if "loss" in names:
        names["loss"].backward()
        assert names["loss"].isfinite()


def test_the_readme_has_the_two_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "examples/quickstart.py" in commands[0]
    assert "pytest" in commands[1]


def test_every_public_name_has_a_place_in_the_api_page():
    page = (ROOT / "docs" / "api.rst").read_text("utf-8")
    for name in mvsc.__all__:
        assert re.search(rf"\b{name}\b", page), name


def test_every_option_of_the_regularizer_has_a_row_in_the_docs():
    page = (ROOT / "docs" / "readings.md").read_text("utf-8")
    for name in list(inspect.signature(mvsc.MVSCRegularizer).parameters)[2:]:
        assert f"| `{name}` |" in page, name


def test_every_proof_on_the_contract_page_exists():
    pages = [(ROOT / "docs" / name).read_text("utf-8") for name in ("contract.md", "mutations.md")]
    proofs = set(re.findall(r"`(test_\w+|AnyOrderOfEvents)`", "".join(pages)))
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^(?:def|class) (\w+)", tests, re.MULTILINE))
    assert len(proofs) > 40
    assert proofs <= defined


def test_the_page_of_planted_bugs_has_them_all_and_each_was_noticed():
    page = (ROOT / "docs" / "mutations.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (\S+)\.py \| (.*) \| (.*) \|$", page, re.MULTILINE)
    bugs = [(str(i), name, meaning) for i, (name, _, _, meaning) in enumerate(mutations.BUGS)]
    assert [row[:3] for row in rows] == bugs
    for number, *_, noticed in rows:
        assert re.fullmatch(r"`\w+`|a crash|a hang", noticed), number
    assert f"plants {len(bugs)} realistic bugs" in (ROOT / "docs" / "contract.md").read_text(
        "utf-8"
    )


def test_every_bug_to_be_planted_still_has_its_place():
    for name, line, wrong, _ in mutations.BUGS:
        source = (ROOT / "mvsc" / f"{name}.py").read_text("utf-8")
        assert line in source, line
        assert line != wrong
