"""Fixtures shared by the tests.

Helpers are imported where they are used: the tests of the CUDA kernels run where neither safetensors nor the rest of
what the package needs is installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cli import PATIENCE, PROGRAM, SECRET, Run

if TYPE_CHECKING:
    from tests.support.gptq_checkpoints import Source
    from tests.support.hub_server import Hub


def pytest_configure() -> None:
    # One thread of torch for each process: those of OpenMP wait for each other by spinning, which takes three times as
    # long for models as small as these when another process wants the CPU too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    give_children_the_default_signals()


@pytest.hookimpl(tryfirst=True)  # before the marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start the program, or a side of a measurement, in a process of its own are slow, all of them."""
    for item in items:
        if {"run", "online", "measured"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def give_children_the_default_signals() -> None:
    """Give the programs that tests start the default action of signals, also where these are ignored here: of SIGINT in
    the background of a script, of SIGHUP under nohup. A handler that does nothing keeps them ignored in this process
    and, unlike SIG_IGN, is not inherited.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The command line, run in this process, handles signals and ignores them at its end: neither the next test nor the
    programs that it starts must find them so. Nor this one, if a fixture of its module ran the command line.
    """
    give_children_the_default_signals()
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


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
        command = [*PROGRAM, *map(str, args)]
        return Run(
            subprocess.run(
                command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=PATIENCE, check=False
            )
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

    def online(*args: object, env: dict[str, str] | None = None) -> Run:
        result = run(*args, env={**hub.settings, **(env or {})})
        assert SECRET not in result.out + result.err
        return result

    return online


@pytest.fixture
def main(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run the command line in this process, where a test can break something inside."""
    from marlin_convert.cli import main as program

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def main(*args: object) -> Run:
        capsys.readouterr()
        code = 0
        try:
            program([str(a) for a in args])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Run(subprocess.CompletedProcess([], code, out, err))

    return main
