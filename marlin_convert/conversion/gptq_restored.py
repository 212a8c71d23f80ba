"""A Marlin layer that becomes a GPTQ one, again or at all; and a checkpoint of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, Shards
from ..errors import SourceError, UnsupportedError
from ..formats.gptq import ZeroPointEncoding, encode_zeros
from ..formats.gptq_config import normalised, with_format
from ..formats.layout import zero_point
from ..formats.stored import StoredLayer
from ..options import ZeroPointReading
from .blocks import Buffers, group_strips
from .inspect import SCALE_DTYPES
from .restored import NUMPY, RestoredGroups, RestoredLayer, restored_groups
from .source_format import Noted, SourceFormat, WayBack
from .source_layer import Words


class GPTQWayBack(WayBack):
    """To GPTQ, whatever the source was; zero points are stored as they are (`v2`) or less one. With `original`, to the
    GPTQ that the source was."""

    def __init__(self, format: SourceFormat, noted: Noted, *, v2: bool, original: bool = False) -> None:
        super().__init__(format, noted)
        self.v2, self.original = v2, original

    @property
    def name(self) -> str:
        return "gptq_v2" if self.v2 else "gptq"

    @property
    def _foreign(self) -> bool:
        """Whether the source was of another format."""
        return self.noted.format != self.format.name

    def layers(self, checkpoint: Checkpoint, stored: Sequence[StoredLayer[Tensor]]) -> list[RestoredLayer]:
        noted = self.noted
        if self._foreign:  # what was noted of other tensors says nothing of these, but for scales
            scales = {key: value for key, value in noted.values.items() if key in ("scales_dtype", "scales_dtypes")}
            noted = Noted({**scales, "g_idx_dtype": None})
        found: list[RestoredLayer] = [restored_gptq(layer, noted, v2=self.v2) for layer in stored]
        if not self.v2 and (self._foreign or stated_format(noted) == "gptq_v2"):
            _require_no_zero_of_0(checkpoint, found)
        return found

    def configs(self, layers: Sequence[RestoredLayer], marlin: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
        if self.original:
            return self.noted.configs
        if not self._foreign and self.noted.configs:
            return {where: with_format(config, self.name) for where, config in self.noted.configs.items()}
        return dict.fromkeys(("config.json", "quantize_config.json"), _implied_settings(layers, marlin, self.name))


def _require_no_zero_of_0(checkpoint: Checkpoint, layers: Sequence[RestoredLayer]) -> None:
    """Raise UnsupportedError where checkpoint_format gptq would store a zero point of 0: its readers do not agree on
    what that looks like, and no file of this source told how its own does."""
    for layer in layers:
        for first, count in group_strips(layer.G, layer.N) if layer.stored.zeros is not None else ():
            if not restored_groups(checkpoint, layer, first, count).zeros.all():
                raise UnsupportedError(
                    f"{layer.name}: it has a zero point of 0, of which readers of checkpoint_format gptq make "
                    "different things; give --v2, by which zero points are stored as they are."
                )


def _implied_settings(
    layers: Sequence[RestoredLayer], marlin: Mapping[str, Any], checkpoint_format: str
) -> dict[str, Any]:
    """Return GPTQ settings for a checkpoint whose source's are not known: what its layers are."""

    def of(layer: RestoredLayer) -> tuple[int, int, bool, bool]:
        group_size = -1 if layer.G == 1 else layer.group_size
        return layer.bits, group_size, layer.stored.settings.sym, layer.stored.settings.desc_act

    kinds = [of(layer) for layer in layers]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    keys = ("bits", "group_size", "sym", "desc_act")
    result: dict[str, Any] = {
        **dict(zip(keys, common, strict=True)),
        "static_groups": False,
        "true_sequential": marlin.get("true_sequential", True),
        "lm_head": any(layer.name.split(".")[-1] == "lm_head" for layer in layers),
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
    }
    if marlin.get("damp_percent") is not None:
        result["damp_percent"] = marlin["damp_percent"]
    dynamic = {
        f"+:^{re.escape(layer.name)}$": {k: v for k, v, c in zip(keys, kind, common, strict=True) if v != c}
        for layer, kind in zip(layers, kinds, strict=True)
        if kind != common
    }
    return {**result, "dynamic": dynamic} if dynamic else result


@dataclass(frozen=True)
class RestoredGPTQ(RestoredLayer):
    """A Marlin layer that becomes a GPTQ one."""

    encoding: ZeroPointEncoding
    g_idx: str | None  # the dtype of the source's, if it had one
    qzeros: bool = True  # whether the source had them
    stored_zero: int | None = None  # in qzeros of a symmetric layer, where its checkpoint_format stores another number

    @property
    def out(self) -> dict[str, OutTensor]:
        found = {
            "qweight": self.tensor("qweight", "I32", self.K * self.bits // 32, self.N),
            "qzeros": self.tensor("qzeros", "I32", self.G, -(-self.N * self.bits // 32)),
            "scales": self.tensor("scales", self.scales_dtype, self.G, self.N),
        }
        if not self.qzeros:
            del found["qzeros"]
        if self.g_idx:
            found["g_idx"] = self.tensor("g_idx", self.g_idx, self.K)
        return found

    def write_rows(self, shards: Shards, k0: int, words: Words, buffers: Buffers) -> int:
        shards.write(f"{self.name}.qweight", words, k0 * self.bits // 32 * self.N * 4)
        return words.nbytes

    def write_columns(self, shards: Shards, n0: int, words: Words, buffers: Buffers) -> int:
        shards.write_columns(f"{self.name}.qweight", words, n0)
        return words.nbytes

    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        written = 0
        for strip in groups:
            found = {"scales": strip.scales}
            if self.qzeros and self.stored_zero is not None:
                same = np.full_like(strip.zeros, self.stored_zero)
                found["qzeros"] = encode_zeros(same, self.bits, ZeroPointEncoding.V2)
            elif self.qzeros:
                found["qzeros"] = encode_zeros(strip.zeros, self.bits, self.encoding)
            for part, array in found.items():
                shards.write(f"{self.name}.{part}", array, strip.first * array.shape[1] * array.itemsize)
                written += array.nbytes
        return written

    def write_order(self, shards: Shards, g_idx: npt.NDArray[np.int32]) -> int:
        if not self.g_idx:
            return 0
        stored = g_idx.astype(NUMPY[self.g_idx])
        shards.write(f"{self.name}.g_idx", stored)
        return int(stored.nbytes)


def restored_gptq(stored: StoredLayer[Tensor], noted: Noted, *, v2: bool) -> RestoredGPTQ:
    """Return what a Marlin layer becomes in GPTQ, its zero points stored as they are (`v2`) or less one; `noted` is of
    a GPTQ source, or empty."""
    if stored.K * stored.bits % 32:
        raise SourceError(f"{stored.name}: K = {stored.K} does not fill whole words of {stored.bits}-bit codes.")
    name, word = stored.name, noted.values.get("zero_point_reading") == ZeroPointReading.WORD
    encoding = ZeroPointEncoding.V1_WORD if word else ZeroPointEncoding.V1_NIBBLE
    return RestoredGPTQ(
        stored,
        noted.dtype(name, "scales_dtype", SCALE_DTYPES) or stored.scales.dtype,
        ZeroPointEncoding.V2 if v2 else encoding,
        _g_idx_dtype(stored, noted),
        stored.zeros is not None or name not in (noted.values.get("without_qzeros") or ()),
        _stored_zero(noted, name, stored.bits, v2=v2) if stored.zeros is None else None,
    )


def _g_idx_dtype(stored: StoredLayer[Tensor], noted: Noted) -> str | None:
    """Return the dtype of the source's g_idx; None where it had none. Where nothing is noted, as other tools have
    it."""
    found = noted.dtype(stored.name, "g_idx_dtype", ("I32", "I64"))
    unknown = "g_idx_dtype" not in noted.values
    return found or ("I32" if unknown or stored.perm is not None else None)


def stated_format(noted: Noted) -> str:
    """Return what the source's configs said of how zero points are stored: gptq where they said nothing."""
    formats = [normalised(where, config)["checkpoint_format"] for where, config in noted.configs.items()]
    return next((format for format in formats if format), "gptq")


def _stored_zero(noted: Noted, name: str, bits: int, *, v2: bool) -> int | None:
    """Return what a symmetric layer's source stored under a checkpoint_format that stores something else, if it is the
    one in which zero points are stored now."""
    number = (noted.values.get("zero_points_stored") or {}).get(name)
    same = stated_format(noted) == ("gptq_v2" if v2 else "gptq")
    return number if same and number in (zero_point(bits), zero_point(bits) - 1) else None
