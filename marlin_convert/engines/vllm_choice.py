"""Which kernel computes a layer in vLLM: ours or vLLM's own Marlin kernel, and what neither computes.

MARLIN_CONVERT_VLLM_KERNEL chooses, for linear layers and for experts: `ours`, `vllm`, or `auto`, which is ours where it
has been measured to be the faster one and for layers that vLLM's kernel does not have.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import vllm.envs as envs
from vllm.logger import init_logger

from .._version import __version__
from ..errors import DeviceError
from ..native import cuda
from . import vllm_calls as calls
from .tensor_parallel import Piece

logger = init_logger("vllm.marlin_convert")  # vLLM shows only loggers below its own name


#: The environment variable that chooses the kernel, and its values.
KERNEL = "MARLIN_CONVERT_VLLM_KERNEL"
_KERNELS = ("auto", "ours", "vllm")
#: Major compute capabilities on which our kernel was measured to be at least as fast as vLLM's Marlin kernel.
_FASTER_ON = (9,)


class Kernel(NamedTuple):
    """What computes quantized layers, and why. `missing` says why our kernels cannot run here, if they cannot."""

    ours: bool
    why: str
    missing: str = ""


@cache
def kernel() -> Kernel:
    """Return the choice for this process. Raises ValueError for one that cannot be."""
    asked = os.environ.get(KERNEL, "").strip().lower() or "auto"
    if asked not in _KERNELS:
        raise ValueError(f"{KERNEL} is {asked!r}; it should be one of {', '.join(_KERNELS)}")
    try:
        cuda.load_library()
        missing = ""
    except DeviceError as error:
        missing = str(error).rstrip(".")
    if asked == "ours" and missing:
        raise ValueError(f"{KERNEL}=ours: {missing}")
    if asked != "auto":
        return Kernel(asked == "ours", f"{KERNEL}={asked}", missing)
    if missing:
        return Kernel(False, missing, missing)
    capability = torch.cuda.get_device_capability()
    where = f"on compute capability {capability[0]}.{capability[1]}"
    if capability[0] in _FASTER_ON:
        return Kernel(True, f"the faster one {where}")
    return Kernel(False, f"ours has not been measured to be faster {where}")


@cache
def say() -> None:
    """Write one line of the log, once in a process."""
    choice = kernel()
    name = "marlin-convert's kernels" if choice.ours else "vLLM's Marlin kernel"
    logger.info("Quantized layers of this Marlin checkpoint are computed by %s: %s", name, choice.why)


def _part_of_the_cache_key() -> str:
    """Give vLLM, which keys compiled graphs by its environment variables, ours among them, as it was decided."""
    return f"{'ours' if kernel().ours else 'vllm'} {cuda.ABI_VERSION} {__version__}"


envs.environment_variables[KERNEL] = _part_of_the_cache_key


def vllm_lacks(bits: int, zeros: bool, group_size: int) -> str:
    """Return what vLLM's Marlin kernel does not have of such a layer, or nothing."""
    if (bits, zeros) not in calls.TYPES:
        return f"vLLM's Marlin kernel has no {bits}-bit codes with zero points"
    if group_size not in calls.GROUP_SIZES:
        return f"vLLM's Marlin kernel has no groups of {group_size}"
    return ""


def is_ours(name: str, bits: int, zeros: bool, group_size: int) -> bool:
    """Tell whether our kernels compute such a layer. Raises ValueError if neither we nor vLLM can."""
    lacking = vllm_lacks(bits, zeros, group_size)
    if lacking and not_ours():
        raise ValueError(f"{name}: {lacking}, and marlin-convert's are not used: {not_ours()}")
    return kernel().ours or bool(lacking)


def not_ours() -> str:
    """Return why our kernels compute nothing here, not even what vLLM's cannot; or nothing."""
    choice = kernel()
    return choice.missing or ("" if choice.ours or not choice.why.startswith(KERNEL) else choice.why)


def piece_is_ours(name: str, piece: Piece) -> bool:
    """Tell, as `is_ours` does, for what a rank has of a layer."""
    return is_ours(name, piece.bits, piece.zeros is not None, -1 if piece.G == 1 else piece.stored_K // piece.G)


def batch_invariant() -> bool:
    """Tell whether vLLM promises results that do not depend on the number of rows."""
    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def check_invariance(name: str, ours: bool) -> None:
    """Raise ValueError where vLLM promises what its kernels, which compute this layer unless `ours` do, do not give."""
    if batch_invariant() and not ours:
        raise ValueError(
            f"{name}: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the number of rows; of the "
            f"kernels, vLLM's for Marlin checkpoints ({kernel().why}) do not give them. Start vLLM without it"
        )


def cast(name: str, piece: Piece, dtype: torch.dtype) -> Piece:
    """Return `piece` with scales of `dtype`, for vLLM's kernels. Raises ValueError for scales beyond its range."""
    scales = piece.scales.to(dtype)
    if not torch.isfinite(scales).all() or ((scales == 0) & (piece.scales != 0)).any():
        raise ValueError(f"{name}: its {piece.scales.dtype} scales do not fit {dtype}; load with --dtype bfloat16")
    return replace(piece, scales=scales)
