"""The formats that a source may have; which one it has, its tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.reader import Tensor
from ..errors import SourceError
from .awq_format import AWQFormat
from .ct_format import CTFormat
from .gptq_format import GPTQFormat
from .source_format import SourceFormat

GPTQ = GPTQFormat()
#: Each has those layers that none before it has: of names that several know, the shapes tell.
FORMATS: tuple[SourceFormat, ...] = (CTFormat(), AWQFormat(), GPTQ)
FORMAT_TITLES = "GPTQ, AWQ or compressed-tensors"


def format_of(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[SourceFormat, list[str]]:
    """Return the format of a checkpoint's quantized layers, and their names. Where there are none: that which one of
    the quantization configs claims, else GPTQ, and [].

    Raises SourceError where layers have several.
    """
    found: list[tuple[SourceFormat, list[str]]] = []
    known: set[str] = set()
    for format in FORMATS:
        if names := [name for name in format.layer_names(tensors) if name not in known]:
            found.append((format, names))
            known.update(names)
    if len(found) > 1:
        (one, (first, *_)), (other, (second, *_)) = found[:2]
        raise SourceError(
            f"{first} is a layer of {one.title}, {second} one of {other.title}; a checkpoint has one format."
        )
    claimed = (format for format in FORMATS for config in (configs or {}).values() if format.claimed_by(config))
    return found[0] if found else (next(claimed, GPTQ), [])


def named(name: str) -> SourceFormat | None:
    """Return the format that `marlin_convert.json` calls so."""
    return next((format for format in FORMATS if format.name == name), None)
