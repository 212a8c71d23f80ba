"""Working through a large checkpoint in small pieces, several at a time, in bounded memory.

A layer's weights are cut into blocks of whole tile rows (16 rows of K), each of which converts on its own; with
act-order, where a row may come from anywhere, into panels of whole tile columns (64 columns of N); plain tensors are
cut into byte ranges. Worker threads take piece after piece and do all of it: read, compute, write.
The system calls and the native code release Python's lock, so reading, repacking and writing overlap.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..formats.layout import PACK_FACTOR, TILE_K, TILE_N
from ..interrupts import postponed

#: Bytes of packed weights in one block: large enough that a system call costs nothing beside the copy, small enough
#: that a block, its result and the check's scratch stay in a core's share of the last-level cache.
BLOCK_BYTES = 2 << 20

#: Threads that work at a time. One more than the cores, because one of them waits for the disk.
WORKERS = min(8, 1 + (os.cpu_count() or 1))

#: Bytes of packed weights in one panel. A layer in one panel is written as a whole; of several, each row of a panel is
#: read and written by a call of its own, which takes the system twice the time. Each worker holds two buffers of this
#: size (restoring, three of smaller panels), no larger than its layers: together 320 MiB at most.
PANEL_BYTES = min(64 << 20, (320 << 20) // (2 * WORKERS))

#: Rows of K that stay together, if they are not too many: whole tile rows, and what the CUDA kernels take at the least.
ROWS = 4 * TILE_K

#: Bytes of a cache line.
LINE_BYTES = 64

#: Numbers in a strip of scales, zero points or weights that numpy works on: some float64 arrays of them are small.
STRIP_ELEMENTS = 1 << 18


def row_blocks(K: int, N: int) -> Iterator[tuple[int, int]]:
    """Return (first row, rows) of each block of a K x N layer; both are multiples of 64, if K is, or of 16 where 64
    rows have more than BLOCK_BYTES."""
    step = ROWS if ROWS * N * 4 // PACK_FACTOR <= BLOCK_BYTES else TILE_K
    rows = step * max(1, BLOCK_BYTES // (step * N * 4 // PACK_FACTOR))
    for first in range(0, K, rows):
        yield first, min(rows, K - first)


class Stored(Protocol):
    """A layer's stored size and bits."""

    @property
    def stored_K(self) -> int: ...
    @property
    def stored_N(self) -> int: ...
    @property
    def bits(self) -> int: ...


def stored_blocks(layer: Stored) -> Iterator[tuple[int, int]]:
    """Return `row_blocks` of a layer as it is stored, of the same number of bytes whatever its bits."""
    return row_blocks(layer.stored_K, layer.stored_N * layer.bits // 4)


def column_panels(layer: Stored, buffers: int = 2) -> Iterator[tuple[int, int]]:
    """Return (first column, columns) of each panel of a layer as it is stored: all its rows of so many columns. A
    worker holds so many `buffers` of a panel's size."""
    return _columns(layer, layer.stored_N, PANEL_BYTES * 2 // buffers)


def strips(layer: Stored, columns: int) -> Iterator[tuple[int, int]]:
    """Return (first column, columns) of the parts of a panel, each worked on as a whole, so that it stays in the
    cache."""
    return _columns(layer, columns, BLOCK_BYTES)


def _columns(layer: Stored, columns: int, limit: int) -> Iterator[tuple[int, int]]:
    """Return parts of so many columns of a layer: of whole tiles, about equally wide, of at most `limit` bytes or one
    tile."""
    tiles, per_tile = columns // TILE_N, layer.stored_K * TILE_N * layer.bits // 8
    parts = -(-tiles // max(1, limit // per_tile))
    width = -(-tiles // parts) * TILE_N
    for first in range(0, columns, width):
        yield first, min(width, columns - first)


def group_strips(G: int, N: int) -> Iterator[tuple[int, int]]:
    """Return (first group, groups) of each strip of a layer's scales or zero points [G, N], each worked on as a
    whole."""
    count = max(1, STRIP_ELEMENTS // N)
    for first in range(0, G, count):
        yield first, min(count, G - first)


def byte_blocks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Return (start, length) of each piece of a tensor that is copied as it is."""
    for start in range(0, nbytes, BLOCK_BYTES):
        yield start, min(BLOCK_BYTES, nbytes - start)


class Buffers(threading.local):
    """Scratch arrays of the calling thread, one for each role, kept between blocks and grown when needed."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, role: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return an uninitialised C-contiguous array, whose memory begins a cache line; the next call for the same role
        hands out the same memory."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = self._arrays.get(role)
        if memory is None or memory.nbytes < nbytes:
            whole = np.empty(nbytes + LINE_BYTES, np.uint8)
            memory = self._arrays[role] = whole[-whole.ctypes.data % LINE_BYTES :][:nbytes]
        array: npt.NDArray[Any] = memory[:nbytes].view(dtype).reshape(shape)
        return array


def run_all(
    tasks: Iterable[Callable[[], None]], workers: int = WORKERS, *, on_stop: Callable[[], None] = lambda: None
) -> None:
    """Run every task, in order of arrival, on `workers` threads.

    The first error, or Ctrl-C, stops the rest and is raised here once no task is running any more. `on_stop` is called
    first: it wakes a worker that waits inside `tasks`.
    """
    iterator, lock, stop = iter(tasks), threading.Lock(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(iterator, None)
            if task is None:
                return
            try:
                task()
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(workers, thread_name_prefix="marlin-convert") as pool:
        futures: list[Future[None]] = []
        try:
            with postponed():
                futures += [pool.submit(work) for _ in range(workers)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            on_stop()
    for future in futures:
        future.result()
