"""Reading a checkpoint: its configs, its tensors, and their bytes.

Nothing here loads a whole tensor by itself: a caller asks for a byte range and gives the buffer. Pickle files are never
opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SourceError, UnsupportedError
from ..progress import StartTransfer
from ..text import shortened
from .bounded import CONFIG
from .files import CheckpointFiles, Folder
from .header import Tensor
from .index import WEIGHT_SUFFIXES, weight_files
from .weight_file import Buffer, WeightFile

__all__ = ["CONFIG_FILES", "Checkpoint", "Tensor", "read_configs"]

#: The model's config, then those of the quantization alone: AutoGPTQ's and GPTQModel's, AutoAWQ's, AutoRound's.
CONFIG_FILES = ("config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def read_configs(files: CheckpointFiles) -> dict[str, dict[str, Any]]:
    """Return the configs among `files`, by their names."""
    return {name: files.json(name, CONFIG) for name in CONFIG_FILES if name in files.names}


class Checkpoint:
    """An opened checkpoint: a folder, or other files. Closing it (or leaving its `with` block) closes the files.

    `tensors` maps every tensor's name to where it lies, in the order in which the files hold their data.
    `names` are all of its files, in any subfolder (relative to the folder); `extra_files` are those beside the model's
    own weights, of any kind, without the configs named in `CONFIG_FILES`, which are parsed into `configs`.

    Leaving the `with` block by an error raises SourceError instead, if a file has changed transfer: then that is why.
    For a folder that is being written, `steady` is false.
    """

    def __init__(self, files: Path | CheckpointFiles, *, steady: bool = True) -> None:
        self._files = Folder(files) if isinstance(files, Path) else files
        self._steady = steady
        self.notes: list[str] = []
        self._weights: dict[str, WeightFile] = {}
        try:
            self.configs = read_configs(self._files)
            self.weight_files, index, index_file = weight_files(self._files, self.configs)
            self.indexed = index is not None
            self.names = tuple(self._files.names)
            known = {*CONFIG_FILES, *self.weight_files, index_file}
            self.extra_files = tuple(n for n in self._files.names if n not in known)
            self.tensors = self._read_headers(index)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _read_headers(self, index: dict[str, str] | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in self.weight_files:
            self._weights[file] = self._files.weight_file(file)
            for tensor in self._weights[file].header():
                home = index.get(tensor.name, file) if index else file
                if home != file:  # another shard holds this name as well; the index says which one counts
                    continue
                if tensor.name in found:
                    raise SourceError(
                        f"{self.label}: tensor {tensor.name} is in both {found[tensor.name].file} and {file}; "
                        "remove the file that does not belong to this checkpoint, or add an index."
                    )
                if index and tensor.name not in index:
                    self.notes.append(f"{tensor.name} is in {file} but not in the index; it is kept")
                found[tensor.name] = tensor
        missing = sorted(set(index or ()) - set(found))
        if index and missing:
            raise SourceError(
                f"{self.label}: the index names {shortened(missing[0])} in {index[missing[0]]}, which does not hold it"
                f"{f' ({len(missing)} such tensors)' if len(missing) > 1 else ''}; "
                "the download is incomplete or damaged."
            )
        return found

    # ---- Files beside the weights

    @property
    def label(self) -> str:
        """What messages call the checkpoint: a folder's path, or a Hub id."""
        return self._files.label

    def called(self, name: str) -> str:
        """Return what messages call one of its files."""
        return self._files.called(name)

    def path(self, name: str) -> Path:
        """Return where an extra file, which has been fetched, is on this disk."""
        return self._files.path(name)

    def nbytes(self, name: str) -> int:
        return self._files.nbytes(name)

    @property
    def weights_beside(self) -> dict[str, int]:
        """Weights among the extra files, which are not the model's own: name → bytes."""
        return {n: self.nbytes(n) for n in self.extra_files if n.endswith(WEIGHT_SUFFIXES)}

    def fetch_extra_files(self, transfer: StartTransfer) -> None:
        """Bring the extra files to this disk, which a plan does not need; `transfer` as `Progress.transfer`."""
        self._files.fetch(self.extra_files, transfer)

    def open_extra(self, name: str) -> AbstractContextManager[int]:
        """Open an extra file for reading. Raises SourceError when it is not the regular file that was found."""
        return self._files.opened(name)

    def require_fit(self) -> None:
        """Raise SourceError that names a file that may not be copied: no regular one, or a link out of the folder."""
        self._files.require_fit()

    def require_readable(self) -> None:
        """Raise SourceError for an extra file that may not be read."""
        self._files.require_readable(self.extra_files)

    def require_unchanged(self) -> None:
        """Raise SourceError if any file is not what it was when it was found."""
        self._files.require_unchanged()

    # ---- Tensors

    def read_ahead(self, tensors: Iterable[Tensor], label: str | None = None) -> None:
        """Prepare for reading these tensors soon, each of which, from afar, would take a request; with a `label`, show
        how far that is."""
        self._files.read_ahead(tensors, label)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let go of what `read_ahead` brought for these tensors, given together as they were there."""
        self._files.release(tensors)

    def raw_header(self, file: str) -> bytes:
        """Return the bytes of a weight file before its first tensor."""
        prefix = bytearray(8)
        self._weights[file].read_into(0, memoryview(prefix))
        header = bytearray(8 + int.from_bytes(prefix, "little"))
        self._weights[file].read_into(0, memoryview(header))
        return bytes(header)

    def read_into(self, tensor: Tensor, buffer: Buffer, start: int = 0) -> None:
        """Fill `buffer` with the bytes of `tensor` from byte `start` on. Thread-safe.

        Raises SourceError when the file ends early or the disk fails.
        """
        view = buffer.reshape(-1).view(np.uint8).data
        if start < 0 or start + len(view) > tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start} to {start + len(view)} of {tensor.nbytes} were asked for")
        self._weights[tensor.file].read_into(tensor.offset + start, view)

    def read_rows(self, tensor: Tensor, first: int, count: int) -> npt.NDArray[Any]:
        """Return rows `first` … of a matrix, as `read` gives the whole of it."""
        rows, width = tensor.shape
        if first < 0 or first + count > rows:
            raise ValueError(f"{tensor.name}: rows {first} to {first + count} of {tensor.shape} were asked for")
        array = np.empty((count, width), self._numpy_dtype(tensor))
        if array.size:
            self.read_into(tensor, array, first * width * array.itemsize)
        return array

    def read_columns(self, tensor: Tensor, buffer: Buffer, first: int) -> None:
        """Fill `buffer` [rows, columns] with the columns of a matrix from `first` on. Thread-safe; as `read_into`."""
        (rows, width), (_, columns) = tensor.shape, buffer.shape
        if buffer.shape[0] != rows or first < 0 or first + columns > width:
            raise ValueError(f"{tensor.name}: columns {first} to {first + columns} of {tensor.shape} were asked for")
        if columns == width:
            self.read_into(tensor, buffer)
            return
        view, length = buffer.reshape(-1).view(np.uint8).data, columns * buffer.itemsize
        read_into = self._weights[tensor.file].read_into
        for row in range(rows):
            position = tensor.offset + (row * width + first) * buffer.itemsize
            read_into(position, view[row * length : (row + 1) * length])

    def read(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return the whole tensor as a numpy array of its own shape. BF16 comes as uint16 (numpy has no bfloat16).

        For small tensors (scales, zero points, g_idx); weights are read in blocks with `read_into`.
        """
        array = np.empty(tensor.shape, self._numpy_dtype(tensor))
        if array.size:
            self.read_into(tensor, array)
        return array

    @staticmethod
    def _numpy_dtype(tensor: Tensor) -> Any:
        numpy_dtype = {
            "I32": np.int32,
            "F16": np.float16,
            "F32": np.float32,
            "BF16": np.uint16,
            "I64": np.int64,
            "I8": np.int8,
        }
        if tensor.dtype not in numpy_dtype:
            raise UnsupportedError(f"{tensor.name}: dtype {tensor.dtype} is not one that a quantized layer has.")
        return numpy_dtype[tensor.dtype]

    # ---- Weight files

    def wait_for(self, file: str) -> bool:
        """Wait until all of a weight file can be read; return False if the work was stopped."""
        return self._weights[file].wait()

    def drop(self, file: str) -> None:
        """Let go of a weight file, of which nothing more is read, so that it may leave the disk."""
        self._weights.pop(file).drop()

    def close(self) -> None:
        for file in self._weights.values():
            file.close()
        self._weights.clear()
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if isinstance(error, Exception) and self._steady:
            self.require_unchanged()
