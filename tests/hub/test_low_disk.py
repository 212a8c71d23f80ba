"""With little disk: what stays in the cache, what goes, and when there is not enough of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion import schedule
from marlin_convert.conversion.schedule import check_room
from marlin_convert.errors import OutputError
from tests.support.cli import PATIENCE, Run, refusal
from tests.support.downloads import MB, REPO, Disk, program, sha256, until, weights_of, whole
from tests.support.gptq_checkpoints import Source, two_layers, write_source
from tests.support.hub_server import Hub, Request


@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["", "verified"])
def test_low_disk(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path, verify: list[str]
) -> None:
    """At no time more on the disk than the result and one file of the source; at the end no weights in the cache."""
    files = {p.name: p.stat().st_size for p in weights_of(repository)}
    peaks, before_last = [], []

    def look(request: Request) -> None:
        name = whole(request)
        if name:
            peaks.append(disk.written() + sum(disk.weights().values()) + files[name])
        if name == max(files):
            before_last.append(until(lambda: len(disk.weights()) <= 2))

    hub.fault = look
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--low-disk", "--json", *verify)
    assert result.code == 0, result.err
    report = result.json()
    assert len(peaks) == 4
    assert max(peaks) <= report["bytes_out"] + max(files.values()) + 0.3 * MB
    assert before_last == [True]
    assert disk.weights() == {}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert bool(report["verification"]) == bool(verify)
    assert online("verify", repository.folder, tmp_path / "out", "--quiet").code == 0
    # The same bytes as any other conversion of the same source.
    hub.fault = lambda _: None
    assert online(REPO, tmp_path / "again", "--cache-dir", tmp_path / "cache", "--quiet").code == 0
    for file in report["weight_files"]:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_low_disk_leaves_what_was_there(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    assert online(REPO, tmp_path / "first", "--cache-dir", tmp_path / "cache", "--quiet").code == 0
    missing, *others = weights_of(repository)
    pointer = next((tmp_path / "cache").rglob(missing.name))
    pointer.resolve().unlink()
    pointer.unlink()
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet", "--low-disk")
    assert result.code == 0, result.err
    assert disk.weights().keys() == {sha256(path) for path in others}


def test_low_disk_interrupted(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    """What a killed run left in the cache, the next one takes, and removes."""
    arrived = threading.Event()

    def hold_the_last(request: Request) -> None:
        if whole(request) == "model-00004-of-00004.safetensors" and not arrived.is_set():
            arrived.set()
            time.sleep(3)

    hub.fault = hold_the_last
    with program(hub, tmp_path, "--low-disk") as process:
        assert arrived.wait(PATIENCE)
        process.kill()
    left = {name for name in disk.weights() if (disk.blobs / name).exists()}
    assert disk.weights()
    hub.requests.clear()
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--low-disk", "--quiet", "--verify")
    assert (result.code, result.err) == (0, "")
    fetched = {sha256(repository.folder / name) for name in map(whole, hub.requests) if name}
    assert not fetched & {name for name in left if name != sha256(weights_of(repository)[-1])}
    assert disk.weights() == {}


def test_low_disk_is_for_the_hub(source: Source, run: Callable[..., Run], tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--low-disk")
    assert result.code == 3
    assert result.err == f"marlin-convert: {source.folder} is a folder; --low-disk applies to a Hub id only.\n"


def test_a_layer_in_the_first_and_the_last_file(
    hub: Hub, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    """Nothing can be removed before all files are there: it goes on beyond its room instead of waiting for ever."""
    source = write_source(tmp_path / "upload", two_layers(), shards=4)  # tensors go to the files in turn
    hub.add(REPO, source.folder)
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--low-disk", "--verify", "--quiet")
    assert result.code == 0, result.err
    assert disk.weights() == {}


def test_room_on_the_disk(hub: Hub, repository: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed is known beforehand, for each mode; on one disk, and with the cache on another."""
    from marlin_convert.hub.answers import RemoteFile
    from marlin_convert.hub.repository import Remote

    files = {p.name: RemoteFile(p.name, p.stat().st_size, "0" * 64) for p in weights_of(repository)}
    remote = Remote(REPO, None, "0" * 40, None, tmp_path / "cache", files)
    source, largest = sum(f.size for f in files.values()), max(f.size for f in files.values())
    with Checkpoint(repository.folder) as checkpoint:
        result = 8_000_000

        def check(*, low_disk: bool) -> None:
            check_room(result, checkpoint, remote, tmp_path / "out", low_disk=low_disk)

        needed: list[int] = []
        monkeypatch.setattr(schedule, "check_space", lambda folder, nbytes, *_: needed.append(nbytes))
        for one_disk, low_disk, expected in (
            (True, False, [result + source]),
            (True, True, [result + largest]),
            (False, False, [result, source]),
            (False, True, [result, 2 * largest]),
        ):
            monkeypatch.setattr(schedule, "_one_disk", lambda cache, out, one=one_disk: one)
            check(low_disk=low_disk)
            assert needed == expected
            needed.clear()
        monkeypatch.undo()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": result + largest + 5}))
        check(low_disk=True)
        with pytest.raises(OutputError) as error:
            check(low_disk=False)
        assert error.value.message == (
            f"{tmp_path}: the result and the download of the source take {(result + source) / 1e9:.2f} GB and "
            f"{(result + largest + 5) / 1e9:.2f} GB are free; make room or choose another disk, or use --low-disk, "
            f"which takes {(result + largest) / 1e9:.2f} GB."
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(
    hub: Hub, repository: Source, small_disk: Path, online: Callable[..., Run], tmp_path: Path
) -> None:
    """While files come, although there was room before. Nothing that looks like a file of the cache is left there."""
    filler = small_disk / "filler"

    def fill(request: Request) -> None:
        if whole(request) == "model-00002-of-00004.safetensors":
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(16_000_000))

    hub.fault = fill
    result = online(REPO, tmp_path / "out", "--cache-dir", small_disk / "cache", "--quiet")
    assert refusal(result) == f"{REPO}: the download failed: No space left on device; run it again to resume."
    assert not (tmp_path / "out").exists()
    filler.unlink()
    hub.fault = lambda _: None
    result = online(REPO, tmp_path / "out", "--cache-dir", small_disk / "cache", "--quiet", "--verify")
    assert (result.code, result.err) == (0, "")
