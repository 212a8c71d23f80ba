"""A quantized layer of a Marlin checkpoint, of either format, from headers and settings: the one reader of it.

The way back to GPTQ, Transformers, vLLM, the benchmark and the plan all find a checkpoint's Marlin layers here, with
one set of checks. What a header is does not matter: anything that has a `dtype`, named as safetensors names it, and a
`shape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..errors import SourceError
from ..options import Format
from .layout import (
    BITS,
    EXT_K,
    EXT_N,
    EXTENDED_NAMES,
    GROUP_SIZES,
    ORIGINAL_NAMES,
    TILE_K,
    pack_factor,
    padded_size,
    stored_groups,
)
from .marlin_config import LayerSettings, MarlinSettings

#: Tensors of a Marlin linear, of either format.
MARLIN_PARTS = (*ORIGINAL_NAMES.values(), *EXTENDED_NAMES.values())
#: What scales may be in each format.
_SCALE_DTYPES = {Format.MARLIN: ("F16",), Format.MARLIN_EXT: ("F16", "BF16")}


class Header(Protocol):
    """What a tensor is, without its data."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


H = TypeVar("H", bound=Header)


def tensor_names(format: Format) -> dict[str, str]:
    """Return what a layer's tensors are → what `format` calls them: keys weight, scales, zeros, perm."""
    return EXTENDED_NAMES if format is Format.MARLIN_EXT else ORIGINAL_NAMES


def needed(settings: LayerSettings) -> set[str]:
    """Return the tensors that a layer of these settings has, by what they are."""
    extras = {"zeros": not settings.sym, "perm": settings.desc_act}
    return {"weight", "scales"} | {what for what, wanted in extras.items() if wanted}


@dataclass(frozen=True)
class StoredLayer(Generic[H]):
    """One quantized linear of a Marlin checkpoint.

    K and N are the layer's own sizes, stored_K and stored_N those with padding. Rows are stored ones; `group_size` is
    the rows that share a scale, -1 where all do; G is the number of groups. `weight` int32 [K'/16, N' bits/2],
    `scales` fp16 or bf16 [G, N'], `zeros` int32 [G, N' bits/32] unless symmetric, `perm` int32 [K] with act-order.
    """

    name: str
    format: Format
    settings: LayerSettings
    K: int
    N: int
    weight: H
    scales: H
    zeros: H | None = None
    perm: H | None = None
    bias: H | None = None

    @classmethod
    def from_tensors(
        cls, name: str, tensors: Mapping[str, H], settings: LayerSettings, format: Format
    ) -> StoredLayer[H]:
        """Read layer `name` of a checkpoint that holds `tensors` (by their full names) and says `settings` of it.

        In the original format a single group counts as such whatever group size the settings say: K = 128 with groups
        of 128 is one group. Raises SourceError for tensors that are missing, superfluous, or do not fit the settings.
        """
        names, wanted = tensor_names(format), needed(settings)
        found = {what: tensors.get(f"{name}.{names[what]}") if what in names else None for what in EXTENDED_NAMES}
        for what, tensor in found.items():
            if (tensor is not None) != (what in wanted):
                state = "is missing" if what in wanted else "should not be there by the settings"
                raise SourceError(f"{name}: {names.get(what, what)} {state}; the checkpoint is damaged.")
        weight, scales, zeros, perm = (found[what] for what in ("weight", "scales", "zeros", "perm"))
        assert weight is not None
        assert scales is not None
        if len(weight.shape) != 2 or len(scales.shape) != 2:
            raise SourceError(
                f"{name}: {names['weight']} {list(weight.shape)} and {names['scales']} {list(scales.shape)} are not "
                "those of a Marlin layer."
            )
        stored_K, stored_N = weight.shape[0] * TILE_K, weight.shape[1] * pack_factor(settings.bits) // TILE_K
        layer = cls(
            name, format, settings, settings.in_features or stored_K, settings.out_features or stored_N,
            weight, scales, zeros, perm, tensors.get(f"{name}.bias"),
        )  # fmt: skip
        layer._check()
        return layer

    def _check(self) -> None:
        """Raise SourceError unless the tensors are as the format has them for these settings."""
        dtypes = {what: t.dtype for what, t in self.parts.items() if what != "scales" and t.dtype != "I32"}
        if dtypes or self.scales.dtype not in _SCALE_DTYPES[self.format]:
            kinds = " or ".join(_SCALE_DTYPES[self.format])
            raise SourceError(
                f"{self.name}: its tensors are "
                + ", ".join(f"{what} {tensor.dtype}" for what, tensor in self.parts.items())
                + f"; scales should be {kinds}, all others I32."
            )
        K, N, G = self.stored_K, self.stored_N, self.G
        if self.format is Format.MARLIN_EXT:
            fits = padded_size(self.K, self.N) == (K, N) and stored_groups(self.K, self.settings.group_size) == G
        else:
            fits = K > 0 and N > 0 and K % EXT_K == 0 and N % EXT_N == 0
            fits = fits and self.bits == BITS and G in {1, *(K // size for size in GROUP_SIZES if size > 0)}
        shapes = {"weight": (K // TILE_K, N * self.bits // 2), "scales": (G, N),
                  "zeros": (G, N // pack_factor(self.bits)), "perm": (self.K,)}  # fmt: skip
        if not fits or any(tensor.shape != shapes[what] for what, tensor in self.parts.items()):
            found = ", ".join(f"{what} {list(tensor.shape)}" for what, tensor in self.parts.items())
            raise SourceError(f"{self.name}: its tensors, {found}, do not fit its settings {self.settings}.")

    @property
    def parts(self) -> dict[str, H]:
        """The layer's tensors but for the bias, by what they are."""
        found = {"weight": self.weight, "scales": self.scales, "zeros": self.zeros, "perm": self.perm}
        return {what: tensor for what, tensor in found.items() if tensor is not None}

    @property
    def bits(self) -> int:
        return self.settings.bits

    @property
    def stored_K(self) -> int:
        return self.weight.shape[0] * TILE_K

    @property
    def stored_N(self) -> int:
        return self.weight.shape[1] * pack_factor(self.bits) // TILE_K

    @property
    def G(self) -> int:
        return self.scales.shape[0]

    @property
    def group_size(self) -> int:
        return -1 if self.G == 1 else self.stored_K // self.G


def is_marlin_part(tensors: Mapping[str, Header], name: str) -> bool:
    """Tell whether a reader of either Marlin format takes tensor `name` for a part of a quantized layer.

    `B` and `s` are words that others use too: they count where both are there, and B holds words.
    """
    layer, _, part = name.rpartition(".")
    if part in EXTENDED_NAMES.values():
        return True
    if part not in ORIGINAL_NAMES.values():
        return False
    weight, scales = (tensors.get(f"{layer}.{part}") for part in ORIGINAL_NAMES.values())
    return weight is not None and scales is not None and weight.dtype == "I32"


def layer_names(tensors: Mapping[str, Header], format: Format) -> list[str]:
    """Return the layers for which `tensors` holds weights of `format`, in the order of the tensors."""
    ending = f".{tensor_names(format)['weight']}"
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending) and is_marlin_part(tensors, name)]


def stored_layers(where: str, tensors: Mapping[str, H], settings: MarlinSettings) -> dict[str, StoredLayer[H]]:
    """Read the Marlin layers among the tensors of checkpoint `where`, by name; {} where there are none.

    Raises SourceError where tensors and settings do not agree, and for layers of both formats.
    """
    found = {format: layer_names(tensors, format) for format in (Format.MARLIN_EXT, Format.MARLIN)}
    if all(found.values()):
        first, second = (names[0] for names in found.values())
        raise SourceError(f"{where}: it holds layers of both Marlin formats ({first}, {second}).")
    for format, names in found.items():
        if names and format is not settings.format:
            raise SourceError(f"{where}: the settings say {settings.format}, and {names[0]} is a layer of {format}.")
    return {
        name: StoredLayer.from_tensors(name, tensors, settings.layer(name), settings.format)
        for name in found[settings.format]
    }
