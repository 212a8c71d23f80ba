"""The header of a safetensors file, every claim of it checked against the file before anybody relies on it.

The rules are those of the safetensors format: an 8-byte little-endian header length, a JSON header, then the data
without holes or overlaps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import SourceError
from ..text import shortened
from .bounded import LFS_POINTER, Bound, json_text, lfs_pointer, parse_json, unique_keys

#: Bits of one element, by the dtype names that the safetensors format uses.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

#: More than any checkpoint has: bytes of a header and values in it (the format itself allows 100 MB), tensors of one
#: file, dimensions of a tensor, characters of a tensor's name.
MAX_HEADER = Bound(32 << 20, 2_000_000)
MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME = 200_000, 64, 500


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of file `file` (a name relative to the folder)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a tensor of `dtype` and `shape` takes in a safetensors file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def is_tensor_name(name: str) -> bool:
    """Tell whether a tensor may have this name: not very long, and printable."""
    return len(name) <= MAX_NAME and name.isprintable()


def read_header(read: Callable[[int, int], bytearray], size: int, file: str, label: str) -> list[Tensor]:
    """Return all tensors of a safetensors file of `size` bytes, in the order of their data.

    `read(start, count)` gives bytes of it; `file` is its name in the checkpoint, `label` what messages call it. Raises
    SourceError with one line that says what is wrong with it.
    """
    data_start = 8 + _header_bytes(read, size, label)
    try:
        header = parse_json(_text(read(8, data_start - 8), label), _claims, _whole_number)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise _damaged(label, f"its header is not valid JSON ({error})") from None
    header.pop("__metadata__", None)
    # pop frees an entry as soon as its tensor has been made.
    tensors = [_tensor(name, header.pop(name), file, data_start, label) for name in list(header)]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _require_gapless(tensors, data_start, size, label)
    return tensors


def _damaged(label: str, what: str) -> SourceError:
    return SourceError(f"{label}: damaged safetensors file: {what}; fetch or export it again.")


def _header_bytes(read: Callable[[int, int], bytearray], size: int, label: str) -> int:
    """Return how long the header's JSON text is, which follows the 8 bytes that say so."""
    if size < 8:
        raise _damaged(label, f"it has {size} bytes, too few for a header")
    prefix = read(0, 8)
    if prefix == LFS_POINTER:
        raise lfs_pointer(label)
    length = int.from_bytes(prefix, "little")
    if 8 + length > size:
        raise _damaged(label, f"its header claims {length} bytes and the file has {size}")
    if length > MAX_HEADER.nbytes:
        raise SourceError(f"{label}: its header has {length} bytes; at most {MAX_HEADER.nbytes} are read.")
    return length


def _text(raw: bytearray, label: str) -> str:
    """Return the JSON of a header; its bytes are gone by then."""
    if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise SourceError(f"{label}: it has {count} tensors; of one file, at most {MAX_TENSORS} are read.")
    return json_text(raw, MAX_HEADER.items)


def _tensor(name: str, claims: Any, file: str, data_start: int, label: str) -> Tensor:
    """Return the tensor that an entry of a header describes, once its name, dtype, shape and size are sound."""
    if not is_tensor_name(name):  # no tool writes such a name, and a message could not show it
        raise _damaged(label, f"the tensor name {shortened(name)} is too long, or cannot be printed")
    if not isinstance(claims, _Claims) or not claims.well_formed():
        raise _damaged(label, f"the header entry of {name} is malformed")
    dtype, shape, (begin, end) = claims
    if dtype not in DTYPE_BITS:
        raise _damaged(label, f"{name} has the unknown dtype {shortened(dtype)}")
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        raise _damaged(label, f"{name} ({dtype} {shortened(list(shape))}) does not end at a whole byte")
    if end - begin != (nbytes := tensor_bytes(dtype, shape)):
        taken = f"{nbytes} bytes" if nbytes < 1 << 64 else "more bytes than there are"
        raise _damaged(label, f"{name} ({dtype} {shortened(list(shape))}) takes {taken}, not {end - begin}")
    return Tensor(name, dtype, shape, file, data_start + begin, end - begin)


def _require_gapless(tensors: list[Tensor], data_start: int, size: int, label: str) -> None:
    """Raise SourceError unless the tensors, in the order of their data, fill the file to its last byte."""
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise _damaged(label, f"{tensor.name} {what}")
        position += tensor.nbytes
    if position != size:
        what = "it is truncated" if position > size else "it has bytes that no tensor owns"
        raise _damaged(label, f"{what}: the header describes {position} bytes and the file has {size}")


class _Claims(NamedTuple):
    """What a header says about one tensor."""

    dtype: Any
    shape: Any
    offsets: tuple[Any, ...]

    def well_formed(self) -> bool:
        if not isinstance(self.dtype, str) or not isinstance(self.shape, tuple):
            return False
        numbers = [*self.shape, *self.offsets]
        return (
            len(self.offsets) == 2
            and len(self.shape) <= MAX_DIMENSIONS
            and all(type(number) is int and number >= 0 for number in numbers)
        )


def _claims(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Claims:
    """Return an object of a header: what it says about one tensor, in little memory, or whatever else it is."""
    found = unique_keys(pairs)
    if not isinstance(offsets := found.get("data_offsets"), list):
        return found
    dtype, shape = found.get("dtype"), found.get("shape")
    return _Claims(
        sys.intern(dtype) if isinstance(dtype, str) else dtype,
        tuple(shape) if isinstance(shape, list) else shape,
        tuple(offsets),
    )


def _whole_number(digits: str) -> int:
    if len(digits) > 20:  # no file has so many bytes
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
