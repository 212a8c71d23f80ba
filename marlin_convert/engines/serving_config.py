"""What a Marlin checkpoint says, for an engine that serves it: what its configuration classes have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..formats.marlin_config import LayerSettings, read_marlin_settings
from .column_marks import Arriving

if TYPE_CHECKING:
    from typing_extensions import Self

#: The method of quantization, by which engines find the plugin.
NAME = "marlin_convert"


class ServedCheckpoint:
    """A checkpoint's settings, and the names of its quantized layers in the engine's words."""

    packed_modules_mapping: dict[str, list[str]]  # by an engine's layer, the layers that it joins

    def __init__(self, config: dict[str, Any]) -> None:
        self.settings = read_marlin_settings(config)
        self.layers = dict(self.settings.layers)
        self.quantized: set[str] = set()
        self.biases: set[str] = set()  # layers with a bias, quantized or not
        self.stored: frozenset[str] = frozenset()  # the quantized layers, by the checkpoint's names
        self.arriving: Arriving | None = None  # while weights are loaded

    @classmethod
    def get_name(cls) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings.format}, {self.settings.default}, {len(self.layers)} exceptions)"

    def find_layers(self, tensors: Iterable[str], where: str) -> None:
        """Note the quantized layers: those of the checkpoint `where` whose `tensors` are there."""
        names = set(tensors)
        ending = ".marlin_qweight" if self.settings.format == "marlin_ext" else ".B"
        self.quantized = {name.removesuffix(ending) for name in names if name.endswith(ending)}
        self.stored = frozenset(self.quantized)
        self.biases = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
        if not self.quantized:
            raise ValueError(f"{where}: the settings say {self.settings.format}, and no tensor ends in {ending}")

    def rename(self, mapper: Any) -> None:
        """Call layers as the engine's model does."""
        self.quantized = set(mapper.apply_list(sorted(self.quantized)))
        self.biases = set(mapper.apply_list(sorted(self.biases)))
        self.layers = mapper.apply_dict(self.layers)

    def parts(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of what the engine joins in `prefix`: those of q_proj, k_proj, v_proj, say."""
        parent, dot, last = prefix.rpartition(".")
        if prefix in self.quantized:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def quantized_parts(self, prefix: str, engine: str) -> list[str]:
        """Return `parts` if all are quantized, nothing if none is. Raises ValueError if only some are."""
        names = self.parts(prefix)
        plain = [name for name in names if name not in self.quantized]
        if plain and len(plain) < len(names):
            raise ValueError(
                f"{prefix}: {engine} computes it as one layer, and {', '.join(plain)} of it is not quantized"
            )
        return [] if plain else names

    def layer(self, name: str) -> LayerSettings:
        return self.layers.get(name, self.settings.default)
