"""Repack, dequantize and gather on the GPU, exact, against slow twins; and the twins against the formulas."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.cuda_library import (
    Layer,
    Library,
    pack_gptq,
    pack_gptq8,
    pack_marlin,
    pack_marlin8,
    pack_zeros,
    permute_scales,
)
from tests.cuda.kernel_inputs import BF16, FP16, GROUP_SIZES, KERNEL_TESTS, groups_of

pytestmark = KERNEL_TESTS


EXACT_SHAPES = [(64, 64, 1), (128, 64, 1), (192, 320, 1), (256, 128, 2), (1024, 4096, 8), (1152, 448, 9)]


@pytest.mark.parametrize(("k", "n"), sorted({shape[:2] for shape in EXACT_SHAPES}))
def test_repack_and_unpack(library: Library, k: int, n: int) -> None:
    code = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
    qweight, b = pack_gptq(code), pack_marlin(code)
    assert torch.equal(library.repack(qweight), b)
    assert torch.equal(library.unpack(b), qweight)


@pytest.mark.parametrize(("k", "n"), [(64, 64), (192, 320), (1024, 4096)])
def test_repack_and_unpack_8_bits(library: Library, k: int, n: int) -> None:
    code = torch.randint(0, 256, (k, n), dtype=torch.uint8, device="cuda")
    qweight, b = pack_gptq8(code), pack_marlin8(code)
    assert torch.equal(library.repack(qweight, 8), b)
    assert torch.equal(library.unpack(b, 8), qweight)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("k", "n", "groups"), EXACT_SHAPES)
def test_dequantize(library: Library, k: int, n: int, groups: int, dtype: torch.dtype) -> None:
    # Any bit pattern of a finite scale: subnormal, zero, negative, up to 65504, where fp16 weights become infinite.
    scales = torch.randint(-(2**15), 2**15, (groups, n), dtype=torch.int16).view(FP16)
    scales[~scales.isfinite()] = 65504
    layer = Layer(k, n, groups, scales)
    expected = layer.weight(torch.float32).to(dtype)  # the fp32 product is exact, so this rounds once
    out = library.dequantize(layer.b, layer.s, dtype)
    assert torch.equal(out, expected)  # which takes -0.0 for 0.0: code 8 with a negative scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_extended_dequantize(library: Library, size: int, zeros: bool, bits: int) -> None:
    """Exact, also with rows in another order and sizes that are no multiples of anything."""
    k, n = 384, 192
    for scale_dtype in (FP16, BF16):
        layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros, scale_dtype=scale_dtype)
        for dtype in (FP16, BF16):
            expected = layer.weight(torch.float32).to(dtype)
            assert torch.equal(library.dequantize(layer.b, layer.s, dtype, **layer.rest), expected)
            for rows, columns in ((384, 192), (381, 190), (300, 129), (257, 176)):
                perm = torch.randperm(rows, device="cuda").int()
                out = library.dequantize(
                    layer.b, layer.s, dtype, perm=perm, in_features=rows, out_features=columns, **layer.rest
                )
                assert torch.equal(out[perm.long()], expected[:rows, :columns])


@pytest.mark.parametrize("m", [1, 3, 63, 64, 101, 303, 1001])
def test_gather(library: Library, m: int) -> None:
    """By rows in shared memory from 64 rows on, one, two or four a block; 120000 columns do not fit there."""
    for rows, k in ((640, 640), (637, 640), (1, 128), (4001, 4096), (14336, 14336), (60001, 60032), (120000, 120064)):
        if m * rows > 1 << 25:
            continue
        for pitch in (rows + 3, (rows + 15) // 8 * 8):  # rows that start anywhere, or at multiples of 16 bytes
            a = torch.randn(m, pitch, device="cuda").half()[:, :rows]
            for perm in (None, torch.randperm(rows, device="cuda").int()):
                out = library.gather(a, perm, k)
                assert torch.equal(out[:, :rows], a if perm is None else a[:, perm.long()])
                assert (out[:, rows:] == 0).all()


def test_twins_agree() -> None:
    """The twin of the packing against the formula for single nibbles."""
    code = torch.randint(0, 16, (32, 128), dtype=torch.uint8)
    b = pack_marlin(code)
    for k, n in ((0, 0), (17, 3), (31, 127), (9, 70), (24, 44)):
        row, column = k % 16, n % 64
        j, g, high = column // 16, column % 8, column % 16 // 8
        t, p = row % 8 // 2, row // 8 + 2 * high + 4 * (row % 2)
        word = b[k // 16, n // 64 * 128 + (4 * g + t) * 4 + j]
        assert int(word) >> (4 * p) & 0xF == code[k, n]
    byte = (16 * torch.arange(16)[:, None] + torch.arange(64)).to(torch.uint8)
    assert int(pack_marlin8(byte)[0, 0]) & 0xFFFFFFFF == 0x90108000
    zeros = torch.arange(64, dtype=torch.uint8)[None, :]
    assert pack_zeros(zeros // 8, 4)[0, 0].item() == 0x75316420
    assert pack_zeros(zeros, 8)[0, 0].item() == 0x18081000
    scales = torch.arange(64).half()
    assert permute_scales(scales[None, :]).tolist()[0][:9] == [0, 1, 8, 9, 16, 17, 24, 25, 2]
    assert permute_scales(torch.stack([scales, scales])).tolist()[1][:9] == [0, 8, 16, 24, 32, 40, 48, 56, 1]
