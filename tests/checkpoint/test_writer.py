"""The output appears complete or not at all, and the bytes of its safetensors files are what the format says."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from marlin_convert.checkpoint import output_folder
from marlin_convert.checkpoint.output_folder import check_space, clear_leftovers, new_folder
from marlin_convert.checkpoint.writer import OutTensor, Shards
from marlin_convert.errors import OutputError, SourceError
from marlin_convert.options import REPORT_FILE
from tests.support.cli import PATIENCE, Run
from tests.support.gptq_checkpoints import Source


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, with its text."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def earlier_result(out: Path) -> dict[str, str]:
    (out / "deep").mkdir(parents=True)
    (out / REPORT_FILE).write_text("{}")
    (out / "deep" / "weights").write_text("old")
    return contents(out)


def write_new(out: Path, *, force: bool = False, error: BaseException | None = None) -> None:
    with new_folder(out, force=force) as folder:
        (folder / "weights").write_text("new")
        if error:
            raise error


# ---------------------------------------------------------------------------------------------------------------
# The folder


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "yet"
    with new_folder(out) as folder:
        assert list(folder.iterdir()) == []
        assert folder.stat().st_dev == out.parent.stat().st_dev
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not out.exists()
        assert all(p.name.startswith(".") for p in out.parent.iterdir())
    assert contents(tmp_path) == {"not/there/yet/a": "1", "not/there/yet/sub/b": "2"}
    assert list(out.parent.iterdir()) == [out]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_new(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == 0o640


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync
    out = tmp_path / "out"

    def watch(fd: int) -> None:
        synced.append((Path(f"/proc/self/fd/{fd}").readlink().name, out.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
    assert sorted(name for name, there in synced if not there) == ["a", "b", "new", "sub"]
    assert [name for name, there in synced if there] == [tmp_path.name]  # the rename itself


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_new(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_new(tmp_path / "out")
    assert contents(tmp_path) == {"out/weights": "new"}


def make_file(out: Path) -> None:
    out.write_text("mine")


def make_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to("elsewhere")


def make_broken_link(out: Path) -> None:
    out.symlink_to("nowhere")


def make_foreign(out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("mine")


TAKEN = {
    "a file": (make_file, "it exists and is not a folder; choose another name.", True),
    "a link": (make_link, "it is a symbolic link; choose another name.", True),
    "a broken link": (make_broken_link, "it is a symbolic link; choose another name.", True),
    "a foreign folder": (make_foreign, "it exists already; choose another name, or replace it with --force.", False),
    "a foreign folder, forced": (
        make_foreign,
        (
            "--force replaces only what marlin-convert made, and this folder has no marlin_convert.json; "
            "remove it yourself, or choose another name."
        ),
        True,
    ),
    "an earlier result": (
        earlier_result, "it exists already; choose another name, or replace it with --force.", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_there_is_kept(tmp_path: Path, name: str) -> None:
    make, message, force = TAKEN[name]
    out = tmp_path / "out"
    make(out)
    before = sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError) as error:
        write_new(out, force=force)
    assert error.value.message == f"{out}: {message}"
    assert sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused_early() -> None:
    with pytest.raises(OutputError, match="nothing can be renamed to a mount point; choose a folder inside it"):
        write_new(Path("/proc"))


@pytest.mark.parametrize("out", [".", "..", "sub/..", "/"])
def test_a_folder_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="give the new folder a name of its own"):
        write_new(Path(out))
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it exists already"), new_folder(tmp_path / "out"):
        make_foreign(tmp_path / "out")
    assert contents(tmp_path) == {"out/mine": "mine"}


def test_force_keeps_the_earlier_result_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at at every step: before each system call that could change what is at `out`."""
    out = tmp_path / "out"
    old = earlier_result(out)
    seen: list[dict[str, str]] = []

    def look(event: str, _: object) -> None:
        if watching and event in ("os.rename", "os.remove", "os.rmdir", "open", "os.mkdir", "shutil.rmtree"):
            watching.clear()  # looking opens files itself
            seen.append(contents(out))
            watching.append(True)

    watching: list[bool] = []
    sys.addaudithook(look)
    watching.append(True)
    write_new(out, force=True)
    watching.clear()
    new = {"weights": "new"}
    assert old in seen
    assert new in seen
    assert all(state in (old, new) for state in seen)
    assert contents(tmp_path) == {"out/weights": "new"}


def test_force_keeps_the_earlier_result_when_the_new_run_fails(tmp_path: Path) -> None:
    old = earlier_result(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        write_new(tmp_path / "out", force=True, error=ZeroDivisionError())
    assert contents(tmp_path / "out") == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class NoRenameat2:
    """A C library on a file system that cannot exchange: renameat2 fails."""

    def renameat2(self, *_: object) -> int:
        return -1


def test_force_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_convert.checkpoint.output_folder._libc", NoRenameat2())
    out = tmp_path / "out"
    old = earlier_result(out)
    write_new(out, force=True)
    assert contents(tmp_path) == {"out/weights": "new"}
    shutil.rmtree(out)

    earlier_result(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Any:
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="writing failed: Input/output error"):
        write_new(out, force=True)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in old.items()}


# ---------------------------------------------------------------------------------------------------------------
# Leftovers


def hidden_folders(parent: Path) -> list[Path]:
    return [p for p in parent.iterdir() if p.name.startswith(".out.marlin-convert-") and p.name.endswith(".tmp")]


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


def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_run(out)
    assert not out.exists()
    (left,) = hidden_folders(tmp_path)
    assert (left / "new" / "weights").read_text() == "half"
    write_new(out)
    assert contents(tmp_path) == {"out/weights": "new"}
    assert list(tmp_path.iterdir()) == [out]


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


# ---------------------------------------------------------------------------------------------------------------
# Changes to a finished output


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
        path.chmod(0o640)
    output_folder.replace_files(tmp_path, {"file": b"new"})
    assert path.read_text() == "new"
    assert before is None or path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "fchmod", "urandom"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_a_replacement_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        output_folder.replace_files(tmp_path, {"file": b"new"})
    assert contents(tmp_path) == {"file": "old"}


def test_a_new_file_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        output_folder.write_json(tmp_path / "file", {})
    assert (tmp_path / "file").read_text() == "old"


def test_json_holds_what_utf8_cannot(tmp_path: Path) -> None:
    output_folder.write_json(tmp_path / "file", {"half": "\ud800", "whole": "é\U0001f600"})
    raw = (tmp_path / "file").read_bytes()
    assert json.loads(raw) == {"half": "\ud800", "whole": "é\U0001f600"}
    assert raw == '{\n  "half": "\\ud800",\n  "whole": "é\U0001f600"\n}\n'.encode()


# ---------------------------------------------------------------------------------------------------------------
# Full disks, missing permissions


def test_free_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return usage(10**10, 0, 1_234_567_890)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_space(tmp_path / "not" / "there", 1_234_567_890)
    assert asked == [tmp_path]
    with pytest.raises(OutputError) as error:
        check_space(tmp_path, 1_300_000_000)
    assert error.value.message == (
        f"{tmp_path}: the result takes 1.30 GB and 1.23 GB are free; make room or choose another disk."
    )


def test_a_conversion_checks_the_space_before_it_writes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlin_convert.conversion.convert import convert
    from marlin_convert.options import Options

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100_000))  # the tensors take 152,077 bytes
    monkeypatch.setattr("marlin_convert.conversion.convert.new_folder", None)
    with pytest.raises(OutputError, match=r"0\.00 GB are free; make room"):
        convert(source.folder, tmp_path / "out", Options(device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_while_writing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from marlin_convert.conversion.convert import convert
    from marlin_convert.options import Options

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError) as error:
        convert(source.folder, tmp_path / "out", Options(device="cpu"))
    assert error.value.message == (
        f"{tmp_path / 'out'}: writing failed: {os.strerror(number)}; nothing was left behind."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


#: Takes from root the right to ignore permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH).
NO_OVERRIDE = "import ctypes; [ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) for capability in (1, 2)]"
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


def limited(source: Source, tmp_path: Path, limit: str = "") -> Run:
    """A conversion in a process that has run the code `limit` on itself first."""
    program = ["-m", "marlin_convert.cli", str(source.folder), str(tmp_path / "results" / "out")]
    code = f"{limit}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *{program!r}])"
    return Run(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    )


def test_a_file_that_may_not_grow(source: Source, tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on the size of files."""
    (tmp_path / "results").mkdir()
    result = limited(source, tmp_path, SMALL_FILES)
    assert result.code == 6
    assert result.err.splitlines()[-1].endswith("writing failed: File too large; nothing was left behind.")
    assert "Traceback" not in result.err
    assert list((tmp_path / "results").iterdir()) == []


def test_no_permission_to_write(source: Source, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir(mode=0o555)
    result = limited(source, tmp_path, NO_OVERRIDE)
    assert result.code == 6
    assert result.err == (
        f"marlin-convert: {results}: cannot be written to: Permission denied; choose another place.\n"
    )


def test_no_permission_to_look_into_what_is_there(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    out.mkdir(parents=True)
    out.chmod(0)
    result = limited(source, tmp_path, NO_OVERRIDE)
    out.chmod(0o755)
    assert result.code == 6
    assert result.err == (
        f"marlin-convert: {out}: it exists and cannot be read: Permission denied; choose another name.\n"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_permission_to_read_the_source(source: Source, tmp_path: Path, name: str) -> None:
    (source.folder / "tokenizer.json").touch()
    (source.folder / name).chmod(0)
    result = limited(source, tmp_path, NO_OVERRIDE)
    assert result.code == 3
    assert result.err.startswith(f"marlin-convert: {source.folder / name}: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "results" / "out").exists()


def test_the_parent_is_a_file(source: Source, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    result = limited(source, tmp_path)
    assert result.code == 6
    assert result.err.startswith(f"marlin-convert: {tmp_path / 'results'}: cannot be written to: ")
    assert result.err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------
# The weights

TENSORS = [
    OutTensor("odd", "U8", (3,), 3),
    OutTensor("half", "BF16", (2, 2), 8),
    OutTensor("λ", "I32", (2,), 8),
    OutTensor("broad", "I64", (1,), 8),
    OutTensor("none", "F16", (0, 4), 0),
]
DATA: dict[str, Any] = {
    "odd": np.array([1, 2, 3], np.uint8),
    "half": np.array([[0x3F80, 0x4000], [0x4040, 0x4080]], np.uint16),  # 1, 2, 3, 4 in bfloat16
    "λ": np.array([-1, 2], np.int32),
    "broad": np.array([-5], np.int64),
}


def test_two_tensors_of_one_name_are_impossible(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^a: 2 tensors of the result would have this name"):
        Shards(tmp_path, [OutTensor("a", "U8", (1,), 1), TENSORS[0], OutTensor("a", "F16", (2,), 4)], "5GB")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    """The larger elements first, so that each tensor is aligned; the header padded to a multiple of 8."""
    with Shards(tmp_path, TENSORS, "5GB") as shards:
        assert shards.files == ["model.safetensors"]
        for name, data in DATA.items():
            shards.write(name, data)
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"broad":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        '"λ":{"dtype":"I32","shape":[2],"data_offsets":[8,16]},'
        '"half":{"dtype":"BF16","shape":[2,2],"data_offsets":[16,24]},'
        '"none":{"dtype":"F16","shape":[0,4],"data_offsets":[24,24]},'
        '"odd":{"dtype":"U8","shape":[3],"data_offsets":[24,27]}}'
    ).encode()
    assert len(header) == 321
    header += b" " * 7
    data = bytes.fromhex("fbffffffffffffff ffffffff02000000 803f004040408040 010203")
    assert (tmp_path / "model.safetensors").read_bytes() == len(header).to_bytes(8, "little") + header + data
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # one file needs no index


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    with Shards(tmp_path, TENSORS, "5GB") as shards:
        for name, data in DATA.items():
            shards.write(name, data)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {t.name for t in TENSORS}
        assert opened.get_tensor("half").float().tolist() == [[1, 2], [3, 4]]
        assert opened.get_tensor("λ").tolist() == [-1, 2]
        assert opened.get_tensor("broad").tolist() == [-5]
        assert opened.get_tensor("odd").tolist() == [1, 2, 3]
        assert tuple(opened.get_tensor("none").shape) == (0, 4)


def test_pieces_go_where_they_belong(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.int32)
    with Shards(tmp_path, [OutTensor("x", "U8", (5,), 5), OutTensor("a", "I32", (10, 100), 4000)], "5GB") as shards:
        for start in (600, 0, 300):
            shards.write("a", whole[start : start + 300].reshape(3, 100), start * 4)
        shards.write("a", whole[900:], 3600)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), whole.reshape(10, 100))
        np.testing.assert_array_equal(opened.get_tensor("x"), np.zeros(5))


def test_columns_go_where_they_belong(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.int32).reshape(10, 100)
    tensors = [OutTensor("x", "U8", (5,), 5), OutTensor("a", "I32", (10, 100), 4000), OutTensor("b", "F16", (2, 3), 12)]
    with Shards(tmp_path, tensors, "5GB") as shards:
        for first, columns in [(60, 40), (0, 25), (25, 35)]:
            shards.write_columns("a", np.ascontiguousarray(whole[:, first : first + columns]), first)
        shards.write_columns("b", np.array([[1, 2, 3], [4, 5, 6]], np.float16), 0)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), whole)
        np.testing.assert_array_equal(opened.get_tensor("b"), [[1, 2, 3], [4, 5, 6]])
        np.testing.assert_array_equal(opened.get_tensor("x"), np.zeros(5))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    data = np.arange(100, dtype=np.int32)
    with Shards(tmp_path, [OutTensor("a", "I32", (100,), 400)], "5GB") as shards:
        shards.write("a", data)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), data)


def test_shards_are_cut_as_transformers_does(tmp_path: Path) -> None:
    """In order, the next shard starting where a tensor would exceed the limit; larger tensors have their own."""
    sizes = {"a": 400, "b": 600, "c": 1, "d": 5000, "e": 999, "f": 2}
    tensors = [OutTensor(name, "U8", (size,), size) for name, size in sizes.items()]
    with Shards(tmp_path, tensors, "1KB") as shards:
        files = shards.files
    expected = [["a", "b"], ["c", "e"], ["d"], ["f"]]
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    found = {}
    for file in names:
        with safe_open(tmp_path / file, "np") as opened:
            found[file] = sorted(opened.keys())
    assert sorted(files) == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"] == {name: file for file, tensors in found.items() for name in tensors}
    assert sorted(found.values()) == expected
    for tensors_of_file in found.values():
        assert len(tensors_of_file) == 1 or sum(sizes[n] for n in tensors_of_file) <= 1000


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        Shards(tmp_path, TENSORS, "5GB")
    assert (tmp_path / "model.safetensors").read_text() == "mine"
