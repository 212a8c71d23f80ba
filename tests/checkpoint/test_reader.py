"""Opening a folder of weights and reading from it: rightly, or refused in one sentence that names the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.checkpoint.reader import Checkpoint, Tensor
from marlin_convert.errors import SourceError, UnsupportedError
from tests.support.gptq_checkpoints import two_layers, write_source
from tests.support.safetensors_files import entry, file_bytes, refusal

# ---- Folders ----


def hub_snapshot(tmp_path: Path, source: Path) -> Path:
    """The files of `source` as the Hub cache keeps them: blobs, and a snapshot of relative links to them."""
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / f"{i:064d}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{i:064d}"))
    return snapshot


@pytest.mark.parametrize("shards", [1, 2])
def test_links_of_the_hub_cache(tmp_path: Path, shards: int) -> None:
    source = write_source(tmp_path / "m", shards=shards, extra={"tokenizer.json": "{}"})
    snapshot = hub_snapshot(tmp_path, source.folder)
    with Checkpoint(snapshot) as checkpoint:
        scales = checkpoint.read(checkpoint.tensors["model.layers.0.mlp.down_proj.scales"])
        np.testing.assert_array_equal(scales, source.layers["model.layers.0.mlp.down_proj"].scale_tensor.numpy())
        assert checkpoint.extra_files == ("tokenizer.json",)


def test_link_to_a_blob_that_is_not_there(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    snapshot = hub_snapshot(tmp_path, source.folder)
    (snapshot / "model.safetensors").resolve().unlink()
    assert "model.safetensors" in refusal(snapshot)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")


def test_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "no .safetensors file" in message


def test_extra_files_are_what_is_not_the_models_weights_no_config_and_not_hidden(tmp_path: Path) -> None:
    small = ["LICENSE", "README.md", "chat_template.jinja", "sub/vocab.txt", "tokenizer.json", "tokenizer.model"]
    weights = [
        "pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "a.gguf", "a.onnx", "tf_model.h5",
        "flax_model.msgpack", "pytorch_model.bin.index.json", "sub/other.safetensors", "mtp.safetensors",
    ]  # fmt: skip
    kept = sorted(small + weights)
    left = [
        ".git/config", ".gitattributes", "quant_config.json", "quantize_config.json", "quantization_config.json",
    ]  # fmt: skip
    write_source(tmp_path / "m", extra={**dict.fromkeys(kept, "x"), **dict.fromkeys(left, "{}")})
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert list(checkpoint.extra_files) == kept
        assert checkpoint.weights_beside == dict.fromkeys(sorted(weights), 1)
        assert set(checkpoint.configs) == {
            "config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"
        }  # fmt: skip


# ---- Reading ----


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[tuple[Checkpoint, Tensor]]:
    """A tensor whose byte i is i % 251, with neighbours that must never be seen."""
    pattern = bytes(i % 251 for i in range(1000))
    header = {"before": entry("U8", [7], 0, 7), "t": entry("U8", [10, 100], 7, 1007),
              "after": entry("U8", [9], 1007, 1016)}  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(file_bytes(header, b"\xfe" * 7 + pattern + b"\xff" * 9))
    with Checkpoint(tmp_path) as checkpoint:
        yield checkpoint, checkpoint.tensors["t"]


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1000), (0, 1), (999, 1), (250, 2), (1, 999), (500, 0), (1000, 0), (0, 0), (251, 749)]
)
def test_read_into(counting: tuple[Checkpoint, Tensor], start: int, length: int) -> None:
    checkpoint, tensor = counting
    buffer = np.full(length, 0xEE, np.uint8)
    checkpoint.read_into(tensor, buffer, start)
    np.testing.assert_array_equal(buffer, np.arange(start, start + length) % 251)


def test_read_into_any_shape_and_dtype(counting: tuple[Checkpoint, Tensor]) -> None:
    checkpoint, tensor = counting
    buffer = np.zeros((5, 25), np.uint64)
    checkpoint.read_into(tensor, buffer)
    np.testing.assert_array_equal(buffer.reshape(-1).view(np.uint8), np.arange(1000) % 251)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (-1, 1001), (0, 1001), (1000, 1), (999, 2), (5000, 0)])
def test_read_into_beyond_the_tensor(counting: tuple[Checkpoint, Tensor], start: int, length: int) -> None:
    checkpoint, tensor = counting
    buffer = np.full(length, 0xEE, np.uint8)
    with pytest.raises(ValueError, match="of 1000"):
        checkpoint.read_into(tensor, buffer, start)
    assert (buffer == 0xEE).all()


@pytest.mark.parametrize(("first", "columns"), [(0, 100), (0, 1), (99, 1), (30, 45)])
def test_read_columns(
    counting: tuple[Checkpoint, Tensor], first: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, tensor = counting
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:17]], at))
    buffer = np.full((10, columns), 0xEE, np.uint8)
    checkpoint.read_columns(tensor, buffer, first)
    np.testing.assert_array_equal(buffer, (np.arange(1000) % 251).reshape(10, 100)[:, first : first + columns])


@pytest.mark.parametrize(("first", "shape"), [(-1, (10, 2)), (99, (10, 2)), (0, (10, 101)), (0, (9, 100))])
def test_read_columns_beyond_the_tensor(
    counting: tuple[Checkpoint, Tensor], first: int, shape: tuple[int, int]
) -> None:
    checkpoint, tensor = counting
    with pytest.raises(ValueError, match=r"of \(10, 100\) were asked for"):
        checkpoint.read_columns(tensor, np.zeros(shape, np.uint8), first)


def test_read_into_continues_after_short_reads(
    counting: tuple[Checkpoint, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call may give less than asked for (at most 2 GiB, or what a network disk has ready)."""
    checkpoint, tensor = counting
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:17]], at))
    buffer = np.zeros(900, np.uint8)
    checkpoint.read_into(tensor, buffer, 50)
    np.testing.assert_array_equal(buffer, np.arange(50, 950) % 251)


def test_file_that_shrinks(counting: tuple[Checkpoint, Tensor]) -> None:
    checkpoint, tensor = counting
    os.truncate(checkpoint.path("model.safetensors"), tensor.offset + 500)
    with pytest.raises(SourceError, match=r"model\.safetensors.*shorter"):
        checkpoint.read_into(tensor, np.zeros(1000, np.uint8))


def test_disk_that_fails(counting: tuple[Checkpoint, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tensor = counting

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SourceError, match=r"model\.safetensors: reading failed: Input/output error\."):
        checkpoint.read_into(tensor, np.zeros(1000, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [(torch.int32, np.int32), (torch.int64, np.int64), (torch.float16, np.float16), (torch.float32, np.float32)],
)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (0, 3)])
def test_read(tmp_path: Path, dtype: torch.dtype, numpy_dtype: Any, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    save_file({"t": tensor, "u": torch.ones(3)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        array = checkpoint.read(checkpoint.tensors["t"])
    assert array.dtype == numpy_dtype
    assert array.shape == shape
    np.testing.assert_array_equal(array, tensor.numpy())


def test_read_bfloat16_as_words(tmp_path: Path) -> None:
    save_file({"t": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.tensors["t"]), np.array([0x3F80, 0xC000], np.uint16))


def test_read_of_a_dtype_that_gptq_does_not_use(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(2, dtype=torch.bool)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(UnsupportedError, match=r"^t: dtype BOOL"):
        checkpoint.read(checkpoint.tensors["t"])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_closes_its_files(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", two_layers(), shards=3)
    before = open_files()
    with Checkpoint(source.folder):
        assert open_files() == before + 3
    assert open_files() == before
    path = source.folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refusal(source.folder)
    assert open_files() == before
