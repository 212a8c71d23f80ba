"""Weights that arrive from the Hub while others are converted: overlap, interruption, damage, patience.

The program runs in a process of its own; what is on its disk, and when, is looked at from the server, while it waits
for a file.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import hub_contents, hub_server
from tests.support.cli import PATIENCE, Run, refusal
from tests.support.downloads import MB, REPO, Disk, large, program, sha256, until, weights_of, whole
from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source
from tests.support.hub_server import Hub, Request, at_first


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
    monkeypatch.setattr(hub_contents, "LFS", False)
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
