"""AWQ, as a source, in each of its layouts: gemm, gemv, and AutoAWQ's own for Marlin, which only has other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..errors import SourceError
from ..formats import awq
from ..formats.gptq_config import AWQ_METHODS, ROUNDED, GPTQSettings, parse_settings
from ..formats.layout import TILE_K, TILE_N, pack_gptq_rows, tile_codes, unpermute_scales, zero_point
from ..formats.stored import StoredLayer
from ..native import cpu
from ..options import ZeroPointReading
from .awq_restored import RESTORED
from .blocks import Buffers, group_strips
from .inspect import SCALE_DTYPES, LayerInspection, rows_per_group
from .layer import Layer
from .restored import RestoredLayer
from .source_format import Noted, SourceFormat, commonest
from .source_layer import Kept, SourceLayer, Words, ZeroPoints


@dataclass(frozen=True)
class AWQLayer(SourceLayer):
    """A layer of any layout."""

    qweight: Tensor
    qzeros: Tensor | None

    #: The layout's name.
    layout = ""

    @property
    def weight(self) -> Tensor:
        return self.qweight

    @property
    def order(self) -> Tensor | None:
        return None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.qweight, self.scales, self.qzeros) if t is not None]

    def damaged(self, error: ValueError) -> SourceError:
        return SourceError(f"{self.name}: {error}; the checkpoint is damaged.")


class GEMMLayer(AWQLayer):
    """`qweight` [K, N/8], a row's codes together."""

    layout = "gemm"

    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        cpu.awq_to_gptq(self._read(checkpoint, k0, len(words), buffers), words)

    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        read: Words = buffers.array("awq", (self.K, words.shape[1] // awq.PER_WORD), np.int32)
        checkpoint.read_columns(self.qweight, read, n0 // awq.PER_WORD)
        cpu.awq_to_gptq(read, words)

    def defined_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        read = self._read(checkpoint, k0, len(words), buffers)
        words[...] = pack_gptq_rows(awq.numbers(read), self.bits)

    def _read(self, checkpoint: Checkpoint, k0: int, word_rows: int, buffers: Buffers) -> Words:
        width = self.N // awq.PER_WORD
        read: Words = buffers.array("awq", (word_rows * awq.PER_WORD, width), np.int32)
        checkpoint.read_into(self.qweight, read, k0 * width * 4)
        return read

    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        return checkpoint.read_rows(self.scales, first, count)

    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        return None if self.qzeros is None else awq.numbers(checkpoint.read_rows(self.qzeros, first, count))


class GEMVLayer(AWQLayer):
    """`qweight` [N, K/8], a column's codes together."""

    layout = "gemv"
    by_columns = True

    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        cpu.transpose(self._read_rows(checkpoint, k0, words, buffers), words)

    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        cpu.transpose(self._read_columns(checkpoint, n0, words, buffers), words)

    def defined_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        words[...] = self._read_rows(checkpoint, k0, words, buffers).T

    def defined_columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        words[...] = self._read_columns(checkpoint, n0, words, buffers).T

    def _read_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> Words:
        read: Words = buffers.array("awq", (self.N, len(words)), np.int32)
        checkpoint.read_columns(self.qweight, read, k0 // awq.PER_WORD)
        return read

    def _read_columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> Words:
        read: Words = buffers.array("awq", (words.shape[1], len(words)), np.int32)
        checkpoint.read_into(self.qweight, read, n0 * len(words) * 4)
        return read

    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        if "scales" not in kept:
            try:
                kept["scales"] = awq.gemv_scales(checkpoint.read(self.scales), self.G)
            except ValueError as error:
                raise self.damaged(error) from None
        return kept["scales"][first : first + count]

    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        assert self.qzeros is not None
        if "zeros" not in kept:
            try:
                kept["zeros"] = awq.gemv_zeros(checkpoint.read(self.qzeros), self.G)
            except ValueError as error:
                raise self.damaged(error) from None
        return kept["zeros"][first : first + count]


class TilesLayer(AWQLayer):
    """`qweight` [K/16, 2N] is Marlin's `B`, `scales` its `s`."""

    layout = "marlin"

    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        cpu.unpack(self._read_rows(checkpoint, k0, words, buffers), out=words)

    def defined_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        words[...] = pack_gptq_rows(tile_codes(self._read_rows(checkpoint, k0, words, buffers)), self.bits)

    def _read_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> Words:
        B: Words = buffers.array("awq", (len(words) * awq.PER_WORD // TILE_K, self.N * 2), np.int32)
        checkpoint.read_into(self.qweight, B, k0 * self.N // 2)
        return B

    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        B: Words = buffers.array("awq", (self.K // TILE_K, words.shape[1] * 2), np.int32)
        checkpoint.read_columns(self.qweight, B, n0 * 2)
        cpu.unpack(B, out=words)

    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        return unpermute_scales(checkpoint.read_rows(self.scales, first, count), self.G)

    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        return None


def layout_of(tensors: Mapping[str, Tensor], name: str) -> type[AWQLayer] | None:
    """Return the layout that the shapes of a layer's tensors are of; None for those of GPTQ, and what is none."""
    qweight, scales, qzeros = (tensors.get(f"{name}.{part}") for part in ("qweight", "scales", "qzeros"))
    if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
        return None
    (rows, width), (scale_rows, scale_width) = qweight.shape, scales.shape
    if qweight.dtype != "I32":
        return None
    # All three have as many rows; of GPTQ's layers, only one with a scale for each word of a column is like that.
    same = qzeros is not None and len(qzeros.shape) == 2 and qzeros.shape[0] == scale_rows == rows
    if same and qzeros is not None and scale_width == qzeros.shape[1] * awq.PER_WORD and f"{name}.g_idx" not in tensors:
        return GEMVLayer
    if scale_width == width:
        return None
    if scale_width == width * awq.PER_WORD:
        return GEMMLayer
    return TilesLayer if qzeros is None and width == 2 * scale_width else None


def _is_fast(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a layer has the tensors of the layouts gemv_fast and llm-awq: codes by four, zero points no whole
    numbers."""
    qweight, qzeros = tensors.get(f"{name}.qweight"), tensors.get(f"{name}.qzeros")
    scaled = f"{name}.scaled_zeros" in tensors or (qzeros is not None and qzeros.dtype in SCALE_DTYPES)
    return qweight is not None and qweight.dtype == "I16" and scaled


class AWQFormat(SourceFormat):
    """What AutoAWQ, GPTQModel and AutoRound (auto_awq) write."""

    name, title = "awq", "AWQ"
    parts = ("qweight", "scales", "qzeros")
    dropped = ("qzeros",)
    telling = ("qweight", "qzeros")

    def layer_names(self, tensors: Mapping[str, Tensor]) -> list[str]:
        names = (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
        return [name for name in names if layout_of(tensors, name) or _is_fast(tensors, name)]

    def claimed_by(self, config: Mapping[str, Any]) -> bool:
        return str(config.get("quant_method", "")).lower() in AWQ_METHODS

    def require_complete(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            layer, _, part = name.rpartition(".")
            if part == "qzeros" and f"{layer}.qweight" not in tensors:
                raise SourceError(f"{layer}: it has {part} and no qweight; the checkpoint is incomplete.")

    def settings(self, configs: dict[str, dict[str, Any]], names: Sequence[str]) -> GPTQSettings:
        return parse_settings(configs, of_awq=True)

    def inspect(
        self, checkpoint: Checkpoint, names: list[str], settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> list[LayerInspection]:
        by_layer = settings.for_layers(names)
        return [AWQInspection(checkpoint, name, by_layer[name]) for name in names]

    def noted(self, layers: Sequence[SourceLayer]) -> dict[str, Any]:
        awq_layers = [layer for layer in layers if isinstance(layer, AWQLayer)]
        found: dict[str, Any] = {}
        kinds: dict[str, dict[str, str | None]] = {
            "scales_dtype": {x.name: x.scales.dtype for x in awq_layers},
            "layout": {x.name: x.layout for x in awq_layers},
            "zeros_width": {x.name: str(x.qzeros.shape[1]) if x.qzeros else None for x in awq_layers},
        }
        for key, values in kinds.items():
            found[key], found[f"{key}s"] = commonest(values)
        return found

    def restored(self, stored: StoredLayer[Tensor], noted: Noted) -> RestoredLayer:
        layout = noted.dtype(stored.name, "layout", tuple(RESTORED))
        width = noted.dtype(stored.name, "zeros_width", [str(i) for i in range(1, stored.K)])
        found = RESTORED[layout or "gemm"](
            stored,
            noted.dtype(stored.name, "scales_dtype", SCALE_DTYPES) or stored.scales.dtype,
            0 if width is None else int(width),
        )
        if stored.perm is not None or stored.bits != awq.BITS or not found.fits():
            raise SourceError(
                f"{stored.name}: its tensors are not those that an AWQ layer becomes; the checkpoint is damaged."
            )
        return found


class AWQInspection(LayerInspection):
    """An AWQ layer under examination."""

    def measured(self) -> Layer | None:
        qweight, scales, qzeros = self.part("qweight"), self.part("scales"), self.part("qzeros")
        bias, kind = self.part("bias"), layout_of(self.checkpoint.tensors, self.name)
        if _is_fast(self.checkpoint.tensors, self.name):
            self.refusals.append(f"tensors of the layout gemv_fast or llm-awq, which stores {ROUNDED}")
            return None
        assert qweight is not None
        assert scales is not None
        assert kind is not None
        if scales.dtype not in SCALE_DTYPES:
            self.refusals.append(f"scales are {scales.dtype}; F16, BF16 or F32 was expected")
            return None
        if qzeros is not None and qzeros.dtype != "I32":
            self.refusals.append(f"qzeros are {qzeros.dtype}; only zero points packed in int32 words can be repacked")
            return None
        if self.settings.bits not in (None, awq.BITS):
            self.refusals.append(f"AWQ tensors of {self.settings.bits} bits, by the config; AWQ's words hold 4")
            return None
        N, K, G = self._size(kind, qweight, scales, qzeros)
        if not (N and K and G):
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)}, scales {list(scales.shape)}: an empty layer."
            )
        if kind is GEMMLayer and qzeros is not None and qzeros.shape != (G, N // awq.PER_WORD):
            raise SourceError(f"{self.name}: qzeros {list(qzeros.shape)} does not match {G} groups of N = {N}.")
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        if K % awq.PER_WORD or (kind is TilesLayer and N % TILE_N):
            self.refusals.append(f"K = {K} or N = {N} does not fill whole words or tiles")
        source = kind(self.name, K, N, G, awq.BITS, scales, qweight, qzeros)
        return Layer(source, bias, rows_per_group(K, G, self.settings) or 0)

    def _size(
        self, kind: type[AWQLayer], qweight: Tensor, scales: Tensor, qzeros: Tensor | None
    ) -> tuple[int, int, int]:
        """Return (N, K, G)."""
        rows, width = qweight.shape
        if kind is GEMMLayer:
            return scales.shape[1], rows, scales.shape[0]
        if kind is TilesLayer:
            return scales.shape[1], rows * TILE_K, scales.shape[0]
        K, group_size = width * awq.PER_WORD, self.settings.group_size
        if group_size is None:
            raise SourceError(f"{self.name}: a layer of AWQ's gemv needs a config that tells its group size.")
        G = 1 if group_size == -1 else -(-K // group_size) if group_size > 0 else 0
        if not 0 < G <= scales.shape[1]:
            raise SourceError(
                f"{self.name}: scales {list(scales.shape)} do not hold K = {K} in groups of {group_size}."
            )
        return rows, K, G

    def with_zero_points(self, layer: Layer) -> Layer:
        source, sym = layer.source, self.settings.sym
        assert isinstance(source, AWQLayer)
        kept: Kept = {}
        if isinstance(source, TilesLayer):
            return layer
        if source.qzeros is None:
            self.refusals.append("no qzeros, without which AWQ's tensors tell no weight")
            return layer
        if isinstance(source, GEMVLayer) and not self.refusals:
            source.raw_scales(self.checkpoint, 0, 1, kept)  # reads the scales now, which checks their padding
        middle = zero_point(awq.BITS)
        strips = [(0, 1), *group_strips(layer.G, layer.N)]  # the first group mostly tells
        if all(np.all(source.zeros(self.checkpoint, *strip, kept) == middle) for strip in strips):
            if sym is False:
                self.notes.append(
                    f"the config says asymmetric (zero_point true), and every zero point is {middle}; converted as "
                    "symmetric"
                )
            return layer
        return self.asymmetric(layer)
