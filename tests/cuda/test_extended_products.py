"""Products of the extended format: 8 bits, small groups, zero points, bf16 scales, padding."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.cuda_library import (
    COUNTER_BYTES,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    assert_close,
    variant,
)
from tests.cuda.kernel_inputs import (
    BF16,
    FP16,
    GROUP_SIZES,
    KERNEL_TESTS,
    activations,
    groups_of,
    names,
    poisoned,
    run_splits,
    runs_here,
)

pytestmark = KERNEL_TESTS


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_extended(library: Library, size: int, zeros: bool, bits: int, dtype: torch.dtype) -> None:
    """Every instance for all GPUs that takes the layer, both splits, ragged in M, N and K."""
    for k, n in ((64, 64), (1152, 448), (2048, 1024)):
        if size == 128 and k == 64:
            continue
        for scale_dtype in (FP16, BF16):
            layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros, scale_dtype=scale_dtype)
            for m in (1, 9, 17, 130, 257):
                a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                out = library.gemm(a, layer.b, layer.s, poisoned(m, n, dtype), bias, **layer.rest)
                assert_close(out, a, library.operand(layer, a), bias)
                generic = [name for name in names(bits, size, zeros) if INSTANCES[name].capability == 80]
                assert generic
                for name in generic:
                    for split in (STREAM_K, DATA_PARALLEL, 3):
                        choice, out = variant(name, 0, split), poisoned(m, n, dtype)
                        try:
                            library.gemm(a, layer.b, layer.s, out, bias, choice, **layer.rest)
                        except CudaError as error:
                            if error.code != -9 or split != 3:  # fewer steps, or more blocks than are resident
                                raise
                            continue
                        assert_close(out, a, library.operand(layer, a, choice), bias)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name, x in INSTANCES.items()
        for size in GROUP_SIZES
        if x.capability == 90 and x.takes(x.bits, size, True)
    ],
)
def test_extended_every_sm90_instance_and_split(library: Library, name: str, size: int) -> None:
    """With and without zero points, clusters too; also those that the library would not choose here."""
    if not runs_here(name):
        pytest.skip("an instance for compute capability 9.0")
    bits = INSTANCES[name].bits
    for k, n in ((64, 64), (1152, 448), (4096, 320)):
        if k <= size:  # one group, which is another instance's
            continue
        for zeros in (False, True):
            if not INSTANCES[name].takes(bits, size, zeros):
                continue
            layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros)
            for dtype in (FP16, BF16):
                for m in (1, 17, 131):
                    a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                    assert run_splits(library, name, layer, a, bias) >= (1 if k == 64 else 2)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_padded(library: Library, size: int, bits: int, dtype: torch.dtype) -> None:
    """Columns from out_features on are not written, rows from in_features on not read, whatever stands there."""
    k, n, around = 640, 320, 4096
    for zeros in (False, True):
        layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros)
        for rows, columns in ((640, 320), (520, 257), (584, 318), (632, 5), (8, 300)):
            for m in (1, 16, 65):
                wide = torch.full((m, rows + 8), float("nan"), dtype=dtype, device="cuda")
                wide[:, :rows] = activations(m, rows, dtype)
                a, bias = wide[:, :rows], torch.randn(columns, device="cuda").to(dtype)
                few_rows = f"sm80_m16n128_b{bits}_gany" + "z" * zeros
                for choice in (0, variant(few_rows), variant("", 0, STREAM_K)):
                    buffer = torch.full((2 * around + m * columns,), 7.0, dtype=dtype, device="cuda")
                    out = buffer[around:-around].view(m, columns)
                    out.fill_(float("nan"))
                    library.gemm(
                        a, layer.b, layer.s, out, bias, choice, in_features=rows, out_features=columns, **layer.rest
                    )
                    assert_close(out, a, library.operand(layer, a, choice)[:rows, :columns], bias)
                    assert (buffer[:around] == 7).all()
                    assert (buffer[-around:] == 7).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_extended_equal_bits_every_time(library: Library, m: int, bits: int) -> None:
    layer = Layer(14336, 1024, 448, bits=bits, zeros=True)
    a = activations(m, 14336, FP16)

    def call(choice: int) -> torch.Tensor:
        return library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, choice, **layer.rest)

    for choice in (0, variant("", 0, STREAM_K)):
        first = call(choice)
        assert_close(first, a, library.operand(layer, a, choice))
        assert all(torch.equal(first, call(choice)) for _ in range(50))
    assert not library.workspace[:COUNTER_BYTES].any()
