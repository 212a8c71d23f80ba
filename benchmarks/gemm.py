#!/usr/bin/env python3
"""The bundled GEMM on this GPU, beside cuBLAS, dequantize + cuBLAS, and any peer that is installed.

    python benchmarks/gemm.py [--layers all|NAME,...] [--m 1,8,16,...] [--weights 4:128 8:32z ...] [--json OUT.json]
                              [--instances NAME,...]

Needs torch and the CUDA library (marlin_convert/_cuda.so or $MARLIN_CUDA_LIBRARY). Times are medians of replays of CUDA
graphs whose launches rotate through weights larger than L2, in microseconds. Columns:

    stream   a kernel that only reads the packed weights: the floor while there are few rows
    cublas   torch.matmul with fp16 weights
    deq+mm   marlin_cuda_dequantize, then torch.matmul
    gemm     marlin_cuda_gemm
    chosen   what marlin_cuda_choose says is faster: g (gemm) or d (deq+mm)
    marlin, machete   vLLM's, when vllm can be imported; 4 bits in groups of 128 only

--instances times instances of the kernels beside the library's choice, by name (sm80_m16n256_b4_g128), or all like
sm80_*. Those that do not take the weights are left out.

--weights are BITS:GROUP_SIZE, with a z where zero points are stored and an a for act-order, which takes a gather of the
activations' columns before each gemm; a group size of -1 is one scale for each column.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from marlin_convert.native.cuda_library import PRODUCT, Weights, instances, variant

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

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Kind:
    """How the weights of a layer are stored."""

    bits: int
    group_size: int
    zeros: bool = False
    act_order: bool = False

    @classmethod
    def parse(cls, text: str) -> Kind:
        match = re.fullmatch(r"([48]):(16|32|64|128|-1)(z?)(a?)", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text} is not BITS:GROUP_SIZE with z, a or both, such as 8:32z")
        return cls(int(match[1]), int(match[2]), bool(match[3]), bool(match[4]))

    def __str__(self) -> str:
        return f"{self.bits}:{self.group_size}{'z' * self.zeros}{'a' * self.act_order}"

    @property
    def words(self) -> str:
        groups = "one group" if self.group_size < 0 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {groups}{', zero points' * self.zeros}{', act-order' * self.act_order}"

    def groups(self, k: int) -> int:
        return 1 if self.group_size < 0 else k // self.group_size

    def bytes(self, k: int, n: int) -> int:
        return k * n * self.bits // 8


@dataclass(frozen=True)
class Layer:
    """Random stored weights on the GPU: B [K / 16, N bits / 2], s [G, N] fp16; zeros [G, N bits / 32], perm [K]."""

    kind: Kind
    B: torch.Tensor
    s: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    fields: Weights

    @classmethod
    def random(cls, kind: Kind, k: int, n: int) -> Layer:
        def words(rows: int, columns: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32, device="cuda")

        groups = kind.groups(k)
        b, s = words(k // 16, n * kind.bits // 2), (torch.rand(groups, n, device="cuda") * 0.01).half()
        zeros = words(groups, n * kind.bits // 32) if kind.zeros else None
        perm = torch.randperm(k, device="cuda").int() if kind.act_order else None
        pointers = [None if x is None else x.data_ptr() for x in (b, s, zeros, perm)]
        return cls(kind, b, s, zeros, perm, Weights(*pointers, k, n, groups, k, n, kind.bits, 0))


class Library:
    """marlin_cuda.h on torch tensors, fp16, device 0, torch's current stream."""

    def __init__(self) -> None:
        path = os.environ.get("MARLIN_CUDA_LIBRARY") or Path(__file__).parents[1] / "marlin_convert" / "_cuda.so"
        i64, i32, p, size = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
        weights = ctypes.POINTER(Weights)
        self.lib = lib = ctypes.CDLL(str(path))
        lib.marlin_cuda_gemm.argtypes = [weights, ctypes.c_char_p]
        lib.marlin_cuda_workspace_bytes.argtypes = [i32]
        lib.marlin_cuda_workspace_bytes.restype = size
        lib.marlin_cuda_choose.argtypes = [weights, i64, i32]
        lib.marlin_cuda_gather.argtypes = [p, p, p, i64, i64, i64, i64, i32, p]
        lib.marlin_cuda_dequantize.argtypes = [weights, p, i32, i32, p]
        lib.marlin_cuda_stream_read.argtypes = [p, i64, p, i32, p]
        lib.marlin_cuda_error_string.restype = ctypes.c_char_p
        size = lib.marlin_cuda_workspace_bytes(0)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.ordered = torch.empty(
            64 << 20, dtype=torch.half, device="cuda"
        )  # gathered activations: 2048 rows of 32768

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"{code}: {self.lib.marlin_cuda_error_string(code).decode()}")

    def gemm(self, x: torch.Tensor, layer: Layer, y: torch.Tensor, variant: int) -> None:
        if layer.perm is not None:
            m, k = x.shape
            ordered = self.ordered[: m * k].view(m, k)
            pointers = x.data_ptr(), layer.perm.data_ptr(), ordered.data_ptr()
            self.check(self.lib.marlin_cuda_gather(*pointers, m, x.stride(0), k, k, 0, stream()))
            x = ordered
        pointers = x.data_ptr(), 0, y.data_ptr(), self.workspace.data_ptr()
        product = PRODUCT.pack(*pointers, self.workspace.numel(), stream(), *x.shape[:1], x.stride(0), 0, 0, variant, 0)
        self.check(self.lib.marlin_cuda_gemm(layer.fields, product))

    def dequantize(self, layer: Layer, w: torch.Tensor) -> None:
        self.check(self.lib.marlin_cuda_dequantize(layer.fields, w.data_ptr(), 0, 0, stream()))

    def read(self, b: torch.Tensor, sink: torch.Tensor) -> None:
        self.check(self.lib.marlin_cuda_stream_read(b.data_ptr(), b.numel() * 4, sink.data_ptr(), 0, stream()))

    def choose(self, m: int, layer: Layer) -> int:
        return int(self.lib.marlin_cuda_choose(layer.fields, m, 0))


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def microseconds(calls: Calls, replays: int) -> float:
    """The median time of a call, from replays of a graph of all of them."""
    calls = calls * max(1, LAUNCHES // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def vllm_peers(k: int, n: int, layers: list[Layer]) -> dict[str, Callable[..., Calls]]:
    """Makers of calls for vLLM's kernels, or nothing without vLLM."""
    if str(layers[0].kind) != "4:128":
        return {}
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types
    except ImportError:
        return {}
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    workspace = torch.zeros(8 * 1024, dtype=torch.int32, device="cuda")
    weights, scales = [layer.B for layer in layers], [layer.s for layer in layers]

    def marlin(x: torch.Tensor) -> Calls:
        def call(b: torch.Tensor, s: torch.Tensor) -> Callable[[], object]:
            return lambda: marlin_utils.apply_gptq_marlin_linear(
                x, b, s, none, none, none, workspace, scalar_types.uint4b8, n, k, True
            )

        return [call(b, s) for b, s in zip(weights, scales, strict=True)]

    packed = [
        ops.machete_prepack_B(
            b.view(k // 8, n).t().contiguous().t(), a_type=torch.float16, b_type=scalar_types.uint4b8,
            group_scales_type=torch.float16,
        )
        for b in weights
    ]  # fmt: skip

    def machete(x: torch.Tensor) -> Calls:
        def call(b: torch.Tensor, s: torch.Tensor) -> Callable[[], object]:
            return lambda: ops.machete_mm(
                a=x, b_q=b, b_type=scalar_types.uint4b8, b_group_scales=s, b_group_size=layers[0].kind.group_size
            )

        return [call(b, s) for b, s in zip(packed, scales, strict=True)]

    return {"marlin": marlin, "machete": machete}


def bench_layer(
    library: Library, name: str, kind: Kind, rows: list[int], wanted: dict[str, int], replays: int
) -> list[dict]:
    k, n = LAYERS[name]
    copies = max(2, min(16, ROTATE_BYTES // kind.bytes(k, n) + 1))
    layers = [Layer.random(kind, k, n) for _ in range(copies)]
    plain = [torch.randn(k, n, dtype=torch.half, device="cuda") for _ in range(max(2, ROTATE_BYTES // (2 * k * n)))]
    peers = vllm_peers(k, n, layers)
    sink = torch.zeros(4, dtype=torch.int32, device="cuda")
    floor = microseconds([lambda w=w: library.read(w.B, sink) for w in layers], replays)
    results = []
    for m in rows:
        x, y = torch.randn(m, k, dtype=torch.half, device="cuda"), torch.empty(m, n, dtype=torch.half, device="cuda")

        def dequantized(layer: Layer, x: torch.Tensor = x, y: torch.Tensor = y) -> None:
            library.dequantize(layer, plain[0])
            torch.matmul(x, plain[0], out=y)

        row = {"layer": name, "k": k, "n": n, "weights": str(kind), "m": m, "stream": floor}
        row["cublas"] = microseconds([lambda w=w, x=x, y=y: torch.matmul(x, w, out=y) for w in plain], replays)
        row["deq+mm"] = microseconds([lambda w=w, d=dequantized: d(w) for w in layers], replays)
        for label, v in {"gemm": 0, **wanted}.items():
            calls: Calls = [lambda w=w, x=x, y=y, v=v: library.gemm(x, w, y, v) for w in layers]
            try:
                row[label] = microseconds(calls, replays)
            except RuntimeError as error:
                if not str(error).startswith("-9"):
                    raise
        row["chosen"] = "gd"[library.choose(m, layers[0])]
        for peer, calls_for in peers.items():
            row[peer] = microseconds(calls_for(x), replays)
        results.append(row)
        numbers = " ".join(f"{key} {v:8.1f}" for key, v in row.items() if isinstance(v, float))
        print(f"{name:16s} {kind!s:6} m {m:5d}  {numbers}  {row['chosen']}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--m", default="1,8,16,32,64,128,256,512,1024,2048")
    parser.add_argument("--weights", type=Kind.parse, nargs="+", default=[Kind(4, 128, False)], help="see above")
    parser.add_argument("--instances", default="", help="see above")
    parser.add_argument("--replays", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = list(LAYERS) if options.layers == "all" else options.layers.split(",")
    rows = [int(m) for m in options.m.split(",")]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, us")
    library = Library()
    wanted = {
        name: variant(instance.id)
        for name, instance in instances(library.lib).items()
        if any(fnmatch(name, pattern) for pattern in options.instances.split(","))
    }
    results = []
    for name, kind in itertools.product(names, options.weights):
        results += bench_layer(library, name, kind, rows, wanted, options.replays)
        torch.cuda.empty_cache()
        if options.json:
            title = "; ".join(kind.words for kind in options.weights)
            measured = {"title": title, "machine": {"name": torch.cuda.get_device_name()}, "rows": results}
            options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
