"""The kernels as torch sees them: operators, streams, graphs, compilation, and arguments that do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import library as torch_library

from marlin_convert.native import cuda
from marlin_convert.native import reference as twin

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]

K, N, G = 256, 512, 2


def layer(K: int = K, N: int = N, G: int = G, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qweight, scales, s) on the GPU: random codes, scales of ordinary size."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    qweight = torch.randint(-(2**31), 2**31 - 1, (K // 8, N), dtype=torch.int32, device="cuda", generator=generator)
    scales = (torch.rand((G, N), device="cuda", generator=generator) * 0.02 + 0.001).half()
    return qweight, scales, twin.permute_scales(scales)


def expected(a: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """a · W in float64, from the GPTQ words."""
    return a.double() @ twin.dequantize_gptq(qweight, scales).double()


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("shape", [(1, K), (3, K), (2, 5, K), (K,), (0, K), (130, K)])
def test_gemm(shape: tuple[int, ...], G: int, dtype: torch.dtype) -> None:
    qweight, scales, s = layer(G=G)
    B = cuda.repack(qweight)
    a, bias = torch.randn(shape, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
    result = cuda.gemm(a, B, s, bias)
    assert result.shape == (*shape[:-1], N)
    assert result.dtype == dtype
    if a.numel():
        assert relative(result, expected(a, qweight, scales) + bias.double()) <= (
            1e-3 if dtype == torch.float16 else 8e-3
        )
        assert torch.equal(torch.ops.marlin_convert.gemm(a, B, s, bias), result)


def test_packing_is_exact() -> None:
    qweight, scales, s = layer()
    B = cuda.repack(qweight)
    assert torch.equal(B, twin.gptq_to_marlin(qweight))
    assert torch.equal(cuda.unpack(B), qweight)
    assert torch.equal(cuda.dequantize(B, s), twin.dequantize_gptq(qweight, scales))


def test_columns_of_a_wider_matrix() -> None:
    """Rows apart by more than K: used as they are where the kernel can, copied where it cannot."""
    qweight, scales, s = layer()
    B = cuda.repack(qweight)
    wide = torch.randn(7, 3 * K, device="cuda").half()
    for start in (0, K, 8, 3):
        a = wide[:, start : start + K]
        assert relative(cuda.gemm(a, B, s), expected(a, qweight, scales)) <= 1e-3
    a = torch.randn(K, 7, device="cuda").half().t()
    assert relative(cuda.gemm(a, B, s), expected(a, qweight, scales)) <= 1e-3


@pytest.mark.parametrize("M", [1, 16, 4096])
def test_matmul_takes_either_way(M: int) -> None:
    qweight, scales, s = layer(K=1024, N=1024, G=8)
    B = cuda.repack(qweight)
    a, bias = torch.randn(M, 1024, device="cuda").half(), torch.randn(1024, device="cuda").half()
    for extra in (None, bias):
        reference = expected(a, qweight, scales) + (0 if extra is None else extra.double())
        assert relative(cuda.matmul(a, B, s, extra), reference) <= 1e-3


def test_two_streams_at_once() -> None:
    layers = [layer(K=2048, N=4096, G=16, seed=i) for i in range(2)]
    Bs = [cuda.repack(q) for q, _, _ in layers]
    a = torch.randn(5, 2048, device="cuda").half()
    want = [cuda.gemm(a, B, s) for B, (_, _, s) in zip(Bs, layers, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[torch.Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(cuda.gemm(a, Bs[i], layers[i][2]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(r, want[i]) for r in results[i])


def test_cuda_graph() -> None:
    """Captured without a warm-up on the capturing stream, replayed with new inputs, several products in one graph."""
    qweight, scales, s = layer(K=2048, N=2048, G=16)
    B = cuda.repack(qweight)
    a = torch.randn(4, 2048, device="cuda").half()
    cuda.gemm(a, B, s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = cuda.gemm(a, B, s)
        second = cuda.gemm(a * 2, B, s)
    for seed in range(3):
        torch.manual_seed(seed)
        a.copy_(torch.randn_like(a))
        first.fill_(float("nan"))
        second.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative(first, expected(a, qweight, scales)) <= 1e-3
        assert relative(second, expected(a * 2, qweight, scales)) <= 1e-3


def test_compiled() -> None:
    qweight, scales, s = layer()
    B = cuda.repack(qweight)

    def model(a: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(torch.ops.marlin_convert.gemm(a, B, s)) + 1

    compiled = torch.compile(model, fullgraph=True)
    for M in (1, 4, 9):
        a = torch.randn(M, K, device="cuda").half()
        reference = torch.relu(expected(a, qweight, scales)) + 1
        assert relative(compiled(a), reference) <= 1e-3


@pytest.mark.parametrize("name", ["gemm", "repack", "unpack", "dequantize"])
def test_operators_pass_opcheck(name: str) -> None:
    qweight, _, s = layer()
    B = cuda.repack(qweight)
    a, bias = torch.randn(3, K, device="cuda").half(), torch.randn(N, device="cuda").half()
    arguments = {"gemm": (a, B, s, bias), "repack": (qweight,), "unpack": (B,), "dequantize": (B, s, torch.float16)}
    torch_library.opcheck(getattr(torch.ops.marlin_convert, name).default, arguments[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    qweight, scales, s = layer()
    a = torch.randn(3, K, device="cuda").half()
    there = [x.to("cuda:1") for x in (a, cuda.repack(qweight), s)]
    with torch.cuda.device(0):
        assert relative(cuda.gemm(*there).to("cuda:0"), expected(a, qweight, scales)) <= 1e-3
        assert torch.cuda.current_device() == 0


def test_arguments_that_do_not_fit() -> None:
    qweight, _, s = layer()
    B, a = cuda.repack(qweight), torch.randn(3, K, device="cuda").half()
    cases = [
        ((a.float(), B, s), TypeError, "a is float32; it should be float16 or bfloat16"),
        ((a[:, :128], B, s), ValueError, "its last dimension should be in_features = 256"),
        ((a, B.float(), s), TypeError, "B is float32; it should be int32"),
        ((a, B, s.float()), TypeError, "s is float32; it should be float16 or bfloat16"),
        (
            (a, B, s[:, :256]),
            ValueError,
            "s has shape (2, 256); it should be [G, 512] with G = 1 or one of 2, 4, 8, 16",
        ),
        ((a, B, s, torch.ones(N, device="cuda")), TypeError, "bias is float32; it should be of a's dtype"),
        ((a, B, s, torch.ones(3, device="cuda").half()), ValueError, "bias has shape (3,); it should be [512]"),
        ((a, B.cpu(), s), ValueError, "B is on cpu; it should be on a CUDA device"),
        ((a.cpu(), B, s), ValueError, "a is on cpu; it should be on cuda:0, like B"),
        ((a, B.t().contiguous().t(), s), ValueError, "B has strides"),
    ]
    for arguments, kind, text in cases:
        for function in (cuda.gemm, cuda.matmul):
            with pytest.raises(kind, match=re.escape(text)):
                function(*arguments)


# ---- The extended format ----


def stored(bits: int, size: int, zeros: bool, act_order: bool, K: int, N: int) -> tuple[dict[str, Any], torch.Tensor]:
    """(a layer's arguments, W in float64): as the format says, packed by the twins of `repack`."""
    rows, columns = (K + 127) // 128 * 128, (N + 63) // 64 * 64
    G = 1 if size < 0 else rows // size
    code = torch.randint(0, 1 << bits, (rows, columns), device="cuda")
    zero = torch.randint(0, 1 << bits, (G, columns), device="cuda") if zeros else None
    scales = (torch.rand((G, columns), device="cuda") * 0.02 + 0.001).bfloat16()
    perm = torch.randperm(K, device="cuda").int() if act_order else None
    middle = 1 << (bits - 1) if zero is None else zero.repeat_interleave(rows // G, dim=0)
    W = ((code - middle).double() * scales.double().repeat_interleave(rows // G, dim=0))[:K, :N]
    if perm is not None:
        natural = torch.empty_like(W)
        natural[perm.long()] = W
        W = natural
    arguments = {
        "B": twin.pack_marlin(code, bits), "s": twin.permute_scales(scales), "perm": perm, "bits": bits,
        "zeros": None if zero is None else twin.pack_zeros(zero, bits), "in_features": K, "out_features": N,
    }  # fmt: skip
    return arguments, W


@pytest.mark.parametrize("size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_extended_layers(bits: int, size: int) -> None:
    for zeros in (False, True):
        for act_order in (False, True):
            for rows, columns in ((512, 384), (500, 257), (1001, 576)):
                layer, W = stored(bits, size, zeros, act_order, rows, columns)
                assert torch.equal(cuda.dequantize(dtype=torch.bfloat16, **layer), W.bfloat16())
                assert torch.equal(
                    torch.ops.marlin_convert.dequantize(dtype=torch.float16, **layer),
                    twin.dequantize_layer(dtype=torch.float16, **layer),
                )
                for M in (1, 7, 16, 130, 3000):
                    a, bias = torch.randn(M, rows, device="cuda").half(), torch.randn(columns, device="cuda").half()
                    for extra in (None, bias):
                        reference = a.double() @ W + (0 if extra is None else extra.double())
                        assert relative(cuda.gemm(a, bias=extra, **layer), reference) <= 1e-3
                        assert relative(cuda.matmul(a, bias=extra, **layer), reference) <= 1e-3
                a = torch.randn(3, 2 * rows + 1, device="cuda").half()[:, 3 : 3 + rows]  # not aligned, strided
                assert relative(cuda.gemm(a, **layer), a.double() @ W) <= 1e-3
                if rows == 500:
                    inputs = (a.contiguous(), layer["B"], layer["s"], None, layer["zeros"], layer["perm"])
                    sizes = {"bits": bits, "in_features": rows, "out_features": columns}
                    torch_library.opcheck(torch.ops.marlin_convert.gemm.default, inputs, sizes)


def test_packing_8_bits_is_exact() -> None:
    qweight = torch.randint(-(2**31), 2**31 - 1, (K // 4, N), dtype=torch.int32, device="cuda")
    B = cuda.repack(qweight, bits=8)
    assert torch.equal(B, twin.gptq_to_marlin(qweight, 8))
    assert torch.equal(cuda.unpack(B, bits=8), qweight)


def test_extended_arguments_that_do_not_fit() -> None:
    layer, _ = stored(4, 32, True, True, 500, 257)
    a = torch.randn(3, 500, device="cuda").half()
    cases = [
        ({"bits": 3}, "bits is 3; it should be 4 or 8"),
        ({"in_features": 513}, "in_features is 513; it should be from 1 to 512, the stored size"),
        ({"out_features": 0}, "out_features is 0; it should be from 1 to 320, the stored size"),
        ({"zeros": layer["zeros"][:, :8]}, "zeros has shape (16, 8); it should be [16, 40]"),
        ({"perm": layer["perm"][:8]}, "perm has shape (8,); it should be [500]"),
    ]
    for change, text in cases:
        for function in (cuda.gemm, cuda.matmul):
            with pytest.raises(ValueError, match=re.escape(text)):
                function(a, **{**layer, **change})
