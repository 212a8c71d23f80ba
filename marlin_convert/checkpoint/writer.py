"""Writing the output's safetensors files: headers first, then every byte range at its planned place."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .header import DTYPE_BITS
from .output_folder import write_json
from .weight_file import Buffer

#: The output's weights in one file; their index, where there are several.
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def require_unique(tensors: Sequence[OutTensor]) -> None:
    """Raise SourceError where two tensors of the output would have one name: only one of them could be kept."""
    name, times = max(Counter(t.name for t in tensors).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise SourceError(
            f"{name}: {times} tensors of the result would have this name; rename the source's own, or remove it."
        )


def _split(tensors: Sequence[OutTensor], max_shard_size: int | str) -> Any:
    """Return which tensor goes into which file, by huggingface_hub's own rule."""
    from huggingface_hub.serialization._base import split_state_dict_into_shards_factory  # imported late: it is slow

    return split_state_dict_into_shards_factory(
        {t.name: t for t in tensors},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def shard_names(tensors: Sequence[OutTensor], max_shard_size: int | str) -> list[str]:
    """Return the files that `Shards` would write."""
    return list(_split(tensors, max_shard_size).filename_to_tensors)


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    shape: tuple[int, ...]


class Shards:
    """The output's safetensors files, created at their full size with their headers, open for positioned writes; and
    their index, if there is more than one, or if `index` asks for it.

    Shards are cut by huggingface_hub's own rule, in the order of `tensors`; within a file, data is ordered by
    element size so that every tensor is aligned, as the safetensors library does it.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[OutTensor], max_shard_size: int | str, *, index: bool = False
    ) -> None:
        require_unique(tensors)
        self.folder = folder
        by_name = {t.name: t for t in tensors}
        self._split = _split(tensors, max_shard_size)
        self._fds: dict[str, int] = {}
        self._places: dict[str, _Place] = {}
        self._missing: dict[str, int] = {}  # bytes still to come of tensors that come column by column
        # The kernel admits one writer at a time to a file and lets the others spin; they wait here instead.
        self._turn = threading.Lock()
        self.written = 0  # bytes of tensors
        try:
            for file, names in self._split.filename_to_tensors.items():
                self._create(file, [by_name[name] for name in names])
            if index or self._split.is_sharded:
                content = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
                write_json(folder / INDEX_FILE, content)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> list[str]:
        return list(self._split.filename_to_tensors)

    def _create(self, file: str, tensors: list[OutTensor]) -> None:
        ordered = sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])  # stable: otherwise in the given order
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for t in ordered:
            header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, begin + t.nbytes]}
            begin += t.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
        fd = self._fds[file] = os.open(self.folder / file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        _pwrite_all(fd, memoryview(struct.pack("<Q", len(raw)) + raw), 0)
        data_start = 8 + len(raw)
        os.truncate(fd, data_start + begin)
        for t in ordered:
            self._places[t.name] = _Place(file, data_start + header[t.name]["data_offsets"][0], t.shape)
            self._missing[t.name] = t.nbytes

    def write(self, name: str, data: Buffer, start: int = 0) -> None:
        """Put the bytes of `data` at byte `start` of tensor `name`. Thread-safe: places do not overlap."""
        place = self._places[name]
        fd, position = self._fds[place.file], place.offset + start
        with self._turn:
            _pwrite_all(fd, data.reshape(-1).view("uint8").data, position)
            self.written += data.nbytes
        _start_writeback(fd, position, data.nbytes)

    def write_columns(self, name: str, data: Buffer, first: int) -> None:
        """Put `data` [rows, columns] at the columns of matrix `name` from `first` on. Thread-safe, as `write`."""
        place = self._places[name]
        (rows, width), (_, columns) = place.shape, data.shape
        if columns == width:
            self.write(name, data)
            return
        fd, view, length = self._fds[place.file], data.reshape(-1).view("uint8").data, columns * data.itemsize
        with self._turn:
            for row in range(rows):
                position = place.offset + (row * width + first) * data.itemsize
                _pwrite_all(fd, view[row * length : (row + 1) * length], position)
            self._missing[name] -= data.nbytes
            self.written += data.nbytes
            complete = not self._missing[name]
        if complete:  # not earlier: the disk's blocks would be allocated in pieces
            _start_writeback(fd, place.offset, rows * width * data.itemsize)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_writeback(fd: int, position: int, length: int) -> None:
    """Let the disk begin with these bytes now, so that the fsync at the end finds little left to do.

    A hint: where the C library or the file system has no sync_file_range, the fsync does all the work.
    """
    write = 2  # SYNC_FILE_RANGE_WRITE: start, do not wait
    sync_file_range = getattr(_libc, "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(fd, ctypes.c_int64(position), ctypes.c_int64(length), write)


def _pwrite_all(fd: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
