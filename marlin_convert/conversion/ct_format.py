"""compressed-tensors' pack-quantized layers, as a source: `weight_packed`, `weight_scale` and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..errors import SourceError
from ..formats import compressed_tensors
from ..formats.gptq_config import GPTQSettings
from ..formats.layout import EXT_BITS, pack_factor, pack_gptq_rows, zero_point
from ..formats.stored import StoredLayer
from ..native import cpu
from ..options import ZeroPointReading
from ..text import shortened
from .blocks import Buffers
from .ct_restored import RestoredCT, stacked_again
from .ct_stacks import Member, stacks_in, taken_apart
from .inspect import SCALE_DTYPES, LayerInspection, rows_per_group
from .layer import Layer
from .restored import RestoredLayer
from .source_format import Noted, SourceFormat, commonest
from .source_layer import Kept, SourceLayer, Words, ZeroPoints

#: Parts of layers that hold more than whole numbers with their scales and zero points → what.
_OTHERS = {
    "input_scale": "quantized activations",
    "input_zero_point": "quantized activations",
    "input_global_scale": "quantized activations",
    "weight_global_scale": "NVFP4, or another kind of scales upon scales",
    "bitmask": "sparse weights",
    "compressed": "sparse weights",
}
#: What to do where stacked experts cannot be taken apart.
_APART = "save the model with one linear for each expert"


@dataclass(frozen=True)
class CTLayer(SourceLayer):
    """A layer of which `packed` [N, words] has the codes, a column's together."""

    packed: Tensor
    shape: Tensor
    zero_point: Tensor | None
    g_idx: Tensor | None
    member: Member | None = None

    by_columns = True

    @property
    def weight(self) -> Tensor:
        return self.packed

    @property
    def order(self) -> Tensor | None:
        return self.g_idx

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.packed, self.scales, self.shape, self.zero_point, self.g_idx) if t is not None]

    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        cpu.transpose(self._read_rows(checkpoint, k0, len(words), buffers), words)

    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        cpu.transpose(self._read_columns(checkpoint, n0, words.shape[1], buffers), words)

    def defined_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        read = self._read_rows(checkpoint, k0, len(words), buffers)
        words[...] = pack_gptq_rows(compressed_tensors.codes(read, self.bits).T, self.bits)

    def defined_columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        read = self._read_columns(checkpoint, n0, words.shape[1], buffers)
        words[...] = pack_gptq_rows(compressed_tensors.codes(read, self.bits).T, self.bits)

    def _read_rows(self, checkpoint: Checkpoint, k0: int, count: int, buffers: Buffers) -> Words:
        read: Words = buffers.array("packed", (self.N, count), np.int32)
        checkpoint.read_columns(self.packed, read, k0 * self.bits // 32)
        return read

    def _read_columns(self, checkpoint: Checkpoint, n0: int, count: int, buffers: Buffers) -> Words:
        width = self.packed.shape[1]
        read: Words = buffers.array("packed", (count, width), np.int32)
        checkpoint.read_into(self.packed, read, n0 * width * 4)
        return read

    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        if "scales" not in kept:
            kept["scales"] = np.ascontiguousarray(checkpoint.read(self.scales).T)
        return kept["scales"][first : first + count]

    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        if self.zero_point is None:
            return None
        if "zeros" not in kept:
            try:
                kept["zeros"] = compressed_tensors.decode_zeros(checkpoint.read(self.zero_point), self.bits, self.N)
            except ValueError as error:
                raise SourceError(f"{self.name}: {error}; the checkpoint is damaged.") from None
        return kept["zeros"][first : first + count]


class CTFormat(SourceFormat):
    """What llm-compressor and others write by compressed-tensors, packed."""

    name, title = "compressed-tensors", "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    dropped = ("weight_shape", "weight_zero_point", "weight_g_idx")
    telling = ("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")

    def layer_names(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]

    def apart(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return taken_apart(tensors, self.parts)

    def claimed_by(self, config: Mapping[str, Any]) -> bool:
        return compressed_tensors.is_config(config)

    def require_complete(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            layer, _, part = name.rpartition(".")
            if part in self.parts and f"{layer}.weight_packed" not in tensors:
                beside = "beside an unpacked weight" if f"{layer}.weight" in tensors else "and no weight_packed"
                raise SourceError(
                    f"{layer}: it has {part} {beside}; the checkpoint is incomplete, or holds layers of another kind."
                )

    def settings(self, configs: dict[str, dict[str, Any]], names: Sequence[str]) -> GPTQSettings:
        return compressed_tensors.parse_settings(configs)

    def inspect(
        self, checkpoint: Checkpoint, names: list[str], settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> list[LayerInspection]:
        tensors, stacks = self.apart(checkpoint.tensors), stacks_in(checkpoint.tensors)
        members = {name: member for stack in stacks.values() for name, member in stack.members.items()}
        return [CTInspection(checkpoint, name, settings, tensors, members.get(name)) for name in names]

    def noted(self, layers: Sequence[SourceLayer]) -> dict[str, Any]:
        ct_layers = [layer for layer in layers if isinstance(layer, CTLayer)]
        found: dict[str, Any] = {}
        kinds: dict[str, dict[str, str | None]] = {
            "scales_dtype": {x.name: x.scales.dtype for x in ct_layers},
            "g_idx_dtype": {x.name: x.g_idx.dtype if x.g_idx else None for x in ct_layers},
            "shape_dtype": {x.name: x.shape.dtype for x in ct_layers},
            "zero_point_dtype": {x.name: x.zero_point.dtype if x.zero_point else None for x in ct_layers},
        }
        for key, values in kinds.items():
            found[key], found[f"{key}s"] = commonest(values)
        stacks = {x.member.stack.name: str(x.member.stack.count) for x in ct_layers if x.member}
        return {**found, "stacks": stacks} if stacks else found

    def all_restored(self, stored: Sequence[StoredLayer[Tensor]], noted: Noted) -> list[RestoredLayer]:
        return list(stacked_again({layer.name: self.restored(layer, noted) for layer in stored}, noted))

    def restored(self, stored: StoredLayer[Tensor], noted: Noted) -> RestoredCT:
        def dtype(key: str, *allowed: str) -> str | None:
            return noted.dtype(stored.name, key, allowed)

        return RestoredCT(
            stored,
            dtype("scales_dtype", *SCALE_DTYPES) or stored.scales.dtype,
            dtype("shape_dtype", "I32", "I64") or "I64",
            dtype("zero_point_dtype", "I32", "I8") or ("I32" if stored.zeros is not None else None),
            dtype("g_idx_dtype", "I32", "I64") or ("I32" if stored.perm is not None else None),
        )


class CTInspection(LayerInspection):
    """A packed layer of compressed-tensors under examination; `tensors` are the checkpoint's, taken apart."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        settings: GPTQSettings,
        tensors: Mapping[str, Tensor],
        member: Member | None,
    ) -> None:
        self.tensors, self.member = tensors, member
        super().__init__(checkpoint, name, settings)

    def part(self, part: str) -> Tensor | None:
        return self.tensors.get(f"{self.name}.{part}")

    def measured(self) -> Layer | None:
        packed, scales, shape = self.part("weight_packed"), self.part("weight_scale"), self.part("weight_shape")
        zeros, g_idx, bias = self.part("weight_zero_point"), self.part("weight_g_idx"), self.part("bias")
        assert packed is not None  # the layer was found by it
        for part, means in _OTHERS.items():
            if self.part(part) is not None:
                self.refusals.append(f"{part} beside weight_packed: {means}, which Marlin has not; vLLM runs them")
                return None
        for part, tensor in (("weight_scale", scales), ("weight_shape", shape)):
            if tensor is None:
                raise SourceError(f"{self.name}: it has a weight_packed and no {part}; the checkpoint is incomplete.")
        assert scales is not None
        assert shape is not None
        if not self._is_known(packed, scales):
            return None
        N, K = self._shape(shape)
        (rows, words), (scale_rows, G) = packed.shape, scales.shape
        fitting = compressed_tensors.packed_bits(K, words)
        if rows != N or not fitting:
            raise SourceError(
                f"{self.name}: weight_packed {list(packed.shape)} is not that of weight_shape [{N}, {K}]."
            )
        if scale_rows != N or not G:
            raise SourceError(f"{self.name}: weight_scale {list(scales.shape)} does not match N = {N}.")
        bits = self.settings.bits if self.settings.bits in fitting else fitting[-1]
        assert bits is not None
        if self.settings.bits not in (None, bits):
            self.notes.append(
                f"the config says {self.settings.bits} bits, the tensors are {bits}-bit; the tensors count"
            )
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        if bits in EXT_BITS and K % pack_factor(bits):
            self.refusals.append(f"K = {K} does not fill whole words of {bits}-bit codes")
        if g_idx is not None and (g_idx.dtype not in ("I32", "I64") or g_idx.shape != (K,)):
            raise SourceError(
                f"{self.name}: weight_g_idx {g_idx.dtype} {list(g_idx.shape)} is not one int32 for each row."
            )
        source = CTLayer(self.name, K, N, G, bits, scales, packed, shape, zeros, g_idx, self.member)
        return Layer(source, bias, rows_per_group(K, G, self.settings) or 0)

    def _is_known(self, packed: Tensor, scales: Tensor) -> bool:
        """Tell whether the tensors are of the types and dimensions that can be repacked; else a refusal says why."""
        if packed.dtype != "I32":
            self.refusals.append(f"weight_packed is {packed.dtype}; only whole numbers in int32 words can be repacked")
            return False
        if len(packed.shape) != 2 or len(scales.shape) != 2:
            self.refusals.append(
                f"weight_packed is {len(packed.shape)}-D, weight_scale {len(scales.shape)}-D, and its name is "
                "not one that stacked experts are known by (experts.gate_up_proj, experts.down_proj and the like); "
                f"{_APART}"
            )
            return False
        if self.member is not None and not self._is_expert(self.member):
            return False
        if scales.dtype not in SCALE_DTYPES:
            self.refusals.append(f"weight_scale is {scales.dtype}; F16, BF16 or F32 was expected")
            return False
        return True

    def _shape(self, tensor: Tensor) -> tuple[int, int]:
        """Return (N, K) of weight_shape; a stack's has the number of experts before it, and N of all their
        projections."""
        stack = self.member.stack if self.member else None
        if tensor.dtype not in ("I32", "I64") or tensor.shape != (3 if stack else 2,):
            raise SourceError(
                f"{self.name}: weight_shape is {tensor.dtype} {list(tensor.shape)}; {'three' if stack else 'two'} "
                "whole numbers were expected."
            )
        *count, N, K = map(int, self.checkpoint.read(tensor))
        if stack:
            if count != [stack.count] or N % stack.parts:
                raise SourceError(
                    f"{stack.name}: weight_shape [{count[0]}, {N}, {K}] is not that of {stack.count} experts with "
                    f"{stack.parts} projections each."
                )
            N //= stack.parts
        if N < 1 or K < 1:
            raise SourceError(f"{self.name}: weight_shape is [{N}, {K}]: an empty layer.")
        return N, K

    def _is_expert(self, member: Member) -> bool:
        """Tell whether the stack is what its name says, so that its rows are those of experts' linears one by one."""
        stack = member.stack
        biases = [name for name in (f"{stack.name}.bias", f"{stack.name}_bias") if name in self.checkpoint.tensors]
        if biases or self.part("weight_g_idx"):
            what = f"biases ({biases[0].rpartition('.')[2]})" if biases else "act-order (weight_g_idx)"
            self.refusals.append(f"experts stacked with {what}; {_APART}")
            return False
        main = self.checkpoint.configs.get("config.json", {})
        text = main.get("text_config")
        hidden = (text if isinstance(text, dict) and "hidden_size" in text else main).get("hidden_size")
        shape = self.part("weight_shape")
        inputs = int(self.checkpoint.read(shape)[-1]) if shape and shape.shape == (3,) else None
        if stack.parts > 1 and inputs is not None and inputs != hidden:
            self.refusals.append(
                f"experts stacked with {inputs} inputs, where the model's hidden size is {shortened(hidden)}: "
                f"transposed, or of another model; {_APART}"
            )
            return False
        self.notes.append("one tensor held the block's experts stacked; in the result, each has layers of its own")
        return True

    def with_zero_points(self, layer: Layer) -> Layer:
        source, sym = layer.source, self.settings.sym
        assert isinstance(source, CTLayer)
        tensor = source.zero_point
        if tensor is None:
            if sym is False:
                self.refusals.append("the config says that it is asymmetric, and weight_zero_point is missing")
            return layer
        shapes = {"I32": (-(-layer.N * layer.bits // 32), layer.G), "I8": (layer.N, layer.G)}
        if tensor.dtype not in shapes:
            self.refusals.append(
                f"weight_zero_point is {tensor.dtype}; zero points that are not whole numbers cannot be repacked; "
                "quantize the model with whole ones"
            )
            return layer
        if tensor.shape != shapes[tensor.dtype]:
            raise SourceError(
                f"{self.name}: weight_zero_point {tensor.dtype} {list(tensor.shape)} does not match "
                f"{layer.G} groups of N = {layer.N}."
            )
        if layer.bits not in EXT_BITS:
            return layer
        if self.member and self.member.stack.parts > 1 and tensor.dtype == "I32" and layer.N * layer.bits % 32:
            self.refusals.append(
                f"stacked projections of {layer.N} outputs, whose zero points share words of 32 bits; {_APART}"
            )
            return layer
        zeros, middle = source.zeros(self.checkpoint, 0, layer.G, {}), zero_point(layer.bits)
        if zeros is None or (zeros == middle).all():
            if sym is False:
                self.notes.append(
                    "the config says that it is asymmetric, and every zero point is 0; converted as symmetric"
                )
            return layer
        return self.asymmetric(layer)
