"""A pretended GPU for `bench`: its clock, its products, what they cost."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from marlin_convert.bench import results
from marlin_convert.bench.products import Peer, Weights
from marlin_convert.bench.results import Machine, Rig
from marlin_convert.bench.shapes import Shape
from marlin_convert.native import reference
from marlin_convert.progress import Progress

MACHINE = Machine(
    "cuda:0", "NVIDIA H100 [80GB]", "9.0", 132, 50 << 20, 80 << 30, "580.1", {"torch": "2.13.0", "python": "3.11"},
    {"sm_mhz": 1755.0, "max_sm_mhz": 1980.0, "memory_mhz": 2619.0, "max_memory_mhz": 2619.0, "power_w": None},
)  # fmt: skip
SHAPE = Shape("qkv", 256, 128, 2, 32)


class Bench:
    """A pretended GPU: products take the time that `cost` says, and are written down."""

    def __init__(self, **changes: Any) -> None:
        self.now = 0.0
        self.products: list[tuple[str, int, int, int]] = []  # (what, M, K, N)
        self.read: list[int] = []  # addresses of the weights
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.synchronized = self.released = 0
        self.cost = {"fp16": 8.0, "marlin": 2.0}
        self.rig = replace(
            Rig(
                device=torch.device("cpu"), kernels=self, fp16=self.fp16, time=self.time, describe=lambda: MACHINE,
                free_bytes=lambda: 1 << 30, synchronize=self.synchronize, release=self.release, l2_bytes=100_000,
                copy_bytes=1 << 20, product_size=64,
            ),
            **changes,
        )  # fmt: skip

    def took(self, what: str, a: torch.Tensor, weight: torch.Tensor, K: int, N: int) -> None:
        assert a.dtype == torch.float16
        self.products.append((what, a.shape[0], K, N))
        self.read.append(weight.data_ptr())
        self.tensors += [weakref.ref(a), weakref.ref(weight)]
        self.now += self.cost[what]

    def fp16(self, a: torch.Tensor, W: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        K, N = W.shape
        assert (W.dtype, out.dtype, tuple(out.shape)) == (torch.float16, torch.float16, (a.shape[0], N))
        self.took("fp16", a, W, K, N)
        return out

    def matmul(self, a: torch.Tensor, B: torch.Tensor, s: torch.Tensor, **layer: Any) -> torch.Tensor:
        K, N = reference.marlin_size(B, layer["bits"])
        assert (B.dtype, s.dtype, s.shape[1]) == (torch.int32, torch.float16, N)
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (B, s))  # as the kernels require it
        assert a.shape[1] == layer["in_features"] <= K
        assert (layer["zeros"] is None) or layer["zeros"].shape == (s.shape[0], N * layer["bits"] // 32)
        assert (layer["perm"] is None) or layer["perm"].tolist() != sorted(layer["perm"].tolist())
        self.took("marlin", a, B, K, N)
        return a.new_empty((a.shape[0], layer["out_features"]))

    def dequantizing_pays(self, M: int, N: int, K: int, index: int, **kind: Any) -> bool:
        assert index == 0
        return M >= 256

    def time(self, calls: results.Calls) -> float:
        before = self.now
        for call in calls:
            call()
        # Copies take no time of this clock: 10 µs for each.
        return (self.now - before) / len(calls) or 10.0

    def synchronize(self) -> None:
        self.synchronized += 1

    def release(self) -> None:
        self.released += 1


class Heard(Progress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.count, self.done, self.ended, self.said = 0, 0, False, []  # type: ignore[var-annotated]

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self.stages.append((label, total_bytes, layers))

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        self.count, self.done = self.count + nbytes, self.done + done
        self.said.append(layer)

    def end(self) -> None:
        self.ended = True


# ---- Peers ----


def peer(name: str, machine: Bench, us: float, fails: Callable[[int], bool] = lambda M: False) -> Peer:
    machine.cost[name] = us

    def calls(shape: Shape, weights: Weights, a: torch.Tensor) -> results.Calls:
        print(f"{name} is talkative")
        if fails(a.shape[0]):
            raise ValueError(f"no such tile\nfor {a.shape[0]} rows")
        return [partial(machine.took, name, a, layer.weight, shape.K, shape.N) for layer in weights.packed]

    return Peer(name, "1.2", lambda shape, weights, device: partial(calls, shape, weights))
