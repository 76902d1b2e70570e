"""What is released: the files in it, what runs of it in a bare place, and the supply chain."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mvsc

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PARTS = ("mvsc", "examples", "benchmarks", "docs")
CODE = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]


def imported_from_mvsc(path):
    """Return the modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mvsc":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mvsc."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_run_one_way():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = text.partition("**Imports run one way.**")[2].partition(".\n-")[0]
    order = re.findall(r"`(\w+)`", listed)
    files = {path.stem: path for path in (ROOT / "mvsc").glob("*.py") if path.stem != "__init__"}
    assert sorted(order) == sorted([*files, "integrations"])
    for name, path in files.items():
        assert imported_from_mvsc(path) <= set(order[: order.index(name)]), name
    for path in (ROOT / "mvsc" / "integrations").glob("*.py"):
        assert imported_from_mvsc(path) <= set(order) - {"integrations"}
    # The check can fail:
    assert imported_from_mvsc(files["attach"]) - set(order[: order.index("regularizer")])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the wheel from the sdist, as `python -m build` does."""
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    wheel, sdist = f"mvsc-{mvsc.__version__}-py3-none-any.whl", f"mvsc-{mvsc.__version__}.tar.gz"
    assert {path.name for path in folder.iterdir()} == {wheel, sdist}
    return folder / wheel, folder / sdist


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mvsc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "mvsc/py.typed" in package
    info = f"mvsc-{mvsc.__version__}.dist-info/"
    about = {info + name for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert names == package | about


def test_the_sdist_holds_what_is_in_the_tree_and_nothing_else(built):
    with tarfile.open(built[1]) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)
    names = {member.name.partition("/")[2] for member in members} - {"PKG-INFO"}
    assert {"mvsc/py.typed", "tests/data/regularizer-0.1.pt", "README.md", "LICENSE"} <= names
    git = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode == 0:  # Not in an sdist of its own.
        assert names <= set(listed.stdout.splitlines())


def test_the_metadata_is_what_an_index_accepts(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_wheel_alone_trains_a_step_without_a_warning(built, tmp_path):
    # A wheel is a zip file of what goes into the environment.
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    one_step = Path(__file__).with_name("one_step.py")
    command = [sys.executable, "-I", one_step, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == f"trained with {tmp_path}/mvsc/__init__.py\n", run.stderr


def test_importing_mvsc_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import mvsc"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_package_needs_torch_and_einops_and_nothing_else():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (line,) = re.findall(r"^dependencies = (.*)$", project, re.MULTILINE)
    assert [re.split(r"[>=]", each)[0] for each in ast.literal_eval(line)] == ["torch", "einops"]


def unsafe(source):
    """Return what in a source runs code that it reads, or writes where an archive says."""
    found, tree = [], ast.parse(source)
    # zipfile keeps what it writes inside the folder; tarfile, up to Python 3.13, only if asked.
    zipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "zipfile." in ast.unparse(node.items[0])
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            readers = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
            found += [name for name in names if name.partition(".")[0] in readers]
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name in ("exec", "eval") and isinstance(node.func, ast.Name):
                found.append(name)
            unpacks = name in ("extractall", "extract", "unpack_archive")
            safe = options.get("filter") == "'data'" or (node in zipped and not options)
            if unpacks and not safe:
                found.append(name)
            runs = ("system", "popen", "extract_archive", "download_and_extract_archive")
            if name in runs or ast.unparse(node.func) in ("torch.hub.load", "yaml.load"):
                found.append(name)
            allowed = {"weights_only": "True", "allow_pickle": "False", "shell": "False"}
            # A name in place of a constant may hold anything.
            found += [o for o, value in allowed.items() if options.get(o, value) != value]
            found += [option for option in options if option == "pickle_module"]
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_reads_a_pickle_or_unpacks_without_a_filter(path):
    assert unsafe(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=0)",
        "torch.load(path, pickle_module=dill)",
        "torch.hub.load(repository, name)",
        "yaml.load(text)",
        "archive.extractall(folder, filter='fully_trusted')",
        "numpy.load(path, allow_pickle=wanted)",
        "numpy.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(path)",
        "exec(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_what_is_unsafe_is_found(line):
    assert len(unsafe(line)) == 1
    assert unsafe("model.eval(); archive.extractall(folder, filter='data'); torch.load(path)") == []
    assert unsafe("with zipfile.ZipFile(path) as archive: archive.extractall(folder)") == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_pins_its_actions_and_asks_for_little(path):
    text = path.read_text("utf-8")
    uses = re.findall(r"^\s*-?\s*uses: (.*)$", text, re.MULTILINE)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert "\npermissions:\n  contents: read\n\n" in text
    assert text.count("permissions:") == 1 + (path.name == "release.yml")
    assert "write-all" not in text
    assert "pull_request_target" not in text
    assert "secrets." not in text
    # What is written by whoever opens a pull request may not become a part of a command.
    assert not re.search(r"run:.*\$\{\{", text)
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    permissions = re.findall(r"^\s+([a-z-]+): (?:read|write)$", text, re.MULTILINE)
    if path.name == "release.yml":
        assert permissions == ["contents", "id-token"]
        publish = text.partition("\n  publish:\n")[2]
        assert "environment: release" in publish
        assert "id-token: write" in publish
    else:
        assert permissions == ["contents"]


def test_there_are_tests_on_three_pythons_docs_a_release_and_a_policy():
    if not (ROOT / ".github").exists():
        pytest.skip("not in an sdist")
    assert [path.name for path in WORKFLOWS] == ["docs.yml", "release.yml", "tests.yml"]
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    assert len(set(re.findall(r"3\.1\d", tests))) >= 3
    assert (ROOT / "SECURITY.md").exists()


def test_what_builds_a_release_is_pinned_by_hash():
    path = ROOT / ".github" / "build-requirements.txt"
    if not path.exists():
        pytest.skip("not in an sdist")
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line), line
