"""GPTQ, as a source: `qweight`, `scales`, `qzeros` and `g_idx`; zero points in either checkpoint_format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..errors import SourceError
from ..formats.gptq import ZeroPointEncoding, decode_zeros
from ..formats.gptq_config import GPTQSettings, parse_settings
from ..formats.layout import EXT_BITS, gptq_zeros, pack_factor, zero_point
from ..formats.stored import StoredLayer
from ..options import ZeroPointReading
from .blocks import Buffers, group_strips
from .gptq_restored import GPTQWayBack, restored_gptq, stated_format
from .inspect import SCALE_DTYPES, LayerInspection, rows_per_group
from .layer import Layer
from .restored import RestoredLayer
from .source_format import Noted, SourceFormat, WayBack, commonest
from .source_layer import Kept, SourceLayer, Words, ZeroPoints

#: `--zero-points`: how to read a v1 checkpoint in which a zero point is 0, where its writer is not known.
READINGS = {
    ZeroPointReading.NIBBLE: ZeroPointEncoding.V1_NIBBLE, ZeroPointReading.WORD: ZeroPointEncoding.V1_WORD
}  # fmt: skip


@dataclass(frozen=True)
class GPTQLayer(SourceLayer):
    """A layer of GPTQ tensors, whose words are those of the port (`SourceLayer`).

    `stored_zero` is what a symmetric layer stores, if that is not what the source's checkpoint_format says.
    """

    qweight: Tensor
    qzeros: Tensor | None
    g_idx: Tensor | None
    encoding: ZeroPointEncoding = ZeroPointEncoding.SYMMETRIC
    stored_zero: int | None = None

    @property
    def weight(self) -> Tensor:
        return self.qweight

    @property
    def order(self) -> Tensor | None:
        return self.g_idx

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qweight, self.scales, self.qzeros, self.g_idx) if t is not None]

    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        checkpoint.read_into(self.qweight, words, k0 * self.N * self.bits // 8)

    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        checkpoint.read_columns(self.qweight, words, n0)

    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        return checkpoint.read_rows(self.scales, first, count)

    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        if self.qzeros is None:
            return None
        return decode_zeros(checkpoint.read_rows(self.qzeros, first, count), self.bits, self.N, self.encoding)


class GPTQFormat(SourceFormat):
    """What AutoGPTQ, GPTQModel and AutoRound write as GPTQ."""

    name, title = "gptq", "GPTQ"
    parts = ("qweight", "scales", "qzeros", "g_idx")
    dropped = ("qzeros", "g_idx")
    telling = ("qweight", "qzeros", "g_idx")

    def layer_names(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]

    def require_complete(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            layer, _, part = name.rpartition(".")
            if part in ("qzeros", "g_idx") and f"{layer}.qweight" not in tensors:
                raise SourceError(f"{layer}: it has {part} and no qweight; the checkpoint is incomplete.")

    def settings(self, configs: dict[str, dict[str, Any]], names: Sequence[str]) -> GPTQSettings:
        return parse_settings(configs)

    def inspect(
        self, checkpoint: Checkpoint, names: list[str], settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> list[LayerInspection]:
        by_layer = settings.for_layers(names)
        return [GPTQInspection(checkpoint, name, by_layer[name], reading) for name in names]

    def restored(self, stored: StoredLayer[Tensor], noted: Noted) -> RestoredLayer:
        return restored_gptq(stored, noted, v2=stated_format(noted) == "gptq_v2")

    def way_back(self, noted: Noted) -> WayBack:
        return GPTQWayBack(self, noted, v2=stated_format(noted) == "gptq_v2", original=True)

    def noted(self, layers: Sequence[SourceLayer]) -> dict[str, Any]:
        gptq_layers = [layer for layer in layers if isinstance(layer, GPTQLayer)]
        scales, other_scales = commonest({x.name: x.scales.dtype for x in gptq_layers})
        g_idx, other_g_idx = commonest({x.name: x.g_idx.dtype if x.g_idx else None for x in gptq_layers})
        words = any(layer.encoding is ZeroPointEncoding.V1_WORD for layer in gptq_layers)
        return {
            "scales_dtype": scales,
            "scales_dtypes": other_scales,
            "g_idx_dtype": g_idx,
            "g_idx_dtypes": other_g_idx,
            "without_qzeros": [layer.name for layer in gptq_layers if layer.qzeros is None],
            "zero_points_stored": {x.name: x.stored_zero for x in gptq_layers if x.stored_zero is not None},
            "zero_point_reading": "word" if words else "nibble",
        }


class GPTQInspection(LayerInspection):
    """A GPTQ layer under examination."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> None:
        self.reading = reading
        self.stored_zero: int | None = None
        super().__init__(checkpoint, name, settings)

    def measured(self) -> Layer | None:
        """Return K, N, G and bits from the shapes of the tensors; the config only where shapes cannot tell."""
        qweight, scales = self.part("qweight"), self.part("scales")
        qzeros, g_idx, bias = self.part("qzeros"), self.part("g_idx"), self.part("bias")
        assert qweight is not None  # the layer was found by it
        if scales is None:
            raise SourceError(f"{self.name}: it has a qweight and no scales; the checkpoint is incomplete.")
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            self.refusals.append(
                f"qweight is {len(qweight.shape)}-D, scales are {len(scales.shape)}-D; only 2-D linears are repacked"
            )
            return None
        if qweight.dtype != "I32":
            self.refusals.append(f"qweight is {qweight.dtype}; only weights packed in int32 words can be repacked")
            return None
        if scales.dtype not in SCALE_DTYPES:
            self.refusals.append(f"scales are {scales.dtype}; F16, BF16 or F32 was expected")
            return None
        (rows, N), (G, scale_columns) = qweight.shape, scales.shape
        if scale_columns != N:
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} differ in N."
            )
        if not rows or not N or not G:
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)}, scales {list(scales.shape)}: an empty layer."
            )
        bits = self._bits(rows, N, G, qzeros, g_idx)
        if bits is None:
            return None
        K = rows * 32 // bits
        if self.settings.bits not in (None, bits):
            self.notes.append(
                f"the config says {self.settings.bits} bits, the tensors are {bits}-bit; the tensors count"
            )
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        group_rows = rows_per_group(K, G, self.settings) or 0
        source = GPTQLayer(self.name, K, N, G, bits, scales, qweight, qzeros, g_idx)
        return Layer(source, bias, group_rows)

    def _bits(self, rows: int, N: int, G: int, qzeros: Tensor | None, g_idx: Tensor | None) -> int | None:
        fitting = [bits for bits in range(2, 9) if rows * 32 % bits == 0]
        if qzeros is not None:
            if qzeros.dtype != "I32":
                self.refusals.append(
                    f"qzeros are {qzeros.dtype}; only zero points packed in int32 words can be repacked"
                )
                return None
            if len(qzeros.shape) != 2 or qzeros.shape[0] != G:
                raise SourceError(f"{self.name}: qzeros {list(qzeros.shape)} does not match scales with {G} groups.")
            fitting = [bits for bits in fitting if -(-N * bits // 32) == qzeros.shape[1]]
        if g_idx is not None:
            if g_idx.dtype not in ("I32", "I64") or len(g_idx.shape) != 1:
                raise SourceError(
                    f"{self.name}: g_idx {g_idx.dtype} {list(g_idx.shape)}: one int32 for each row was expected."
                )
            fitting = [bits for bits in fitting if rows * 32 // bits == g_idx.shape[0]]
        fitting = [bits for bits in fitting if bits not in (5, 6, 7)] or fitting  # which only GPTQModel's planes have
        if not fitting:
            raise SourceError(
                f"{self.name}: no bit width explains its shapes: qweight has {rows} rows and N = {N}, "
                f"qzeros {list(qzeros.shape) if qzeros else 'none'}, g_idx {list(g_idx.shape) if g_idx else 'none'}."
            )
        if len(fitting) > 1:  # neither qzeros nor g_idx is there to tell
            if self.settings.bits not in fitting:
                self.refusals.append("neither qzeros, nor g_idx, nor the config tells the number of bits")
                return None
            return self.settings.bits
        return fitting[0]

    def with_zero_points(self, layer: Layer) -> Layer:
        """Return the layer, knowing how its zero points are stored."""
        assert isinstance(layer.source, GPTQLayer)
        encoding = self._encoding(layer.source)
        symmetric = encoding is ZeroPointEncoding.SYMMETRIC
        stored = self.stored_zero if symmetric else None
        return replace(layer, source=replace(layer.source, encoding=encoding, stored_zero=stored), sym=symmetric)

    def _encoding(self, layer: GPTQLayer) -> ZeroPointEncoding:
        """Return how zero points are stored. Symmetric means that every one is the middle, 8 or 128: stored one less by
        checkpoint_format gptq, as it is by gptq_v2."""
        sym, version = self.settings.sym, self.settings.checkpoint_format
        if layer.qzeros is None:
            if "sym" in self.settings.conflicts:
                self.refusals.append(f"no qzeros, and the configs disagree on sym ({self.settings.conflicts['sym']})")
            elif sym is not True:
                reason = "the config says sym false" if sym is False else "no config says whether it is symmetric"
                self.refusals.append(f"no qzeros, and {reason}")
            return ZeroPointEncoding.SYMMETRIC
        if layer.bits not in EXT_BITS:
            return ZeroPointEncoding.SYMMETRIC
        numbers, middle = self._stored_numbers(layer, layer.qzeros), zero_point(layer.bits)
        stored = next((z for z in (middle - 1, middle) if numbers == {z}), None)
        layout, expected = ("gptq_v2", middle) if version == "gptq_v2" else ("gptq", middle - 1)
        if stored is None:
            claim = ", although the config says sym" if sym else ""
            self.why_extended.append(f"asymmetric (zero points are not all {middle}{claim})")
            if sym:
                self.extended_notes.append("the config says sym and zero points differ; converted as asymmetric")
            return self._asymmetric(layer, numbers)
        doubtful = sym is False or "sym" in self.settings.conflicts
        if doubtful and "checkpoint_format" in self.settings.conflicts:
            self.refusals.append(
                f"every zero point is stored as {stored}, no config says sym for certain, and they disagree on "
                f"checkpoint_format ({self.settings.conflicts['checkpoint_format']})"
            )
        elif stored == expected:
            if sym is False:
                self.notes.append(
                    f"the config says sym false, and every zero point is {middle}; converted as symmetric"
                )
        elif doubtful:
            # No sym to lean on: the label decides what the stored number means, and it does not mean the middle.
            meant = stored + middle - expected
            self.why_extended.append(
                f"asymmetric (every zero point is stored as {stored}, which is {meant} in checkpoint_format {layout})"
            )
            return self._asymmetric(layer, numbers)
        else:
            self.stored_zero = stored
            self.notes.append(
                f"checkpoint_format {layout} stores zero point {middle} as {expected}, here it is {stored}; "
                "read as symmetric"
            )
        return ZeroPointEncoding.SYMMETRIC

    def _stored_numbers(self, layer: GPTQLayer, qzeros: Tensor) -> set[int]:
        """Return every number that stands in `qzeros`."""
        present, factor = np.zeros(2**layer.bits, np.bool_), pack_factor(layer.bits)
        for first, count in group_strips(layer.G, layer.N):
            words, columns = self.checkpoint.read_rows(qzeros, first, count), layer.N
            if layer.N % factor == 0 and (words == words[0, 0]).all():  # the usual case: looking at one word is enough
                words, columns = words[:1, :1], factor
            present[gptq_zeros(words, layer.bits, columns)] = True
        return set(np.flatnonzero(present).tolist())

    def _asymmetric(self, layer: GPTQLayer, numbers: set[int]) -> ZeroPointEncoding:
        """Return how the zero points of an asymmetric layer are stored, in which `numbers` stand."""
        if "checkpoint_format" in self.settings.conflicts:
            self.extended_refusals.append(
                "asymmetric, and the configs disagree on checkpoint_format "
                f"({self.settings.conflicts['checkpoint_format']}), which tells how zero points are stored"
            )
            return ZeroPointEncoding.V2
        if self.settings.checkpoint_format == "gptq_v2":
            return ZeroPointEncoding.V2
        if self.reading is not None:
            return READINGS[self.reading]
        highest = 2**layer.bits - 1
        if highest not in numbers:  # all readings agree
            return ZeroPointEncoding.V1_NIBBLE
        writer = self.settings.writer
        if writer == "gptqmodel":
            return ZeroPointEncoding.V1_WORD
        if writer == "autoround":
            return ZeroPointEncoding.V1_NIBBLE
        lost = (
            "AutoGPTQ, which wrote it, loses the numbers beside it"
            if writer == "autogptq"
            else "its writers differ in what they mean by that, and no config names this one"
        )
        self.extended_refusals.append(
            f"asymmetric with a zero point stored as {highest}: {lost}; give --zero-points word (GPTQModel) or nibble "
            "(others) if you know"
        )
        return ZeroPointEncoding.V1_NIBBLE
