"""Contents of files on the Hub that tests serve: sizes, parts, and the names that the Hub and git give them."""

from __future__ import annotations

import hashlib
from pathlib import Path

LFS = True  # whether weights are LFS objects


def is_lfs(name: str) -> bool:
    """Whether the Hub keeps a file as an LFS object, as it does with all but the smallest weights."""
    return LFS and name.endswith(".safetensors")


def size_of(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def part(content: bytes | Path, begin: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[begin:end]
    with content.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


_HASHES: dict[tuple[Path, bool], str] = {}


def hash_of(name: str, content: bytes | Path) -> str:
    """The Hub's name for a file's content: SHA-256 of weights, git's own for others."""
    lfs = is_lfs(name)
    if isinstance(content, Path):
        key = (content, lfs)
        if key not in _HASHES:
            with content.open("rb") as file:  # some have gigabytes
                begun = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size_of(content))
                while piece := file.read(1 << 20):
                    begun.update(piece)
            _HASHES[key] = begun.hexdigest()
        return _HASHES[key]
    return hashlib.sha256(content).hexdigest() if lfs else blob_id(content)


def blob_id(data: bytes) -> str:
    """git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
