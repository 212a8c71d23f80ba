"""What does the work: the library, an instruction set of it, or the twin where it is missing, damaged or old."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marlin_convert.errors import DeviceError
from marlin_convert.formats import layout
from marlin_convert.native import _cpu_library, cpu, cpu_weights, reference
from tests.support.native_cpu import ISAS, needs_native, random_scales, random_words, twin


def test_the_twin_is_used_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, scales = random_words(16, 128), random_scales(1, 128)
    s = layout.permute_scales(scales)
    expected_B, expected_W = twin(reference.gptq_to_marlin, qweight), twin(reference.dequantize_gptq, qweight, scales)
    monkeypatch.delenv(cpu.NO_NATIVE, raising=False)
    built = cpu.native_available()
    for value, native in [("1", False), ("0", built), ("", built)]:
        monkeypatch.setenv(cpu.NO_NATIVE, value)
        assert cpu.native_available() == native
        out = np.empty_like(expected_B)
        assert cpu.pack(qweight, out, threads=2) is out
        np.testing.assert_array_equal(out, expected_B)
        np.testing.assert_array_equal(cpu.unpack(out), qweight)
        np.testing.assert_array_equal(cpu_weights.dequantize_gptq(qweight, scales), expected_W)
        np.testing.assert_array_equal(cpu_weights.dequantize_marlin(out, s), expected_W)


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.native_available():
        assert re.fullmatch(r"native CPU library \((plain C\+\+|AVX2|AVX-512)\)", cpu.describe())
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    assert cpu.describe() == "torch twin: MARLIN_CONVERT_NO_NATIVE is set"
    assert cpu.available_isas() == ()
    with pytest.raises(ValueError, match="isa is 'avx2', but the native library is not in use"):
        cpu.pack(random_words(2, 64), isa="avx2")


@needs_native
@pytest.mark.parametrize(("wanted", "title"), [("plain", "plain C++"), ("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_the_instruction_set_is_kept_to(
    library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, wanted: str, title: str
) -> None:
    """Seen from what reaches the native code; an instruction set that this CPU lacks is not used because of it."""
    monkeypatch.delenv(_cpu_library.HIGHEST_ISA, raising=False)
    library(_cpu_library.LIBRARY)
    best = cpu.available_isas()[-1]
    monkeypatch.setenv(_cpu_library.HIGHEST_ISA, wanted)
    library(_cpu_library.LIBRARY)
    used = cpu.available_isas()
    assert used == ISAS[: min(ISAS.index(wanted), ISAS.index(best)) + 1]
    assert used[-1] != wanted or title in cpu.describe()
    called: list[Any] = []
    monkeypatch.setattr(_cpu_library.Native, "call", lambda self, function, *arguments: called.append(arguments[-1]))
    cpu.pack(random_words(2, 64))
    assert called == [ISAS.index(used[-1]) + 1]  # MARLIN_ISA_* of kernels/marlin.h


@needs_native
def test_an_instruction_set_that_does_not_exist(
    library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_cpu_library.HIGHEST_ISA, "sse2")
    library(_cpu_library.LIBRARY)
    with pytest.raises(DeviceError, match="MARLIN_CONVERT_ISA is 'sse2'; it should be one of plain, avx2, avx512"):
        cpu.pack(random_words(2, 64))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Point `ops` to another library file, not yet loaded."""

    def use(path: Path) -> None:
        monkeypatch.setattr(_cpu_library, "LIBRARY", path)
        monkeypatch.setattr(_cpu_library, "_loaded", None)

    monkeypatch.delenv(cpu.NO_NATIVE, raising=False)
    return use


def assert_works_without_library() -> None:
    assert not cpu.native_available()
    qweight = random_words(2, 64)
    np.testing.assert_array_equal(cpu.pack(qweight), twin(reference.gptq_to_marlin, qweight))


def test_missing_library(library: Callable[[Path], None], tmp_path: Path) -> None:
    library(tmp_path / "marlin_convert" / "_cpu.so")
    assert cpu.describe() == "torch twin: marlin_convert/_cpu.so is not built: run pip install ."
    assert_works_without_library()


def test_damaged_library(library: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"not a library")
    library(path)
    assert re.fullmatch(r"torch twin: .*_cpu.so cannot be loaded \(.*\): rebuild it with .*", cpu.describe())
    assert_works_without_library()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int marlin_cpu_abi_version(void) { return 999; }", "has ABI version 999, this package wants"),
        ("int other(void) { return 1; }", "cannot be loaded"),
    ],
)
def test_stale_library(library: Callable[[Path], None], tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "_cpu.so"
    (tmp_path / "stale.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "stale.c", "-o", path], check=True)
    library(path)
    assert cpu.describe().startswith("torch twin: ")
    assert message in cpu.describe()
    assert "pip install ." in cpu.describe()
    assert_works_without_library()


@pytest.mark.slow
def test_importing_and_packing_does_not_import_torch() -> None:
    program = """if True:
        import sys
        import numpy as np
        from marlin_convert.formats import layout
        from marlin_convert.native import _cpu_library, cpu
        from marlin_convert.native import reference
        if cpu.native_available():
            cpu.pack(np.zeros((2, 64), np.int32))
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)
