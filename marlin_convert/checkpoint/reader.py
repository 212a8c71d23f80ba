"""Reading a checkpoint folder: file names, safetensors headers, and byte ranges of tensors.

Files are what is read: a link counts as the file that it leads to, and may not leave the folder for anything else than
a Hub cache. A file that is changed while it is read would give a mixture: every file's size, time and place are noted
before and compared at the end.

Nothing here loads a whole tensor by itself: a caller asks for a byte range and gives the buffer. All that a
header claims is checked against the file before anybody relies on it (the rules are those of the safetensors
format: an 8-byte little-endian header length, a JSON header, then the data without holes or overlaps).
Pickle files are never opened.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import SourceError, UnsupportedError
from ..text import shortened
from .bounded import open_regular, opened, parse_json, read_bytes, read_file

#: Bits of one element, by the dtype names that the safetensors format uses.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

#: The safetensors format caps its header at this many bytes; a larger one is damage or an attack.
MAX_HEADER_BYTES = 100_000_000

#: More than any checkpoint has: tensors of one file, dimensions of a tensor, characters of a tensor's name.
MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME = 200_000, 64, 500

#: Weights in formats that are not read: pickles are never unpickled, the others hold no GPTQ tensors.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
OTHER_WEIGHT_SUFFIXES = (".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".mlmodel", ".npz")
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", INDEX_SUFFIX, ".bin.index.json", *PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)

#: The first bytes of what Git leaves in place of a large file that was not fetched.
_LFS_POINTER = b"version "

#: Anything that `os.preadv` can fill: a writable, C-contiguous numpy array.
Buffer: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of file `file` (a name relative to the folder)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileState:
    """What tells one file, in one state, from another: its place on which disk, its size, when it was last written."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileState:
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of `dtype` and `shape` takes in a safetensors file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


class Checkpoint:
    """An opened source folder. Closing it (or leaving its `with` block) closes the files.

    `tensors` maps every tensor's name to where it lies, in the order in which the files hold their data.
    `extra_files` are the files beside the model's own weights, of any kind and in any subfolder (names relative to the
    folder), without the configs named in `CONFIG_FILES`, which are parsed into `configs`.

    Leaving the `with` block by an error raises SourceError instead, if a file has changed meanwhile: then that is why.
    For a folder that is being written, `steady` is false; in one that stands for a repository on the Hub, `partial`
    tells that fp16 scales, as the weights, may not be there yet.
    """

    #: The model's config, then those of the quantization alone: AutoGPTQ's and GPTQModel's, AutoAWQ's, AutoRound's.
    CONFIG_FILES = ("config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")

    def __init__(self, folder: Path, *, steady: bool = True, partial: bool = False) -> None:
        self.folder, self._steady, self.partial = folder, steady, partial
        self._unfit: dict[str, str] = {}  # what may not be copied, and why
        self._states: dict[str, tuple[Path, FileState]] = {}
        names = sorted(self._find_files())
        self.notes: list[str] = []
        self._fds: dict[str, int] = {}
        try:
            self.configs = self.read_configs(folder, names)
            self.weight_files, index, index_file = weight_files(folder, names, self.configs)
            self.indexed = index is not None
            own = {*self.CONFIG_FILES, *self.weight_files, index_file}
            self.names = tuple(names)
            self.extra_files = tuple(n for n in names if n not in own)
            self.tensors = self._read_headers(index)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    @classmethod
    def read_configs(cls, folder: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """The configs among `names`, by their names."""
        return {name: read_json(folder / name) for name in cls.CONFIG_FILES if name in names}

    @property
    def weights_beside(self) -> dict[str, int]:
        """Weights among the extra files, which are not the model's own: name → bytes."""
        return {n: self.nbytes(n) for n in self.extra_files if n.endswith(WEIGHT_SUFFIXES)}

    def _find_files(self) -> Iterator[str]:
        """Names of all files, noting their states and what is wrong with them."""
        root = os.path.realpath(self.folder)
        for name in _walk(self.folder):
            path = self.folder / name
            try:
                self._note(name, path)
            except OSError as error:
                self._unfit[name] = f"it cannot be read: {error.strerror}; remove or mend it."
                yield name
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                self._unfit[name] = "it cannot be read: no regular file (a pipe, a device, a linked folder); remove it."
                if path.is_dir():
                    continue
            elif path.is_symlink():
                target = os.path.realpath(path)
                if not (Path(target).is_relative_to(root) or _in_hub_cache(Path(target))):
                    self._unfit[name] = (
                        f"it is a link to {target}, outside the folder; put the file there, or remove it."
                    )
            yield name

    def _note(self, name: str, path: Path) -> None:
        self._states[name] = path, FileState.of(path.stat())

    def moved(self, name: str, path: Path) -> None:
        """An extra file, of which only the size was known, is at `path` from now on."""
        try:
            self._note(name, path)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None

    def nbytes(self, name: str) -> int:
        return self._states[name][1].nbytes

    def require_fit(self) -> None:
        """Raise SourceError that names a file that may not be copied: no regular one, or a link out of the folder."""
        for name, why in self._unfit.items():
            raise SourceError(f"{self.folder / name}: {why}")

    def require_unchanged(self) -> None:
        """Raise SourceError if any file is not what it was when it was found."""
        for name, (path, state) in self._states.items():
            try:
                now = FileState.of(path.stat())
            except OSError:
                now = None
            if now != state:
                raise SourceError(
                    f"{self.folder / name}: it {'changed' if now else 'went away'} while the folder was read, which "
                    "would give a mixture; run it again when nothing writes there any more."
                )

    @contextlib.contextmanager
    def open_extra(self, name: str) -> Iterator[int]:
        """An extra file, open for reading. Raises SourceError when it is not the regular file that was found."""
        path, state = self._states[name]
        with opened(path) as fd:
            if FileState.of(os.fstat(fd)) != state:
                self.require_unchanged()
            yield fd

    def _read_headers(self, index: dict[str, str] | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in self.weight_files:
            self._fds[file] = open_regular(self.folder / file)
            for tensor in read_header(self._fds[file], self.folder / file, file):
                home = index.get(tensor.name, file) if index else file
                if home != file:  # another shard owns this name; the index says which one counts
                    continue
                if tensor.name in found:
                    raise SourceError(
                        f"{self.folder}: tensor {tensor.name} is in both {found[tensor.name].file} and {file}; "
                        "remove the file that does not belong to this checkpoint, or add an index."
                    )
                if index and tensor.name not in index:
                    self.notes.append(f"{tensor.name} is in {file} but not in the index; it is kept")
                found[tensor.name] = tensor
        missing = sorted(set(index or ()) - set(found))
        if index and missing:
            raise SourceError(
                f"{self.folder}: the index names {shortened(missing[0])} in {index[missing[0]]}, which does not hold it"
                f"{f' ({len(missing)} such tensors)' if len(missing) > 1 else ''}; "
                "the download is incomplete or damaged."
            )
        return found

    def read_into(self, tensor: Tensor, buffer: Buffer, start: int = 0) -> None:
        """Fill `buffer` with the bytes of `tensor` from byte `start` on. Thread-safe.

        Raises SourceError when the file ends early or the disk fails.
        """
        view = buffer.reshape(-1).view(np.uint8).data
        if start < 0 or start + len(view) > tensor.nbytes:
            raise ValueError(f"{tensor.name}: bytes {start} to {start + len(view)} of {tensor.nbytes} were asked for")
        self._read_at(tensor, tensor.offset + start, view)

    def read_rows(self, tensor: Tensor, first: int, count: int) -> npt.NDArray[Any]:
        """Rows `first` … of a matrix, as `read` gives the whole of it."""
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
        for row in range(rows):
            position = tensor.offset + (row * width + first) * buffer.itemsize
            self._read_at(tensor, position, view[row * length : (row + 1) * length])

    def _read_at(self, tensor: Tensor, position: int, view: memoryview) -> None:
        fd = self._fds[tensor.file]
        while view:
            try:
                count = os.preadv(fd, [view], position)
            except OSError as error:
                raise SourceError(f"{self.folder / tensor.file}: reading failed: {error.strerror}.") from None
            if count == 0:
                raise SourceError(f"{self.folder / tensor.file}: the file became shorter while it was read.")
            view, position = view[count:], position + count

    def read(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The whole tensor as a numpy array of its own shape. BF16 comes as uint16 (numpy has no bfloat16).

        For small tensors (scales, zero points, g_idx); weights are read in blocks with `read_into`.
        """
        array = np.empty(tensor.shape, self._numpy_dtype(tensor))
        if array.size:
            self.read_into(tensor, array)
        return array

    @staticmethod
    def _numpy_dtype(tensor: Tensor) -> Any:
        numpy_dtype = {"I32": np.int32, "F16": np.float16, "F32": np.float32, "BF16": np.uint16, "I64": np.int64}
        if tensor.dtype not in numpy_dtype:
            raise UnsupportedError(f"{tensor.name}: dtype {tensor.dtype} is not one that a GPTQ tensor may have.")
        return numpy_dtype[tensor.dtype]

    def arrived(self, file: str, path: Path) -> None:
        """Read weight file `file` from `path` from now on: the whole of it, where only its header was known.

        Raises SourceError when it is another file.
        """
        fd = open_regular(path)
        try:
            if read_header(fd, path, file) != read_header(self._fds[file], self.folder / file, file):
                raise SourceError(f"{path}: not the file whose header was read before; run it again.")
        except BaseException:
            os.close(fd)
            raise
        self._fds[file], fd = fd, self._fds[file]
        os.close(fd)
        self._note(file, path)

    def release(self, file: str) -> None:
        """Close a weight file of which nothing more is read, so that it can leave the disk."""
        os.close(self._fds.pop(file))
        self._states.pop(file)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        if isinstance(error, Exception) and self._steady:
            self.require_unchanged()


def _in_hub_cache(path: Path) -> bool:
    """Whether a file belongs to a repository in a cache of huggingface_hub, wherever that is."""
    return any(
        parent.name.startswith(("models--", "datasets--"))
        and path.relative_to(parent).parts[0] in ("blobs", "snapshots")
        for parent in path.parents
    )


def read_header(fd: int, path: Path, file: str) -> list[Tensor]:
    """All tensors of the safetensors file open at `fd`, in the order of their data, every claim checked.

    Raises SourceError with one line that says what is wrong with `path`.
    """

    def damaged(what: str) -> SourceError:
        return SourceError(f"{path}: damaged safetensors file: {what}; fetch or export it again.")

    size = os.fstat(fd).st_size
    try:
        prefix = read_bytes(fd, 0, 8)
        if len(prefix) < 8:
            raise damaged(f"it has {size} bytes, too few for a header")
        if prefix == _LFS_POINTER:
            raise _lfs_pointer(path)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise damaged(f"its header claims {length} bytes and the file has {size}")
        raw = read_bytes(fd, 8, length)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(raw) < length:
        raise damaged("its header cannot be read to the end")
    if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise SourceError(f"{path}: it has {count} tensors; of one file, at most {MAX_TENSORS} are read.")
    try:
        header = parse_json(raw, _claims, _whole_number)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise damaged(f"its header is not valid JSON ({error})") from None
    del raw
    header.pop("__metadata__", None)

    data_start, tensors = 8 + length, []
    for name in list(header):
        claims = header.pop(name)  # its memory is the next tensor's
        if not is_tensor_name(name):  # no exporter writes such a name, and a message could not show it
            raise damaged(f"the tensor name {shortened(name)} is too long, or cannot be printed")
        if not isinstance(claims, _Claims) or not claims.well_formed():
            raise damaged(f"the header entry of {name} is malformed")
        dtype, shape, (begin, end) = claims.dtype, tuple(claims.shape), claims.offsets
        if dtype not in DTYPE_BITS:
            raise damaged(f"{name} has the unknown dtype {shortened(dtype)}")
        if math.prod(shape) * DTYPE_BITS[dtype] % 8:
            raise damaged(f"{name} ({dtype} {shortened(list(shape))}) does not end at a whole byte")
        if end - begin != (nbytes := tensor_bytes(dtype, shape)):
            taken = f"{nbytes} bytes" if nbytes < 1 << 64 else "more bytes than there are"
            raise damaged(f"{name} ({dtype} {shortened(list(shape))}) takes {taken}, not {end - begin}")
        tensors.append(Tensor(name, sys.intern(dtype), shape, file, data_start + begin, end - begin))
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise damaged(f"{tensor.name} {what}")
        position += tensor.nbytes
    if position != size:
        what = "it is truncated" if position > size else "it has bytes that no tensor owns"
        raise damaged(f"{what}: the header describes {position} bytes and the file has {size}")
    return tensors


class _Claims(NamedTuple):
    """What a header says about one tensor."""

    dtype: Any
    shape: Any
    offsets: Any

    def well_formed(self) -> bool:
        if not isinstance(self.dtype, str) or not isinstance(self.shape, list) or not isinstance(self.offsets, list):
            return False
        numbers = [*self.shape, *self.offsets]
        return (
            len(self.offsets) == 2
            and len(self.shape) <= MAX_DIMENSIONS
            and all(type(number) is int and number >= 0 for number in numbers)
        )


def _claims(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Claims:
    """An object of a header: what it says about one tensor, in little memory, or whatever else it is."""
    found = _unique_keys(pairs)
    if isinstance(found.get("data_offsets"), list):
        return _Claims(found.get("dtype"), found.get("shape"), found["data_offsets"])
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 20:  # no file has so many bytes
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may have this name: not very long, and printable."""
    return len(name) <= MAX_NAME and name.isprintable()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files below `folder`, relative, with '/', and of links to folders, which are not followed; hidden
    files and folders (.git, .cache) are left out."""
    try:
        for parent, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [f for f in folders if not f.startswith(".")]
            links = [f for f in folders if Path(parent, f).is_symlink()]
            inside = Path(parent).relative_to(folder)
            yield from ((inside / file).as_posix() for file in (*files, *links) if not file.startswith("."))
    except OSError as error:
        raise SourceError(f"{error.filename or folder}: cannot be read: {error.strerror}.") from None


def _raise(error: OSError) -> None:
    raise error


def _lfs_pointer(path: Path) -> SourceError:
    return SourceError(
        f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull` in the source first."
    )


def read_json(path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError when there is none."""
    raw = read_file(path)
    if raw.startswith(_LFS_POINTER):
        raise _lfs_pointer(path)
    try:
        value = parse_json(raw, pairs_hook)
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error}); fetch or export it again.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: a JSON object was expected, not {type(value).__name__}.")
    return value


def weight_files(
    folder: Path, names: list[str], configs: dict[str, dict[str, Any]]
) -> tuple[list[str], dict[str, str] | None, str | None]:
    """The safetensors files that make up the checkpoint in `folder`, of whose files (`names`) only the index is read;
    where there is one, its tensor → file map, and its name. Raises SourceError or UnsupportedError when there are none.
    """
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX) and "/" not in n]
    files = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    preferred = f"model{INDEX_SUFFIX}"
    if "model.safetensors" in files and preferred not in indexes:
        return ["model.safetensors"], None, None
    if "adapter_config.json" in names and not indexes and all(n.startswith("adapter_model") for n in files):
        raise UnsupportedError(
            f"{folder}: a LoRA adapter (it has adapter_config.json and no model); convert the GPTQ model that it was "
            "trained on, and load the adapter beside the result."
        )
    if indexes:
        if len(indexes) > 1 and preferred not in indexes:
            raise SourceError(
                f"{folder}: several indexes ({', '.join(indexes)}); keep the one that belongs to the checkpoint."
            )
        index = preferred if preferred in indexes else indexes[0]
        return *_indexed_files(folder, index, names), index
    for config in configs.values():
        for holder in (config, config.get("quantization_config")):
            base = holder.get("model_file_base_name") if isinstance(holder, dict) else None
            if isinstance(base, str) and f"{base}.safetensors" in files:
                return [f"{base}.safetensors"], None, None
    if not files:
        raise _no_safetensors(folder, names)
    _require_all_parts(folder, files)
    return files, None, None


def _indexed_files(folder: Path, index: str, names: list[str]) -> tuple[list[str], dict[str, str]]:
    weight_map = read_json(folder / index, _unique_keys).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / index}: it has no weight_map; fetch or export it again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise SourceError(
                f"{folder / index}: {shortened(tensor)} points to {shortened(file)}, outside the folder; "
                "this index is refused."
            )
        if not file.endswith(".safetensors"):
            raise SourceError(
                f"{folder / index}: {shortened(tensor)} points to {shortened(file)}, which is not a safetensors file."
            )
    files = sorted(set(weight_map.values()))
    missing = [f for f in files if f not in names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(f"{folder}: {missing[0]}{more}, named by {index}, is missing; complete the download.")
    return files, weight_map


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name and bool(path.parts)
    )


def _require_all_parts(folder: Path, files: list[str]) -> None:
    """Without an index, `x-00002-of-00003.safetensors` tells that 1 and 3 must be there too."""
    parts: dict[tuple[str, str], set[int]] = {}
    for file in files:
        match = re.fullmatch(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", file)
        if match:
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (base, count), seen in parts.items():
        first = 0 if 0 in seen else 1
        missing = next((i for i in range(first, first + int(count)) if i not in seen), None)
        if missing is not None:
            file = f"{base}-{missing:0{len(count)}d}-of-{count}.safetensors"
            raise SourceError(f"{folder}: {file} is missing, and its neighbours are there; complete the download.")


def _no_safetensors(folder: Path, names: list[str]) -> Exception:
    ggufs = [n for n in names if n.endswith((".gguf", ".ggml"))]
    if ggufs:
        return UnsupportedError(
            f"{folder}: a GGUF checkpoint ({ggufs[0]}), which has nothing to repack; a GPTQ checkpoint is needed. "
            "llama.cpp runs it as it is."
        )
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return UnsupportedError(
            f"{folder}: the weights are in a pickle file ({pickles[0]}), which can run code when it is opened and is "
            "therefore never read; save the checkpoint as safetensors first."
        )
    return SourceError(f"{folder}: no .safetensors file in it; give the folder of a GPTQ checkpoint.")
