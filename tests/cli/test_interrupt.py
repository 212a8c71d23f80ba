"""A conversion stopped from outside at several points: no half result, no leftovers, the source untouched.

The program runs in a process of its own. At a chosen point it says "ready" and waits there, so that a signal finds
it exactly at that point, whatever the machine's speed.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from marlin_convert.conversion.convert import convert
from marlin_convert.options import Options
from tests.conversion.test_convert import assert_equal_to_source
from tests.support.cli import PATIENCE, running
from tests.support.gptq_checkpoints import Source, two_layers, write_source

pytestmark = pytest.mark.slow

CPU, FORCE = Options(device="cpu"), Options(device="cpu", force=True)

# Waiting ends when a signal's exception arrives (in the main thread), when the main thread has got it and shuts the
# pool of workers down (in a worker), or by SIGUSR1.
DRIVER = """
import os, signal, sys, threading
from marlin_convert import cli
from marlin_convert.conversion import convert, blocks as stream, products
from marlin_convert.checkpoint import output_folder, writer

released = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: released.set())
if "ignore SIGHUP" in sys.argv[2]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

shutdown = stream.ThreadPoolExecutor.shutdown
def release_and_shut_down(*args, **options):
    released.set()
    shutdown(*args, **options)

def stop_at(owner, name, *, calls=0, afterwards=False):
    function, counter = getattr(owner, name), iter(range(calls + 1000))
    def stopping(*args, **options):
        if afterwards:
            function(*args, **options)
        if next(counter) >= calls:
            os.write(1, b"ready\\n")
            assert released.wait()
        if not afterwards:
            return function(*args, **options)
    setattr(owner, name, stopping)

stop_in_worker = sys.argv[1] in ("in the middle of writing", "while verifying")
if stop_in_worker:
    stream.ThreadPoolExecutor.shutdown = release_and_shut_down
{
    "before the first write": lambda: stop_at(convert, "write_tensors"),
    "in the middle of writing": lambda: stop_at(writer.Shards, "write", calls=3),
    "before the configs": lambda: stop_at(convert, "write_configs"),
    "while verifying": lambda: stop_at(products.CPUProduct, "add_stored"),
    "before the rename": lambda: stop_at(output_folder, "_swap_in"),
    "after the rename": lambda: stop_at(output_folder, "_swap_in", afterwards=True),
}[sys.argv[1]]()
cli.main(sys.argv[3:])
"""
POINTS = (
    "before the first write",
    "in the middle of writing",
    "before the configs",
    "while verifying",
    "before the rename",
)


@contextmanager
def stopped(point: str, *args: object, setting: str = "") -> Iterator[subprocess.Popen[str]]:
    """The program, waiting at `point`."""
    command = [sys.executable, "-c", DRIVER, point, setting, *map(str, args), "--verify", "--quiet", "--device", "cpu"]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", process.communicate()
        yield process


def end(process: subprocess.Popen[str]) -> str:
    """Wait for the process; what it wrote to standard error."""
    return process.communicate(timeout=PATIENCE)[1]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below `folder`: its bytes and when it was last changed."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupted(source: Source, tmp_path: Path, point: str, number: signal.Signals) -> None:
    before = snapshot(source.folder)
    with stopped(point, source.folder, tmp_path / "out") as process:
        assert not (tmp_path / "out").exists()
        assert len(list(tmp_path.iterdir())) == 2  # the source and the hidden folder
        process.send_signal(number)
        error = end(process)
    assert process.returncode == 128 + number
    assert error == "\nmarlin-convert: interrupted; nothing half-done was left behind.\n"
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert snapshot(source.folder) == before


@pytest.mark.parametrize("point", ["in the middle of writing", "before the rename"])
def test_folders_above_are_removed_too(source: Source, tmp_path: Path, point: str) -> None:
    with stopped(point, source.folder, tmp_path / "not" / "there" / "out") as process:
        process.send_signal(signal.SIGINT)
        end(process)
    assert process.returncode == 130
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_lost_terminal_interrupts(source: Source, tmp_path: Path) -> None:
    with stopped("in the middle of writing", source.folder, tmp_path / "out") as process:
        process.send_signal(signal.SIGHUP)
        end(process)
    assert process.returncode == 129
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_nohup_is_respected(source: Source, tmp_path: Path) -> None:
    with stopped("before the configs", source.folder, tmp_path / "out", setting="ignore SIGHUP") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert end(process) == ""
    assert process.returncode == 0
    assert_equal_to_source(source, tmp_path / "out")


@pytest.mark.parametrize("point", POINTS)
def test_killed(source: Source, tmp_path: Path, point: str) -> None:
    before = snapshot(source.folder)
    with stopped(point, source.folder, tmp_path / "out") as process:
        process.kill()
        end(process)
    assert not (tmp_path / "out").exists()
    left = [p.name for p in tmp_path.iterdir() if p.name != "source"]
    assert len(left) == 1
    assert left[0].startswith(".out.marlin-convert-")

    convert(source.folder, tmp_path / "out", CPU)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert_equal_to_source(source, tmp_path / "out")
    assert snapshot(source.folder) == before


@pytest.mark.parametrize("point", POINTS[1::2] + POINTS[-1:])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_an_earlier_result_survives(tmp_path: Path, point: str, number: signal.Signals) -> None:
    """With --force: what is at OUT stays, byte for byte, until the new result takes its place."""
    old = write_source(tmp_path / "old", two_layers(group_size=-1))
    new = write_source(tmp_path / "new")
    out = tmp_path / "out"
    convert(old.folder, out, CPU)
    before = snapshot(out)
    with stopped(point, new.folder, out, "--force") as process:
        assert snapshot(out) == before
        process.send_signal(number)
        end(process)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert snapshot(out) == before
    if number == signal.SIGINT or point != POINTS[-1]:
        return
    convert(new.folder, out, FORCE)
    assert_equal_to_source(new, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_after_the_rename_the_new_result_is_there(tmp_path: Path, number: signal.Signals) -> None:
    """What is left then is the earlier result, on its way out; the next run clears it."""
    old = write_source(tmp_path / "old", two_layers(group_size=-1))
    new = write_source(tmp_path / "new")
    out = tmp_path / "out"
    convert(old.folder, out, CPU)
    with stopped("after the rename", new.folder, out, "--force") as process:
        process.send_signal(number)
        end(process)
    if number == signal.SIGINT:
        assert process.returncode == 0  # the result is complete
    assert_equal_to_source(new, out)
    hidden = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert len(hidden) == (0 if number == signal.SIGINT else 1)
    convert(old.folder, out, FORCE)
    assert_equal_to_source(old, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "out"]


def test_an_interrupt_while_arguments_are_read_is_no_traceback(source: Source, tmp_path: Path) -> None:
    """Ctrl-C can come before anything has begun."""
    code = (
        "import os, signal, sys\nfrom marlin_convert import cli\n"
        "from marlin_convert.cli import commands\n"
        "assert commands.screen_for\n"
        "commands.screen_for = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, source.folder, tmp_path / "out"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert process.returncode == 130
    assert process.stderr == "\nmarlin-convert: interrupted; nothing half-done was left behind.\n"
