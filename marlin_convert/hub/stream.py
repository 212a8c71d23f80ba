"""Tensors of weight files that stay on the Hub: brought by Range requests when they are needed, and dropped again.

A mirror (`Remote.mirror`) has, in place of each weight file, a sparse one of its size. What is brought is written
there, so that whoever reads a checkpoint's files finds it; what is dropped is a hole again and takes no room.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checkpoint.reader import Tensor
from ..errors import OutputError
from .client import explained
from .download import read_range
from .repository import Remote

#: Bytes of one request, and requests at a time: few enough for the Hub's limits, and in memory, at most their product.
_PIECE = 8 << 20
_REQUESTS = 8

#: fallocate(2): the bytes are given back, the file's size stays.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Streamed:
    """The weight files in `folder`, a mirror of `remote`; where `remote` is None, or the cache has a file, all of it is
    there, and nothing is done. Thread-safe for tensors that do not overlap."""

    def __init__(self, remote: Remote | None, folder: Path) -> None:
        self._remote, self._folder = remote, folder
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="marlin-convert-range")
        self._came = 0
        self.bytes_read = 0

    def bring(self, tensor: Tensor, start: int = 0, length: int | None = None) -> None:
        """Let bytes `start` … of a tensor be there. Raises HubError."""
        remote = self._remote
        if remote is None or not self._is_hole(tensor.file):
            return
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(remote.repo_id, tensor.file, revision=remote.commit)
        headers = build_hf_headers(token=remote.token)
        fd = os.open(self._folder / tensor.file, os.O_WRONLY | os.O_CLOEXEC)

        def read(begin: int, end: int) -> None:
            with explained(remote.repo_id, remote.revision):
                content = read_range(remote.repo_id, url, headers, begin, end, lambda: self._came)
            _write(fd, memoryview(content), begin)
            self._came += 1
            self.bytes_read += len(content)

        try:
            done = [self._pool.submit(read, *piece) for piece in _pieces(tensor, start, length)]
            try:
                for future in done:
                    future.result()
            except BaseException:
                for future in done:
                    future.cancel()
                raise
        finally:
            os.close(fd)

    def drop(self, tensor: Tensor, start: int = 0, length: int | None = None) -> None:
        """Give back the room of bytes `start` … of a tensor. Raises OutputError where the disk cannot."""
        if self._remote is None or not self._is_hole(tensor.file):
            return
        count = tensor.nbytes - start if length is None else length
        path = self._folder / tensor.file
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            begin, size = ctypes.c_int64(tensor.offset + start), ctypes.c_int64(count)
            if count and _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, begin, size):
                raise OutputError(
                    f"{self._folder}: this disk cannot give back parts of a file ({os.strerror(ctypes.get_errno())}); "
                    "let TMPDIR name a folder on another."
                )
        finally:
            os.close(fd)

    def _is_hole(self, file: str) -> bool:
        """Whether a file is a sparse one that stands for the Hub's; else it leads to all of it, in the cache."""
        return not (self._folder / file).is_symlink()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _pieces(tensor: Tensor, start: int, length: int | None) -> Iterator[tuple[int, int]]:
    """(first byte, end) in the file of each request for a part of a tensor."""
    first, end = tensor.offset + start, tensor.offset + (tensor.nbytes if length is None else start + length)
    for begin in range(first, end, _PIECE):
        yield begin, min(end, begin + _PIECE)


def _write(fd: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
