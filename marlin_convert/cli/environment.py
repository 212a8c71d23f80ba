"""What `marlin-convert env` says, for a bug report: versions and machine, and nothing that is secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from .._version import __version__
from ..bench.gpu import driver_version
from ..device import cuda_devices
from ..errors import MarlinConvertError
from ..native import cpu

PACKAGES = (
    "numpy", "safetensors", "huggingface_hub", "click", "rich", "torch", "transformers", "accelerate", "vllm", "triton",
    "nvidia-ml-py", "gradio", "ray",
)  # fmt: skip

#: Variables whose values are told; of all others that count, only that they are set. Values may hold passwords.
_TOLD = re.compile(r"MARLIN_\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|VLLM_BATCH_INVARIANT")
_NAMED = re.compile(r"HF_\w+|VLLM_\w+|CUDA_HOME|PYTHONPATH|LD_LIBRARY_PATH|HTTPS?_PROXY|ALL_PROXY|https?_proxy")

_CUDA_LIBRARY = Path(__file__).parents[1] / "_cuda.so"


def environment() -> dict[str, Any]:
    """Return what `--json` prints; nothing here needs torch, and no failure of a driver is one of this."""
    return {
        "ok": True,
        "source": None,
        "marlin_convert": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}",
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_library": _tried(cpu.describe),
        "cuda_library": f"{_CUDA_LIBRARY.stat().st_size} bytes" if _CUDA_LIBRARY.exists() else None,
        "driver": driver_version(),
        "gpus": _tried(lambda: [{"name": x.name, "capability": f"{x.capability[0]}.{x.capability[1]}"}
                                for x in cuda_devices() if x.capability is not None]),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": _variables(),
    }  # fmt: skip


def _tried(ask: Any) -> Any:
    """Return what `ask` answers, or in words why it does not."""
    try:
        return ask()
    except MarlinConvertError as error:
        return error.message


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or 'unknown'}, {platform.machine()}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _variables() -> dict[str, str]:
    return {  # without the one that the program sets itself
        name: value if _TOLD.fullmatch(name) else "set"
        for name, value in sorted(os.environ.items())
        if value and name != "HF_HUB_DISABLE_PROGRESS_BARS" and (_TOLD.fullmatch(name) or _NAMED.fullmatch(name))
    }
