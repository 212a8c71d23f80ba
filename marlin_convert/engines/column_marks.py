"""Marks in the place of weights: an engine's own loading code says which columns a layer gets, and in what order.

An engine's model knows how a plain weight [N, K] is loaded: which of its layers it belongs to, which of several parts
of a layer it is, in what order the model wants its columns (heads apart or together), which of them are this rank's.
That code cannot cut or reorder a packed layer. So it is given, in place of each Marlin layer, `Marks` [N, 1] of int64:
each row says which layer and which of its columns it stands for. What arrives in the engine's layer, [N of the rank,
1], is then the exact list of columns to take from the stored tensors, however it came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats.layout import EXTENDED_NAMES, ORIGINAL_NAMES
from ..formats.marlin_config import LayerSettings, MarlinSettings
from ..formats.stored import needed
from . import tensor_parallel as shards
from .tensor_parallel import Piece

#: A mark is (number of the layer, from 1) · 2^32 + column; zero is a column of zeros, as engines pad; this is none yet.
NOTHING = -1
_SHIFT = 32
_COLUMN = (1 << _SHIFT) - 1
_WRITES = (Tensor.copy_, Tensor.__setitem__)


class Marks(Tensor):
    """Marks stay marks through views, cuts and joins; written into a tensor that is no list of marks, they raise."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRITES and args[0].dtype != torch.int64:
            raise TypeError("the engine loads it into a tensor that is not the weight of one of its linear layers")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


@dataclass
class _Stored:
    """A layer of the checkpoint whose tensors have come. `left` of its columns have not been asked for yet; `claimed`
    says whether a layer of the engine has some."""

    name: str
    settings: LayerSettings
    tensors: dict[str, Tensor]
    left: int
    claimed: bool = False


class Arriving:
    """A checkpoint on its way into an engine: its tensors wait here until its marks have found their layers."""

    def __init__(self, settings: MarlinSettings, names: Iterable[str]) -> None:
        """Take `names`, the checkpoint's quantized layers, in its own words."""
        self.settings, self.names = settings, set(names)
        self.stored: list[_Stored] = []
        self.now = ""  # the name that the engine got last
        self.biased: set[str] = set()  # quantized layers with a bias that is not zero

    def stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Return the checkpoint's tensors, and `NAME.weight` with marks for each quantized layer as soon as it is
        complete.

        Raises ValueError at the end for layers that are not complete, or whose tensors do not fit their settings.
        """
        extended = self.settings.format == "marlin_ext"
        kinds = {name: what for what, name in (EXTENDED_NAMES if extended else ORIGINAL_NAMES).items()}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights:
            name, _, ending = key.rpartition(".")
            if name not in self.names or ending not in kinds:
                self.now = key
                if ending == "bias" and name in self.names and bool(tensor.any()):
                    self.biased.add(name)
                yield key, tensor
                continue
            tensors = parts.setdefault(name, {})
            tensors[kinds[ending]] = tensor
            settings = self.settings.layer(name)
            if tensors.keys() == needed(settings):
                del parts[name]
                N = shards.whole(name, settings, tensors, self.settings.format).N
                self.stored.append(_Stored(name, settings, tensors, N))
                marks = torch.arange(N, dtype=torch.int64, device="cpu") + (len(self.stored) << _SHIFT)
                self.now = name
                yield f"{name}.weight", marks.reshape(N, 1).as_subclass(Marks)
        self.now = ""
        for name, tensors in parts.items():
            shards.whole(name, self.settings.layer(name), tensors, self.settings.format)

    def asked(self, marks: Tensor) -> None:
        """Note that a layer of the engine was given `marks`, of whole layers or of parts of them."""
        numbers, counts = torch.unique(_plain(marks) >> _SHIFT, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if not 0 < number <= len(self.stored):
                raise TypeError("the engine changes the values of its weights while it loads them")
            self.stored[number - 1].left -= count

    def pieces(self, where: str, marks: Tensor, device: torch.device, given: Tensor | None = None) -> list[Piece]:
        """Return the columns that `marks` name, as pieces on `device` that lie side by side in their order.

        Columns of zeros go with those before them; `given` are marks of the layer that they belong to if there are
        none. Raises ValueError that starts with `where` for marks that name nothing.
        """
        marks = _plain(marks)
        if bool((marks < 0).any()):
            raise ValueError(f"{where}: {int((marks < 0).sum())} of its {marks.numel()} columns have not been loaded")
        numbers, columns = marks >> _SHIFT, marks & _COLUMN
        columns = torch.where(numbers == 0, NOTHING, columns)
        known = [int(number) for number in numbers.tolist()]
        before = next((number for number in known if number), 0)
        if not before and given is not None:
            before = int(_plain(given)[0]) >> _SHIFT
        found, first = [], 0
        for i, number in enumerate([*known, -1]):
            if number in (before, 0):
                continue
            if i > first:
                found.append(self._piece(where, before, columns[first:i], device))
            first, before = i, number
        return found

    def _piece(self, where: str, number: int, columns: Tensor, device: torch.device) -> Piece:
        if not 0 < number <= len(self.stored):
            raise TypeError("the engine changes the values of its weights while it loads them")
        stored = self.stored[number - 1]
        stored.claimed = True
        if not stored.tensors:
            raise ValueError(f"{where}: the engine asks for {stored.name} again, after all of it was loaded")
        tensors = {what: tensor.to(device) for what, tensor in stored.tensors.items()}
        if stored.left <= 0:
            stored.tensors = {}
        return shards.columns(shards.whole(stored.name, stored.settings, tensors, self.settings.format), columns)

    def sources(self, marks: Tensor) -> set[str]:
        """Return the layers of the checkpoint that `marks` name columns of."""
        numbers = torch.unique(_plain(marks) >> _SHIFT).tolist()
        return {self.stored[number - 1].name for number in numbers if number > 0}

    def unclaimed(self) -> list[str]:
        """Return layers of the checkpoint of which no layer of the engine has a column."""
        return [stored.name for stored in self.stored if not stored.claimed]


def _plain(marks: Tensor) -> Tensor:
    if marks.dtype != torch.int64:
        raise TypeError("the engine changes the values of its weights while it loads them")
    return marks.detach().cpu().as_subclass(Tensor).reshape(-1)
