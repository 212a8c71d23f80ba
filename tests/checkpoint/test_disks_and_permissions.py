"""Full disks, failing disks, and folders and files that one may not read or write."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.checkpoint.output_folder import check_space
from marlin_convert.errors import OutputError
from tests.support.cli import one_line
from tests.support.gptq_checkpoints import Source
from tests.support.output_folders import NO_OVERRIDE, SMALL_FILES, limited, limited_program


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


@pytest.mark.slow
def test_a_file_that_may_not_grow(source: Source, tmp_path: Path) -> None:
    """The kernel's own refusal, by a limit on the size of files."""
    (tmp_path / "results").mkdir()
    result = limited(source, tmp_path, SMALL_FILES)
    assert result.code == 6
    assert result.err.splitlines()[-1].endswith("writing failed: File too large; nothing was left behind.")
    assert "Traceback" not in result.err
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.slow
def test_no_permission_to_write(source: Source, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir(mode=0o555)
    result = limited(source, tmp_path, NO_OVERRIDE)
    assert result.code == 6
    assert result.err == (
        f"marlin-convert: {results}: cannot be written to: Permission denied; choose another place.\n"
    )


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_permission_to_read_the_source(source: Source, tmp_path: Path, name: str) -> None:
    (source.folder / "tokenizer.json").touch()
    (source.folder / name).chmod(0)
    result = limited(source, tmp_path, NO_OVERRIDE)
    assert result.code == 3
    assert result.err.startswith(f"marlin-convert: {source.folder / name}: ")
    assert result.err.count("\n") == 1
    assert not (tmp_path / "results" / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["restore", "to-gptq"])
def test_no_permission_to_read_the_report_of_a_result(source: Source, tmp_path: Path, command: str) -> None:
    """Without its report, the source's settings would only be guessed."""
    out = tmp_path / "results" / "out"
    assert limited(source, tmp_path).code == 0
    (out / "marlin_convert.json").chmod(0)
    result = limited_program(NO_OVERRIDE, command, out, tmp_path / "back")
    assert result.code == 3
    assert one_line(result).startswith(f"{out}/marlin_convert.json: it cannot be read: Permission denied")
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0, 0o444, 0o111], ids=oct)
def test_no_permission_to_enter_a_result(source: Source, tmp_path: Path, mode: int) -> None:
    """With or without its names: one sentence, and the code of what the folder is for."""
    out = tmp_path / "results" / "out"
    assert limited(source, tmp_path).code == 0
    out.chmod(mode)
    statement = [source.folder, tmp_path / "new", "--attest", out / "statement"]
    for code, arguments in (
        (3, ["push", out, "me/name"]), (3, ["restore", out, tmp_path / "back"]), (3, ["verify", out]),
        (3, ["verify", source.folder, out]), (6, [source.folder, out]), (6, [source.folder, out, "--force"]),
        (6, statement),
    ):  # fmt: skip
        result = limited_program(NO_OVERRIDE, *arguments)
        assert result.code == code, (arguments, result.err)
        assert "Permission denied" in one_line(result)
    out.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"), [(["bench", "--plot", "a.svg", "--from-json", "closed"], 3), (["batch", "closed"], 3)]
)
def test_no_permission_to_read_a_file_that_is_named(tmp_path: Path, command: list[str], code: int) -> None:
    """Not a wrong argument: the file's own exit code."""
    (tmp_path / "closed").touch(mode=0)
    state = ["--state", "state", "--out", "out"] if command[0] == "batch" else []
    result = limited_program(NO_OVERRIDE, *command, *state, cwd=tmp_path)
    assert result.code == code
    assert one_line(result) == "closed: cannot be opened: Permission denied."


@pytest.mark.slow
def test_the_parent_is_a_file(source: Source, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    result = limited(source, tmp_path)
    assert result.code == 6
    assert result.err.startswith(f"marlin-convert: {tmp_path / 'results'}: cannot be written to: ")
    assert result.err.count("\n") == 1
