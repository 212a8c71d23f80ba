"""The contract between the package and its CPU library: one header, and checks on both sides of it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.native import _cpu_library, cpu

HEADER = Path(__file__).parents[2] / "kernels" / "marlin.h"
ISAS = ("plain", "avx2", "avx512")


def test_header_has_the_same_codes_and_prototypes() -> None:
    text = re.sub(r"//.*", "", HEADER.read_text())
    defined = {name: int(value) for name, value in re.findall(r"#define MARLIN_(\w+) (\d+)", text)}
    assert defined["CPU_ABI_VERSION"] == _cpu_library.ABI_VERSION
    assert defined["ISA_AUTO"] == _cpu_library.ISA_AUTO
    assert {name: defined[f"ISA_{name.upper()}"] for name in ISAS} == _cpu_library.ISAS
    errors = {value for name, value in defined.items() if name.startswith("ERROR_")}
    assert errors == set(_cpu_library.ERRORS)

    types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64}
    prototypes = {
        name: (types[result], [c_type(argument, types) for argument in arguments.split(",") if argument != "void"])
        for result, name, arguments in re.findall(r"MARLIN_EXPORT (\w+) (\w+)\(([^)]*)\)", text)
    }
    assert prototypes == {"marlin_cpu_abi_version": (ctypes.c_int, []), **_cpu_library.PROTOTYPES}


def c_type(argument: str, types: dict[str, Any]) -> Any:
    return ctypes.c_void_p if "*" in argument else types[argument.split()[0]]


# ---- What the native code refuses ----

#: A word array; as large as anything below needs.
WORDS = (ctypes.c_int32 * 1024)()
OUT = (ctypes.c_int32 * 1024)()
FOUND = ctypes.c_int64(7)


def order(*numbers: int) -> Any:
    return (ctypes.c_int32 * len(numbers))(*numbers)


LAYER: dict[str, Any] = {
    "weights": ctypes.addressof(WORDS), "scales": ctypes.addressof(WORDS), "k0": 0, "k": 16, "n": 64, "groups": 1,
    "rows_per_group": 16, "bits": 4,
}  # fmt: skip


def layer(**changes: int) -> Any:
    return ctypes.byref(_cpu_library.LayerArguments(**(LAYER | changes)))


#: Arguments that are right, by the header's names.
SORTED: dict[str, Any] = {
    "qweight": WORDS, "stride": 64, "perm": order(*range(16)), "fill": WORDS, "B": OUT, "b_stride": 128, "k": 16,
    "n": 64, "rows": 16, "padded_n": 64, "bits": 4, "threads": 1, "isa": 0,
}  # fmt: skip
RIGHT: dict[str, dict[str, Any]] = {
    "pack": {"qweight": WORDS, "B": OUT, "k": 16, "n": 64, "bits": 4, "threads": 1, "isa": 0},
    "arrange": {
        "qweight": WORDS, "perm": None, "fill": WORDS, "out": OUT, "k": 16, "n": 64, "k0": 0, "rows": 16,
        "padded_n": 64, "bits": 4, "threads": 1, "isa": 0,
    },
    "pack_sorted": SORTED,
    "compare_sorted": {**SORTED, "difference": ctypes.byref(FOUND)},
    "matmul_gptq": {"x": WORDS, "m": 1, "x_columns": 16, "layer": layer(), "y": OUT, "threads": 1, "isa": 0},
}  # fmt: skip

NULL, SIZES, ISA, BITS = 1, 2, 3, 4  # MARLIN_ERROR_*
WRONG_SORTED: list[tuple[int, str, Any]] = [
    *((NULL, name, None) for name in ("qweight", "perm", "fill", "B")),
    (SIZES, "stride", 63), (SIZES, "b_stride", 127), (SIZES, "k", 0), (SIZES, "k", 12), (SIZES, "k", 24),
    (SIZES, "n", 0), (SIZES, "n", 65), (SIZES, "rows", 8), (SIZES, "rows", 24), (SIZES, "padded_n", 32),
    (SIZES, "padded_n", 96), (SIZES, "perm", order(*range(1, 17))), (SIZES, "perm", order(-1, *range(1, 16))),
    (SIZES, "perm", order(0, *range(15))), (BITS, "bits", 3), (ISA, "isa", 4),
]  # fmt: skip
WRONG: dict[str, list[tuple[int, str, Any]]] = {
    "pack": [
        (NULL, "qweight", None), (NULL, "B", None), (SIZES, "k", 8), (SIZES, "k", 0), (SIZES, "k", -16),
        (SIZES, "n", 32), (SIZES, "n", 0), (SIZES, "n", -64), (ISA, "isa", -1), (ISA, "isa", 4),
        (BITS, "bits", 0), (BITS, "bits", 2), (BITS, "bits", 3), (BITS, "bits", 16),
    ],
    "arrange": [
        (NULL, "fill", None), (SIZES, "perm", order(*range(1, 17))), (SIZES, "k", 0), (SIZES, "k", 12),
        (SIZES, "n", 0), (SIZES, "n", 65), (SIZES, "k0", 4), (SIZES, "k0", -8), (SIZES, "rows", 0), (SIZES, "rows", 4),
    ],
    "pack_sorted": WRONG_SORTED,
    "compare_sorted": [*WRONG_SORTED, (NULL, "difference", None)],
    "matmul_gptq": [
        (NULL, "layer", None), (SIZES, "m", 0), (SIZES, "x_columns", 8), (BITS, "layer", layer(bits=2)),
        *((SIZES, "layer", layer(**change)) for change in (
            {"k0": 8}, {"k0": 16}, {"k": 24}, {"n": 32}, {"groups": 0}, {"rows_per_group": 8}, {"rows_per_group": 0},
        )),
    ],
}  # fmt: skip


def call(function: str, **changes: Any) -> int:
    """The library's own answer, past the checks of the Python side; arguments are put in the header's order."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    found = re.search(rf"marlin_cpu_{function}\(([^)]*)\)", text)
    assert found is not None
    names = [argument.split()[-1].lstrip("*") for argument in found[1].split(",")]
    assert names == list(RIGHT[function])
    native = getattr(ctypes.CDLL(str(_cpu_library.LIBRARY)), f"marlin_cpu_{function}")
    native.argtypes = _cpu_library.PROTOTYPES[f"marlin_cpu_{function}"][1]
    return int(native(*(RIGHT[function] | changes).values()))


@pytest.mark.skipif(not cpu.native_available(), reason=cpu.describe())
@pytest.mark.parametrize("function", WRONG)
def test_native_code_checks_again(function: str) -> None:
    """The Python side lets none of this through; another caller might."""
    assert call(function) == 0
    for code, name, value in WRONG[function]:
        assert call(function, **{name: value}) == code, (name, value)
