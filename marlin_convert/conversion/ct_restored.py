"""A Marlin layer that becomes a packed one of compressed-tensors again, or a share of stacked experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.writer import OutTensor, Shards
from ..errors import SourceError
from ..formats import compressed_tensors
from ..native import cpu
from ..text import shortened
from .blocks import Buffers
from .ct_stacks import Member, Stack, is_stack
from .restored import NUMPY, RestoredGroups, RestoredLayer
from .source_format import Noted
from .source_layer import Words


@dataclass(frozen=True)
class RestoredCT(RestoredLayer):
    """A Marlin layer that becomes a packed one of compressed-tensors."""

    shape: str  # the dtypes of the source's tensors; None for those that it did not have
    zero_point: str | None
    g_idx: str | None
    member: Member | None = None

    by_columns = True

    @property
    def parts_alone(self) -> dict[str, OutTensor]:
        """The layer's tensors, if it were by itself."""
        found = {
            "weight_packed": self.tensor("weight_packed", "I32", self.N, self.K * self.bits // 32),
            "weight_scale": self.tensor("weight_scale", self.scales_dtype, self.N, self.G),
            "weight_shape": self.tensor("weight_shape", self.shape, 2),
        }
        if self.zero_point == "I8":
            found["weight_zero_point"] = self.tensor("weight_zero_point", "I8", self.N, self.G)
        elif self.zero_point:
            words = -(-self.N * self.bits // 32)
            found["weight_zero_point"] = self.tensor("weight_zero_point", "I32", words, self.G)
        if self.g_idx:
            found["weight_g_idx"] = self.tensor("weight_g_idx", self.g_idx, self.K)
        return found

    @property
    def out(self) -> dict[str, OutTensor]:
        """Those of a stack are its first layer's."""
        member = self.member
        if member is None:
            return self.parts_alone
        if member.expert or member.part:
            return {}
        found = {part: member.whole(tensor) for part, tensor in self.parts_alone.items()}
        shape = self.tensor("weight_shape", self.shape, 3)
        return {**found, "weight_shape": replace(shape, name=member.name("weight_shape"))}

    def _write(self, shards: Shards, part: str, array: npt.NDArray[Any], start: int = 0) -> int:
        """Write a part of the layer's own tensor `part`, from its byte `start` on."""
        if self.member is None:
            shards.write(f"{self.name}.{part}", array, start)
        else:
            shards.write(self.member.name(part), array, self.member.begin(self.parts_alone[part].nbytes) + start)
        return array.nbytes

    def write_rows(self, shards: Shards, k0: int, words: Words, buffers: Buffers) -> int:
        raise NotImplementedError("its columns are written")

    def write_columns(self, shards: Shards, n0: int, words: Words, buffers: Buffers) -> int:
        packed: Words = buffers.array("packed", (words.shape[1], words.shape[0]), np.int32)
        cpu.transpose(words, packed)
        return self._write(shards, "weight_packed", packed, n0 * packed.shape[1] * 4)

    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        strips = list(groups)
        scales = np.ascontiguousarray(np.concatenate([strip.scales for strip in strips]).T)
        written = self._write(shards, "weight_scale", scales)
        if self.zero_point:
            zeros = np.concatenate([strip.zeros for strip in strips])
            packed = compressed_tensors.encode_zeros(zeros, self.bits, self.zero_point)
            written += self._write(shards, "weight_zero_point", packed)
        return written

    def write_order(self, shards: Shards, g_idx: npt.NDArray[np.int32]) -> int:
        if self.member is not None:
            return self._write_stack_shape(shards, self.member)
        written = self._write(shards, "weight_shape", np.array([self.N, self.K], NUMPY[self.shape]))
        if self.g_idx:
            written += self._write(shards, "weight_g_idx", g_idx.astype(NUMPY[self.g_idx]))
        return written

    def _write_stack_shape(self, shards: Shards, member: Member) -> int:
        if member.expert or member.part:
            return 0
        shape = np.array([member.stack.count, member.stack.parts * self.N, self.K], NUMPY[self.shape])
        shards.write(member.name("weight_shape"), shape)
        return shape.nbytes


def stacked_again(layers: Mapping[str, RestoredCT], noted: Noted) -> Iterator[RestoredCT]:
    """Return the layers, by name, each as a member of the stack that held it, as the conversion noted that.

    Raises SourceError where a stack cannot be made of the layers that there are.
    """
    members: dict[str, Member] = {}
    stacks = noted.values.get("stacks") or {}
    for name, count in stacks.items() if isinstance(stacks, dict) else ():
        number = int(count) if str(count).isdecimal() and len(str(count)) < 6 else 0
        found = Stack(name, number).members if is_stack(name) else {}
        kinds = {_kind(layers.get(member)) for member in found}
        if len(kinds) != 1 or None in kinds or members.keys() & found.keys():
            raise SourceError(
                f"{shortened(name)}: it was made of {shortened(count)} stacked experts, and some are missing, or "
                "they are of several kinds; the checkpoint is damaged."
            )
        members |= found
    for name, layer in layers.items():
        yield replace(layer, member=members.get(name))


def _kind(layer: RestoredCT | None) -> object:
    """Return what is the same in all layers of a stack; None for what cannot be in one."""
    if layer is None or layer.g_idx or layer.stored.perm is not None:
        return None
    return layer.bits, layer.K, layer.zero_point, tuple((t.dtype, t.shape) for t in layer.parts_alone.values())
