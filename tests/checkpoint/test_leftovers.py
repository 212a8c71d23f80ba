"""What killed runs leave beside an output, what is only named like it, and runs beside each other."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.checkpoint import output_folder
from marlin_convert.checkpoint.output_folder import clear_leftovers, new_folder
from marlin_convert.errors import OutputError
from marlin_convert.options import REPORT_FILE
from tests.support.cli import PATIENCE
from tests.support.gptq_checkpoints import Source
from tests.support.output_folders import NO_OVERRIDE, contents, earlier_result, hidden_folders, limited, write_new

KILLED = """
import os, sys
from pathlib import Path
from marlin_convert.checkpoint.output_folder import new_folder
with new_folder(Path(sys.argv[1]), force=True) as folder:
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), 9)
"""


def killed_run(out: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False, timeout=PATIENCE)
    assert process.returncode == -9


@pytest.mark.slow
def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_run(out)
    assert not out.exists()
    (left,) = hidden_folders(tmp_path)
    assert (left / "new" / "weights").read_text() == "half"
    write_new(out)
    assert contents(tmp_path) == {"out/weights": "new"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_leftovers_of_other_outputs_are_not_ours(tmp_path: Path) -> None:
    killed_run(tmp_path / "out2")
    before = list(tmp_path.iterdir())
    write_new(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"}


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    """A second run to the same place does not disturb the first; the one that ends later finds the place taken."""
    out = tmp_path / "out"

    def two_at_once() -> None:
        with new_folder(out) as first:
            (first / "weights").write_text("first")
            assert clear_leftovers(out) == []
            with new_folder(out) as second:
                (second / "weights").write_text("second")
            assert (first / "weights").read_text() == "first"

    with pytest.raises(OutputError, match="it exists already"):
        two_at_once()
    assert contents(tmp_path) == {"out/weights": "second"}


def test_a_folder_without_a_lock_is_cleared_when_it_is_old(tmp_path: Path) -> None:
    """A run killed between making the folder and locking it; a younger one may be a run that is just starting."""
    young, old = tmp_path / ".out.marlin-convert-a.tmp", tmp_path / ".out.marlin-convert-b.tmp"
    young.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 100,) * 2)
    assert clear_leftovers(tmp_path / "out") == [old]
    assert list(tmp_path.iterdir()) == [young]


@pytest.mark.slow
def test_an_earlier_result_in_between_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames, where folders cannot be exchanged."""
    out = tmp_path / "out"
    killed_run(out)
    (left,) = hidden_folders(tmp_path)
    old = earlier_result(left / "replaced")
    with pytest.raises(OutputError):
        write_new(out)  # without force: the earlier result is there again, and stays
    assert contents(out) == old
    assert list(tmp_path.iterdir()) == [out]


def test_the_lock_is_held_until_the_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no other run takes a folder that is still being published, or removed, for a leftover."""
    held: list[bool] = []
    rmtree, swap_in = shutil.rmtree, output_folder._swap_in

    def is_held() -> bool:
        (hidden,) = hidden_folders(tmp_path)
        with (hidden / ".lock").open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def watched_rmtree(path: Path, **options: Any) -> None:
        held.append(is_held())
        rmtree(path, **options)

    def watched_swap_in(folder: Path, out: Path, *, force: bool) -> None:
        held.append(is_held())
        swap_in(folder, out, force=force)

    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    monkeypatch.setattr(output_folder, "_swap_in", watched_swap_in)
    write_new(tmp_path / "out")
    assert held
    assert all(held)


LEFTOVER = ".out.marlin-convert-x.tmp"


def precious(folder: Path) -> Path:
    """A folder of somebody's, with what a leftover has."""
    for name in ("new", "replaced"):
        (folder / name).mkdir(parents=True)
        (folder / name / "work").write_text("mine")
    (folder / ".lock").touch()
    return folder


def linked_folder(tmp_path: Path) -> None:
    (tmp_path / "out-parent" / LEFTOVER).symlink_to(precious(tmp_path / "elsewhere"))


def linked_lock(tmp_path: Path) -> None:
    folder = precious(tmp_path / "out-parent" / LEFTOVER)
    (folder / ".lock").unlink()
    (tmp_path / "lock").touch()
    (folder / ".lock").symlink_to(tmp_path / "lock")


def folder_for_a_lock(tmp_path: Path) -> None:
    folder = precious(tmp_path / "out-parent" / LEFTOVER)
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()


def pipe_for_a_lock(tmp_path: Path) -> None:
    folder = precious(tmp_path / "out-parent" / LEFTOVER)
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")


def no_lock(tmp_path: Path) -> None:
    folder = precious(tmp_path / "out-parent" / LEFTOVER)
    (folder / ".lock").unlink()
    os.utime(folder, (time.time() - 1000,) * 2)


def plain_file(tmp_path: Path) -> None:
    (tmp_path / "out-parent" / LEFTOVER).write_text("mine")


@pytest.mark.parametrize(
    "make",
    [linked_folder, linked_lock, folder_for_a_lock, pipe_for_a_lock, no_lock, plain_file],
    ids=lambda f: f.__name__,
)
def test_what_is_only_named_like_a_leftover_is_stepped_around(make: Any, tmp_path: Path) -> None:
    (tmp_path / "out-parent").mkdir()
    make(tmp_path)
    before = contents(tmp_path)
    write_new(tmp_path / "out-parent" / "out")
    assert contents(tmp_path) == {**before, "out-parent/out/weights": "new"}
    assert os.path.lexists(tmp_path / "out-parent" / LEFTOVER)


@pytest.mark.slow
def test_leftovers_of_another_user_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared folder their removal would fail, or worse, succeed."""
    out = tmp_path / "out"
    killed_run(out)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    write_new(out)
    assert contents(tmp_path) == {**before, "out/weights": "new"}


def test_a_leftover_that_may_not_be_entered(source: Source, tmp_path: Path) -> None:
    hidden = tmp_path / "results" / LEFTOVER
    precious(hidden).chmod(0)
    result = limited(source, tmp_path, NO_OVERRIDE)
    hidden.chmod(0o700)
    assert (result.code, result.err.count("Permission")) == (0, 0)
    assert (tmp_path / "results" / "out" / REPORT_FILE).is_file()
    assert (hidden / "new" / "work").read_text() == "mine"


def test_a_run_that_ends_first_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears after the last look whether the place is free, and before the rename."""
    out, swap_in = tmp_path / "out", output_folder._swap_in

    def faster(folder: Path, out: Path, *, force: bool) -> None:
        earlier_result(out)
        swap_in(folder, out, force=force)

    monkeypatch.setattr(output_folder, "_swap_in", faster)
    with pytest.raises(OutputError, match="it exists already"):
        write_new(out)
    assert contents(tmp_path) == {f"out/{REPORT_FILE}": "{}", "out/deep/weights": "old"}


def test_with_force_a_run_that_ends_first_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears after the look at what is there, and before the rename."""
    out, rename, times = tmp_path / "out", Path.rename, iter(range(1))

    def faster(self: Path, target: Path) -> Path:
        for _ in times:
            earlier_result(out)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", faster)
    write_new(out, force=True)
    assert contents(tmp_path) == {"out/weights": "new"}


def test_a_lock_that_another_run_took_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was found between its making and its locking, and removed with its folder: the run makes another."""
    out, flock = tmp_path / "out", fcntl.flock
    removed: list[Path] = []

    def late(lock: int, operation: int) -> None:
        if not removed:
            removed.append(Path())
            removed.extend(clear_leftovers(out))
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_new(out)
    assert len(removed) == 2
    assert contents(tmp_path) == {"out/weights": "new"}


@pytest.mark.parametrize("force", [False, True])
def test_runs_that_start_and_end_at_the_same_time(tmp_path: Path, force: bool) -> None:
    """Each succeeds, or says that another was faster; none trips over what another one makes and removes."""
    out, count = tmp_path / "a" / "b" / "out", 12
    together = threading.Barrier(count)
    ends: list[Any] = []

    def run(number: int) -> str:
        try:
            with new_folder(out, force=force) as folder:
                (folder / REPORT_FILE).write_text("{}")
                if number % 2:
                    raise ValueError  # a run that fails removes the folders above that it made
        except (OutputError, ValueError) as error:
            return str(error)
        return "done"

    def start(number: int) -> None:
        together.wait()
        ends.extend(run(number) for _ in range(20))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = f"{out}: it exists already; choose another name, or replace it with --force."
    assert set(ends) <= {"done", "", taken}
    assert len(ends) == count * 20
    assert ends.count("done") == (count * 20 // 2 if force else 1)
    assert contents(tmp_path) == {f"a/b/out/{REPORT_FILE}": "{}"}


@pytest.mark.parametrize("steps", range(1, 12))
def test_an_interrupt_at_any_step_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The output is complete, and the run goes on; or it is not there, and nothing else."""
    out, left = tmp_path / "above" / "out", [steps]

    def interrupting(function: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return step

    def run() -> None:
        with new_folder(out) as folder:
            (folder / "weights").write_text("new")
            for owner, name in (
                (os, "fsync"),
                (output_folder, "check_free"),
                (output_folder, "_sync_folder"),
                (shutil, "rmtree"),
            ):
                monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))

    try:
        run()
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    assert contents(tmp_path) == ({} if interrupted else {"above/out/weights": "new"})
    assert [p.name for p in tmp_path.iterdir()] == ([] if interrupted else ["above"])
