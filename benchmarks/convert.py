"""How fast is a conversion, beside `cp -r` of the same folder? And how much memory does it take?

    python benchmarks/convert.py [--shape mistral-7b] [--act-order] [--bits 8] [--format awq] [--runs 5]
        [--folder DIR] [--verify] [--untouched] [--json OUT.json]

Makes a checkpoint of the shape (kept in DIR for the next time), then alternates, in one run: `cp -r` and `sync`;
the conversion; with --verify the conversion with --verify. Prints the median of the ratios, pair by pair, and the
peak memory of the whole process; then what benchmarks/repack.py measures: the repacking alone, in memory, and its
ratio to numpy's. Each time ends when the data is on disk. Memory is touched before each run, and what others wrote is
removed; with --untouched neither, as on a user's machine: the copy stays while a conversion runs. Needs about 3 times
the checkpoint's size in DIR (4.2 GB for mistral-7b; 7.7 GB with 8 bits).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from shapes import SHAPES, make


def settle() -> None:
    """Touch the memory that the next command will use for its page cache.

    A virtual machine hands free memory back to its host, and touching it again costs seconds at random moments;
    without this, the comparison is one of who was hit.
    """
    touch = "import numpy as np; np.empty(9 << 30, np.uint8)[::4096] = 1"
    subprocess.run([sys.executable, "-c", touch], check=True)


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of `command` and a sync of what it wrote."""
    # As where it is installed: Python keeps the modules compiled, and does not do so again at each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command[0]} ended with status {status}")
    return seconds, usage.ru_maxrss / 1000


def machine() -> str:
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return f"{os.cpu_count()} cores" + (f", {models[0].partition(': ')[2]}" if models else "")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--act-order", action="store_true", help="rows in groups of 128 in random order")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--format", choices=("gptq", "awq", "compressed-tensors"), default="gptq", help="the source's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "marlin-convert-bench")
    parser.add_argument("--verify", action="store_true", help="also time --verify")
    parser.add_argument("--untouched", action="store_true", help="touch no memory beforehand; what is written stays")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


def made(options: argparse.Namespace) -> Path:
    """The checkpoint that the options ask for, from an earlier time or new."""
    title = options.shape + ("-act-order" if options.act_order else "") + ("-8-bit" if options.bits == 8 else "")
    source: Path = options.folder / (title + ("" if options.format == "gptq" else f"-{options.format}"))
    if not source.exists():
        print(f"making {source} …", flush=True)
        settings = {"bits": options.bits, "act_order": options.act_order, "format": options.format}
        # In a process of its own: the system counts what this one once held into the peak of those that it starts.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(make, source, replace(SHAPES[options.shape], **settings)).result()
    return source


def measured(
    commands: dict[str, tuple[list[str], Path]], runs: int, untouched: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run, peak resident MB) of each command, which take turns; beside it, the folder it writes."""
    folders = {folder for _, folder in commands.values()}
    times: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0.0)
    for run in range(runs + 1):  # the first one warms the page cache and does not count
        for name, (command, target) in commands.items():
            for folder in {target} if untouched else folders:
                shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            if not untouched:
                settle()
            seconds, peak = timed(command)
            peaks[name] = max(peaks[name], peak)
            if run:
                times[name].append(seconds)
        if run:
            print(f"run {run}: " + ", ".join(f"{name} {t[-1]:.2f} s" for name, t in times.items()), flush=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return times, peaks


def main() -> None:
    options = parsed()
    source, copy, out = made(options), options.folder / "copy", options.folder / "out"
    title, nbytes = source.name, sum(f.stat().st_size for f in source.iterdir())
    os.sync()
    base = [sys.executable, "-m", "marlin_convert.cli"]
    convert = [*base, str(source), str(out), "--quiet", "--device", "cpu"]
    commands = {"cp -r": (["cp", "-r", str(source), str(copy)], copy), "convert": (convert, out)}
    if options.verify:
        commands["convert --verify"] = ([*convert, "--verify"], out)
    times, peaks = measured(commands, options.runs, options.untouched)

    print(f"{title}: {nbytes / 1e9:.2f} GB, median of {options.runs}, {os.cpu_count()} cores")
    rows: list[dict[str, object]] = []
    for name, values in times.items():
        ratio = statistics.median(t / c for t, c in zip(values, times["cp -r"], strict=True))
        seconds = statistics.median(values)
        rate = nbytes / 1e9 / seconds
        rows.append({"what": name, "seconds": round(seconds, 2), "times_cp": round(ratio, 2),
                     "peak_mb": None if name == "cp -r" else round(peaks[name])})  # fmt: skip
        print(f"  {name:17} {seconds:6.2f} s  {rate:5.2f} GB/s  {ratio:5.2f} x cp  peak {peaks[name]:4.0f} MB")
    if options.json:
        figures = {"checkpoint": f"{title}, {nbytes / 1e9:.2f} GB", "machine": machine(), "runs": options.runs}
        options.json.write_text(json.dumps({**figures, "rows": rows}, indent=1) + "\n")
    print(flush=True)
    subprocess.run([sys.executable, str(Path(__file__).with_name("repack.py"))], check=True)


if __name__ == "__main__":
    main()
