"""The layers that are measured: those of a checkpoint, or of a well-known model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..conversion.layer import GROUP_SIZE
from ..conversion.plan import is_marlin_checkpoint, make_plan
from ..conversion.restore import marlin_layers
from ..formats.layout import padded_size
from ..hub.open import opened_for_planning
from ..options import PRESETS as PRESET_NAMES
from ..options import HubAccess

DEFAULT_PRESET = "mistral-7b"

Notes = dict[str, list[str]]  # a text → where it applies


@dataclass(frozen=True)
class Shape:
    """A linear layer: W is K x N, stored with G groups of scales. `count` is how often a model has it."""

    name: str
    K: int
    N: int
    G: int
    count: int = 1
    bits: int = 4
    zeros: bool = False
    act_order: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.K} x {self.N}"

    @property
    def stored(self) -> tuple[int, int]:
        """(K, N) with padding."""
        return padded_size(self.K, self.N)

    @property
    def group_size(self) -> int:
        return -1 if self.G == 1 else self.stored[0] // self.G

    @property
    def kind(self) -> str:
        """What distinguishes it from a layer of 4 bits without zero points and act-order, in words; or nothing."""
        words = {f"{self.bits} bits": self.bits != 4, "zero points": self.zeros, "act-order": self.act_order}
        return ", ".join(word for word, applies in words.items() if applies)

    @property
    def packed_bytes(self) -> int:
        """Marlin's weights and scales, zero points and order of rows."""
        K, N = self.stored
        zeros = self.G * N * self.bits // 8 if self.zeros else 0
        return K * N * self.bits // 8 + self.G * N * 2 + zeros + (self.K * 4 if self.act_order else 0)

    @property
    def fp16_bytes(self) -> int:
        return self.K * self.N * 2


def _preset(hidden: int, qkv: int, intermediate: int, blocks: int) -> tuple[Shape, ...]:
    """Return the linears of a block, q, k, v and gate, up fused as engines run them."""
    sizes = {
        "qkv": (hidden, qkv), "o": (hidden, hidden), "gate_up": (hidden, 2 * intermediate),
        "down": (intermediate, hidden),
    }  # fmt: skip
    return tuple(Shape(name, K, N, K // GROUP_SIZE, blocks) for name, (K, N) in sizes.items())


_MODELS = {
    "mistral-7b": _preset(4096, 6144, 14336, 32),
    "llama-3-8b": _preset(4096, 6144, 14336, 32),
    "llama-70b": _preset(8192, 10240, 28672, 80),
}
PRESETS = {name: _MODELS[name] for name in PRESET_NAMES}


def source_shapes(source: str | Path, access: HubAccess) -> tuple[str, list[Shape], Notes]:
    """Return (label, distinct shapes, notes) of a checkpoint, GPTQ or Marlin of either format, from its headers."""
    with opened_for_planning(str(source), access) as (origin, checkpoint):
        notes: Notes = {}
        if is_marlin_checkpoint(checkpoint.tensors):
            layers = [
                Shape(x.name, x.K, x.N, x.G, bits=x.bits, zeros=x.zeros is not None, act_order=x.perm is not None)
                for x in marlin_layers(checkpoint).values()
            ]
        else:
            plan = make_plan(checkpoint)
            layers = [
                Shape(x.name, x.K, x.N, x.stored_G, bits=x.bits, zeros=not x.sym, act_order=x.act_order)
                for x in plan.layers
            ]
            if not layers:
                plan.require_convertible()
            notes = {f"left out, Marlin cannot hold it: {why}": names for why, names in plan.refusals.items()}
    return origin.label, distinct(layers), notes


def distinct(layers: Sequence[Shape]) -> list[Shape]:
    """Return those that differ in more than the name, in order of appearance, named by the last parts of the layers'
    names."""
    names: dict[Shape, list[str]] = {}
    for layer in layers:
        names.setdefault(replace(layer, name=""), []).append(layer.name.rpartition(".")[2])
    return [replace(x, name="/".join(dict.fromkeys(found)), count=len(found)) for x, found in names.items()]
