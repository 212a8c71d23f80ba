"""Several programs on one cache: each waits for a file that comes, and what one wants to keep stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import PATIENCE, Run
from tests.support.downloads import REPO, Disk, until, weights_of, whole
from tests.support.gptq_checkpoints import Source
from tests.support.hub_server import Hub, Request


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
