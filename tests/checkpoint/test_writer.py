"""The bytes of the safetensors files that are written are what the format says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from marlin_convert.checkpoint.writer import OutTensor, Shards
from marlin_convert.errors import SourceError

TENSORS = [
    OutTensor("odd", "U8", (3,), 3),
    OutTensor("half", "BF16", (2, 2), 8),
    OutTensor("λ", "I32", (2,), 8),
    OutTensor("broad", "I64", (1,), 8),
    OutTensor("none", "F16", (0, 4), 0),
]
DATA: dict[str, Any] = {
    "odd": np.array([1, 2, 3], np.uint8),
    "half": np.array([[0x3F80, 0x4000], [0x4040, 0x4080]], np.uint16),  # 1, 2, 3, 4 in bfloat16
    "λ": np.array([-1, 2], np.int32),
    "broad": np.array([-5], np.int64),
}


def test_two_tensors_of_one_name_are_impossible(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^a: 2 tensors of the result would have this name"):
        Shards(tmp_path, [OutTensor("a", "U8", (1,), 1), TENSORS[0], OutTensor("a", "F16", (2,), 4)], "5GB")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    """The larger elements first, so that each tensor is aligned; the header padded to a multiple of 8."""
    with Shards(tmp_path, TENSORS, "5GB") as shards:
        assert shards.files == ["model.safetensors"]
        for name, data in DATA.items():
            shards.write(name, data)
    header = (
        '{"__metadata__":{"format":"pt"},'
        '"broad":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        '"λ":{"dtype":"I32","shape":[2],"data_offsets":[8,16]},'
        '"half":{"dtype":"BF16","shape":[2,2],"data_offsets":[16,24]},'
        '"none":{"dtype":"F16","shape":[0,4],"data_offsets":[24,24]},'
        '"odd":{"dtype":"U8","shape":[3],"data_offsets":[24,27]}}'
    ).encode()
    assert len(header) == 321
    header += b" " * 7
    data = bytes.fromhex("fbffffffffffffff ffffffff02000000 803f004040408040 010203")
    assert (tmp_path / "model.safetensors").read_bytes() == len(header).to_bytes(8, "little") + header + data
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # one file needs no index


def test_the_library_reads_it_back(tmp_path: Path) -> None:
    with Shards(tmp_path, TENSORS, "5GB") as shards:
        for name, data in DATA.items():
            shards.write(name, data)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {t.name for t in TENSORS}
        assert opened.get_tensor("half").float().tolist() == [[1, 2], [3, 4]]
        assert opened.get_tensor("λ").tolist() == [-1, 2]
        assert opened.get_tensor("broad").tolist() == [-5]
        assert opened.get_tensor("odd").tolist() == [1, 2, 3]
        assert tuple(opened.get_tensor("none").shape) == (0, 4)


def test_pieces_go_where_they_belong(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.int32)
    with Shards(tmp_path, [OutTensor("x", "U8", (5,), 5), OutTensor("a", "I32", (10, 100), 4000)], "5GB") as shards:
        for start in (600, 0, 300):
            shards.write("a", whole[start : start + 300].reshape(3, 100), start * 4)
        shards.write("a", whole[900:], 3600)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), whole.reshape(10, 100))
        np.testing.assert_array_equal(opened.get_tensor("x"), np.zeros(5))


def test_columns_go_where_they_belong(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.int32).reshape(10, 100)
    tensors = [OutTensor("x", "U8", (5,), 5), OutTensor("a", "I32", (10, 100), 4000), OutTensor("b", "F16", (2, 3), 12)]
    with Shards(tmp_path, tensors, "5GB") as shards:
        for first, columns in [(60, 40), (0, 25), (25, 35)]:
            shards.write_columns("a", np.ascontiguousarray(whole[:, first : first + columns]), first)
        shards.write_columns("b", np.array([[1, 2, 3], [4, 5, 6]], np.float16), 0)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), whole)
        np.testing.assert_array_equal(opened.get_tensor("b"), [[1, 2, 3], [4, 5, 6]])
        np.testing.assert_array_equal(opened.get_tensor("x"), np.zeros(5))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    data = np.arange(100, dtype=np.int32)
    with Shards(tmp_path, [OutTensor("a", "I32", (100,), 400)], "5GB") as shards:
        shards.write("a", data)
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("a"), data)


def test_shards_are_cut_as_transformers_does(tmp_path: Path) -> None:
    """In order, the next shard starting where a tensor would exceed the limit; larger tensors have their own."""
    sizes = {"a": 400, "b": 600, "c": 1, "d": 5000, "e": 999, "f": 2}
    tensors = [OutTensor(name, "U8", (size,), size) for name, size in sizes.items()]
    with Shards(tmp_path, tensors, "1KB") as shards:
        files = shards.files
    expected = [["a", "b"], ["c", "e"], ["d"], ["f"]]
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    found = {}
    for file in names:
        with safe_open(tmp_path / file, "np") as opened:
            found[file] = sorted(opened.keys())
    assert sorted(files) == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"] == {name: file for file, tensors in found.items() for name in tensors}
    assert sorted(found.values()) == expected
    for tensors_of_file in found.values():
        assert len(tensors_of_file) == 1 or sum(sizes[n] for n in tensors_of_file) <= 1000


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        Shards(tmp_path, TENSORS, "5GB")
    assert (tmp_path / "model.safetensors").read_text() == "mine"
