"""Weight files as a checkpoint reads them, wherever their bytes are: on this disk, or still on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from ..errors import SourceError
from .bounded import open_regular
from .header import Tensor, read_header

#: Anything that `os.preadv` can fill: a writable, C-contiguous numpy array.
Buffer: TypeAlias = "npt.NDArray[Any]"


class WeightFile(Protocol):
    """One safetensors file of a checkpoint."""

    def header(self) -> list[Tensor]:
        """Return the file's tensors in the order of their data. Raises SourceError for a damaged file."""

    def read_into(self, position: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `position` on. Thread-safe. Raises SourceError when they cannot be read."""

    def wait(self) -> bool:
        """Wait until all of the file can be read at the speed of a disk; return False if the work was stopped."""

    def drop(self) -> None:
        """Let go of the file, of which nothing more is read, so that it may leave the disk."""

    def close(self) -> None:
        """Close the file, and leave it where it is."""


class LocalWeightFile:
    """A weight file on this disk. `name` is its name in the checkpoint, `label` what messages call it."""

    def __init__(self, path: Path, name: str, label: str) -> None:
        self._name, self._label = name, label
        self._fd = open_regular(path, label)
        self._nbytes = os.fstat(self._fd).st_size

    def header(self) -> list[Tensor]:
        return read_header(self._bytes, self._nbytes, self._name, self._label)

    def _bytes(self, start: int, count: int) -> bytearray:
        content = bytearray(count)
        self.read_into(start, memoryview(content))
        return content

    def read_into(self, position: int, view: memoryview) -> None:
        while view:
            try:
                count = os.preadv(self._fd, [view], position)
            except OSError as error:
                raise SourceError(f"{self._label}: reading failed: {error.strerror}.") from None
            if count == 0:
                raise SourceError(f"{self._label}: the file became shorter while it was read.")
            view, position = view[count:], position + count

    def wait(self) -> bool:
        return True

    def drop(self) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
