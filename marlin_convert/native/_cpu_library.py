"""The native CPU library `_cpu.so` (`kernels/cpu`): its contract with `kernels/marlin.h`, loading it, and what is used
where it is missing. Part of `cpu`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import INSTALL, INSTALL_RUN, DeviceError, MissingPackageError

_Prototype = tuple[Any, list[Any]]

ABI_VERSION = 4  # MARLIN_CPU_ABI_VERSION of kernels/marlin.h
NO_NATIVE = "MARLIN_CONVERT_NO_NATIVE"
HIGHEST_ISA = "MARLIN_CONVERT_ISA"
MAX_THREADS = 1024
LIBRARY = Path(__file__).parents[1] / "_cpu.so"

# MARLIN_ISA_* of kernels/marlin.h, lowest first.
ISAS = {"plain": 1, "avx2": 2, "avx512": 3}
ISA_TITLES = {"plain": "plain C++", "avx2": "AVX2", "avx512": "AVX-512"}
ISA_AUTO = 0

# MARLIN_ERROR_* of kernels/marlin.h.
ERRORS = {
    1: "a null pointer",
    2: "sizes that do not fit",
    3: "an instruction set that this CPU lacks",
    4: "neither 4 nor 8 bits",
}


class LayerArguments(ctypes.Structure):
    """marlin_cpu_layer_t."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("k0", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("rows_per_group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
    )


# The prototypes of kernels/marlin.h: (result, arguments).
_pointer_t, _size_t, _int_t = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_REPACKING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_size_t] * 2, *[_int_t] * 3])
_ARRANGING: _Prototype = (_int_t, [*[_pointer_t] * 4, *[_size_t] * 5, *[_int_t] * 3])
_SORTED = [_pointer_t, _size_t, *[_pointer_t] * 3, *[_size_t] * 5, *[_int_t] * 3]
_DEQUANTIZING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_int_t] * 2])
_PRODUCT: _Prototype = (_int_t, [_pointer_t, *[_size_t] * 2, *[_pointer_t] * 2, *[_int_t] * 2])
_EXCHANGING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_size_t] * 2, *[_int_t] * 2])
PROTOTYPES: dict[str, _Prototype] = {
    "marlin_cpu_best_isa": (_int_t, []),
    "marlin_cpu_pack": _REPACKING,
    "marlin_cpu_unpack": _REPACKING,
    "marlin_cpu_arrange": _ARRANGING,
    "marlin_cpu_pack_sorted": (_int_t, _SORTED),
    "marlin_cpu_compare_sorted": (_int_t, [*_SORTED, _pointer_t]),
    "marlin_cpu_transpose": _EXCHANGING,
    "marlin_cpu_awq_to_gptq": _EXCHANGING,
    "marlin_cpu_gptq_to_awq": _EXCHANGING,
    "marlin_cpu_first_difference": (_size_t, [*[_pointer_t] * 2, _size_t]),
    "marlin_cpu_dequantize_gptq": _DEQUANTIZING,
    "marlin_cpu_dequantize_marlin": _DEQUANTIZING,
    "marlin_cpu_matmul_gptq": _PRODUCT,
    "marlin_cpu_matmul_marlin": _PRODUCT,
}


@dataclass(frozen=True)
class Native:
    """The loaded library."""

    native: ctypes.CDLL
    isas: tuple[str, ...]

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.native, function)(*arguments)
        if code:  # the arguments have been checked, so this is a bug here
            raise RuntimeError(f"{function} failed with code {code}: {ERRORS.get(code, 'unknown')}")

    def first_difference(self, a: ctypes.c_void_p, b: ctypes.c_void_p, count: int) -> int:
        return int(self.native.marlin_cpu_first_difference(a, b, count))


@dataclass(frozen=True)
class Twin:
    """No library, and why."""

    reason: str


_loaded: Native | Twin | None = None
_loading = threading.Lock()


def current() -> Native | Twin:
    """Return what does the work. The library is loaded once; the environment variable is heeded at each call."""
    global _loaded
    if os.environ.get(NO_NATIVE, "") not in ("", "0"):
        return _twin(f"{NO_NATIVE} is set")
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load(LIBRARY)
    return _loaded


def _twin(reason: str) -> Twin:
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(f"{reason}; what takes the native library's place needs torch: {INSTALL_RUN}.")
    return Twin(reason)


def _load(path: Path) -> Native | Twin:
    name = f"{path.parent.name}/{path.name}"
    if not path.exists():
        return _twin(f"{name} is not built: run {INSTALL}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.marlin_cpu_abi_version()
    except (OSError, AttributeError) as error:
        return _twin(f"{name} cannot be loaded ({error}): rebuild it with {INSTALL}")
    if version != ABI_VERSION:
        return _twin(f"{name} has ABI version {version}, this package wants {ABI_VERSION}: run {INSTALL} again")
    _declare(library)
    best = min(library.marlin_cpu_best_isa(), _highest_wanted())
    return Native(library, tuple(isa for isa, code in ISAS.items() if code <= best))


def _highest_wanted() -> int:
    wanted = os.environ.get(HIGHEST_ISA) or max(ISAS, key=ISAS.__getitem__)
    if wanted not in ISAS:
        raise DeviceError(f"{HIGHEST_ISA} is {wanted!r}; it should be one of {', '.join(ISAS)}.")
    return ISAS[wanted]


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def choose(threads: int, isa: str | None) -> tuple[Native | Twin, int]:
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}; it should be an int")
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads is {threads}; it should be 1..{MAX_THREADS}")
    backend = current()
    if isa is None:
        return backend, ISAS[backend.isas[-1]] if isinstance(backend, Native) else ISA_AUTO
    if isa not in ISAS:
        raise ValueError(f"isa is {isa!r}; it should be one of {', '.join(ISAS)}")
    if isinstance(backend, Twin):
        raise ValueError(f"isa is {isa!r}, but the native library is not in use ({backend.reason})")
    if isa not in backend.isas:
        raise ValueError(f"isa is {isa!r}; this CPU has {', '.join(backend.isas)}")
    return backend, ISAS[isa]
