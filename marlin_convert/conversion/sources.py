"""The formats that a source may have; which one it has, its tensors tell."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint.reader import Tensor
from ..errors import SourceError
from .gptq_format import GPTQFormat
from .source_format import SourceFormat

GPTQ = GPTQFormat()
FORMATS: tuple[SourceFormat, ...] = (GPTQ,)


def format_of(tensors: Mapping[str, Tensor]) -> tuple[SourceFormat, list[str]]:
    """The format of a checkpoint's quantized layers, and their names; GPTQ and [] where there are none.

    Raises SourceError where layers have several.
    """
    found = [(format, names) for format in FORMATS if (names := format.layer_names(tensors))]
    if len(found) > 1:
        (one, (first, *_)), (other, (second, *_)) = found[:2]
        raise SourceError(
            f"{first} is a layer of {one.title}, {second} one of {other.title}; a checkpoint has one format."
        )
    return found[0] if found else (GPTQ, [])
