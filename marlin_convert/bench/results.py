"""What a measurement asks of a machine, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .shapes import Notes, Shape

if TYPE_CHECKING:
    import torch

REPLAYS = 9  # of a graph; odd, so that the median is one of them
ROTATE = 4  # the copies of a layer's weights together, in sizes of the L2 cache

Calls = Sequence[Callable[[], object]]


# ---- What is asked ----


class Kernels(Protocol):
    """Marlin's products, as the module `cuda` has them."""

    def matmul(
        self, a: torch.Tensor, B: torch.Tensor, s: torch.Tensor, *, zeros: torch.Tensor | None,
        perm: torch.Tensor | None, bits: int, in_features: int | None, out_features: int | None,
    ) -> torch.Tensor: ...  # fmt: skip

    def dequantizing_pays(
        self, M: int, N: int, K: int, index: int, *, bits: int, group_size: int, zeros: bool
    ) -> bool: ...


@dataclass(frozen=True)
class Rig:
    """All that a measurement asks of a machine. `cuda_rig` is the real one; tests bring their own."""

    device: torch.device
    kernels: Kernels
    fp16: Callable[..., object]  # (a [M, K], W [K, N], out=[M, N])
    time: Callable[[Calls], float]  # µs of one of the calls
    describe: Callable[[], Machine]
    free_bytes: Callable[[], int]
    synchronize: Callable[[], None]  # raises when the device has failed
    release: Callable[[], None]  # returns memory that no tensor uses to the driver
    l2_bytes: int
    copy_bytes: int = 1 << 30  # of the copy that tells the bandwidth
    product_size: int = 8192  # of the square product that tells the peak


# ---- What comes out ----


@dataclass(frozen=True)
class Limits:
    """What this GPU can do at most, as measured: bytes/s of a large copy (read + write), flop/s of a large product."""

    copy_bytes_per_s: float
    fp16_flop_per_s: float

    def us(self, nbytes: int, flops: int) -> float:
        return max(nbytes / self.copy_bytes_per_s, flops / self.fp16_flop_per_s) * 1e6

    def bound(self, nbytes: int, flops: int) -> str:
        return "memory" if nbytes / self.copy_bytes_per_s >= flops / self.fp16_flop_per_s else "compute"


@dataclass(frozen=True)
class Speed:
    """One product's time, in µs, beside the least that its bytes and operations take."""

    us: float
    nbytes: int
    flops: int
    limit_us: float
    bound: str  # "memory" or "compute": what sets the limit

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.us / 1e3

    @property
    def tflop_per_s(self) -> float:
        return self.flops / self.us / 1e6

    @property
    def share_of_limit(self) -> float:
        return self.limit_us / self.us

    def as_dict(self) -> dict[str, Any]:
        numbers = {"us": self.us, "gb_per_s": self.gb_per_s, "tflop_per_s": self.tflop_per_s,
                   "limit_us": self.limit_us, "share_of_limit": self.share_of_limit}  # fmt: skip
        return {key: round(value, 4) for key, value in numbers.items()} | {"limited_by": self.bound}


@dataclass(frozen=True)
class Cell:
    """One layer at one batch size. `method` is what `cuda.matmul` chose; a peer that failed is None."""

    M: int
    fp16: Speed
    marlin: Speed
    method: str  # "kernel", or "dequantize": dequantize and cuBLAS
    peers: dict[str, Speed | None]

    @property
    def speedup(self) -> float:
        return self.fp16.us / self.marlin.us

    def as_dict(self) -> dict[str, Any]:
        def beside_fp16(speed: Speed) -> dict[str, Any]:
            return speed.as_dict() | {"speedup": round(self.fp16.us / speed.us, 4)}

        return {
            "M": self.M,
            "fp16": self.fp16.as_dict(),
            "marlin": beside_fp16(self.marlin) | {"method": self.method},
            "peers": {name: speed and beside_fp16(speed) for name, speed in self.peers.items()},
        }


@dataclass
class LayerResult:
    shape: Shape
    cells: list[Cell] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "name": shape.name, "K": shape.K, "N": shape.N, "bits": shape.bits, "group_size": shape.group_size,
            "sym": not shape.zeros, "desc_act": shape.act_order, "count": shape.count,
            "cells": [cell.as_dict() for cell in self.cells],
        }  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from. `clocks` is what the driver says under load, None without nvidia-ml-py."""

    device: str
    name: str
    capability: str
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    driver: str
    versions: dict[str, str]
    clocks: dict[str, float | None] | None


@dataclass
class Report:
    title: str
    machine: Machine
    limits: Limits
    peers: dict[str, str]  # name → version
    layers: list[LayerResult] = field(default_factory=list)
    notes: Notes = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for `--json`. Times are in µs, rates in 1e9 bytes and 1e12 operations a second."""
        return {
            "ok": True,
            "title": self.title,
            "machine": asdict(self.machine),
            "limits": {"copy_gb_per_s": round(self.limits.copy_bytes_per_s / 1e9, 2),
                       "fp16_tflop_per_s": round(self.limits.fp16_flop_per_s / 1e12, 3)},
            "method": {"timing": "median of CUDA graph replays", "replays": REPLAYS, "rotated_l2_sizes": ROTATE},
            "peers": self.peers,
            "layers": [layer.as_dict() for layer in self.layers],
            "notes": [{"note": note, "where": where} for note, where in self.notes.items()],
        }  # fmt: skip
