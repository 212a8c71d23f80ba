"""The experts of a block in an engine that serves Marlin checkpoints: stacked as they arrive, for one product.

Ours (`native/moe.py`) takes experts as the checkpoint has them, with whatever settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.layout import TILE_K
from ..native import moe
from . import tensor_parallel as shards
from .tensor_parallel import Piece

_PARTS = ("weight", "scales", "zeros", "perm")


class ServedExperts:
    """What an engine's methods for the experts of one block have in common; `sets` are this rank's."""

    sets: list[ExpertSet]
    formula: moe.Formula
    position: Tensor | None
    rank_inner: int  # columns of gate and up, rows of down, of this rank
    hidden: int

    def rank_piece(self, name: str, shard: str, piece: Piece, rank: int, ranks: int) -> Piece:
        """Return this rank's piece of one expert's gate (w1), up (w3) or down (w2)."""
        K, N = (self.rank_inner * ranks, self.hidden) if shard == "w2" else (self.hidden, self.rank_inner * ranks)
        if (piece.K, piece.N) != (K, N):
            raise ValueError(f"{name}: it is {piece.K} x {piece.N}, the model {K} x {N}")
        if shard == "w2":
            return shards.rows(piece, rank * self.rank_inner, self.rank_inner)
        return shards.columns(piece, torch.arange(rank * self.rank_inner, (rank + 1) * self.rank_inner))

    def rank_bias(self, shard: str, bias: Tensor, rank: int) -> Tensor:
        """Return this rank's bias: of a sum over ranks, the first one adds it."""
        if shard != "w2":
            return bias[rank * self.rank_inner : (rank + 1) * self.rank_inner]
        return bias if rank == 0 else torch.zeros_like(bias)

    def register(self, layer: Any) -> torch.device:
        """Register the stacks, which nothing repacks; return where they are."""
        for number, made in enumerate(self.sets):
            for shard, tensors in made.stacks().items():
                for what, tensor in tensors.items():
                    value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                    layer.register_parameter(f"marlin{number}_{shard}_{what}", value)
        device: torch.device = getattr(layer, f"marlin0_{self.sets[0].shards()[0]}_weight").device
        return device

    def place(self, numbers: dict[int, int], count: int, device: torch.device) -> None:
        """Note where in the sets the experts are that `count` ids mean; `numbers` has the set's of each id there."""
        places = {expert: place for place, expert in enumerate(n for made in self.sets for n in made.row)}
        position = [places.get(numbers.get(number, -1), -1) for number in range(count)]
        in_order = position == list(range(count))
        self.position = None if in_order else torch.tensor(position, dtype=torch.int32, device=device)

    def our_product(
        self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor, count: int, weights_on_input: bool, fixed: bool
    ) -> Tensor:
        """Turn x [T, H], with weights and ids [T, k] of `count` experts, into [T, H]. An id of none counts nothing.

        `fixed` asks for results that do not depend on the number of rows.
        """
        sets = []
        for number, made in enumerate(self.sets):
            found: dict[str, moe.Stack] = {}
            for shard in made.shards():
                parts = {w: getattr(layer, f"marlin{number}_{shard}_{w}") for w in (*_PARTS, "bias")}
                kind = made.kinds[shard]
                bias = None if parts["bias"] is None else parts["bias"].to(x.dtype)
                rows = kind.K if parts["perm"] is None else parts["perm"].shape[1]
                found[shard] = moe.Stack(
                    parts["weight"], parts["scales"], bias, parts["zeros"], parts["perm"], kind.bits, rows, kind.N
                )
            sets.append(moe.Set(found.get("w13") or found["w1"], found.get("w3"), found["w2"]))
        return moe.experts(
            x, weights.float(), ids, sets, self.formula, count=count, position=self.position,
            weights_on_input=weights_on_input, batch_invariant=fixed or None,
        )  # fmt: skip


class ExpertSet:
    """Experts with the same settings. What arrives is put into a stack that is made for all of them at once."""

    def __init__(self, numbers: list[int], prefix: str, joined: bool, sorted_down: bool) -> None:
        self.row = {number: row for row, number in enumerate(numbers)}
        self.prefix, self.joined, self._sorted_down = prefix, joined, sorted_down
        self.kinds: dict[str, Piece] = {}  # by shard of the stacks: sizes, without tensors
        self._stacks: dict[str, dict[str, Tensor | None]] = {}
        self._there: dict[str, set[int]] = {}
        # Act-order of down: a rank's rows of it are as many as groups make them. They wait in the host's memory until
        # all have come, so that the device's never has two copies.
        self._loose: dict[int, Piece] = {}
        self._device = torch.device("cpu")
        self._biases: dict[str, dict[int, Tensor]] = {}

    def shards(self) -> list[str]:
        return sorted(self.kinds)

    def missing(self, shard: str) -> bool:
        return len(self._there.get(shard, ())) < len(self.row)

    def put(self, number: int, shard: str, piece: Piece) -> None:
        self._there.setdefault(shard, set()).add(number)
        if shard == "w2" and self._sorted_down:
            self._device = piece.weight.device
            self._loose[number] = _on(torch.device("cpu"), piece)
            return
        half = {"w1": 0, "w3": 1}.get(shard) if self.joined else None
        stack, times = (shard, 1) if half is None else ("w13", 2)
        tensors = {what: getattr(piece, what) for what in _PARTS}
        if stack not in self._stacks:
            self._stacks[stack] = {
                what: None if t is None else t.new_empty((len(self.row), *t.shape[:-1], t.shape[-1] * times))
                for what, t in tensors.items()
            }
            self.kinds[stack] = replace(piece, N=piece.N * times)
        for what, tensor in tensors.items():
            whole = self._stacks[stack][what]
            if (whole is None) != (tensor is None):
                raise ValueError(f"{self.prefix}: experts of one kind are stored in different ways")
            if whole is None or tensor is None:
                continue
            target = whole[self.row[number]]
            if half is not None:
                target = target.chunk(2, -1)[half]
            if target.shape != tensor.shape:
                raise ValueError(f"{self.prefix}: experts of one kind are stored in different sizes")
            target.copy_(tensor)

    def put_bias(self, number: int, shard: str, bias: Tensor) -> None:
        self._biases.setdefault(shard, {})[number] = bias

    def stacks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return, by shard its tensors; once."""
        if self._loose:
            ready = _alike([self._loose.pop(number) for number in self.row])
            self.kinds["w2"] = ready[0]
            all_of = {what: [getattr(piece, what) for piece in ready] for what in _PARTS}
            self._stacks["w2"] = {
                what: None if parts[0] is None else torch.stack(parts).to(self._device)
                for what, parts in all_of.items()
            }
        found, self._stacks = self._stacks, {}
        for shard, tensors in found.items():
            weight = tensors["weight"]
            assert weight is not None
            tensors["bias"] = self._bias_of(shard, weight.device)
            kind = self.kinds[shard]
            none = {what: None if tensors[what] is None else tensors[what][:0] for what in _PARTS}  # type: ignore[index]
            self.kinds[shard] = replace(kind, **none)  # type: ignore[arg-type]
        return found

    def _bias_of(self, shard: str, device: torch.device) -> Tensor | None:
        parts = [self._biases.get(part) for part in (("w1", "w3") if shard == "w13" else (shard,))]
        if all(part is None for part in parts):
            return None
        if any(part is None or part.keys() != self.row.keys() for part in parts):
            raise ValueError(f"{self.prefix}: some of its experts have a bias, others have none")
        return torch.stack([torch.cat([part[number] for part in parts]) for number in self.row]).to(device)  # type: ignore[index]


def _on(device: torch.device, piece: Piece) -> Piece:
    """Return the piece with its tensors on a device."""
    moved: dict[str, Any] = {what: tensor.to(device) for what in _PARTS if (tensor := getattr(piece, what)) is not None}
    return replace(piece, **moved)


def _alike(pieces: list[Piece]) -> list[Piece]:
    """Return pieces with act-order, brought to the same number of stored rows: by rows of zeros, in groups of their
    own."""
    natural = [
        torch.arange(p.K, dtype=torch.int32, device=p.weight.device) if p.perm is None else p.perm for p in pieces
    ]
    if len({(piece.stored_K, perm.numel()) for piece, perm in zip(pieces, natural, strict=True)}) == 1:
        return [replace(piece, perm=perm) for piece, perm in zip(pieces, natural, strict=True)]
    rows = max(piece.stored_K for piece in pieces)

    def longer(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else nn.functional.pad(tensor, (0, 0, 0, count))

    alike = []
    for piece, perm in zip(pieces, natural, strict=True):
        more, size = rows - piece.stored_K, piece.stored_K // piece.G
        if more and piece.G == 1:
            raise ValueError("experts with act-order and one group are stored in different sizes")
        groups = more // size if more else 0
        weight, scales, zeros = (
            longer(tensor, count)
            for tensor, count in ((piece.weight, more // TILE_K), (piece.scales, groups), (piece.zeros, groups))
        )
        assert weight is not None
        assert scales is not None
        perm = nn.functional.pad(perm, (0, rows - perm.numel()))
        alike.append(replace(piece, weight=weight, scales=scales, zeros=zeros, perm=perm))
    return alike
