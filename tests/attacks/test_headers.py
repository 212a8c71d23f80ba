"""Headers of safetensors files, damaged and hostile: read rightly, or refused in one sentence that names the file.

Where the safetensors library itself can be asked, it is.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import SourceError
from tests.support.safetensors_files import GOOD, entry, file_bytes, refusal, shard

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
    """The file below really has the 40 MB that it claims (a hole on disk)."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 40_000_000) + b"{")
        file.truncate(8 + 40_000_000)
    asked: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], at: int) -> int:
        asked.append(len(buffers[0]))
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    assert "its header has 40000000 bytes; at most 33554432 are read" in refusal(tmp_path)
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


@pytest.mark.slow
@FUZZ
@given(header=st.dictionaries(st.sampled_from(["a", "b", "\n"]), json_values | entries), size=st.integers(0, 8))
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    raw = file_bytes(header, bytes(size))
    names = accepted_names(tmp_path, raw)
    if names is not None:  # then the format's own library must take it too, and see the same tensors
        assert names == {name for name, _ in deserialize(raw)}


@pytest.mark.slow
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
