"""The port for a layer of a source: what planning, writing and checking know of GPTQ and its kin.

It gives the layer's codes as GPTQ words, whatever the packing of its files is, its scales, its zero points and the
order of its rows, some at a time. Each format's module implements it, and `source_format` what there is to a whole
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from .blocks import Buffers

Words: TypeAlias = "npt.NDArray[np.int32]"
ZeroPoints: TypeAlias = "npt.NDArray[np.uint8]"
#: What a reader keeps of a layer for itself, where all of it has to be read for any part of it.
Kept: TypeAlias = "dict[str, npt.NDArray[Any]]"


@dataclass(frozen=True)
class SourceLayer(ABC):
    """One quantized linear as its files hold it: K rows, N columns, G groups, codes of `bits` bits.

    Everything is read in the source's own order of rows and columns. Thread-safe.
    """

    name: str
    K: int
    N: int
    G: int
    bits: int
    scales: Tensor

    #: Whether a column's codes, not a row's, lie together: then columns are read, and not rows.
    by_columns: ClassVar[bool] = False

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The tensor of codes, in whose place the result's tensors come."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All of its tensors, but for the bias."""

    @property
    @abstractmethod
    def order(self) -> Tensor | None:
        """The tensor that tells each row's group, int [K], if there is one."""

    @abstractmethod
    def rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        """Fill `words` [rows bits/32, N] with rows k0 …, as GPTQ words."""

    @abstractmethod
    def columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        """Fill `words` [K bits/32, columns] with columns n0 …, as GPTQ words."""

    def defined_rows(self, checkpoint: Checkpoint, k0: int, words: Words, buffers: Buffers) -> None:
        """Fill as `rows` does, by the format's definition, code by code: what a conversion is verified against."""
        self.rows(checkpoint, k0, words, buffers)

    def defined_columns(self, checkpoint: Checkpoint, n0: int, words: Words, buffers: Buffers) -> None:
        """Fill as `columns` does, by the format's definition, code by code."""
        self.columns(checkpoint, n0, words, buffers)

    @abstractmethod
    def raw_scales(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> npt.NDArray[Any]:
        """Return scales [count, N] of groups `first` …, as the file has them (bf16 as uint16)."""

    @abstractmethod
    def zeros(self, checkpoint: Checkpoint, first: int, count: int, kept: Kept) -> ZeroPoints | None:
        """Return zero points [count, N] of groups `first` …; None if the source stores none."""

    def read_order(self, checkpoint: Checkpoint) -> npt.NDArray[Any] | None:
        """Return the group of each row, int [K]; None where there is nothing that tells it."""
        return None if self.order is None else checkpoint.read(self.order)
