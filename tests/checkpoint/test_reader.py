"""Opening a folder of weights: whatever is in it, it is read rightly or refused in one sentence that names the file.

Nothing here trusts the module's own idea of the format: files are written byte by byte from the safetensors
specification, and where the safetensors library itself can be asked, it is.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save_file

from marlin_convert.checkpoint.reader import Checkpoint, Tensor
from marlin_convert.errors import MarlinConvertError, SourceError, UnsupportedError
from tests.support.gptq_checkpoints import two_layers, write_source


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


# ---- Headers ----


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\x01" * 7, "7 bytes"),
    "length beyond the file": (file_bytes({}, length=1000), "claims 1000 bytes"),
    "length one beyond the file": (file_bytes({}, length=3), "claims 3 bytes"),
    "length of all ones": (b"\xff" * 16, "claims 18446744073709551615 bytes"),
    "length zero": (file_bytes(b""), "not valid JSON"),
    "not JSON": (file_bytes(b"{this is not json}"), "not valid JSON"),
    "half of the JSON": (file_bytes({"a": entry("F16", [6], 0, 12)}, bytes(12), length=20), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "UTF-16": (file_bytes("{}".encode("utf-16")), "not valid JSON"),
    "a byte-order mark": (file_bytes(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "nested too deep": (file_bytes(b'{"a":' * 100_000), "not valid JSON"),
    "a number of 10,000 digits": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a list": (file_bytes([]), "not an object"),
    "a number": (file_bytes(b"3"), "not an object"),
    "a string": (file_bytes(b'"{}"'), "not an object"),
    "null": (file_bytes(b"null"), "not an object"),
    "one tensor twice": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                   b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "twice",
    ),
    "one key of an entry twice": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', b"x"), "twice",
    ),
    "a name with a line break": (file_bytes({"a\nb": entry("U8", [1], 0, 1)}, b"x"), "a\\nb"),
    "a name with an escape sequence": (file_bytes({"a\x1b[2J": entry("U8", [1], 0, 1)}, b"x"), "a\\x1b[2J"),
    "a name with half a surrogate": (file_bytes({"a\ud800": entry("U8", [1], 0, 1)}, b"x"), "a\\ud800"),
    "an unknown dtype": (file_bytes({"a": entry("F12", [1], 0, 1)}, b"x"), "unknown dtype 'F12'"),
    "an empty dtype": (file_bytes({"a": entry("", [1], 0, 1)}, b"x"), "unknown dtype ''"),
    "too few bytes for the shape": (
        file_bytes({"a": entry("F16", [2, 3], 0, 11)}, bytes(11)), "takes 12 bytes, not 11",
    ),
    "too many bytes for the shape": (
        file_bytes({"a": entry("F16", [2, 3], 0, 13)}, bytes(13)), "takes 12 bytes, not 13",
    ),
    "bytes of another dtype": (file_bytes({"a": entry("F32", [2, 3], 0, 12)}, bytes(12)), "takes 24 bytes, not 12"),
    "half a byte": (file_bytes({"a": entry("F4", [3], 0, 1)}, bytes(1)), "a"),
    "an enormous shape": (file_bytes({"a": entry("U8", [2**62, 2**62], 0, 0)}), "takes"),
    "a shape that overflows to nothing": (file_bytes({"a": entry("U8", [2**32, 2**32], 0, 0)}), "takes"),
    "an end before its begin": (file_bytes({"a": entry("U8", [1], 1, 0)}, b"x"), "not -1"),
    "overlapping tensors": (
        file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "b overlaps",
    ),
    "the same bytes twice": (
        file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)), "b overlaps",
    ),
    "an empty tensor inside another": (
        file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, bytes(4)), "b overlaps",
    ),
    "a hole": (file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, bytes(9)), "hole before"),
    "a hole at the start": (file_bytes({"a": entry("U8", [4], 1, 5)}, bytes(5)), "hole before"),
    "truncated by one byte": (GOOD[:-1], "truncated"),
    "one byte too many": (GOOD + b"\0", "no tensor owns"),
    "data and no tensors": (file_bytes({}, b"x"), "no tensor owns"),
    "no data at all": (file_bytes({"a": entry("U8", [4], 0, 4)}), "truncated"),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(100), "claims"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "reason"), ATTACKS.values(), ids=ATTACKS)
def test_attack_is_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    message = refusal(tmp_path)
    assert str(path) in message
    assert reason in message
    assert message.isprintable()


MALFORMED = {
    "null": None,
    "a number": 3,
    "a string": "F16",
    "a list": [1, 2, 3],
    "empty": {},
    "without dtype": {"shape": [1], "data_offsets": [0, 1]},
    "without shape": {"dtype": "U8", "data_offsets": [0, 1]},
    "without offsets": {"dtype": "U8", "shape": [1]},
    "dtype a number": entry(8, [1], 0, 1),
    "dtype a list": entry(["U8"], [1], 0, 1),
    "dtype an object": entry({"U8": 1}, [1], 0, 1),
    "dtype null": entry(None, [1], 0, 1),
    "shape a number": entry("U8", 1, 0, 1),
    "shape null": entry("U8", None, 0, 1),
    "shape an empty object": entry("U8", {}, 0, 1),
    "shape an empty string": entry("U8", "", 0, 1),
    "shape with a string": entry("U8", ["1"], 0, 1),
    "shape with a float": entry("U8", [1.0], 0, 1),
    "shape with true": entry("U8", [True], 0, 1),
    "shape with null": entry("U8", [None], 0, 1),
    "shape with a list": entry("U8", [[1]], 0, 1),
    "negative shape": entry("U8", [-1], 0, 1),
    "two negative sizes": entry("U8", [-1, -1], 0, 1),
    "negative begin": entry("U8", [2], -1, 1),
    "negative end": entry("U8", [1], 0, -1),
    "float offsets": entry("U8", [1], 0.0, 1.0),
    "string offsets": {"dtype": "U8", "shape": [1], "data_offsets": "01"},
    "object offsets": {"dtype": "U8", "shape": [1], "data_offsets": {"0": 0, "1": 1}},
    "one offset": {"dtype": "U8", "shape": [1], "data_offsets": [0]},
    "three offsets": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]},
    "null offsets": {"dtype": "U8", "shape": [1], "data_offsets": None},
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_malformed_entry_is_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"the.tensor": value}, b"x"))
    message = refusal(tmp_path)
    assert str(path) in message
    assert "the.tensor" in message


def test_huge_header_is_refused_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format allows 100 MB; the file below really has the 101 MB that it claims (a hole on disk)."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 101_000_000) + b"{")
        file.truncate(8 + 101_000_000)
    asked: list[int] = []
    pread = os.pread

    def counted(fd: int, count: int, at: int) -> bytes:
        asked.append(count)
        return pread(fd, count, at)

    monkeypatch.setattr(os, "pread", counted)
    assert "claims 101000000 bytes" in refusal(tmp_path)
    assert asked
    assert sum(asked) < 1000


def test_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4000000000\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not valid JSON"), ("[]", "object"), ("", "not valid JSON"), ("[" * 100_000, "not valid JSON"),
     ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
    ids=["half", "list", "empty", "deep", "LFS pointer"],
)  # fmt: skip
def test_json_files_are_checked(tmp_path: Path, name: str, text: str, reason: str) -> None:
    shard(tmp_path, "a.safetensors", "a")
    (tmp_path / name).write_text(text)
    message = refusal(tmp_path)
    assert name in message
    assert reason in message


ACCEPTED: dict[str, tuple[bytes, dict[str, tuple[str, tuple[int, ...], int]]]] = {
    "two tensors": (GOOD, {"a": ("F16", (2, 3), 12), "b": ("I32", (1,), 4)}),
    "no tensors": (file_bytes({}), {}),
    "metadata": (file_bytes({"__metadata__": {"format": "pt"}, "a": entry("U8", [1], 0, 1)}, b"x"),
                 {"a": ("U8", (1,), 1)}),
    "padding after the JSON": (file_bytes(b"{}      "), {}),
    "a scalar": (file_bytes({"a": entry("F32", [], 0, 4)}, bytes(4)), {"a": ("F32", (), 4)}),
    "nothing in it": (file_bytes({"a": entry("F32", [3, 0], 0, 0)}), {"a": ("F32", (3, 0), 0)}),
    "empty between full": (
        file_bytes({"x": entry("U8", [2], 2, 4), "e": entry("U8", [0], 2, 2), "a": entry("U8", [2], 0, 2)}, bytes(4)),
        {"a": ("U8", (2,), 2), "e": ("U8", (0,), 0), "x": ("U8", (2,), 2)},
    ),
    "empty at the end": (
        file_bytes({"e": entry("U8", [0], 2, 2), "a": entry("U8", [2], 0, 2)}, bytes(2)),
        {"a": ("U8", (2,), 2), "e": ("U8", (0,), 0)},
    ),
    "four bits": (file_bytes({"a": entry("F4", [4], 0, 2)}, bytes(2)), {"a": ("F4", (4,), 2)}),
    "a name outside ASCII": (file_bytes({"größe.重": entry("U8", [1], 0, 1)}, b"x"), {"größe.重": ("U8", (1,), 1)}),
    **{
        dtype: (file_bytes({"a": entry(dtype, [3], 0, 3 * size)}, bytes(3 * size)), {"a": (dtype, (3,), 3 * size)})
        for dtype, size in {
            "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
            "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
            "C64": 8,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize(("raw", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(tmp_path: Path, raw: bytes, expected: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with Checkpoint(tmp_path) as checkpoint:
        assert {n: (t.dtype, t.shape, t.nbytes) for n, t in checkpoint.tensors.items()} == expected
        assert list(checkpoint.tensors) == list(expected)  # in the order of their data
        for tensor in checkpoint.tensors.values():
            assert (tensor.name, tensor.file) == (next(n for n in expected if n == tensor.name), "model.safetensors")


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    with Checkpoint(tmp_path) as checkpoint:
        data_start = len(GOOD) - 16
        assert {n: t.offset for n, t in checkpoint.tensors.items()} == {"a": data_start, "b": data_start + 12}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.sampled_from(["", "U8", "F16", "F4", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": json_values | st.sampled_from(["U8", "F16", "F4"]),
        "shape": json_values | st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": json_values | st.lists(st.integers(0, 8), min_size=2, max_size=2),
    }
)


def accepted_names(folder: Path, raw: bytes) -> set[str] | None:
    """The tensors of a file with these bytes, or None if it is refused; anything but a SourceError is a bug."""
    (folder / "model.safetensors").write_bytes(raw)
    try:
        with Checkpoint(folder) as checkpoint:
            return set(checkpoint.tensors)
    except SourceError as error:
        message = error.message
    assert message.isprintable()
    return None


FUZZ = settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["a", "b", "\n"]), json_values | entries), size=st.integers(0, 8))
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    raw = file_bytes(header, bytes(size))
    names = accepted_names(tmp_path, raw)
    if names is not None:  # then the format's own library must take it too, and see the same tensors
        assert names == {name for name, _ in deserialize(raw)}


def test_any_damage_is_read_or_refused(tmp_path: Path) -> None:
    """A byte changed, or the file cut, anywhere: never a crash, and never accepted where the library refuses it."""
    rng, taken = random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(GOOD)
        for _ in range(rng.randint(1, 2)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        raw = bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        names = accepted_names(tmp_path, raw)
        if names is not None:
            taken += 1
            assert names == {name for name, _ in deserialize(raw)}, raw
    assert 5 < taken < 300  # a change may hit the data, or only a name; most break the file


# ---- Which files ----


def test_one_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    with Checkpoint(source.folder) as checkpoint:
        assert checkpoint.weight_files == ["model.safetensors"]
        expected = source.plain.keys() | {f"{n}.{p}" for n in source.layers for p in ("qweight", "scales", "qzeros",
                                                                                     "g_idx")}  # fmt: skip
        assert checkpoint.tensors.keys() == expected
        assert checkpoint.configs["config.json"]["model_type"] == "llama"
        assert checkpoint.notes == []


def test_shards_with_index(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", shards=3)
    with Checkpoint(source.folder) as checkpoint:
        assert checkpoint.weight_files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        weight_map = json.loads((source.folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert {n: t.file for n, t in checkpoint.tensors.items()} == weight_map


@pytest.mark.parametrize(
    "file", ["gptq_model-4bit-128g.safetensors", "gptq_model-4bit--1g.safetensors", "weights.v2.safetensors"]
)
def test_one_file_of_any_name(tmp_path: Path, file: str) -> None:
    write_source(tmp_path / "m", file=file)
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.weight_files == [file]
        assert "model.layers.0.mlp.down_proj.qweight" in checkpoint.tensors


def test_index_of_another_name(tmp_path: Path) -> None:
    shard(tmp_path, "gptq_model-4bit-128g-00001-of-00002.safetensors", "a")
    shard(tmp_path, "gptq_model-4bit-128g-00002-of-00002.safetensors", "b")
    weight_map = {t: f"gptq_model-4bit-128g-0000{i}-of-00002.safetensors" for i, t in ((1, "a"), (2, "b"))}
    index(tmp_path, weight_map, "gptq_model-4bit-128g.safetensors.index.json")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_model_file_base_name(tmp_path: Path, file: str) -> None:
    """The config names one of several files; in config.json the key stands inside quantization_config."""
    shard(tmp_path, "gptq_model-4bit-128g.safetensors", "a", "b")
    shard(tmp_path, "older.safetensors", "a", "c")
    said = {"model_file_base_name": "gptq_model-4bit-128g", "bits": 4}
    (tmp_path / file).write_text(json.dumps({"quantization_config": said} if file == "config.json" else said))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.weight_files == ["gptq_model-4bit-128g.safetensors"]
        assert set(checkpoint.tensors) == {"a", "b"}


@pytest.mark.parametrize("base", ["missing", "../elsewhere", "/etc/passwd", 3, None, ["x"]])
def test_model_file_base_name_that_names_no_file_here(tmp_path: Path, base: object) -> None:
    shard(tmp_path / "m", "weights.safetensors", "a")
    shard(tmp_path, "elsewhere.safetensors", "secret")
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"model_file_base_name": base}))
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert set(checkpoint.tensors) == {"a"}


def test_shards_without_index(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        shard(tmp_path, f"model-{i:05d}-of-00003.safetensors", f"t{i}")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"t1", "t2", "t3"}


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("base", ["model", "gptq_model-4bit-128g"])
def test_missing_part_without_index(tmp_path: Path, missing: int, base: str) -> None:
    for i in {1, 2, 3} - {missing}:
        shard(tmp_path, f"{base}-{i:05d}-of-00003.safetensors", f"t{i}")
    message = refusal(tmp_path)
    assert f"{base}-{missing:05d}-of-00003.safetensors" in message
    assert str(tmp_path) in message


def test_missing_part_that_another_number_hides(tmp_path: Path) -> None:
    """Three files, and one of them is no part of three: counting files is not enough."""
    for i in (1, 2, 4):
        shard(tmp_path, f"model-{i:05d}-of-00003.safetensors", f"t{i}")
    assert "model-00003-of-00003.safetensors" in refusal(tmp_path)


def test_absurd_number_of_parts_is_refused_at_once(tmp_path: Path) -> None:
    shard(tmp_path, "model-000000001-of-999999999.safetensors", "a")
    assert "model-000000002-of-999999999.safetensors" in refusal(tmp_path)


def test_tensor_in_two_shards_without_index(tmp_path: Path) -> None:
    shard(tmp_path, "model-00001-of-00002.safetensors", "a", "twice")
    shard(tmp_path, "model-00002-of-00002.safetensors", "b", "twice")
    message = refusal(tmp_path)
    assert "twice" in message
    assert "model-00001-of-00002.safetensors" in message
    assert "model-00002-of-00002.safetensors" in message


def test_tensor_in_two_shards_with_index(tmp_path: Path) -> None:
    """The index says which one counts."""
    save_file({"twice": torch.zeros(4)}, tmp_path / "one.safetensors")
    save_file({"twice": torch.ones(4), "b": torch.ones(4)}, tmp_path / "two.safetensors")
    index(tmp_path, {"twice": "two.safetensors", "b": "two.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.tensors["twice"]), np.ones(4, np.float32))
        assert checkpoint.weight_files == ["two.safetensors"]  # the other one is not opened at all
    index(tmp_path, {"twice": "one.safetensors", "b": "two.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.tensors["twice"]), np.zeros(4, np.float32))
        assert checkpoint.tensors["twice"].file == "one.safetensors"


def test_unrelated_files_are_read_together_when_they_do_not_contradict(tmp_path: Path) -> None:
    shard(tmp_path, "head.safetensors", "lm_head.weight")
    shard(tmp_path, "body.safetensors", "model.norm.weight")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.weight_files == ["body.safetensors", "head.safetensors"]
        assert set(checkpoint.tensors) == {"lm_head.weight", "model.norm.weight"}


def test_unrelated_files_that_contradict(tmp_path: Path) -> None:
    shard(tmp_path, "a-4bit.safetensors", "x")
    shard(tmp_path, "b-8bit.safetensors", "x")
    message = refusal(tmp_path)
    assert "a-4bit.safetensors" in message
    assert "b-8bit.safetensors" in message


def test_model_safetensors_beats_files_of_other_names(tmp_path: Path) -> None:
    """What Transformers loads when there is no index."""
    shard(tmp_path, "model.safetensors", "x")
    shard(tmp_path, "consolidated.safetensors", "x", "y")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"x"}


def test_index_beats_the_standard_name(tmp_path: Path) -> None:
    """One of several files may be called model.safetensors: it is not the whole model."""
    shard(tmp_path, "model.safetensors", "a")
    shard(tmp_path, "more.safetensors", "b")
    index(tmp_path, {"a": "model.safetensors", "b": "more.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


def test_tensor_beside_the_index_is_kept_and_said(tmp_path: Path) -> None:
    shard(tmp_path, "m.safetensors", "a", "extra")
    index(tmp_path, {"a": "m.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "extra"}
        assert len(checkpoint.notes) == 1
        assert "extra" in checkpoint.notes[0]
        assert "m.safetensors" in checkpoint.notes[0]


# ---- The index ----


OUTSIDE = {
    "parent": "../secret.safetensors",
    "parent further in": "sub/../../secret.safetensors",
    "absolute": "/etc/secret.safetensors",
    "backslashes": "..\\secret.safetensors",
    "a null byte": "m\0.safetensors",
    "a dot": ".",
    "empty": "",
    "a number": 3,
    "null": None,
    "a list": ["m.safetensors"],
    "an object": {"m.safetensors": 1},
}


@pytest.mark.parametrize("file", OUTSIDE.values(), ids=OUTSIDE)
def test_index_entry_outside_the_folder(tmp_path: Path, file: object) -> None:
    shard(tmp_path, "secret.safetensors", "a")
    shard(tmp_path / "m", "m.safetensors", "b")
    (tmp_path / "m" / "sub").mkdir()
    index(tmp_path / "m", {"b": "m.safetensors", "a": file})
    message = refusal(tmp_path / "m")
    assert "model.safetensors.index.json" in message
    assert "'a' points to" in message


def test_index_entry_in_a_subfolder(tmp_path: Path) -> None:
    shard(tmp_path / "parts", "one.safetensors", "a")
    index(tmp_path, {"a": "parts/one.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].file == "parts/one.safetensors"


def test_index_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"})
    message = refusal(tmp_path)
    assert "m-2.safetensors and 1 more" in message
    assert "model.safetensors.index.json" in message


def test_index_names_a_tensor_that_its_file_does_not_hold(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "b")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"})
    message = refusal(tmp_path)
    assert "'c' in m-2.safetensors" in message


def test_index_names_the_wrong_file(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "b")
    index(tmp_path, {"a": "m-2.safetensors", "b": "m-2.safetensors"})
    assert "'a' in m-2.safetensors" in refusal(tmp_path)


def test_index_names_a_pickle(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    (tmp_path / "m-2.bin").write_bytes(b"x")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.bin"})
    message = refusal(tmp_path)
    assert "m-2.bin" in message
    assert "not a safetensors file" in message


def test_index_entry_with_a_line_break(tmp_path: Path) -> None:
    shard(tmp_path, "m.safetensors", "a")
    index(tmp_path, {"a": "m.safetensors", "b\nc": "m.safetensors"})
    assert "'b\\nc' in m.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "m.safetensors", 3])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    shard(tmp_path, "m.safetensors", "a")
    index(tmp_path, weight_map)
    message = refusal(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "weight_map" in message


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "a")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}'
    )
    message = refusal(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "twice" in message


def test_several_indexes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        shard(tmp_path, f"{name}.safetensors", "a")
        index(tmp_path, {"a": f"{name}.safetensors"}, f"{name}.safetensors.index.json")
    message = refusal(tmp_path)
    assert "x.safetensors.index.json, y.safetensors.index.json" in message
    index(tmp_path, {"a": "y.safetensors"})  # the standard name decides
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].file == "y.safetensors"


def test_damage_in_any_shard_names_that_shard(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", shards=3)
    path = source.folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(source.folder)
    assert str(path) in message
    assert "truncated" in message


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


# ---- Other kinds of weights ----


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
    os.truncate(checkpoint.folder / "model.safetensors", tensor.offset + 500)
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
