"""Files written byte by byte from the safetensors specification: nothing here trusts the package's own idea of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import MarlinConvertError, SourceError


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header (JSON, or bytes as they are); `length` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = file_bytes({"a": entry("F16", [2, 3], 0, 12), "b": entry("I32", [1], 12, 16)}, bytes(range(16)))


def refusal(folder: Path, kind: type[MarlinConvertError] = SourceError) -> str:
    """The message with which `folder` is refused: one line, one sentence, no leftovers of Python's own errors."""
    with pytest.raises(kind) as caught:
        Checkpoint(folder)
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    assert "Traceback" not in message
    assert "Errno" not in message
    return message


def index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def shard(folder: Path, name: str, *tensors: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({t: torch.arange(4, dtype=torch.int32) for t in tensors}, folder / name)


def flip_bit(file: Path) -> None:
    """Change the last byte of a file: a byte of its last tensor."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
