"""Fixtures shared by the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptq import Source, write_source


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A plain, convertible checkpoint: two layers, three other tensors."""
    return write_source(tmp_path / "source")


class Run:
    """What the program printed and how it ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """Run `marlin-convert` with arguments, as a user's shell would; never with the user's own Hub settings."""

    def run(*args: object, env: dict[str, str] | None = None, cwd: Path = tmp_path) -> Run:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf-home"), "COLUMNS": "200", **(env or {})}
        command = [sys.executable, "-m", "marlin_convert.cli", *map(str, args)]
        return Run(
            subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False)
        )

    return run
