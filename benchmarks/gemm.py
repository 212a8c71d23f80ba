#!/usr/bin/env python3
"""The bundled GEMM on this GPU, beside cuBLAS, dequantize + cuBLAS, and any peer that is installed.

    python benchmarks/gemm.py [--layers all|NAME,...] [--m 1,8,16,...] [--weights 4:128 8:32z ...] [--json OUT.json]
                              [--instances NAME,...] [--only COLUMN,...] [--no-peers] [--no-humming] [--choices OUT.csv]
    python benchmarks/gemm.py --chain [--m 1,8,16] [--json OUT.json]

Needs torch and the CUDA library (marlin_convert/_cuda.so or $MARLIN_CUDA_LIBRARY). Times are medians of replays of CUDA
graphs whose launches rotate through weights larger than L2, in microseconds; the graphs of a product are replayed in
turn, those of large products, which power limits, each behind 200 ms of their own. With nvidia-ml-py the JSON also has
the SM clock while each ran. Columns:

    stream   a kernel that only reads the packed weights: the floor while there are few rows
    cublas   torch.matmul with fp16 weights
    deq+mm   marlin_cuda_dequantize, then torch.matmul
    gemm     marlin_cuda_gemm; with act-order, the gather of activations and then that
    early    the same, begun while the product before it ends
    fixed    gemm with batch_invariant
    gather   that gather alone
    marlin, machete   vLLM's, when vllm can be imported
    humming  humming-kernels', when it can be imported; it begins early too

and then what marlin_cuda_choose says is faster, g (gemm) or d (deq+mm), and the instance and split of gemm.

--instances times instances of the kernels beside the library's choice, by name (sm80_m16n256_b4_g128, with a split
sm80_m16n256_b4_g128/2), or all like sm80_*. Those that do not take the weights are left out. --choices times every
instance and split that the library chooses from, for benchmarks/cost_model. --chain times the four products of a
transformer layer eight times in one graph, each reading what the one before wrote; microseconds are those of one layer.

--weights are BITS:GROUP_SIZE, with a z where zero points are stored and an a for act-order, which takes a gather of the
activations' columns before each gemm; a group size of -1 is one scale for each column.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peers
import torch
from gemm_layers import Kind, Layer, Library
from peers import Calls

from marlin_convert.native.cuda_library import (
    BATCH_INVARIANT,
    DATA_PARALLEL,
    variant,
)

LAYERS = {  # K, N
    "mistral-gate-up": (4096, 28672),
    "mistral-down": (14336, 4096),
    "mistral-qkv": (4096, 6144),
    "mistral-o": (4096, 4096),
    "llama70-gate-up": (8192, 57344),
    "llama70-down": (28672, 8192),
}
ROTATE_BYTES = 200 << 20  # four times the L2 of an H100
LAUNCHES = 16  # in a graph, so that the graph's own start is a small part
GRAPH_MS = 20.0  # … but no more of them than take so long
SHORT_MS, LOAD_MS = 2.0, 200.0  # graphs that take longer than the first are warmed up for the second …
TIMED_MS = 60.0  # … and timed for so long, as the clock goes up and down by a tenth meanwhile
CHAIN = ("mistral-qkv", "mistral-o", "mistral-gate-up", "mistral-down")
CHAIN_COPIES = 8  # layers of a chain, each with weights of its own
NO_SUCH_VARIANT = -9  # MARLIN_CUDA_ERROR_VARIANT
TIMING = ("instance", "split", "m", "n", "k", "bits", "group_size", "zeros", "us")  # columns of --choices


class Clocks:
    """The SM clock (MHz), power (W) and temperature (°C) that the driver tells while the GPU works; nothing without
    nvidia-ml-py."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            self.nvml: Any = None
            return
        self.nvml = pynvml
        pynvml.nvmlInit()
        self.device = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def sm(self) -> list[int]:
        return [int(self.nvml.nvmlDeviceGetClockInfo(self.device, self.nvml.NVML_CLOCK_SM))] if self.nvml else []

    def state(self) -> dict[str, int]:
        if not self.nvml:
            return {}
        watts = self.nvml.nvmlDeviceGetPowerUsage(self.device) // 1000
        return {"watts": watts, "celsius": self.nvml.nvmlDeviceGetTemperature(self.device, 0)}


class Way:
    """One way of a product, as a CUDA graph of enough calls, and how long its replays took."""

    def __init__(self, calls: Calls) -> None:
        for call in calls[:2]:
            call()
        once = self.milliseconds(calls[0])
        launches = min(LAUNCHES, int(GRAPH_MS / once) + 1)
        self.calls = calls * max(1, launches // len(calls))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls:
                call()
        self.graph.replay()
        self.ms = self.milliseconds(self.graph.replay)
        #: Replays of its own that come first. Power limits large products: the SM clock follows it, some 100 ms late,
        #: and without them would be what the way before needed.
        self.warm = round(LOAD_MS / self.ms) if self.ms > SHORT_MS else 0
        self.times: list[float] = []
        self.clocks: list[int] = []

    @staticmethod
    def milliseconds(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        meanwhile()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def replay(self, clocks: Clocks, after: int = 0) -> None:
        """Time a replay, after as many others; the clock is read while it is half done."""
        for _ in range(after):
            self.graph.replay()

        def read_clock() -> None:
            time.sleep(self.ms * (after + 0.5) / 1e3)
            self.clocks.extend(clocks.sm())

        ms = self.milliseconds(self.graph.replay, read_clock)
        self.times.append(ms * 1e3 / len(self.calls))


def measured_in_turn(ways: dict[str, Calls], replays: int, clocks: Clocks) -> dict[str, Way]:
    """Each way's graph, replayed in turn, in an order that changes; of large products one after the other, warmed up. A
    way that does not take the product is left out."""
    made = {}
    for name, calls in ways.items():
        try:
            made[name] = Way(calls)
        except RuntimeError as error:  # noqa: PERF203
            if not str(error).startswith(str(NO_SUCH_VARIANT)):
                print(f"{name}: {str(error)[:200]}", file=sys.stderr)
    short = [way for way in made.values() if not way.warm]
    for _ in range(replays):
        random.shuffle(short)
        for way in short:
            way.replay(clocks)
    for way in made.values():
        for i in range(max(3, round(TIMED_MS / way.ms)) if way.warm else 0):
            way.replay(clocks, way.warm if i == 0 else 0)
    return made


def candidates(library: Library, m: int) -> dict[str, int]:
    """The variants of all instances and splits that the library would choose from for M = m, by name."""
    capability = torch.cuda.get_device_capability()
    few = [8, 16, 32, 64]
    start = (
        "sm80_" if capability != (9, 0) else "sm90_wide_" if m > few[-1] else f"sm90_m{min(x for x in few if x >= m)}n"
    )
    return {
        f"{name}/{split}": variant(instance.id, split=split)
        for name, instance in library.instances.items()
        if name.startswith(start)
        for split in range(1, DATA_PARALLEL + 1)
    }


def bench_layer(
    library: Library, name: str, kind: Kind, rows: list[int], options: argparse.Namespace, wanted: dict[str, int]
) -> Iterator[dict[str, Any]]:
    k, n = LAYERS[name]
    copies = max(2, min(16, ROTATE_BYTES // kind.bytes(k, n) + 1))
    layers = [Layer.random(kind, k, n) for _ in range(copies)]
    copies = max(2, ROTATE_BYTES // (2 * k * n))
    plain = [torch.randn(k, n, dtype=torch.half, device="cuda") / k**0.5 for _ in range(copies)]
    others = peers.find(kind, k, n, layers, options.humming) if options.peers else {}
    sink = torch.zeros(4, dtype=torch.int32, device="cuda")
    clocks = Clocks()
    for m in rows:
        x, y = torch.randn(m, k, dtype=torch.half, device="cuda"), torch.empty(m, n, dtype=torch.half, device="cuda")

        def dequantized(layer: Layer, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            library.dequantize(layer, plain[0])
            torch.matmul(x, plain[0], out=y)

        def gemm(v: int, early: bool = False, x: torch.Tensor = x, y: torch.Tensor = y) -> Calls:
            return [lambda w=w: library.gemm(x, w, y, v, early) for w in layers]

        ways: dict[str, Calls] = {
            "stream": [lambda w=w: library.read(w.B, sink) for w in layers],
            "cublas": [lambda w=w, x=x, y=y: torch.matmul(x, w, out=y) for w in plain],
            "deq+mm": [lambda w=w, d=dequantized: d(w) for w in layers],
            "gemm": gemm(0),
            "early": gemm(0, early=True),
            "fixed": gemm(BATCH_INVARIANT),
            **({"gather": [lambda w=w, x=x: library.gather(x, w.perm) for w in layers]} if kind.act_order else {}),
            **{label: gemm(v) for label, v in wanted.items()},
            **{peer: calls(x) for peer, calls in others.items()},
        }
        if options.only:
            kept = {*options.only.split(","), *wanted}
            ways = {label: calls for label, calls in ways.items() if label in kept}
        if options.choices:
            ways |= {label: gemm(v) for label, v in candidates(library, m).items()}
        row: dict[str, Any] = {"layer": name, "k": k, "n": n, "weights": str(kind), "m": m}
        made = measured_in_turn(ways, options.replays, clocks)
        row |= {label: round(statistics.median(way.times), 2) for label, way in made.items()}
        row["chosen"] = "gd"[library.choose(m, layers[0])]
        row["plan"] = library.plan(m, layers[0])
        row["sm_mhz"] = {label: statistics.median(way.clocks) for label, way in made.items() if way.clocks}
        yield row | clocks.state()
        numbers = " ".join(f"{key} {v:8.1f}" for key, v in row.items() if isinstance(v, float) and "/" not in key)
        print(f"{name:16s} {kind!s:6} m {m:5d}  {numbers}  {row['chosen']} {row['plan']}", flush=True)


def bench_chain(library: Library, rows: list[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A transformer layer's four products CHAIN_COPIES times in one graph, each reading what the one before wrote."""
    kind = Kind(4, 128)
    sizes = [LAYERS[name] for name in CHAIN]
    copies = [[Layer.random(kind, k, n) for _ in range(CHAIN_COPIES)] for k, n in sizes]
    found = [peers.find(kind, k, n, w) for (k, n), w in zip(sizes, copies, strict=True)] if options.peers else []
    clocks = Clocks()
    for m in rows:
        results = [torch.empty(m, n, dtype=torch.half, device="cuda") for _, n in sizes]
        first = torch.randn(m * sizes[-1][1], dtype=torch.half, device="cuda")
        results[-1].copy_(first.view(m, -1))
        # What a layer reads: the first numbers of what the one before wrote, as its activations.
        read = [results[i - 1].view(-1)[: m * k].view(m, k) for i, (k, _) in enumerate(sizes)]

        triples = [(read[i], copies[i][j], results[i]) for j in range(CHAIN_COPIES) for i in range(len(sizes))]
        ways: dict[str, Calls] = {
            label: [lambda x=x, w=w, y=y, e=early: library.gemm(x, w, y, 0, e) for x, w, y in triples]
            for label, early in (("gemm", False), ("early", True))
        }
        for peer in {name for each in found for name in each}:
            calls = [each[peer](x) for each, x in zip(found, read, strict=True)]
            ways[peer] = [calls[i][j] for j in range(CHAIN_COPIES) for i in range(len(sizes))]
        made = measured_in_turn(ways, options.replays, clocks)
        times = {label: round(statistics.median(way.times) * len(sizes), 2) for label, way in made.items()}
        yield {"chain": CHAIN, "m": m, **times} | clocks.state()
        print(f"chain m {m:5d}", times, flush=True)


def choices(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What --choices measured, as benchmarks/cost_model keeps it."""
    for row in rows:
        kind = Kind.parse(row["weights"])
        for label, us in row.items():
            if "/" in label:
                instance, split = label.split("/")
                fields = (
                    instance,
                    split,
                    row["m"],
                    row["n"],
                    row["k"],
                    kind.bits,
                    kind.group_size,
                    int(kind.zeros),
                    us,
                )
                yield dict(zip(TIMING, fields, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--m", default="1,8,16,32,64,128,256,512,1024,2048")
    parser.add_argument("--weights", type=Kind.parse, nargs="+", default=[Kind(4, 128, False)], help="see above")
    parser.add_argument("--instances", default="", help="see above")
    parser.add_argument("--only", default="", help="of the columns above")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument(
        "--no-humming", dest="humming", action="store_false", help="which compiles its kernels when run"
    )
    parser.add_argument("--choices", type=Path, metavar="CSV", help="see above")
    parser.add_argument("--chain", action="store_true", help="see above")
    parser.add_argument("--replays", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = list(LAYERS) if options.layers == "all" else options.layers.split(",")
    rows = [int(m) for m in options.m.split(",")]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, us")
    library = Library()
    wanted = {
        pattern.replace(pattern.split("/")[0], name): variant(instance.id, split=int((pattern + "/0").split("/")[1]))
        for pattern in options.instances.split(",")
        for name, instance in library.instances.items()
        if fnmatch(name, pattern.split("/")[0])
    }
    title = "a chain of products" if options.chain else "; ".join(kind.words for kind in options.weights)
    results: list[dict[str, Any]] = []
    measured = {"title": title, "machine": {"name": torch.cuda.get_device_name()}, "rows": results}
    if options.chain:
        runs = [bench_chain(library, rows, options)]
    else:
        pairs = itertools.product(names, options.weights)
        runs = [bench_layer(library, name, kind, rows, options, wanted) for name, kind in pairs]
    for run in runs:
        for row in run:
            results.append(row)
            if options.json:
                options.json.write_text(json.dumps(measured, indent=1))
        torch.cuda.empty_cache()
    if options.choices:
        with options.choices.open("w", newline="") as file:
            writer = csv.DictWriter(file, TIMING, lineterminator="\n")
            writer.writeheader()
            writer.writerows(choices(results))


if __name__ == "__main__":
    main()
