"""Files of unknown origin, read with bounds: regular ones only, and no more than fits into memory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import SourceError

#: Bytes of a file that is read whole (as many as safetensors allows to a header); commas and opening brackets in it,
#: each of which may become an object; levels of lists within lists.
MAX_FILE_BYTES, MAX_ITEMS, MAX_DEPTH = 100_000_000, 4_000_000, 100

_ITEMS = (b",", b"[", b"{")


def open_regular(path: Path) -> int:
    """A regular file, open for reading. Raises SourceError; a pipe is not waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}.") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"{path}: it is no regular file; remove it, or put the file itself there.")
    return fd


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """`open_regular`, closed at the end."""
    fd = open_regular(path)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """All of a regular file. Raises SourceError when it cannot be read or has more than `limit` bytes."""
    with opened(path) as fd:
        try:
            content = read_bytes(fd, 0, limit + 1)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(content) > limit:
        raise SourceError(f"{path}: it has more than {limit} bytes, which no such file has.")
    return content


def read_bytes(fd: int, start: int, count: int) -> bytes:
    """Bytes `start` to `start + count` of an open file, fewer where it ends. Raises OSError."""
    parts: list[bytes] = []
    piece = max(1 << 20, os.fstat(fd).st_size - start + 1)  # in general all of it, which then is there once only
    while count and (part := os.pread(fd, min(count, piece), start)):
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return b"".join(parts)


def parse_json(
    raw: bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None, parse_int: Callable[[str], Any] = int
) -> Any:
    """The value that a JSON text in UTF-8 has. Raises ValueError, with a reason, for anything else, and for more than a
    file of a checkpoint has."""
    if sum(map(raw.count, _ITEMS)) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} values")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=pairs_hook, parse_int=parse_int)
    except RecursionError:
        raise ValueError(f"nested in more than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return value
        holders = [holder for holder in level if isinstance(holder, (dict, list))]
        level = [inner for holder in holders for inner in (holder.values() if isinstance(holder, dict) else holder)]
    raise ValueError(f"nested in more than {MAX_DEPTH} levels")
