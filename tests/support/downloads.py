"""A repository large enough for a download to be watched, and what of it lies on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.cli import PROGRAM, running
from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source
from tests.support.hub_server import Hub, Request

REPO = "someone/large-gptq"
MB = 1e6


def large(folder: Path, shards: int = 4, **changes: Any) -> Source:
    """Eight layers of 1 MB, two in each of four files, the layer between two files in both; 1 MB of other tensors."""
    layers = {f"model.layers.{i}.mlp.up_proj": GPTQLayer(K=1024, N=2048, seed=i, **changes) for i in range(8)}
    plain = {"model.embed_tokens.weight": torch.randn(1024, 512).half()}
    return write_source(folder, layers, plain, shards=shards, in_order=True, extra={"tokenizer.json": "{}"})


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


@contextlib.contextmanager
def program(hub: Hub, tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [*PROGRAM, REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--quiet", *options]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf-home")}
    with running(command, env=env, stderr=subprocess.PIPE) as process:
        yield process
