"""What README, docs and docstrings say is run; what they link to is there."""

import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import runpy
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mutations
import mvsc
from mvsc import diagnostics, equations, plotting
from recipes import RECIPES

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
    if "torch.optim.Muon" in block and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
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


MODULES = [
    "mvsc",
    *(f"mvsc.{module.name}" for module in pkgutil.iter_modules(mvsc.__path__) if not module.ispkg),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("module", [equations, diagnostics], ids=lambda module: module.__name__)
def test_every_pure_function_has_an_example_that_runs(module):
    for function in functions(module):
        tests = doctest.DocTestFinder(recurse=False).find(function, globs={})
        assert any(test.examples for test in tests), function.__name__


def functions(module):
    """The public functions that a module defines itself."""
    return [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ] or pytest.fail(f"{module.__name__} defines no function")


def test_every_public_name_has_a_place_in_the_api_page():
    page = (ROOT / "docs" / "api.rst").read_text("utf-8")
    for name in mvsc.__all__:
        place = "module" if name == "equations" else r"\w+"
        assert re.search(rf"^\.\. auto{place}:: mvsc\.{name}$", page, re.MULTILINE), name


def test_commands_name_recipes_that_there_are():
    recipes = ROOT / "examples" / "recipes"
    told = [*PAGES, *recipes.glob("*.py"), *recipes.glob("*.yaml")]
    texts = "\n".join(page.read_text("utf-8") for page in told)
    named = re.findall(r"(?:train|ablate|ray_train)\.py ([a-z0-9]+-[\w-]+)", texts)
    assert len(named) >= 10
    assert set(named) <= set(RECIPES)


@pytest.mark.parametrize("module", [mvsc, equations, diagnostics, plotting])
def test_everything_public_is_described_and_on_the_api_page(module):
    page = (ROOT / "docs" / "api.rst").read_text("utf-8")
    own = [getattr(mvsc, name) for name in mvsc.__all__] if module is mvsc else functions(module)
    for value in own:
        assert inspect.getdoc(value), value
    if module is not mvsc:
        assert f".. automodule:: {module.__name__}\n   :members:\n" in page
        for function in own:
            told = inspect.getdoc(function)
            for name in re.findall(r"Arguments as in :func:`(\w+)`", told):
                told += "\n" + inspect.getdoc(getattr(module, name))
            for argument in inspect.signature(function).parameters:
                assert re.search(rf"^ +{argument}: ", told, re.MULTILINE), (function, argument)
            if inspect.signature(function).return_annotation is not None:
                assert "\nReturns:\n" in told, function


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = page.read_text("utf-8")
        found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        found += re.findall(r"^```\{(?:image|include|executed)\} (\S+)", text, re.MULTILINE)
        for link in found:
            if not re.match(r"[a-z]+:", link):
                yield pytest.param(page, link, id=f"{page.name}-{link}")


@pytest.mark.parametrize(("page", "link"), list(links()))
def test_a_relative_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    assert target.is_relative_to(ROOT)
    if anchor:
        assert anchor in anchors(target)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_every_file_that_is_named_is_there(page):
    text = page.read_text("utf-8")
    named = re.findall(r"(?<![\w./])((?:examples|benchmarks|docs|tests|mvsc)/[\w./-]*\w)", text)
    for path in set(named):
        assert (ROOT / path).exists() or "NAME" in path or path.startswith("docs/_build"), path


def test_every_page_is_in_the_table_of_contents():
    pages = {path.stem for path in (ROOT / "docs").glob("*") if path.suffix in {".md", ".rst"}}
    trees = re.findall(
        r"^```\{toctree\}\n(.*?)^```",
        "\n".join(path.read_text("utf-8") for path in PAGES),
        re.MULTILINE | re.DOTALL,
    )
    listed = {line.strip() for tree in trees for line in tree.splitlines() if line[:1] != ":"}
    assert pages - listed == {"index"}


def test_every_option_of_the_regularizer_has_a_row_in_the_docs():
    page = (ROOT / "docs" / "readings.md").read_text("utf-8")
    for name in list(inspect.signature(mvsc.MVSCRegularizer).parameters)[2:]:
        assert f"| `{name}` |" in page, name


def test_every_proof_on_the_contract_page_exists():
    page = (ROOT / "docs" / "contract.md").read_text("utf-8")
    proofs = set(re.findall(r"`(test_\w+|AnyOrderOfEvents)`", page))
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^(?:def|class) (\w+)", tests, re.MULTILINE))
    assert len(proofs) > 40
    assert proofs <= defined


def test_the_contract_begins_with_ten_promises_and_their_tests():
    page = (ROOT / "docs" / "contract.md").read_text("utf-8")
    promises = re.findall(r"^(\d+)\. \*\*(?:(?!^\d+\. |^#).*\n)*", page, re.MULTILINE)
    assert promises == [str(number) for number in range(1, 11)]
    for each in re.split(r"^\d+\. ", page.partition("\n## ")[0], flags=re.MULTILINE)[1:]:
        assert "`test_" in each


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    prose = re.sub(r"^```.*?^```|^!.*?$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.M | re.S)
    assert len(text.splitlines()) <= 96
    assert len(re.findall(r"(?<!\w)[-+\N{MINUS SIGN}]?\d+(?:\.\d+)?", prose)) <= 22


def test_the_readmes_picture_is_the_scripts(tmp_path):
    image = pytest.importorskip("PIL.Image")
    figure = runpy.run_path(str(ROOT / "docs" / "gallery" / "method.py"))["figure"]
    figure.savefig(tmp_path / "drawn.png", dpi=160)
    kept, drawn = image.open(ROOT / "docs" / "method.png"), image.open(tmp_path / "drawn.png")
    assert kept.size == drawn.size
    difference = np.abs(np.asarray(kept, dtype=float) - np.asarray(drawn, dtype=float))
    # Another version of matplotlib may draw edges and letters a little otherwise.
    same_version = kept.info["Software"] == drawn.info["Software"]
    assert difference.mean() <= (0 if same_version else 2)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_interval_in_the_prose_is_one_of_the_kept_scores(page):
    report = tables_of_the_study()
    measured = (report.RESULTS / "report.md").read_text("utf-8")
    for cells in report.load(report.RESULTS).values():
        for pair, name in itertools.product(itertools.permutations(cells, 2), report.SCORES):
            measured += report.gain(report.paired(cells, *pair, name)) + "\n"
    text = " ".join((ROOT / page).read_text("utf-8").replace("\N{MINUS SIGN}", "-").split())
    bound = r"[+-]\d+\.\d+"
    told = re.findall(rf"([+-]?\d\.\d+)(?: mIoU| mAcc| points)? (\[{bound}, {bound}\])", text)
    assert told
    for value, interval in told:
        assert f"{value if value[0] in '+-' else '+' + value} {interval}" in measured


@pytest.mark.parametrize(
    ("head", "name"), [("deeplabv3plus", "DeepLabV3+"), ("segformer", "SegFormer's head")]
)
def test_the_readme_has_the_numbers_that_were_kept(head, name):
    report = tables_of_the_study()
    cells = report.load(report.RESULTS)["large", head]
    plain, ours = ([cells[arm][seed]["mIoU"] for seed in range(5)] for arm in ("ce", "mvsc"))
    gain = report.gain([after - before for before, after in zip(plain, ours, strict=True)])
    row = f"| {name} | {statistics.mean(plain):.2f} | {statistics.mean(ours):.2f} | {gain} |"
    assert row in (ROOT / "README.md").read_text("utf-8").replace("\N{MINUS SIGN}", "-")


def tables_of_the_study():
    pytest.importorskip("scipy")
    return importlib.import_module("report")


def test_every_bug_to_be_planted_still_has_its_place():
    for name, line, wrong, _ in mutations.BUGS:
        source = (ROOT / "mvsc" / f"{name}.py").read_text("utf-8")
        assert line in source, line
        assert line != wrong
