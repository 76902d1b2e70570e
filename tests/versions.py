"""Run the tests in an environment of its own for the oldest and the newest of everything.

    python tests/versions.py oldest     # Python 3.10, the lower bounds of pyproject.toml
    python tests/versions.py newest     # Python 3.13, the newest that pip finds
    python tests/versions.py newest tests/test_state.py    # what follows is for pytest

Needs these Pythons on the PATH and, one environment at a time, up to 8 GB in the temporary
folder (TMPDIR). Prints a row for the table of versions in docs/contract.md.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = {"oldest": "python3.10", "newest": "python3.13"}
HOSTS = ("accelerate", "safetensors", "transformers")  # old ones lack the models that are tested
SHOWN = ("torch", "einops", "numpy", "timm", "transformers", "pytest", "hypothesis")


def lower_bounds() -> list[str]:
    """Return each requirement of the package and its tests at the oldest version it allows.

    But for the hosts of the integrations, which come as new as pip finds them.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [
        project["dependencies"],
        *(extras[e] for e in ("plot", "quickstart", "examples", "test")),
    ]
    lines = [line for lines in named for line in lines if not line.startswith(HOSTS)]
    return [line.replace(">=", "==") for line in lines if ">=" in line]


def versions(python: Path) -> list[str]:
    code = f"import importlib.metadata as m; print(*[m.version(n) for n in {SHOWN}])"
    return [sys_version(python), *run(python, "-c", code).split()]


def sys_version(python: Path) -> str:
    return run(python, "-c", "import platform; print(platform.python_version())").strip()


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(which: str, *arguments: str) -> None:
    interpreter = shutil.which(PYTHONS[which])
    if interpreter is None:
        sys.exit(f"{PYTHONS[which]} must be on the PATH.")
    with tempfile.TemporaryDirectory(prefix=f"mvsc-{which}-") as folder:
        run(interpreter, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(lower_bounds() if which == "oldest" else []))
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        # First in a bare place, as a user has it: the package and what it needs.
        run(python, *install, str(ROOT))
        print(run(python, "-I", ROOT / "tests" / "one_step.py"), end="", flush=True)
        run(python, *install, f"{ROOT}[test]")
        tested = subprocess.run(
            # Not `python -m pytest`: what is installed is tested, not the tree.
            [Path(folder) / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        print(tested.stdout)
        result = re.sub(r" in .*", "", tested.stdout.strip().splitlines()[-1])
        print(f"| {' | '.join([which, *versions(python), result.strip('= ')])} |")
    sys.exit(tested.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
