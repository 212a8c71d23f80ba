"""Weights in files that run code when they are loaded: never opened, and said to be what they are."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import UnsupportedError
from tests.support.gptq_checkpoints import write_source
from tests.support.safetensors_files import refusal


class Opened:
    """Every path that is opened while it watches, through any of Python's doors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
            monkeypatch.setattr(module, name, self._watch(getattr(module, name)))

    def _watch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int):
                self.names.add(Path(os.fsdecode(path)).name)
            return original(path, *args, **kwargs)

        return watched


class Bomb:
    """What a hostile pickle does when it is loaded: it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    raw = pickle.dumps(Bomb(tmp_path / "exploded"))
    yield raw
    assert not (tmp_path / "exploded").exists()
    pickle.loads(raw)  # it would have worked
    assert (tmp_path / "exploded").is_dir()


PICKLES = ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "gptq_model-4bit-128g.bin", "x.ckpt"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_only(tmp_path: Path, name: str, bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / name).write_bytes(bomb)
    (folder / "config.json").write_text("{}")
    opened = Opened(monkeypatch)
    message = refusal(folder, UnsupportedError)
    assert name in message
    assert "pickle" in message
    assert "safetensors" in message  # the way out
    assert "config.json" in opened.names  # the watch works
    assert name not in opened.names


def test_pickles_beside_safetensors_are_not_opened(
    tmp_path: Path, bomb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "m")
    for name in PICKLES:
        (source.folder / name).write_bytes(bomb)
    opened = Opened(monkeypatch)
    with Checkpoint(source.folder) as checkpoint:
        assert checkpoint.weight_files == ["model.safetensors"]
    assert "model.safetensors" in opened.names
    assert not opened.names & set(PICKLES)


def test_pickle_named_safetensors(tmp_path: Path, bomb: bytes) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bomb)
    assert "model.safetensors" in refusal(folder)


def test_gguf_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0")
    opened = Opened(monkeypatch)
    message = refusal(tmp_path, UnsupportedError)
    assert "GGUF" in message
    assert "model-Q4_K_M.gguf" in message
    assert "model-Q4_K_M.gguf" not in opened.names
