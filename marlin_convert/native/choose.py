"""Which device does what: the one that is asked for, if it can be used, and what repacks there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..device import CPU, Device, pick_device
from ..errors import DeviceError, MissingPackageError, require
from ..formats.layout import TILE_K
from . import cpu

if TYPE_CHECKING:
    import torch

Words = npt.NDArray[np.int32]


def usable_device(request: str, *, computes: bool) -> tuple[Device, str | None]:
    """Return the device of `request`, its kernels loaded if they will be used, and a note for the user.

    `computes` says that products will be computed there; repacking alone, the CPU does unless a GPU is asked for by
    name. Raises DeviceError when it was asked for by name and cannot be used. With "auto", a GPU whose kernels are not
    there gives way to the CPU, and the note says so.
    """
    device = pick_device(request)
    if device.kind == "cpu":
        return device, None
    if request == "auto" and not computes:
        return device, None  # there is nothing to compute on a GPU: see `packer`
    try:
        require("torch")
        from . import cuda

        cuda.torch_device(device)
    except (DeviceError, MissingPackageError) as error:
        if request != "auto":
            raise
        return CPU, f"{device} ({device.name}) is not used: {error.message}"
    return device, None


class Packer(Protocol):
    """Repacks GPTQ words into Marlin's tile order."""

    def pack(self, words: Words, B: Words, bits: int) -> None:
        """Repack a block: `words` [K bits/32, N] → the given `B` [K/16, N bits/2]."""

    def pack_sorted(
        self, qweight: Words, B: Words, bits: int, *, perm: Words, fill: npt.NDArray[np.uint8], rows: int
    ) -> None:
        """Repack columns of a layer with act-order, `qweight` [K bits/32, columns] → `B` [rows/16, columns' bits/2]."""


class CPUPacker:
    """Repacks with the native CPU library."""

    def pack(self, words: Words, B: Words, bits: int) -> None:
        cpu.pack(words, out=B, bits=bits)

    def pack_sorted(
        self, qweight: Words, B: Words, bits: int, *, perm: Words, fill: npt.NDArray[np.uint8], rows: int
    ) -> None:
        cpu.pack_sorted(qweight, B, bits=bits, perm=perm, fill=fill, rows=rows)


class CUDAPacker:
    """Repacks on a GPU; rows are sorted before, on the CPU."""

    def __init__(self, target: torch.device) -> None:
        self._target = target

    def pack(self, words: Words, B: Words, bits: int) -> None:
        import torch

        from . import cuda

        # A block of a wide layer may have fewer rows than the kernel takes; each tile row is then packed by itself.
        missing = -len(B) % (cuda.K_MULTIPLE // TILE_K) * TILE_K * bits // 32
        given = torch.nn.functional.pad(torch.from_numpy(words).to(self._target), (0, 0, 0, missing))
        torch.from_numpy(B).copy_(cuda.repack(given, bits=bits)[: len(B)])

    def pack_sorted(self, qweight: Words, B: Words, bits: int, **order: Any) -> None:
        self.pack(cpu.arrange(np.ascontiguousarray(qweight), bits=bits, **order), B, bits)


def packer(device: Device, request: str) -> Packer:
    """Return what repacks: the CPU, which keeps up with any disk, unless a GPU was asked for by name."""
    if device.kind == "cpu" or request == "auto":
        return CPUPacker()
    from . import cuda

    return CUDAPacker(cuda.torch_device(device))
