"""The port for a source format: which layers of a checkpoint are its own, what its configs say, how its layers are
judged. Each format has a module of its own, and `sources` names them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checkpoint.reader import Checkpoint, Tensor
from ..formats import auto_round
from ..formats.gptq_config import GPTQSettings
from ..formats.stored import StoredLayer
from ..options import ZeroPointReading
from .inspect import LayerInspection
from .restored import RestoredLayer
from .source_layer import SourceLayer


@dataclass(frozen=True)
class Noted:
    """What a conversion noted about its source in `marlin_convert.json`: `values`, as they were checked; {} for a
    checkpoint that another tool made."""

    values: dict[str, Any]

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The source's quantization configs, by where they stood."""
        return self.values.get("configs") or {}

    @property
    def format(self) -> str:
        """The name of the source's format."""
        return str(self.values.get("source_format", "gptq"))

    def dtype(self, layer: str, key: str, allowed: Collection[str]) -> str | None:
        """Return what `key` says of a layer (see `commonest`), if it is one of those `allowed`."""
        others = self.values.get(f"{key}s")
        found = (others if isinstance(others, dict) else {}).get(layer, self.values.get(key))
        return found if found in allowed else None


class SourceFormat(ABC):
    """A format of source checkpoints. `name` stands in reports, `title` in sentences; `parts` are the endings of a
    layer's tensors, the first of which every layer has; `dropped` are those that have no counterpart in the result,
    `telling` those that nothing else has."""

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    dropped: ClassVar[tuple[str, ...]]
    telling: ClassVar[tuple[str, ...]]

    @abstractmethod
    def layer_names(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the layers of this format among `tensors`, in their order."""

    def apart(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a checkpoint, those in which several layers lie together as each layer's own, under the
        names that these have by themselves.

        Raises SourceError where that gives two tensors one name, or the parts do not belong together.
        """
        return tensors

    def claimed_by(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a quantization config says that its checkpoint has this format."""
        return False

    def called(self, settings: GPTQSettings) -> str:
        """Return what sentences call a checkpoint of this format whose configs say `settings`: by the quantizer that
        has a config of its own over another's tensors, else by the format."""
        return auto_round.NAME if auto_round.is_config(settings.raw) else self.title

    @abstractmethod
    def require_complete(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise SourceError for parts of a layer that has no weights."""

    @abstractmethod
    def settings(self, configs: dict[str, dict[str, Any]], names: Sequence[str]) -> GPTQSettings:
        """Return what the parsed configs of a checkpoint with layers `names` say.

        Raises UnsupportedError where they tell of something that no result can be, SourceError where they are no
        configs of this format.
        """

    @abstractmethod
    def inspect(
        self, checkpoint: Checkpoint, names: list[str], settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> list[LayerInspection]:
        """Judge every layer; see `LayerInspection`."""

    @abstractmethod
    def restored(self, stored: StoredLayer[Tensor], noted: Noted) -> RestoredLayer:
        """Return what a Marlin layer becomes, by what was noted of its source."""

    def all_restored(self, stored: Sequence[StoredLayer[Tensor]], noted: Noted) -> list[RestoredLayer]:
        """Return what all Marlin layers of a checkpoint become. Raises SourceError where they cannot be what the source
        held together."""
        return [self.restored(layer, noted) for layer in stored]

    def way_back(self, noted: Noted) -> WayBack:
        """Return how a Marlin checkpoint becomes what it was made from, a checkpoint of this format."""
        return WayBack(self, noted)

    @abstractmethod
    def noted(self, layers: Sequence[SourceLayer]) -> dict[str, Any]:
        """Return what only the source tells of its `layers`, for restoring them: goes into `marlin_convert.json`."""


class WayBack:
    """How a Marlin checkpoint becomes one of `format`: as the source was, by what was noted of it."""

    def __init__(self, format: SourceFormat, noted: Noted) -> None:
        self.format, self.noted = format, noted

    @property
    def name(self) -> str:
        """What a report calls the result's format."""
        return self.format.name

    def layers(self, checkpoint: Checkpoint, stored: Sequence[StoredLayer[Tensor]]) -> list[RestoredLayer]:
        """Return what the layers of the Marlin checkpoint become. Raises SourceError where they are none that such a
        source had, UnsupportedError where the format cannot hold them."""
        return self.format.all_restored(stored, self.noted)

    def configs(self, layers: Sequence[RestoredLayer], marlin: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
        """Return the quantization configs of the result, by where they stand; `marlin` is the Marlin checkpoint's."""
        return self.noted.configs


def commonest(values: Mapping[str, str | None]) -> tuple[str | None, dict[str, str | None]]:
    """Return the value that most of the layers have, and the others' values by name."""
    found = list(values.values())
    common = max(dict.fromkeys(found), key=found.count)
    return common, {name: value for name, value in values.items() if value != common}
