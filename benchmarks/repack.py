"""How fast a layer is repacked in memory, and how much faster than plain Python does it.

    python benchmarks/repack.py

Prints a table: packed weights per second (GB/s, counting the bytes of `qweight` once) for each direction, instruction
set and number of threads; then the same for packing in numpy in the customary way (codes as whole integers, a
permutation of columns, eight shift-and-or steps), which is checked for equality with the native result. A second
table: act-order, rows in random order sorted and packed in one pass, and compared with the source again.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from marlin_convert.formats import layout
from marlin_convert.native import cpu


def numpy_permutation() -> NDArray[np.int64]:
    """Where each of a tile's 1024 codes, in the order of B's nibbles, stands in a tile stored as 16 x 16 blocks."""
    order = []
    for word in range(layout.TILE_WORDS):
        for nibble in range(layout.PACK_FACTOR):
            row, column = layout.tile_position(word, nibble)
            block, within = divmod(column, 16)
            order.append(256 * block + 16 * row + within)
    return np.array(order)


def numpy_pack(qweight: NDArray[np.int32]) -> NDArray[np.int32]:
    """`qweight` -> `B` through codes [K, N]: unpack, cut into blocks, permute, pack."""
    rows, N = qweight.shape
    K = rows * layout.PACK_FACTOR
    words = qweight.view(np.uint32)
    codes = np.empty((rows, layout.PACK_FACTOR, N), np.int64)
    for i in range(layout.PACK_FACTOR):
        codes[:, i] = (words >> np.uint32(4 * i)) & np.uint32(15)

    blocks = codes.reshape(K // 16, 16, N // 16, 16).transpose(0, 2, 1, 3).reshape(K // 16, N * 16)
    tiles = blocks.reshape(-1, 1024)[:, numpy_permutation()].reshape(K // 16, N * 16).astype(np.uint32)

    B = np.zeros((K // 16, 2 * N), np.uint32)
    for i in range(layout.PACK_FACTOR):
        B |= tiles[:, i :: layout.PACK_FACTOR] << np.uint32(4 * i)
    return B.view(np.int32)


def best_time(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run: others only measure what else the machine did."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=4096, help="in_features (default: %(default)s)")
    parser.add_argument("--n", type=int, default=14336, help="out_features (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip-numpy", action="store_true", help="do not time numpy (seconds, and 1.5 GB of memory)")
    arguments = parser.parse_args()

    K, N = arguments.k, arguments.n
    info = np.iinfo(np.int32)
    shape = layout.qweight_shape(K, N)
    qweight = np.random.default_rng(0).integers(info.min, info.max, shape, dtype=np.int32, endpoint=True)
    B, back = np.empty(layout.b_shape(K, N), np.int32), np.empty_like(qweight)
    gigabytes = qweight.nbytes / 1e9

    reference = None
    if not arguments.skip_numpy:
        reference = gigabytes / best_time(partial(numpy_pack, qweight), 2)

    table = Table(title=f"{K} x {N}, {qweight.nbytes / 1e6:.1f} MB packed; {processor()}, {os.cpu_count()} CPUs")
    for column in ("code", "threads", "pack GB/s", "unpack GB/s", "pack : numpy"):
        table.add_column(column, justify="left" if column == "code" else "right")
    for isa in cpu.available_isas() or (None,):
        for threads in arguments.threads:
            repeats = arguments.repeats if isa else 1
            pack = gigabytes / best_time(partial(cpu.pack, qweight, B, threads=threads, isa=isa), repeats)
            unpack = gigabytes / best_time(partial(cpu.unpack, B, back, threads=threads, isa=isa), repeats)
            if cpu.first_difference(back, qweight) is not None:
                raise SystemExit(f"{isa}: unpack(pack(qweight)) is not qweight")
            ratio = f"{pack / reference:.0f}" if reference else "-"
            table.add_row(isa or "torch twin", str(threads), f"{pack:.2f}", f"{unpack:.2f}", ratio)
    if reference:
        if not np.array_equal(numpy_pack(qweight), B):
            raise SystemExit("numpy and native results differ")
        table.add_row("numpy", "1", f"{reference:.4f}", "-", "1")

    console = Console()
    console.print(cpu.describe())
    console.print(table)
    if cpu.native_available():
        console.print(act_order_table(qweight, B, arguments.threads, arguments.repeats))


def act_order_table(qweight: NDArray[np.int32], B: NDArray[np.int32], threads: list[int], repeats: int) -> Table:
    """As `write_sorted` of convert.py does it: strip after strip, with the comparison after each."""
    rows, N = qweight.shape
    K = rows * layout.PACK_FACTOR
    perm, width = np.random.default_rng(0).permutation(K).astype(np.int32), max(64, (2 << 20) // (K // 2) // 64 * 64)

    def strips(function: Callable[[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]], object]) -> None:
        for n in range(0, N, width):
            words, part = qweight[:, n : n + width], B[:, 2 * n : 2 * (n + width)]
            function(words, part, np.full(words.shape[1], layout.ZERO_POINT, np.uint8))

    table = Table(title=f"the same with act-order, strips of {width} columns")
    for column in ("code", "threads", "sort and pack GB/s", "compare GB/s"):
        table.add_column(column, justify="left" if column == "code" else "right")
    for isa in cpu.available_isas():
        for count in threads:

            def pack(words: Any, part: Any, fill: Any, count: int = count, isa: str = isa) -> None:
                cpu.pack_sorted(words, part, bits=4, perm=perm, fill=fill, rows=K, threads=count, isa=isa)

            def compare(words: Any, part: Any, fill: Any, count: int = count, isa: str = isa) -> None:
                if cpu.sorted_difference(part, words, bits=4, perm=perm, fill=fill, threads=count, isa=isa):
                    raise SystemExit(f"{isa}: wrong rows")

            rates = [qweight.nbytes / 1e9 / best_time(partial(strips, f), repeats) for f in (pack, compare)]
            table.add_row(isa, str(count), *(f"{rate:.2f}" for rate in rates))
    return table


if __name__ == "__main__":
    main()
