"""What is printed on the way: progress in a log, pipes that close, other encodings, no secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import PATIENCE, PROGRAM, Run
from tests.support.gptq_checkpoints import Source

# ---------------------------------------------------------------------------------------------------------------
# Progress


def test_plain_lines_in_a_log(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--verify")
    lines = result.err.splitlines()
    assert lines[0] == "converting: 2 layers, 152.1 kB"
    assert re.fullmatch(r"converting: done, 2 layers, 152\.1 kB in \d+\.\d s", lines[1])
    assert lines[2] == "verifying: 2 layers, 152.1 kB"
    assert re.fullmatch(r"verifying: done, 2 layers, 152\.1 kB in \d+\.\d s", lines[3])
    assert len(lines) == 4
    assert "\x1b" not in result.err + result.out


def test_plain_lines_on_the_way(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marlin_convert.cli.progress.PLAIN_INTERVAL", 0)
    lines = main(source.folder, tmp_path / "out").err.splitlines()[1:-1]
    pattern = (
        r"converting: (\d+) %, (\d)/2 layers, [\d.]+ k?B of 152\.1 kB, [\d.]+ [kMG]?B/s, \d+ s left, model\.[\w.]+"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert len(found) > 5
    assert all(found), lines
    percent = [int(match[1]) for match in found if match]
    assert percent == sorted(percent)
    assert percent[-1] == 100


# ---------------------------------------------------------------------------------------------------------------
# Pipes, encodings, secrets


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_closed_pipe_is_no_bug(source: Source, tmp_path: Path, closed: str) -> None:
    """As with `| head`: the reader is gone before the program has printed all."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= dict.fromkeys(("stdout", "stderr"), writer) if closed == "both" else {closed: writer}
    process = subprocess.Popen([*PROGRAM, str(source.folder), str(tmp_path / "out"), "--verify"], text=True, **streams)
    os.close(writer)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    for text in (out or "", err or ""):
        assert "Traceback" not in text
        assert "BrokenPipe" not in text
        assert "bug" not in text
    left = {p.name for p in tmp_path.iterdir()}
    assert left == ({"source", "out"} if closed == "stdout" else {"source"})


def test_output_that_is_not_utf8(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for args in (["--dry-run"], [tmp_path / "ou→t", "--json"], ["x", "--verify"]):
        result = run(source.folder, *args, env={"PYTHONIOENCODING": "ascii"})
        assert result.code == 0, result.err
    assert run(source.folder, "y", "--json", env={"PYTHONIOENCODING": "ascii"}).json()["ok"]


@pytest.mark.slow
def test_file_names_that_are_not_utf8(source: Source, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(source.folder, os.fsdecode(folder))
    for extra in ([], [b"--force", b"--json"]):
        command = [*map(os.fsencode, PROGRAM), folder, folder + b"-out", *extra]
        process = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        assert process.returncode == 0, process.stderr
    report = json.loads((Path(os.fsdecode(folder + b"-out")) / "marlin_convert.json").read_text("utf-8"))
    assert report["source"] == "caf\ufffd"


def test_long_lines_in_a_pipe_are_not_folded(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    out = tmp_path.joinpath(*["deep" * 20] * 4) / "out"
    assert main(source.folder, out).out.startswith(f"result    {out} (model.safetensors): original Marlin format, 2")


SECRET = "SECRETXYZ"


def test_tokens_are_never_shown(
    main: Callable[..., Run], run: Callable[..., Run], source: Source, tmp_path: Path
) -> None:
    token = ["--token", SECRET]
    runs = [
        main(source.folder, tmp_path / "out", *token, "--verify", "--verbose"),
        main(source.folder, tmp_path / "out2", *token, "--json"),
        main("verify", source.folder, tmp_path / "out", *token, "--verbose"),
        main(tmp_path / "nowhere", tmp_path / "x", *token),
        main(tmp_path / "nowhere", tmp_path / "x", *token, "--json"),
        run("owner/name", tmp_path / "x", *token, env={"HF_HUB_OFFLINE": "1"}),
        run("owner/name", tmp_path / "x", *token, "--verbose", env={"HF_ENDPOINT": "http://127.0.0.1:9"}),
        main(source.folder, *token),
        main(source.folder, tmp_path / "x", *token, "--device", "?"),
    ]
    assert [r.code for r in runs] == [0, 0, 0, 3, 3, 8, 8, 2, 2]
    assert not [r.out + r.err for r in runs if SECRET in r.out + r.err]
    written = [p for folder in ("out", "out2") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert len(written) >= 9
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
