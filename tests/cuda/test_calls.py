"""Calls of the CUDA library: what they leave alone, streams, graphs, answers and errors."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tests.cuda import cuda_library
from tests.cuda.cuda_library import (
    BATCH_INVARIANT,
    COUNTER_BYTES,
    INSTANCES,
    STREAM_K,
    Layer,
    Library,
    assert_close,
    product,
    variant,
)
from tests.cuda.kernel_inputs import FP16, GROUP, KERNEL_TESTS, activations, names, poisoned, runs_here

pytestmark = KERNEL_TESTS


@pytest.mark.parametrize("m", [1, 3, 16, 33, 129])
def test_writes_nothing_else(library: Library, m: int) -> None:
    k, n = 1152, 320
    layer = Layer(k, n, 9)
    a = activations(m, k, FP16)
    around = 4096
    for choice in [0, *(variant(name) for name in names(4, GROUP) if INSTANCES[name].capability == 80)]:
        buffer = torch.full((2 * around + m * n,), 7.0, dtype=FP16, device="cuda")
        library.gemm(a, layer.b, layer.s, buffer[around:-around].view(m, n), None, choice)
        assert (buffer[:around] == 7).all()
        assert (buffer[-around:] == 7).all()
    assert not library.workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_equal_bits_every_time(library: Library, m: int) -> None:
    layer = Layer(14336, 1024, 112)  # tall: every tile is shared
    a = activations(m, 14336, FP16)
    for split in (0, STREAM_K):
        first = library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, variant("", 0, split))
        for _ in range(50):
            again = library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, variant("", 0, split))
            assert torch.equal(first, again)


def test_two_streams(library: Library) -> None:
    layers = [Layer(4096, 1536, 32), Layer(8192, 1024, 64)]
    inputs = [activations(m, layer.k, FP16) for m, layer in zip((5, 70), layers, strict=True)]
    for split in (0, STREAM_K):
        alone = [
            library.gemm(a, x.b, x.s, poisoned(a.shape[0], x.n, FP16), None, variant("", 0, split))
            for a, x in zip(inputs, layers, strict=True)
        ]
        streams = [torch.cuda.Stream() for _ in layers]
        workspaces = [library.new_workspace() for _ in layers]
        outs = [[poisoned(o.shape[0], o.shape[1], FP16) for _ in range(100)] for o in alone]
        torch.cuda.synchronize()
        for i in range(100):
            for j, (a, x) in enumerate(zip(inputs, layers, strict=True)):
                with torch.cuda.stream(streams[j]):
                    library.gemm(a, x.b, x.s, outs[j][i], None, variant("", 0, split), workspaces[j])
        torch.cuda.synchronize()
        for expected, got in zip(alone, outs, strict=True):
            assert all(torch.equal(expected, out) for out in got)


def test_in_a_graph(library: Library) -> None:
    layer = Layer(2048, 1024, 16)
    for m in (1, 100):
        a, out = activations(m, 2048, FP16), poisoned(m, 1024, FP16)
        library.gemm(a, layer.b, layer.s, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.gemm(a, layer.b, layer.s, out)
        for _ in range(3):
            a.copy_(activations(m, 2048, FP16))
            out.fill_(float("nan"))
            graph.replay()
            assert_close(out, a, library.operand(layer, a))


def test_version_and_device(library: Library) -> None:
    assert library.lib.marlin_cuda_abi_version() == 7
    count = ctypes.c_int()
    library.check(library.lib.marlin_cuda_device_count(ctypes.byref(count)))
    assert count.value == torch.cuda.device_count()
    info = (ctypes.c_char * 1024)()
    library.check(library.lib.marlin_cuda_device_info(0, ctypes.byref(info)))
    assert int.from_bytes(info.raw[0:4], "little") == torch.cuda.get_device_capability()[0]
    assert int.from_bytes(info.raw[8:12], "little") == torch.cuda.get_device_properties(0).multi_processor_count


def has_sm90() -> bool:
    """Whether the library has kernels for Hopper, and this is such a GPU."""
    return any(x.capability == 90 and runs_here(name) for name, x in INSTANCES.items())


def test_choose(library: Library) -> None:
    for k, n in ((64, 64), (4096, 4096), (8192, 57344)):
        for bits in (4, 8):
            assert library.choose(1, n, k, bits=bits) == 0
            assert all(library.choose(m, n, k, k // 64, bits=bits) in (0, 1) for m in (1, 100, 1000, 10000, 100000))
    # cuBLAS is faster than mma.sync on large products; the kernel for many rows on Hopper is as fast as cuBLAS.
    assert library.choose(16384, 28672, 4096, 32) == (not has_sm90())
    assert library.choose(0, 64, 64) == -2
    assert library.choose(1, 64, 96) == -2
    assert library.choose(1, 64, 128, 3) == -3
    assert library.choose(1, 64, 64, bits=3) == -10


def test_plan(library: Library) -> None:
    """What is chosen is one of the instances that fit; what is asked for is what is planned."""
    for m in (1, 16, 100, 3000):
        plan = library.plan(m, 4096, 4096, 32)
        (chosen,) = [x for x in INSTANCES.values() if x.id == plan.instance]
        assert chosen.takes(4, GROUP, False)
        assert chosen.capability == (90 if has_sm90() else 80)
        assert 0 < plan.us <= plan.gemm_us
        assert library.choose(m, 4096, 4096, 32) == (plan.gemm_us > plan.dense_us)
        asked = library.plan(m, 4096, 4096, 32, variant("sm80_m16n256_b4_g128", 3, STREAM_K))
        assert (asked.instance, asked.stages, asked.split) == (INSTANCES["sm80_m16n256_b4_g128"].id, 3, STREAM_K)


def test_errors(library: Library) -> None:
    layer = Layer(256, 128, 2)
    a, out = activations(4, 256, FP16), poisoned(4, 128, FP16)
    weights = {"B": layer.b.data_ptr(), "s": layer.s.data_ptr(), "zeros": None, "perm": None, "K": 256, "N": 128,
               "G": 2, "in_features": 256, "out_features": 128, "bits": 4, "scale_dtype": 0}  # fmt: skip
    x: dict[str, Any] = {
        "A": a.data_ptr(), "bias": None, "C": out.data_ptr(), "workspace": library.workspace.data_ptr(),
        "workspace_bytes": library.workspace.numel(), "stream": library.stream(), "M": 4, "lda": 256, "dtype": 0,
        "device": 0, "variant": 0, "early": 0,
    }  # fmt: skip
    cases: list[tuple[int, dict[str, Any]]] = [
        (-1, {"A": None}), (-1, {"C": None}), (-1, {"workspace": None}), (-1, {"B": None}), (-1, {"s": None}),
        (-2, {"M": 0}), (-2, {"M": -1}), (-2, {"N": 96}), (-2, {"K": 250}), (-2, {"K": 0}), (-2, {"M": 1 << 40}),
        (-2, {"in_features": 257}), (-2, {"in_features": 0}), (-2, {"out_features": 129}), (-2, {"out_features": 0}),
        (-3, {"G": 3}), (-3, {"G": 0}), (-3, {"K": 192, "in_features": 192, "G": 2}), (-3, {"G": 32}),
        (-4, {"lda": 255}), (-4, {"lda": 260}), (-4, {"in_features": 250}),
        (-5, {"A": x["A"] + 2}), (-5, {"C": x["C"] + 8}), (-5, {"bias": x["C"] + 4}), (-5, {"zeros": x["C"] + 4}),
        (-6, {"dtype": 2}), (-6, {"scale_dtype": 2}), (-7, {"workspace_bytes": 1000}), (-8, {"device": 99}),
        (-8, {"device": -1}), (-9, {"variant": 4000}), (-9, {"variant": -1}), (-9, {"variant": 1 << 21}),
        (-9, {"variant": BATCH_INVARIANT | 1}),
        (-9, {"variant": variant("sm80_m8n256_b4_g128", 0, 1)}), (-9, {"variant": variant("sm80_m8n256_b4_g128", 15)}),
        (-9, {"variant": variant("sm80_m16n128_b8_gany")}), (-10, {"bits": 3}),
        (-9, {"variant": variant("sm80_m8n256_b4_g128"), "zeros": x["C"]}),
        *((-9, {"variant": variant(name)}) for name in INSTANCES if name == "sm90_m8n128_b4_g64"),
    ]  # fmt: skip

    def call(change: dict[str, Any]) -> int:
        merged = cuda_library.Weights(**{k: change.get(k, v) for k, v in weights.items()})
        return library.lib.marlin_cuda_gemm(merged, product(**{k: change.get(k, v) for k, v in x.items()}))

    for code, change in cases:
        assert call(change) == code, change
        assert library.lib.marlin_cuda_error_string(code)
    torch.cuda.synchronize()
    assert torch.isnan(out).all()  # a refused call queues nothing
    assert call({}) == 0
    assert_close(out, a, layer.weight())
