"""tools/environment.py, which `make demo` and `make test` call: its steps, and what it says when something is missing.

uv and the compilers are scripts here; that the real ones make a working environment is seen by whoever runs `make`.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "environment.py"
OLD = sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python"))

UV = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path

arguments = sys.argv[1:]
with open(os.environ["UV_LOG"], "a") as log:
    print(*arguments, "|", os.environ.get("UV_INDEX", ""), os.environ.get("UV_FIND_LINKS", ""), file=log)
if arguments[0] == "venv":
    python = Path(arguments[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\\necho marlin-convert: a remark of setup.py\\necho something else\\n")
    python.chmod(0o755)
if "torch" in arguments:
    print("Downloading a large file", flush=True)
    time.sleep(float(os.environ.get("UV_SLEEP", 0)))
    sys.exit(int(os.environ.get("UV_EXIT", 0)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of programs: uv and g++."""
    for name, text in (("uv", UV), ("g++", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(folder: Path, extra: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_")) and name != "CXX"}
    return subprocess.run(
        [sys.executable, SCRIPT, extra, folder / "venv"],
        cwd=folder,
        env={**kept, "PATH": str(folder / "bin"), "UV_LOG": str(folder / "log"), "PIP_CONFIG_FILE": os.devnull, **env},
        capture_output=True,
        text=True,
        check=False,
    )


OPTIONS = "--no-build-isolation --config-settings editable_mode=compat"


def test_every_step_is_said_with_its_time(folder: Path) -> None:
    done = environment(folder, "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(re.match(r" +\d+:\d\d  ", line) for line in lines)
    assert [re.sub(r"^ +\d+:\d\d  ", "", line) for line in lines[1:]] == [
        "a new environment",
        "build tools",
        "native libraries",
        "a remark of setup.py",
        "packages: torch",
        "packages: Transformers and the rest",
        "installed",
    ]
    assert [(folder / "venv" / name).exists() for name in (".run", ".dev")] == [True, False]
    installed = [line.split(" | ")[0] for line in (folder / "log").read_text().splitlines() if " install " in line]
    python = folder / "venv" / "bin" / "python"
    assert installed == [
        f"pip install --python {python} setuptools>=77",
        f"pip install --python {python} -c constraints.txt torch",
        f"pip install --python {python} -c constraints.txt {OPTIONS} -e .[run]",
    ]


def test_an_environment_for_the_tests_serves_the_demo_too(folder: Path) -> None:
    assert environment(folder, "dev").returncode == 0
    assert [(folder / "venv" / name).exists() for name in (".run", ".dev")] == [True, True]
    assert "-e .[dev]" in (folder / "log").read_text()


def test_a_long_step_is_not_silent(folder: Path) -> None:
    done = environment(folder, "run", UV_SLEEP="6")
    assert "  … packages: torch: Downloading a large file" in done.stdout


def test_a_step_that_fails_shows_what_its_program_said(folder: Path) -> None:
    done = environment(folder, "run", UV_EXIT="3")
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first == "Downloading a large file"
    assert last.startswith("packages: torch: `")
    assert last.endswith("ended with exit code 3.")
    assert not (folder / "venv" / ".run").exists()


def test_uv_takes_packages_from_where_pip_would(folder: Path) -> None:
    (folder / "pip.conf").write_text("[global]\nextra-index-url = file:///a file:///b\nfind-links = /wheels\n")
    environment(folder, "run", PIP_CONFIG_FILE=str(folder / "pip.conf"), UV_FIND_LINKS="/mine")
    line = (folder / "log").read_text().splitlines()[-1]
    assert line.endswith(" | file:///a file:///b /mine")


def test_without_a_compiler_nothing_is_begun(folder: Path) -> None:
    (folder / "bin" / "g++").unlink()
    done = environment(folder, "run")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("there is no C++ compiler g++: install g++ (Debian, Ubuntu: apt install g++), or")
    assert done.stderr.count("\n") == 1
    assert not (folder / "log").exists()
    assert "no C++ compiler clang++-99" in environment(folder, "run", CXX="clang++-99 -O1").stderr


@pytest.mark.skipif(not OLD, reason="no Python older than 3.10 here")
@pytest.mark.parametrize("python", OLD, ids=lambda path: path.parts[-3])
def test_an_older_python_is_refused_in_one_sentence(python: Path) -> None:
    done = subprocess.run([python, SCRIPT, "run"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"marlin-convert needs Python 3.10 or newer, and {python} is 3.")
    assert done.stderr.count("\n") == 1


def test_the_script_has_nothing_that_an_older_python_cannot_compile() -> None:
    """As far as this Python can tell: what stands before the check of the version must be reached."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
