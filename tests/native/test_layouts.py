"""The packings of other formats <-> GPTQ's words: the native code of every instruction set against the definition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from marlin_convert.native import cpu
from tests.support.awq_checkpoints import interleaved
from tests.support.gptq_checkpoints import pack_rows

Words = npt.NDArray[np.int32]
ISAS = [None, *cpu.available_isas()]


def words(shape: tuple[int, int], seed: int = 0) -> Words:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (16, 16), (17, 33), (64, 5), (200, 130), (1024, 512)])
def test_rows_and_columns_exchanged(shape: tuple[int, int], threads: int, isa: str | None) -> None:
    a = words(shape)
    out = np.empty((shape[1], shape[0]), np.int32)
    assert cpu.transpose(a, out, threads=threads, isa=isa) is out
    np.testing.assert_array_equal(out, a.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("K", "N"), [(8, 8), (8, 128), (16, 120), (256, 136), (512, 1024), (64, 1160)])
def test_awq_and_gptq(K: int, N: int, threads: int, isa: str | None) -> None:
    """Codes packed both ways here, as each format defines it."""
    codes = np.random.default_rng(K).integers(0, 16, (K, N))
    theirs, ours = interleaved(codes), pack_rows(codes)
    out, back = np.empty_like(ours), np.empty_like(theirs)
    assert cpu.awq_to_gptq(theirs, out, threads=threads, isa=isa) is out
    np.testing.assert_array_equal(out, ours)
    assert cpu.gptq_to_awq(ours, back, threads=threads, isa=isa) is back
    np.testing.assert_array_equal(back, theirs)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin, which does the work where the library is missing, gives the same."""
    a, expected = words((64, 24)), np.empty((8, 192), np.int32)
    cpu.awq_to_gptq(a, expected)
    monkeypatch.setattr(cpu, "choose", lambda threads, isa: (None, 0))
    found = cpu.awq_to_gptq(a, np.empty((8, 192), np.int32))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(cpu.gptq_to_awq(found, np.empty_like(a)), a)
    np.testing.assert_array_equal(cpu.transpose(a, np.empty((24, 64), np.int32)), a.T)


def test_views_into_a_file_need_no_alignment() -> None:
    raw = np.zeros(4 * 16 * 8 + 1, np.uint8)
    view = raw[1:].view(np.int32).reshape(16, 8)
    view[...] = words((16, 8))
    np.testing.assert_array_equal(cpu.transpose(view, np.empty((8, 16), np.int32)), view.T)


@pytest.mark.parametrize("function", [cpu.transpose, cpu.awq_to_gptq, cpu.gptq_to_awq])
def test_what_is_no_such_array(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="out has shape"):
        function(words((16, 16)), np.empty((3, 3), np.int32))
    with pytest.raises(TypeError, match="dtype int64"):
        function(np.zeros((16, 16), np.int64), np.empty((16, 16), np.int32))
    with pytest.raises(ValueError, match="should have 2 dimensions"):
        function(np.zeros(16, np.int32), np.empty((16, 16), np.int32))
