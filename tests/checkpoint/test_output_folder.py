"""The output appears complete or not at all, and what is in a finished one is replaced whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.checkpoint import output_folder
from marlin_convert.checkpoint.output_folder import new_folder
from marlin_convert.errors import OutputError
from tests.support.output_folders import contents, earlier_result, write_new


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


FOREIGN = "it exists already, and marlin-convert did not make it (it has no marlin_convert.json);"
TAKEN = {
    "a file": (make_file, "it exists and is not a folder; choose another name.", True),
    "a link": (make_link, "it is a symbolic link; choose another name.", True),
    "a broken link": (make_broken_link, "it is a symbolic link; choose another name.", True),
    "a foreign folder": (make_foreign, f"{FOREIGN} choose another name.", False),
    "a foreign folder, forced": (make_foreign, f"{FOREIGN} remove it yourself, or choose another name.", True),
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


# ---- Changes to a finished output ----


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
