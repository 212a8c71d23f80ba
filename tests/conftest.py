"""Fixtures shared by the tests.

Helpers are imported where they are used: the tests of the CUDA kernels run where neither safetensors nor the rest of
what the package needs is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import SECRET, Run

if TYPE_CHECKING:
    from tests.support.gptq_checkpoints import Source
    from tests.support.hub_server import Hub


def pytest_configure() -> None:
    # One thread of torch for each process: those of OpenMP wait for each other by spinning, which takes three times as
    # long for models as small as these when another process wants the CPU too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    give_children_the_default_signals()


def give_children_the_default_signals() -> None:
    """Give the programs that tests start the default action of signals, also where these are ignored here: of SIGINT in
    the background of a script, of SIGHUP under nohup. A handler that does nothing keeps them ignored in this process
    and, unlike SIG_IGN, is not inherited.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A plain, convertible checkpoint: two layers, three other tensors."""
    from tests.support.gptq_checkpoints import write_source

    return write_source(tmp_path / "source")


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


@pytest.fixture
def hub() -> Iterator[Hub]:
    from tests.support.hub_server import Hub

    with Hub() as server:
        yield server


@pytest.fixture
def online(hub: Hub, run: Callable[..., Run], tmp_path: Path) -> Callable[..., Run]:
    """Run the program with `hub` as the Hub, a cache of its own, and no token of the user's."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
                "NO_PROXY": "*"}  # fmt: skip

    def online(*args: object, env: dict[str, str] | None = None) -> Run:
        result = run(*args, env={**settings, **(env or {})})
        assert SECRET not in result.out + result.err
        return result

    return online


@pytest.fixture
def main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """Run `cli.main` in this process, where a test can break something inside; signals are put back afterwards."""
    from marlin_convert import cli

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}

    def main(*args: object) -> Run:
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(a) for a in args])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Run(subprocess.CompletedProcess([], code, out, err))

    yield main
    for number, handler in before.items():
        signal.signal(number, handler)
