"""The package as `pip install .` brings it, without torch and Transformers: what works, and what says that
it needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Run
from tests.support.gptq_checkpoints import Source

pytestmark = pytest.mark.slow

ADVICE = 'pip install "torch>=2.6" "transformers>=5.6"'


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python finds neither of the two."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(('torch', 'transformers')))\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path / "bare"), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


def test_conversion_both_ways_and_verification(
    source: Source, tmp_path: Path, run: Callable[..., Run], bare: dict[str, str]
) -> None:
    done = run(source.folder, tmp_path / "out", "--verify", "--json", "--device", "cpu", env=bare)
    assert done.code == 0, done.err
    assert done.json()["ok"]
    assert run("verify", source.folder, tmp_path / "out", "--device", "cpu", env=bare).code == 0
    assert run("to-gptq", tmp_path / "out", tmp_path / "gptq", env=bare).code == 0


def test_the_demo_leaves_its_prompt_out(tmp_path: Path, run: Callable[..., Run], bare: dict[str, str]) -> None:
    done = run("demo", tmp_path / "out", env=bare)
    assert done.code == 0, done.err
    assert "verified  56 of 56 layers" in done.out
    assert f"no prompt was continued: this needs torch and transformers: {ADVICE}" in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "env", "needs"),
    [
        (["generate", "out", "--prompt", "x"], {}, "this needs torch and transformers"),
        (["bench"], {}, "this needs torch"),
        (["bench", "out", "--tokens"], {}, "this needs torch and transformers"),
        (["demo", "out"], {"MARLIN_CONVERT_NO_NATIVE": "1"}, "MARLIN_CONVERT_NO_NATIVE is set; what takes the native"),
    ],
)
def test_what_needs_them_says_so(
    run: Callable[..., Run], bare: dict[str, str], arguments: list[str], env: dict[str, str], needs: str
) -> None:
    done = run(*arguments, env={**bare, **env})
    assert done.code == 1
    assert needs in done.err
    assert ADVICE in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "code", ["import marlin_convert; marlin_convert.load", "import marlin_convert.hf", "marlin_convert.MarlinLinear"]
)
def test_from_python(bare: dict[str, str], code: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"import marlin_convert; {code}"],
        env={**os.environ, **bare},
        capture_output=True,
        text=True,
        check=False,
    )
    last = process.stderr.strip().splitlines()[-1]
    assert last == f"marlin_convert.errors.MissingPackageError: this needs torch and transformers: {ADVICE}."
