"""Files of unknown origin, read with bounds: regular ones only, and no more than fits into memory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SourceError


class Bound(NamedTuple):
    """What a JSON text may have: bytes, and commas and opening brackets, each of which may become an object."""

    nbytes: int
    items: int


#: Of a config, which may name every layer of the largest models with two settings for each; of what has an entry for
#: each tensor or layer: an index, a report. An item takes up to 300 bytes.
CONFIG, LISTING = Bound(16 << 20, 250_000), Bound(32 << 20, 1_000_000)

#: Depth of nesting.
MAX_DEPTH = 100

_ITEMS = (b",", b"[", b"{")

#: The first bytes of what Git leaves in place of a large file that was not fetched.
LFS_POINTER = b"version "


def open_regular(path: Path, label: str | None = None) -> int:
    """Open a regular file for reading. Raises SourceError, which names it by `label`; a pipe is not waited for."""
    label = str(path) if label is None else label
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SourceError(f"{label}: cannot be opened: {getattr(error, 'strerror', error)}.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"{label}: it is not a regular file; remove it, or put the file itself there.")
    return fd


@contextlib.contextmanager
def opened(path: Path, label: str | None = None) -> Iterator[int]:
    """Open a regular file as `open_regular` does, and close it at the end."""
    fd = open_regular(path, label)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(path: Path, limit: int = LISTING.nbytes, label: str | None = None) -> bytes:
    """Return all of a regular file. Raises SourceError when it cannot be read or has more than `limit` bytes."""
    label = str(path) if label is None else label
    with opened(path, label) as fd:
        try:
            content = read_bytes(fd, 0, limit + 1)
        except OSError as error:
            raise SourceError(f"{label}: cannot be read: {error.strerror}.") from None
    if len(content) > limit:
        raise SourceError(f"{label}: it has more than {limit} bytes, which no such file has.")
    return content


def read_bytes(fd: int, start: int, count: int) -> bytes:
    """Return bytes `start` to `start + count` of an open file, fewer where it ends. Raises OSError."""
    parts: list[bytes] = []
    piece = max(1 << 20, os.fstat(fd).st_size - start + 1)  # usually all of it, so that there is only one copy
    while count and (part := os.pread(fd, min(count, piece), start)):
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return b"".join(parts)


def json_text(raw: bytes | bytearray, items: int = LISTING.items) -> str:
    """Return JSON in UTF-8 as a text, for `parse_json`; of so many items, or ValueError is raised."""
    if sum(map(raw.count, _ITEMS)) > items:
        raise ValueError(f"more than {items} values")
    return raw.decode()


def parse_json(
    text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None, parse_int: Callable[[str], Any] = int
) -> Any:
    """Return the value that a JSON text has. Raises ValueError, with a reason, for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook, parse_int=parse_int)
    except RecursionError:
        raise ValueError(f"nested in more than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return value
        holders = [holder for holder in level if isinstance(holder, (dict, list))]
        level = [inner for holder in holders for inner in (holder.values() if isinstance(holder, dict) else holder)]
    raise ValueError(f"nested in more than {MAX_DEPTH} levels")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for `parse_json`. Raises ValueError where a name appears twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def read_json(
    path: Path,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    label: str | None = None,
    bound: Bound = LISTING,
) -> dict[str, Any]:
    """Return the object in a JSON file. Raises SourceError, which names it by `label`, when there is none."""
    label = str(path) if label is None else label
    try:
        value = parse_json(_text(path, label, bound), pairs_hook)
    except ValueError as error:
        raise SourceError(f"{label}: not valid JSON ({error}); fetch or export it again.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{label}: a JSON object was expected, not {type(value).__name__}.")
    return value


def _text(path: Path, label: str, bound: Bound) -> str:
    """Return what a JSON file says; its bytes are gone by then."""
    raw = read_file(path, bound.nbytes, label)
    if raw.startswith(LFS_POINTER):
        raise lfs_pointer(label)
    return json_text(raw, bound.items)


def lfs_pointer(label: str) -> SourceError:
    """Return the error for a pointer of Git LFS in the place of a file."""
    return SourceError(
        f"{label}: this is a Git LFS pointer, not the file itself; run `git lfs pull` in the source first."
    )
