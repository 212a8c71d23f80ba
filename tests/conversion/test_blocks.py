"""Cutting into blocks and working on several at a time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_convert.conversion import blocks as stream
from marlin_convert.conversion.blocks import Buffers, byte_blocks, column_panels, row_blocks, run_all, strips
from tests.support.cli import PATIENCE


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 2000))
def test_row_blocks_cover_every_row_once(tile_rows: int, quarter_columns: int) -> None:
    K, N = 16 * tile_rows, 64 * quarter_columns
    blocks = list(row_blocks(K, N))
    assert [row for first, rows in blocks for row in range(first, first + rows)] == list(range(K))
    # Whole tile rows; and 64 rows at a time, which the CUDA kernels take at the least, unless they are too many.
    step = 64 if 64 * N // 2 <= stream.BLOCK_BYTES else 16
    assert all(first % step == 0 and rows % 16 == 0 and rows > 0 for first, rows in blocks)
    assert all(rows % step == 0 for _, rows in blocks[:-1])
    # A block is as large as allowed and no larger, unless a tile row is.
    assert all(rows * N // 2 <= stream.BLOCK_BYTES or rows == 16 for _, rows in blocks)
    assert len(blocks) <= K * N / 2 / stream.BLOCK_BYTES * 2 + 1


def test_row_blocks_of_known_layers() -> None:
    """2 MiB of packed weights: 146 rows of 28672 columns (14336 bytes each), of which 128 are twice 64."""
    assert list(row_blocks(8192, 28672))[:3] == [(0, 128), (128, 128), (256, 128)]
    assert list(row_blocks(8192, 28672))[-1] == (8064, 128)
    assert list(row_blocks(64, 262144)) == [(0, 16), (16, 16), (32, 16), (48, 16)]  # of 2 MiB each
    assert list(row_blocks(4096, 4096)) == [(0, 1024), (1024, 1024), (2048, 1024), (3072, 1024)]


@dataclass
class Stored:
    stored_K: int
    stored_N: int
    bits: int = 4


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 500), st.sampled_from([4, 8]))
def test_panels_and_strips_cover_every_column_once(eight_tile_rows: int, tiles: int, bits: int) -> None:
    layer = Stored(128 * eight_tile_rows, 64 * tiles, bits)
    per_column = layer.stored_K * bits // 8
    for limit, parts, width in [
        (stream.PANEL_BYTES, list(column_panels(layer)), layer.stored_N),
        (stream.BLOCK_BYTES, list(strips(layer, 64 * (tiles // 2 + 1))), 64 * (tiles // 2 + 1)),
    ]:
        assert [n for first, columns in parts for n in range(first, first + columns)] == list(range(width))
        assert all(first % 64 == 0 and columns % 64 == 0 and columns > 0 for first, columns in parts)
        assert all(columns * per_column <= limit or columns == 64 for _, columns in parts)
        assert len(parts) <= width * per_column / limit * 2 + 1


def test_panels_of_known_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 MiB: a whole layer of Mistral-7B's attention, half of its down_proj, a fifth of Llama-70B's."""
    monkeypatch.setattr(stream, "PANEL_BYTES", 24 << 20)
    assert list(column_panels(Stored(4096, 4096))) == [(0, 4096)]
    assert list(column_panels(Stored(14336, 4096))) == [(0, 2048), (2048, 2048)]
    assert list(column_panels(Stored(28672, 8192))) == [
        (0, 1664),
        (1664, 1664),
        (3328, 1664),
        (4992, 1664),
        (6656, 1536),
    ]


@settings(deadline=None)
@given(st.integers(0, 40_000_000))
def test_byte_blocks_cover_every_byte_once(nbytes: int) -> None:
    blocks = list(byte_blocks(nbytes))
    ends = [start + length for start, length in blocks]
    assert [start for start, _ in blocks] == [0, *ends[:-1]][: len(blocks)]
    assert (ends[-1] if ends else 0) == nbytes
    assert all(0 < length <= stream.BLOCK_BYTES for _, length in blocks)


def test_tasks_start_in_order() -> None:
    started: list[int] = []
    run_all((lambda i=i: started.append(i)) for i in range(100))  # type: ignore[misc]
    assert sorted(started) == list(range(100))
    alone: list[int] = []
    run_all([lambda i=i: alone.append(i) for i in range(100)], workers=1)  # type: ignore[misc]
    assert alone == list(range(100))


def test_nothing_to_do() -> None:
    run_all([])


def test_several_run_at_a_time() -> None:
    """Three tasks that wait for each other end only if all three are running."""
    meeting = threading.Barrier(3, timeout=PATIENCE)
    run_all([meeting.wait] * 3, workers=3)  # type: ignore[list-item]


def test_tasks_are_asked_for_one_by_one() -> None:
    """The list of all tasks is never in memory: a model has thousands of blocks."""
    asked, done = 0, 0

    def tasks() -> Iterator[Callable[[], None]]:
        nonlocal asked
        for _ in range(50):
            asked += 1
            assert asked - done <= 2
            yield finish

    def finish() -> None:
        nonlocal done
        done += 1

    run_all(tasks(), workers=1)
    assert done == 50


def test_the_first_error_stops_the_rest() -> None:
    started: list[int] = []
    running = threading.Semaphore(0)

    def task(i: int) -> None:
        started.append(i)
        if i == 3:
            raise ZeroDivisionError("task 3")
        if i > 3:
            running.release()
            time.sleep(0.01)

    with pytest.raises(ZeroDivisionError, match="task 3"):
        run_all([lambda i=i: task(i) for i in range(1000)], workers=2)  # type: ignore[misc]
    assert len(started) < 50


def test_no_task_is_running_when_the_error_arrives() -> None:
    """The caller removes the output folder then; nobody may still be writing into it."""
    in_flight, both = 0, threading.Barrier(2, timeout=PATIENCE)
    lock = threading.Lock()

    def slow() -> None:
        nonlocal in_flight
        with lock:
            in_flight += 1
        both.wait()
        time.sleep(0.2)
        with lock:
            in_flight -= 1

    def fails() -> None:
        both.wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all([slow, fails], workers=2)
    assert in_flight == 0


def test_an_error_of_the_list_of_tasks_itself_is_raised() -> None:
    def tasks() -> Iterator[Callable[[], None]]:
        yield lambda: None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(tasks())


def test_an_interrupt_in_a_task_is_raised() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([interrupted])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupt_while_the_threads_begin(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """None of them still works when it arrives, for the same reason."""
    start, begun = threading.Thread.start, iter(range(1, 1000))

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if next(begun) == after:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        run_all([lambda: time.sleep(0.2)] * 100, workers=3)
    assert set(threading.enumerate()) == before


def test_buffers_are_kept_and_grow() -> None:
    buffers = Buffers()
    small = buffers.array("a", (4, 8), np.int32)
    assert (small.shape, small.dtype, small.flags.c_contiguous) == ((4, 8), np.int32, True)
    again = buffers.array("a", (2, 8), np.int32)
    assert np.shares_memory(small, again)
    assert not np.shares_memory(small, buffers.array("b", (4, 8), np.int32))
    large = buffers.array("a", (100, 100), np.float64)
    assert large.shape == (100, 100)
    assert np.shares_memory(large, buffers.array("a", (10,), np.uint8))
    assert buffers.array("a", (0, 5), np.int32).shape == (0, 5)


def test_each_thread_has_its_own_buffers() -> None:
    buffers, arrays, both = Buffers(), [], threading.Barrier(2, timeout=PATIENCE)

    def take() -> None:
        array = buffers.array("a", (1000,), np.uint8)
        both.wait()
        array[:] = threading.get_ident() % 251
        both.wait()
        arrays.append(array)

    run_all([take, take], workers=2)
    assert not np.shares_memory(arrays[0], arrays[1])
