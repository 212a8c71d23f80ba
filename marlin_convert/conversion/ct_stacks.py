"""Experts that compressed-tensors holds stacked: one `weight_packed` [E, N, words] for one projection of all of a
block's experts, or for two, a gate's rows before an up's.

In every tensor of a stack, an expert's part is one range of bytes, read from the file like any other tensor: a stack
is taken apart by naming those ranges. `compressed_tensors`, which packs a weight of three dimensions slice by slice,
stacks the scales [E, N, G], zero points [E, ceil(N bits/32), G] or int8 [E, N, G], and has [E, N, K] as `weight_shape`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..checkpoint.reader import Tensor
from ..checkpoint.writer import OutTensor
from ..errors import SourceError

#: What a stack is called, at the end of its name → the experts' holder, and what each one's layers are called.
#: Transformers' own names of the two, each projection by itself, and those of the Granite models, whose experts vLLM
#: knows as w1 and so on.
_NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "experts.gate_up_proj": ("experts", ("gate_proj", "up_proj")),
    **{f"experts.{part}": ("experts", (part,)) for part in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")},
    "block_sparse_moe.input_linear": ("block_sparse_moe.experts", ("w1", "w3")),
    "block_sparse_moe.output_linear": ("block_sparse_moe.experts", ("w2",)),
}
#: What is not each expert's own.
_COMMON = ("weight_shape", "weight_g_idx")
#: More experts than any model has in a block.
_MOST = 4096
_ENDING = re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, _NAMES))})$")


@dataclass(frozen=True)
class Stack:
    """`count` experts' layers, of `parts` projections each, in the tensors named `name`."""

    name: str
    count: int

    @property
    def _names(self) -> tuple[str, tuple[str, ...]]:
        found = _ENDING.search(self.name)
        assert found
        holder, parts = _NAMES[found[1]]
        return self.name[: found.start(1)] + holder, parts

    @property
    def parts(self) -> int:
        return len(self._names[1])

    @property
    def members(self) -> dict[str, Member]:
        """The layers in it, by name, in the order of their data."""
        holder, parts = self._names
        return {
            f"{holder}.{expert}.{part}": Member(self, expert, number)
            for expert in range(self.count)
            for number, part in enumerate(parts)
        }


@dataclass(frozen=True)
class Member:
    """One layer in a stack: the projection `part` of an expert."""

    stack: Stack
    expert: int
    part: int

    def name(self, part: str) -> str:
        """Return what the stack calls the tensor that holds a `part` of the layer."""
        return f"{self.stack.name}.{part}"

    def begin(self, nbytes: int) -> int:
        """Return the byte with which the layer's own `nbytes` begin in the stack's tensor."""
        return (self.expert * self.stack.parts + self.part) * nbytes

    def whole(self, tensor: OutTensor) -> OutTensor:
        """Return the stack's tensor, of which `tensor`, of this layer alone, is a share."""
        count, parts = self.stack.count, self.stack.parts
        shape = (count, parts * tensor.shape[0], *tensor.shape[1:])
        return OutTensor(self.name(tensor.name.rpartition(".")[2]), tensor.dtype, shape, count * parts * tensor.nbytes)


def is_stack(name: str) -> bool:
    """Tell whether tensors so named hold experts in a way that is known."""
    return _ENDING.search(name) is not None


def stacks_in(tensors: Mapping[str, Tensor]) -> dict[str, Stack]:
    """Return the stacks among tensors, by name: those that are packed, of three dimensions, and known by their
    names."""
    found: dict[str, Stack] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight_packed" and len(tensor.shape) == 3 and is_stack(layer) and 0 < tensor.shape[0] <= _MOST:
            found[layer] = Stack(layer, tensor.shape[0])
    return found


def taken_apart(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors, those of stacks, with the endings `parts`, as each expert's own: parts of the files under
    names that the layers would have. Of what is not each one's own, each has the whole.

    Raises SourceError where a stack's tensors do not belong together, or an expert is there twice.
    """
    stacks = stacks_in(tensors)
    members: dict[str, Stack] = {}
    for stack in stacks.values():
        twice = next((name for name in stack.members if name in members), None)
        if twice is not None:
            raise SourceError(
                f"{twice}: it is stacked in {members[twice].name} and in {stack.name}; remove the one or the other."
            )
        members |= dict.fromkeys(stack.members, stack)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in members:
            raise SourceError(
                f"{name}: it is there by itself, and its layer in the experts stacked in {members[layer].name}; remove "
                "the one or the other."
            )
        stacked = stacks.get(layer) if part in parts else None
        found |= {name: tensor} if stacked is None else _shares(stacked, part, tensor)
    return found


def _shares(stack: Stack, part: str, tensor: Tensor) -> dict[str, Tensor]:
    members = stack.members
    if part in _COMMON:
        return {f"{name}.{part}": replace(tensor, name=f"{name}.{part}") for name in members}
    if len(tensor.shape) != 3 or tensor.shape[0] != stack.count or tensor.shape[1] % stack.parts:
        raise SourceError(
            f"{stack.name}: {part} {list(tensor.shape)} is not that of {stack.count} experts"
            f"{f' of {stack.parts} projections each' if stack.parts > 1 else ''}."
        )
    shape = (tensor.shape[1] // stack.parts, tensor.shape[2])
    nbytes = tensor.nbytes // (stack.count * stack.parts)
    return {
        f"{name}.{part}": Tensor(
            f"{name}.{part}", tensor.dtype, shape, tensor.file, tensor.offset + member.begin(nbytes), nbytes
        )
        for name, member in members.items()
    }
