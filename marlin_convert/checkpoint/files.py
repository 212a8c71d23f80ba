"""The files of a checkpoint, wherever they are: what each is called, how large it is, and whether it changed."""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..progress import StartTransfer
from .bounded import Bound, opened, read_json
from .header import Tensor
from .weight_file import LocalWeightFile, WeightFile


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


class CheckpointFiles(ABC):
    """The files of one checkpoint: their `names`, sorted, and a `label` that names the whole as the user does.

    The state of every file on this disk is noted when it is found, and compared at the end: a file that is changed
    while it is read would give a mixture.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.names: Sequence[str] = ()
        self._states: dict[str, tuple[Path, FileState]] = {}
        self._unfit: dict[str, str] = {}  # files that may not be copied, and why

    @abstractmethod
    def weight_file(self, name: str) -> WeightFile:
        """Open a weight file."""

    @abstractmethod
    def fetch(self, names: Sequence[str], transfer: StartTransfer) -> None:
        """Bring what is not on this disk yet; `transfer` shows it, as `Progress.transfer` does."""

    @abstractmethod
    def read_ahead(self, tensors: Iterable[Tensor], label: str | None = None) -> None:
        """Prepare for reading these tensors soon: a hint, where each read by itself would take a request. With a
        `label`, show how far that is."""

    def require_fit(self) -> None:
        """Raise SourceError that names a file that may not be copied: no regular one, or a link out of the folder."""
        for name, why in self._unfit.items():
            raise SourceError(f"{self.called(name)}: {why}")

    @abstractmethod
    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let go of what `read_ahead` brought for these tensors."""

    def called(self, name: str) -> str:
        """Return what messages call a file."""
        return f"{self.label}/{name}"

    def nbytes(self, name: str) -> int:
        return self._states[name][1].nbytes

    def state(self, name: str) -> FileState | None:
        """Return the state of a file as it was found; None where it is not on this disk, or could not be looked at."""
        return self._states[name][1] if name in self._states else None

    def path(self, name: str) -> Path:
        """Return where a file's content is on this disk; KeyError when it is not there."""
        return self._states[name][0]

    def json(
        self, name: str, bound: Bound, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
    ) -> dict[str, Any]:
        """Return the object in a JSON file. Raises SourceError when there is none."""
        return read_json(self.path(name), pairs_hook, label=self.called(name), bound=bound)

    def note(self, name: str, path: Path) -> None:
        """Note the state of a file, whose content is at `path`. Raises OSError."""
        self._states[name] = path, FileState.of(path.stat())

    def forget(self, name: str) -> None:
        """Let a file change from now on."""
        self._states.pop(name, None)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file for reading. Raises SourceError when it is not the regular file that was found."""
        path, state = self._states[name]
        with opened(path, self.called(name)) as fd:
            if FileState.of(os.fstat(fd)) != state:
                self.require_unchanged()
            yield fd

    def require_readable(self, names: Sequence[str]) -> None:
        """Raise SourceError for a file on this disk that may not be read."""
        for name in names:
            if name in self._states and not os.access(self.path(name), os.R_OK):
                raise SourceError(
                    f"{self.called(name)}: it cannot be read: Permission denied; remove it, or fix its permissions."
                )

    def require_unchanged(self) -> None:
        """Raise SourceError if any file is not what it was when it was found."""
        for name, (path, state) in self._states.items():
            try:
                now = FileState.of(path.stat())
            except OSError:
                now = None
            if now != state:
                raise SourceError(
                    f"{self.called(name)}: it {'changed' if now else 'went away'} while the folder was read, which "
                    "would give a mixture of old and new; run it again when nothing is writing there."
                )

    @abstractmethod
    def close(self) -> None:
        """Let go of everything that is held beside the weight files."""


class Folder(CheckpointFiles):
    """A folder on this disk. A link counts as the file that it leads to, and may not leave the folder for anything else
    than a Hub cache. `label`: what messages call it, by default its path.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        super().__init__(str(folder) if label is None else label)
        self._folder = folder
        self.names = sorted(self._find())

    def weight_file(self, name: str) -> WeightFile:
        return LocalWeightFile(self._folder / name, name, self.called(name))

    def path(self, name: str) -> Path:
        return self._folder / name

    def fetch(self, names: Sequence[str], transfer: StartTransfer) -> None:
        """Do nothing: all files are here."""

    def read_ahead(self, tensors: Iterable[Tensor], label: str | None = None) -> None:
        """Do nothing: a disk is fast enough."""

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Do nothing: nothing was brought."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _find(self) -> Iterator[str]:
        """Yield the names of all files, noting their states and what is wrong with them."""
        root = os.path.realpath(self._folder)
        for name in _walk(self._folder):
            path = self._folder / name
            try:
                self.note(name, path)
            except OSError as error:
                self._unfit[name] = f"it cannot be read: {error.strerror}; remove it, or fix its permissions."
                yield name
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                self._unfit[name] = "it is not a regular file (a pipe, a device, a linked folder); remove it."
                if path.is_dir():
                    continue
            elif path.is_symlink():
                target = os.path.realpath(path)
                if not (Path(target).is_relative_to(root) or _in_hub_cache(Path(target))):
                    self._unfit[name] = (
                        f"it is a link to {target}, outside the folder; put the file there, or remove it."
                    )
            yield name


def _in_hub_cache(path: Path) -> bool:
    """Tell whether a file belongs to a repository in a cache of huggingface_hub, wherever that is."""
    return any(
        parent.name.startswith(("models--", "datasets--"))
        and path.relative_to(parent).parts[0] in ("blobs", "snapshots")
        for parent in path.parents
    )


def _walk(folder: Path) -> Iterator[str]:
    """Yield the names of all files below `folder`, relative, with '/', and of links to folders, which are not followed;
    hidden files and folders (.git, .cache) are left out."""
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
