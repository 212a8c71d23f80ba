"""Weights that arrive from the Hub while others are converted: overlap, little disk, interruption, damage, patience.

The program runs in a process of its own; what is on its disk, and when, is looked at from the server, while it waits
for a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion import supply
from marlin_convert.conversion.supply import check_room
from marlin_convert.errors import OutputError
from tests.support import hub_server
from tests.support.cli import PATIENCE, PROGRAM, Run, refusal, running
from tests.support.gptq_checkpoints import GPTQLayer, Source, two_layers, write_source
from tests.support.hub_server import Hub, Request, at_first

REPO = "someone/large-gptq"
MB = 1e6


def large(folder: Path, shards: int = 4, **changes: Any) -> Source:
    """Eight layers of 1 MB, two in each of four files, the layer between two files in both; 1 MB of other tensors."""
    layers = {f"model.layers.{i}.mlp.up_proj": GPTQLayer(K=1024, N=2048, seed=i, **changes) for i in range(8)}
    plain = {"model.embed_tokens.weight": torch.randn(1024, 512).half()}
    return write_source(folder, layers, plain, shards=shards, in_order=True, extra={"tokenizer.json": "{}"})


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Source:
    source = large(tmp_path / "upload")
    hub.add(REPO, source.folder)
    return source


def whole(request: Request) -> str | None:
    """The name of the weight file that is asked for to its end; None where it is a header or something else."""
    asked = request.method == "GET" and request.path.endswith(".safetensors")
    return request.path.split("/")[-1] if asked and (request.range is None or request.range.endswith("-")) else None


class Disk:
    """What the program has on its disk: its cache at tmp_path/cache, and the unfinished result of tmp_path/out."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.blobs = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}" / "blobs"

    def weights(self) -> dict[str, int]:
        """Weight files in the cache, also those on their way: SHA-256 → bytes."""
        files = [p for p in self.blobs.glob("*") if len(p.name.split(".")[0]) == 64] if self.blobs.is_dir() else []
        sizes = {}
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                sizes[path.name.split(".")[0]] = path.stat().st_blocks * 512
        return sizes

    def written(self) -> int:
        """Bytes of the result that are there; its files are full of holes at first."""
        found = [p for p in self.tmp_path.glob(".out.marlin-convert-*/new/*.safetensors") if p.exists()]
        return sum(p.stat().st_blocks * 512 for p in found)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def weights_of(source: Source) -> list[Path]:
    return sorted(source.folder.glob("*.safetensors"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_converting_begins_before_the_download_ends(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    """The last file is held back until the layers of the first three are in the result."""
    converted = []

    def hold_the_last(request: Request) -> None:
        if whole(request) == "model-00004-of-00004.safetensors":
            converted.append(until(lambda: disk.written() > 5 * MB))

    hub.fault = hold_the_last
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--verify", "--json")
    assert result.code == 0, result.err
    assert result.json()["verification"]["ok"]
    assert converted == [True]
    assert len(disk.weights()) == 4  # they stay in the cache


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


@contextlib.contextmanager
def program(hub: Hub, tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [*PROGRAM, REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet", *options]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf-home")}
    with running(command, env=env, stderr=subprocess.PIPE) as process:
        yield process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_an_interrupted_download_is_taken_up_again(
    hub: Hub, disk: Disk, online: Callable[..., Run], tmp_path: Path, number: signal.Signals
) -> None:
    """Within a file, which huggingface_hub itself would begin anew. It reads 10 MB at a time, and that can be lost."""
    source = write_source(tmp_path / "upload", {"up_proj": GPTQLayer(K=4096, N=14336)}, {})
    hub.add(REPO, source.folder)
    (file,) = weights_of(source)
    ended = threading.Event()

    def dawdle(request: Request, content: bytes) -> bytes:
        """Send 24 MB, and then nothing, until the program has gone."""
        return Stalling(content, 24_000_000, ended) if whole(request) else content

    hub.alter = dawdle
    with program(hub, tmp_path) as process:
        assert until(lambda: sum(disk.weights().values()) >= 20_000_000)
        process.send_signal(number)
        process.wait(PATIENCE)
    ended.set()
    assert not (tmp_path / "out").exists()
    hub.alter = lambda _, content: content
    hub.requests.clear()
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--verify", "--json")
    assert result.code == 0, result.err
    asked = [r.range for r in hub.requests if whole(r)]
    assert asked == ["bytes=20971520-"]
    assert list(disk.weights()) == [sha256(file)]


class Stalling(bytes):
    """Bytes that do not come to their end before `event`: what the server sends of them waits for it."""

    def __new__(cls, content: bytes, pause: int, event: threading.Event) -> Stalling:
        self = super().__new__(cls, content)
        self.pause, self.event = pause, event  # type: ignore[attr-defined]
        return self

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and key.start is not None and key.start >= self.pause:  # type: ignore[attr-defined]
            self.event.wait(PATIENCE)  # type: ignore[attr-defined]
        return super().__getitem__(key)


def test_a_connection_that_breaks(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """In the middle of a file, twice: it goes on where it ended, in the same run."""
    source = write_source(tmp_path / "upload", {"up_proj": GPTQLayer(K=4096, N=14336)}, {})
    hub.add(REPO, source.folder)
    cuts = [12_000_000, 11_000_000]
    hub.cut = lambda request: cuts.pop() if cuts and whole(request) else None
    result = online(REPO, tmp_path / "out", "--quiet", "--verify")
    assert (result.code, result.err) == (0, "")
    assert [r.range for r in hub.requests if whole(r)] == [None, "bytes=10485760-", "bytes=20971520-"]


def test_content_of_another_hash(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    """Fetched once more; if it stays so, said, and never converted, cached, or taken for half a download."""
    name = "model-00002-of-00004.safetensors"
    answers: list[str] = []

    def spoil(request: Request, content: bytes) -> bytes:
        if whole(request) != name or len(answers) >= spoilt:
            return content
        answers.append("spoilt")
        return content[:-1000] + bytes(1000)

    hub.alter, spoilt = spoil, 1
    result = online(REPO, tmp_path / "once", "--quiet", "--verify", "--cache-dir", tmp_path / "cache0")
    assert (result.code, result.err, answers) == (0, "", ["spoilt"])

    answers, spoilt = [], 99
    result = online(REPO, tmp_path / "out", "--quiet", "--cache-dir", tmp_path / "cache")
    assert refusal(result) == (
        f"{REPO}: what comes as {name} is not what the Hub describes (its hash is another), twice; nothing of it "
        "was kept. Try again later, or without a proxy in between."
    )
    assert len(answers) == 2
    assert not (tmp_path / "out").exists()
    assert disk.weights().keys() == {sha256(repository.folder / "model-00001-of-00004.safetensors")}


def test_a_hub_in_trouble(hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """Every address answers 503 the first time."""
    hub.add(REPO, source.folder)
    hub.fault = at_first(503)
    result = online(REPO, tmp_path / "out", "--quiet", "--verify")
    assert (result.code, result.err) == (0, "")


def test_a_hub_that_stays_in_trouble(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """In the middle: tried several times, then said. What came stays."""
    name = "model-00003-of-00004.safetensors"
    hub.fault = lambda request: 503 if whole(request) == name else None
    assert refusal(online(REPO, tmp_path / "out", "--quiet")) == f"{REPO}: the Hub answered 503; try again later."
    assert len([r for r in hub.requests if whole(r) == name]) == 5
    assert not (tmp_path / "out").exists()
    hub.fault = lambda _: None
    hub.requests.clear()
    assert online(REPO, tmp_path / "out", "--quiet").code == 0
    assert {whole(r) for r in hub.requests} - {None} == {name, "model-00004-of-00004.safetensors"}


def test_a_slow_hub(hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """Each answer about the repository, and each file, comes too late the first time."""
    hub.add(REPO, source.folder)
    seen: set[str] = set()

    def dawdle(request: Request) -> None:
        if request.path not in seen:
            seen.add(request.path)
            if whole(request) or request.path.startswith("/api/"):
                time.sleep(2)

    hub.fault = dawdle
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    result = online(REPO, tmp_path / "out", "--quiet", "--verify", env=patience)
    assert (result.code, result.err) == (0, "")


def test_weights_in_git(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Very small ones may be no LFS objects; the Hub has no SHA-256 of them, and huggingface_hub fetches them."""
    monkeypatch.setattr(hub_server, "LFS", False)
    result = online(REPO, tmp_path / "out", "--verify")
    assert result.code == 0, result.err
    size = sum(p.stat().st_size for p in weights_of(repository)) / 1e6
    assert f"downloading: done, {size:.1f} MB in " in result.err
    assert not [line for line in result.err.splitlines() if "%" in line and "|" in line]  # no bars of its own
    result = online(REPO, tmp_path / "low", "--quiet", "--low-disk")
    assert result.code == 0, result.err


def test_a_server_without_ranges(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read of the whole file that comes instead."""
    monkeypatch.setattr(hub_server, "RANGES", False)
    expected = (
        f"{REPO}: {hub.url} does not answer Range requests, by which its headers are read; download the repository "
        "first (`hf download`) and give its folder."
    )
    assert refusal(online(REPO, tmp_path / "out")) == expected
    assert refusal(online(REPO, "--dry-run")) == expected


def test_weights_that_no_index_names_travel_as_they_are(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path
) -> None:
    files = hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]]
    beside = {"mtp.safetensors": b"a draft model's", "onnx/a.onnx": b"again"}
    hub.repositories[REPO].commit({**files, **beside})
    plan = online(REPO, "--dry-run", "--json").json()
    assert plan["weights_beside"] == [{"name": name, "bytes": len(data)} for name, data in beside.items()]
    assert not hub.fetched() & beside.keys()
    assert online(REPO, tmp_path / "out", "--quiet").code == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in beside} == beside
    assert online(REPO, tmp_path / "offline", "--quiet", env={"HF_HUB_OFFLINE": "1"}).code == 0


def test_what_cannot_be_converted_does_not_travel(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    source = large(tmp_path / "upload", g_idx=np.repeat(np.arange(8), [100, 156, *[128] * 6]))
    hub.add(REPO, source.folder)
    result = online(REPO, tmp_path / "out")
    assert result.code == 4
    assert "8 of 8 quantized layers cannot be converted" in result.err
    assert not [r for r in hub.requests if whole(r)]
    # Nor does what needs no conversion.
    assert online(large(tmp_path / "plain").folder, tmp_path / "marlin", "--quiet").code == 0
    hub.add(REPO, tmp_path / "marlin")
    hub.requests.clear()
    assert "already is a Marlin checkpoint" in online(REPO, tmp_path / "out").out
    assert not [r for r in hub.requests if whole(r)]


def test_scales_decide_about_the_format(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """bf16 scales that fp16 cannot hold, and inf in fp16 ones, are seen before any weight comes, as in a dry run."""
    scales = np.full((2, 512), 1e5)
    layers = {"up_proj": GPTQLayer(K=256, N=512, scale_dtype=torch.bfloat16, scales=scales)}
    hub.add(REPO, write_source(tmp_path / "bf16", layers).folder)
    report = online(REPO, tmp_path / "out", "--json", "--verify").json()
    assert (report["ok"], report["format"], report["verification"]["ok"]) == (True, "marlin_ext", True)

    layers = {"up_proj": GPTQLayer(K=2048, N=2048, scales=np.full((16, 2048), np.inf))}
    hub.add("someone/inf", write_source(tmp_path / "inf", layers).folder)
    hub.requests.clear()
    for where in (tmp_path / "inf-out", "--dry-run"):
        result = online("someone/inf", where, "--quiet")
        assert result.code == 4
        assert "  - scales contain inf or NaN: up_proj\n" in result.err
    assert not [request for request in hub.requests if whole(request)]
    assert not (tmp_path / "inf-out").exists()
    assert not list(tmp_path.glob(".inf-out*"))


@pytest.mark.parametrize("named", ["someone/model-gptq", "someone/modell-gptq", "modell-gptq", "models/large-gtpq"])
def test_a_folder_that_was_meant(hub: Hub, online: Callable[..., Run], tmp_path: Path, named: str) -> None:
    for folder in ("model-gptq", "models/large-gptq"):
        (tmp_path / folder).mkdir(parents=True)
    near = "models/large-gptq" if named.startswith("models/") else "model-gptq"
    result = refusal(online(named, tmp_path / "out"))
    expected = f"{named}: no such repository, or it is private and needs a token (`hf auth login` or --token)"
    assert result == expected + (f"; did you mean the folder ./{near}?" if named != "someone/modell-gptq" else ".")


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
        monkeypatch.setattr(supply, "check_space", lambda folder, nbytes, *_: needed.append(nbytes))
        for one_disk, low_disk, expected in (
            (True, False, [result + source]),
            (True, True, [result + largest]),
            (False, False, [result, source]),
            (False, True, [result, 2 * largest]),
        ):
            monkeypatch.setattr(supply, "_one_disk", lambda cache, out, one=one_disk: one)
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


def test_a_cache_that_holds_a_part(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """Offline, or with no network: said, and nothing is begun."""
    assert online(REPO, tmp_path / "first", "--cache-dir", tmp_path / "cache", "--quiet").code == 0
    next((tmp_path / "cache").rglob("model-00002-of-00004.safetensors")).unlink()
    for where, env in (
        ("offline mode is on (HF_HUB_OFFLINE)", {"HF_HUB_OFFLINE": "1"}),
        ("the Hub cannot be reached", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ):
        result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", env=env)
        expected = f"{REPO}: {where} and the cache holds only a part of it; try again with a network connection."
        assert refusal(result) == expected
        assert not (tmp_path / "out").exists()


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


def test_progress_of_the_download(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    lines = online(REPO, tmp_path / "out").err.splitlines()
    size = sum(p.stat().st_size for p in weights_of(repository)) / 1e6
    assert lines[0] == "reading scales and zero points: 307.2 kB"
    assert f"downloading: {size:.1f} MB" in lines
    (done,) = [line for line in lines if line.startswith("downloading: done")]
    assert f", {size:.1f} MB in " in done


def test_the_report_names_the_commit(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    assert online(REPO, tmp_path / "out", "--quiet", "--low-disk").code == 0
    commit = hub.repositories[REPO].refs["main"]
    assert json.loads((tmp_path / "out" / "marlin_convert.json").read_text())["source_commit"] == commit
    assert commit in (tmp_path / "out" / "README.md").read_text()


def start(hub: Hub, code: list[object], **streams: Any) -> subprocess.Popen[str]:
    """Another process on the same Hub: Python with these arguments."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "HF_TOKEN": ""}
    return subprocess.Popen([sys.executable, *map(str, code)], env={**os.environ, **settings}, text=True, **streams)


def both(hub: Hub, online: Callable[..., Run], tmp_path: Path, first: list[str], second: list[str]) -> None:
    """Two runs on one cache, both of which succeed: while the second file comes for the first run, the second run
    begins, and waits for it as well."""
    began: list[subprocess.Popen[str]] = []
    common = ["--cache-dir", tmp_path / "cache", "--quiet", "--verify"]

    def begin_another(request: Request) -> None:
        if whole(request) == "model-00002-of-00004.safetensors" and not began:
            code = ["-m", "marlin_convert.cli", REPO, tmp_path / "second", *common, *second]
            began.append(start(hub, code, stderr=subprocess.PIPE))
            assert until(lambda: [r.path for r in hub.requests].count(f"/api/models/{REPO}") == 2)
            time.sleep(1.5)

    hub.fault = begin_another
    result = online(REPO, tmp_path / "first", *common, *first)
    assert (result.code, result.err) == (0, "")
    error = began[0].communicate(timeout=PATIENCE)[1]
    assert (began[0].returncode, error) == (0, "")
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_two_runs_with_little_disk(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    both(hub, online, tmp_path, ["--low-disk"], ["--low-disk"])
    assert disk.weights() == {}


@pytest.mark.parametrize("first", [[], ["--low-disk"]], ids=["last", "first"])
def test_a_run_with_little_disk_beside_another(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path, first: list[str]
) -> None:
    """What the other run wants to keep stays, whoever fetched it."""
    both(hub, online, tmp_path, first, [] if first else ["--low-disk"])
    commit = hub.repositories[REPO].refs["main"]
    for path in weights_of(repository):
        assert (disk.blobs.parent / "snapshots" / commit / path.name).read_bytes() == path.read_bytes()


def test_huggingface_hub_waits_for_a_file(
    hub: Hub, repository: Source, disk: Disk, online: Callable[..., Run], tmp_path: Path
) -> None:
    """Another program asks for the file that comes, and gets it, and keeps it."""
    name = "model-00002-of-00004.safetensors"
    code = "import sys, huggingface_hub as h; print(h.hf_hub_download(*sys.argv[1:3], cache_dir=sys.argv[3]))"
    others: list[subprocess.Popen[str]] = []

    def ask_for_it(request: Request) -> None:
        if whole(request) == name and not others:
            others.append(start(hub, ["-c", code, REPO, name, tmp_path / "cache"], stdout=subprocess.PIPE))
            assert until(lambda: any(r.method == "HEAD" and r.path.endswith(name) for r in hub.requests))
            time.sleep(1)

    hub.fault = ask_for_it
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet", "--low-disk")
    assert (result.code, result.err) == (0, "")
    path = Path(others[0].communicate(timeout=PATIENCE)[0].strip())
    assert path.read_bytes() == (repository.folder / name).read_bytes()
