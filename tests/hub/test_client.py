"""Sources on the Hub, fetched by the real huggingface_hub from a server on loopback."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError

from marlin_convert.hub import client
from marlin_convert.hub.download import read_range
from tests.support import hub_server
from tests.support.cli import PATIENCE, PROGRAM, SECRET, Run, refusal, running
from tests.support.gptq_checkpoints import GPTQLayer, Source, two_layers, write_source
from tests.support.hub_server import Hub, Request

REPO = "someone/model-gptq"
#: What lies beside the weights, and what of it are weights of other kinds.
BESIDE = {"pytorch_model.bin": "pickle", "2_Dense/model.safetensors": "other", "mtp.safetensors": "a draft"}
EXTRA = {"tokenizer.json": "{}", "LICENSE": "free", "assets/logo.txt": "logo", **BESIDE}


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Source:
    """A checkpoint in the repository REPO; the folder it came from is not there any more."""
    source = write_source(tmp_path / "upload", extra=EXTRA, shards=2)
    hub.add(REPO, source.folder)
    shutil.rmtree(source.folder)
    return source


def test_a_conversion(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    result = online(REPO, tmp_path / "out", "--verify", "--device", "cpu")
    assert result.code == 0, result.err
    assert "2 of 2 layers exactly equal, 3 other tensors byte for byte" in result.out
    report = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())
    assert (report["source"], report["source_commit"]) == (REPO, hub.repositories[REPO].refs["main"])
    for name, text in EXTRA.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert not (tmp_path / "out" / name).is_symlink()  # as the cache's files are
    wanted = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
              "config.json", *EXTRA}  # fmt: skip
    assert hub.fetched() == wanted
    assert report["weights_beside"] == sorted(BESIDE)
    # The progress bars of huggingface_hub do not mix with ours.
    said = [line.split(":")[0] for line in result.err.splitlines()]
    assert said[:2] == ["downloading other files"] * 2
    assert said[2] == "downloading"
    assert sorted(said[2:6]) == ["converting"] * 2 + ["downloading"] * 2  # at the same time
    assert said[6:] == ["verifying"] * 2


WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_a_plan_without_fetching_the_weights(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path
) -> None:
    """--dry-run reads of the weight files their headers, g_idx and qzeros, by Range requests, and nothing whole."""
    plan = online(REPO, "--dry-run", "--json").json()
    assert {layer["name"] for layer in plan["layers"]} == set(repository.layers)
    assert plan["convertible"]
    asked = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert {r.path.rsplit("/")[-1] for r in asked} == WEIGHTS
    assert all(r.range for r in asked)
    assert hub.fetched() <= {"config.json", "model.safetensors.index.json", *WEIGHTS}
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing came into the cache either

    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    local = online(folder, "--dry-run", "--json").json()
    assert {**local, "source": REPO} == plan


def test_what_lies_beside_is_restored(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """Also what the index does not name, which engines that find no index would read as the model's own."""
    assert online(REPO, tmp_path / "out", "--quiet", "--device", "cpu").code == 0
    hub.add("someone/model-marlin", tmp_path / "out")
    assert online("to-gptq", "someone/model-marlin", tmp_path / "back", "--quiet").code == 0
    for folder in (tmp_path / "out", tmp_path / "back"):
        assert {name: (folder / name).read_text() for name in EXTRA} == EXTRA
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_a_plan_reads_little_of_a_large_file(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """A layer's 4 MB of weights between its g_idx and its qzeros stay on the Hub; shuffled rows are seen."""
    shuffled = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 128))
    layers = {"plain": GPTQLayer(K=2048, N=4096), "shuffled": GPTQLayer(K=2048, N=4096, g_idx=shuffled)}
    source = write_source(tmp_path / "upload", layers, {})
    hub.add(REPO, source.folder)
    plan = online(REPO, "--dry-run", "--json", "--format", "marlin").json()
    assert [layer["name"] for layer in plan["layers"]] == ["plain"]
    assert [refused["layers"] for refused in plan["refused"]] == [["shuffled"]]
    read = 0
    for request in hub.requests:
        if request.method == "GET" and request.path.endswith(".safetensors"):
            start, end = map(int, request.range.removeprefix("bytes=").split("-"))
            read += end + 1 - start
    total = (source.folder / "model.safetensors").stat().st_size
    assert 0 < read < 0.1 * total


def test_a_plan_from_the_cache_when_offline(repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    assert "the cache does not hold it" in refusal(online(REPO, "--dry-run", env={"HF_HUB_OFFLINE": "1"}))
    assert online(REPO, tmp_path / "out", "--quiet").code == 0
    plan = online(REPO, "--dry-run", "--json", env={"HF_HUB_OFFLINE": "1"})
    assert plan.code == 0
    assert "the Hub was not reached" in str(plan.json()["notes"])


def test_a_plan_of_a_repository_of_pickles(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "upload").mkdir()
    (tmp_path / "upload" / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add(REPO, tmp_path / "upload")
    result = online(REPO, "--dry-run")
    assert result.code == 4
    assert "pickle file (pytorch_model.bin)" in result.err
    assert hub.fetched() == set()


def test_a_plan_of_what_is_not_there(online: Callable[..., Run]) -> None:
    assert refusal(online("someone/nothing", "--dry-run")).startswith("someone/nothing: no such repository")


def test_the_cache_is_used(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    assert online(REPO, tmp_path / "a", "--quiet", "--cache-dir", tmp_path / "cache").code == 0
    assert (tmp_path / "cache" / "models--someone--model-gptq").is_dir()
    hub.requests.clear()
    assert online(REPO, tmp_path / "b", "--quiet", "--cache-dir", tmp_path / "cache").code == 0
    assert hub.fetched() == set()
    assert online("verify", REPO, tmp_path / "b", "--quiet", "--cache-dir", tmp_path / "cache").code == 0


def test_a_revision(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """A branch, a tag and a commit; each with weights of its own."""
    other = write_source(tmp_path / "upload", two_layers(group_size=-1))
    files: dict[str, bytes | Path] = {p.name: p.read_bytes() for p in other.folder.iterdir()}
    commit = hub.repositories[REPO].commit(files, "per-channel")
    for i, revision in enumerate(("per-channel", commit)):
        report = online(REPO, tmp_path / f"out{i}", "--revision", revision, "--json").json()
        assert (report["group_size"], report["source_commit"]) == (-1, commit)


def test_no_such_revision(repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    assert refusal(online(REPO, tmp_path / "out", "--revision", "nonsense")) == (
        f"{REPO} has no revision 'nonsense'; give a branch, a tag or a commit that it has."
    )


def test_no_such_repository(online: Callable[..., Run], tmp_path: Path) -> None:
    assert refusal(online("someone/nothing", tmp_path / "out")) == (
        "someone/nothing: no such repository, or it is private and needs a token (`hf auth login` or --token)."
    )
    assert refusal(online("nothing", tmp_path / "out", "--token", SECRET)) == (
        "nothing: no such repository, or it is private and needs a token (`hf auth login` or --token); "
        "if you mean a folder, there is none named nothing here."
    )


def test_a_private_repository(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    hub.repositories[REPO].private, hub.repositories[REPO].members = True, {SECRET}
    assert refusal(online(REPO, tmp_path / "out")).startswith(f"{REPO}: no such repository, or it is private")
    assert online(REPO, tmp_path / "out", "--token", SECRET, "--verbose").code == 0
    assert {r.token for r in hub.requests if "/resolve/" in r.path} == {SECRET}
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_gated_repository(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """Its description is public, its files are not."""
    hub.repositories[REPO].gated, hub.repositories[REPO].members = True, {SECRET}
    for token in ([], ["--token", "hf_other"]):
        assert refusal(online(REPO, tmp_path / "out", *token)) == (
            f"{REPO} is gated: ask for access at {hub.url}/{REPO}, then log in with `hf auth login` or give --token."
        )
    assert online(REPO, tmp_path / "out", "--quiet", "--token", SECRET).code == 0


def test_the_token_of_the_environment(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    hub.repositories[REPO].private, hub.repositories[REPO].members = True, {SECRET}
    """It is used, also when --token is there and empty: a variable of a script that was not set."""
    assert online(REPO, tmp_path / "out", "--quiet", "--token", "", env={"HF_TOKEN": SECRET}).code == 0


@pytest.mark.parametrize("token", [f" {SECRET}\r\n", f"{SECRET}\r\nX-Other: 1", f"{SECRET}\N{CHECK MARK}"])
def test_a_token_with_a_line_end(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path, token: str
) -> None:
    """White space around a token, as from a file, is none of it; within it is an error that does not show it."""
    result = online(REPO, tmp_path / "out", "--quiet", "--token", token)
    if token.strip() == SECRET:
        assert result.code == 0, result.err
        assert {r.token for r in hub.requests if "/resolve/" in r.path} == {SECRET}
    else:
        assert refusal(result) == "the token is not valid: it holds characters that no token has."
        assert hub.requests == []


def test_a_token_that_the_hub_does_not_know(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path
) -> None:
    hub.fault = lambda request: 401 if request.token == SECRET else None
    assert "--token" in refusal(online(REPO, tmp_path / "out", "--token", SECRET))


def test_offline(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    assert refusal(online(REPO, tmp_path / "out", env=offline)) == (
        f"{REPO}: offline mode is on (HF_HUB_OFFLINE) and the cache does not hold it; "
        "try again with a network connection."
    )
    assert hub.requests == []
    assert online(REPO, tmp_path / "first", "--quiet").code == 0
    hub.requests.clear()
    plan = online("--dry-run", REPO, "--json", env=offline)
    assert (plan.code, plan.err) == (0, "")
    assert (plan.json()["source"], len(plan.json()["layers"])) == (REPO, 2)
    result = online(REPO, tmp_path / "out", "--json", env=offline)
    assert result.code == 0, result.err
    assert result.json()["source_commit"] == hub.repositories[REPO].refs["main"]
    assert hub.requests == []


def test_no_network(repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port that nothing listens on
    assert refusal(online(REPO, tmp_path / "out", env=nowhere)) == (
        f"{REPO}: the Hub cannot be reached and the cache does not hold it; try again with a network connection."
    )
    assert online(REPO, tmp_path / "first", "--quiet").code == 0
    assert online("--dry-run", REPO, "--quiet", env=nowhere).code == 0
    assert online(REPO, tmp_path / "out", "--quiet", env=nowhere).code == 0


@pytest.mark.parametrize("status", [500, 403])
def test_the_hub_fails(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path, status: int) -> None:
    hub.fault = lambda _: status
    message = refusal(online(REPO, tmp_path / "out"))
    if status == 403:
        assert message == f"{REPO}: the Hub refuses access (403); log in with `hf auth login`, or give another --token."
    else:
        assert message == f"{REPO}: the Hub answered {status}; try again later."


def test_the_hub_fails_on_a_file(hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    def fault(request: Request) -> int | None:
        return 418 if request.method == "GET" and request.path.endswith("00002-of-00002.safetensors") else None

    hub.fault = fault
    assert refusal(online(REPO, tmp_path / "out")) == f"{REPO}: the Hub answered 418; try again later."
    assert not (tmp_path / "out").exists()
    hub.fault = lambda _: None
    hub.requests.clear()
    assert online(REPO, tmp_path / "out", "--quiet").code == 0
    assert "config.json" not in hub.fetched()  # what had come is not fetched again


def test_a_range_is_asked_for_while_others_come(hub: Hub, repository: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that answers every second request: with many at once, one may meet trouble again and again."""
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    url = f"{hub.url}/{REPO}/resolve/main/model-00001-of-00002.safetensors"
    answers = iter([503] * 6)
    hub.fault = lambda _: next(answers, 0)
    came: list[tuple[int, bytes]] = []
    read_range(REPO, url, {}, 0, 8, lambda *piece: came.append(piece), itertools.count().__next__)
    assert int.from_bytes(came[0][1], "little") > 0  # the length of the header
    assert len(hub.requests) == 7
    answers = iter([503] * 6)
    with pytest.raises(HfHubHTTPError):  # nothing comes: the first and one for each wait
        read_range(REPO, url, {}, 0, 8, lambda *piece: came.append(piece), lambda: 0)
    assert len(hub.requests) == 7 + 3
    assert len(came) == 1


def test_a_range_goes_on_where_the_connection_broke(
    hub: Hub, repository: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer ends after 1000 bytes; more of them than there are waits, since each brings something."""
    monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
    name = "model-00001-of-00002.safetensors"
    hub.cut = lambda _: 1000
    came = bytearray(7500)

    def write(position: int, piece: bytes) -> None:
        came[position - 100 : position - 100 + len(piece)] = piece

    read_range(REPO, f"{hub.url}/{REPO}/resolve/main/{name}", {}, 100, 7600, write, lambda: 0)
    content = hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]][name]
    assert isinstance(content, bytes)
    assert bytes(came) == content[100:7600]
    assert [request.range for request in hub.requests] == [f"bytes={100 + i * 1000}-7599" for i in range(8)]


def test_a_server_that_is_no_hub(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """As a network that wants a login first: it answers everything, with something else."""
    hub.fault = lambda _: 200
    assert refusal(online(REPO, tmp_path / "out")) == (
        f"{REPO}: what answers at {hub.url} is not a Hugging Face Hub; check the proxy settings, and HF_ENDPOINT."
    )


@pytest.mark.slow
def test_an_interrupted_download_ends_at_once(hub: Hub, repository: Source, tmp_path: Path) -> None:
    """huggingface_hub alone would wait for every file, which may be gigabytes, or for the server, as here."""
    arrived, release = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        if request.method == "GET" and request.path.endswith("00002-of-00002.safetensors"):
            arrived.set()
            release.wait()

    hub.fault = hold
    command = [*PROGRAM, REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache"]
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": str(2 * PATIENCE)}  # the client's own
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), **patience}
    try:
        with running(command, env=env, stderr=subprocess.PIPE) as process:
            assert arrived.wait(PATIENCE)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=PATIENCE)[1]
    finally:
        release.set()
    assert process.returncode == 130
    assert error == "\nmarlin-convert: interrupted; nothing half-done was left behind.\n"
    assert not (tmp_path / "out").exists()


def test_an_error_in_json(online: Callable[..., Run], tmp_path: Path) -> None:
    result = online("someone/nothing", tmp_path / "out", "--json", "--token", SECRET)
    assert (result.code, result.err) == (8, "")
    error = result.json()
    assert (error["ok"], error["error"], error["exit_code"]) == (False, "HubError", 8)


def test_a_redirect_to_nowhere(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights lie elsewhere, and nobody is there: said, without the address, which is signed."""
    send = hub_server.Handler.send

    def elsewhere(self: Any, status: int, body: bytes, headers: dict[str, str], request: Request | None = None) -> None:
        if self.path.endswith(".safetensors"):
            status, headers = 302, {"Location": "http://127.0.0.1:9/x?X-Amz-Signature=SIGNED", "Content-Length": "0"}
            body = b""
        send(self, status, body, headers, request)

    monkeypatch.setattr(hub_server.Handler, "send", elsewhere)
    result = online(REPO, tmp_path / "out", "--verbose")
    expected = f"{REPO}: the download failed: no connection to where the files are; run it again to resume."
    assert refusal(result) == expected


def test_a_cache_in_which_nothing_can_be_written(
    hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path
) -> None:
    """To run it again would not help: the place is named."""
    hub.add(REPO, source.folder)
    (tmp_path / "cache").mkdir()
    taken = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    taken.write_text("a file")
    message = refusal(online(REPO, "--dry-run", "--cache-dir", tmp_path / "cache"))
    assert message.startswith(f"{REPO}: the download failed: {taken}")
    assert message.endswith("; mend that, or choose another --cache-dir.")
