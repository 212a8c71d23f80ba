"""A repository's files as a checkpoint reads them, although most of them are still on the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.header import Tensor, read_header
from ..checkpoint.weight_file import LocalWeightFile
from ..errors import SourceError
from ..progress import StartTransfer
from .client import explaining, interruptible
from .ranges import Part, RangeReader
from .repository import Remote


class HubFiles(CheckpointFiles):
    """The files of a repository. Configs are fetched at once, of weight files only the parts that are read until they
    have arrived; all others by `fetch`. `transfer` shows the parts that `read_ahead` brings.
    """

    def __init__(self, remote: Remote, transfer: StartTransfer) -> None:
        super().__init__(remote.repo_id)
        self.remote, self._transfer = remote, transfer
        self.names = sorted(remote.files)
        self._ranges = RangeReader(remote)
        self.weights: dict[str, RemoteWeightFile] = {}
        with explaining(remote.repo_id, remote.revision):
            cached = interruptible(lambda: remote.fetch_small(remote.configs))
        for name in remote.configs:
            self.arrived(name, cached / name)

    def arrived(self, name: str, path: Path) -> None:
        """Note that all of a file is at `path`."""
        try:
            self.note(name, path.resolve())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}.") from None

    def nbytes(self, name: str) -> int:
        return self.remote.files[name].size

    def weight_file(self, name: str) -> RemoteWeightFile:
        file = self.weights[name] = RemoteWeightFile(self, name, self._ranges)
        return file

    def fetch(self, names: Sequence[str], transfer: StartTransfer) -> None:
        """Bring files beside the weights into the cache: all small ones, and the weights among `names`."""
        remote = self.remote
        large = sorted(set(names) - set(remote.small_files) - set(remote.configs))
        with explaining(remote.repo_id, remote.revision):
            cached = interruptible(remote.fetch_small)
            on_bytes = transfer("downloading other files", sum(map(remote.missing_bytes, large)))
            interruptible(lambda: [remote.fetch(name, on_bytes) for name in large])
        for name in names:
            self.arrived(name, cached / name)

    def read_ahead(self, tensors: Iterable[Tensor], label: str | None = None) -> None:
        """Read many tensors at once, which then come from this disk."""
        parts = [Part(t.file, t.offset, t.offset + t.nbytes) for t in tensors if not self.weights[t.file].on_disk]
        total = sum(part.end - part.start for part in self._ranges.missing(parts))
        if total:
            self._ranges.fetch(parts, self._transfer(label, total) if label else lambda nbytes: None)

    def release(self, tensors: Iterable[Tensor]) -> None:
        self._ranges.release(Part(t.file, t.offset, t.offset + t.nbytes) for t in tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of weight files that Range requests have brought."""
        return self._ranges.bytes_read

    def path(self, name: str) -> Path:
        """Return where a file is, or will be when it has been fetched."""
        return self._states[name][0] if name in self._states else self.remote.cache.snapshot(self.remote.commit) / name

    def cached(self, name: str) -> Path | None:
        """Return where the cache has a file to stay; what another run may remove does not count."""
        file, cache = self.remote.files[name], self.remote.cache
        return None if cache.is_temporary(file) else cache.find(file, self.remote.commit)

    def close(self) -> None:
        self._ranges.close()


class RemoteWeightFile:
    """A weight file on the Hub: parts of it are read by Range requests until it has arrived, or where the cache has it,
    from the disk.
    """

    def __init__(self, files: HubFiles, name: str, ranges: RangeReader) -> None:
        self.name = name
        self._files, self._ranges, self._label = files, ranges, files.called(name)
        self._arrival: Future[tuple[Path, Callable[[], None]] | None] = Future()
        self._give_back: Callable[[], None] | None = None
        cached = files.cached(name)
        self._local = self._opened(cached) if cached else None
        self._header: list[Tensor] | None = None

    @property
    def on_disk(self) -> bool:
        return self._local is not None

    def _opened(self, path: Path) -> LocalWeightFile:
        return LocalWeightFile(path, self.name, self._label)

    def header(self) -> list[Tensor]:
        if self._header is None:
            self._header = read_header(self._bytes, self._files.nbytes(self.name), self.name, self._label)
        return self._header

    def _bytes(self, start: int, count: int) -> bytearray:
        content = bytearray(count)
        self.read_into(start, memoryview(content))
        return content

    def read_into(self, position: int, view: memoryview) -> None:
        if self._local is not None:
            self._local.read_into(position, view)
        else:
            self._ranges.read_into(self.name, position, view)

    # ---- Arriving

    def arrive(self, path: Path, give_back: Callable[[], None]) -> None:
        """Tell that all of the file is at `path` now; `give_back` will be called when it is dropped."""
        with contextlib.suppress(InvalidStateError):  # it was stopped
            self._arrival.set_result((path, give_back))

    def stop(self) -> None:
        """Let whoever waits for the file go on without it."""
        with contextlib.suppress(InvalidStateError):
            self._arrival.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Let whoever waits for the file know that it does not come."""
        with contextlib.suppress(InvalidStateError):
            self._arrival.set_exception(error)

    def wait(self) -> bool:
        """Wait until the file has arrived; return False if it was stopped. Raises what stopped the download, or
        SourceError where what arrived is another file than the one whose header was read."""
        remote = self._files.remote
        with explaining(remote.repo_id, remote.revision):
            arrival = self._arrival.result()
        if arrival is None:
            return False
        path, self._give_back = arrival
        before, local = self._local, self._opened(path)
        self._local = local
        if before is not None:
            before.close()
        if local.header() != self.header():
            raise SourceError(f"{self._label}: not the file whose header was read before; run it again.")
        self._files.arrived(self.name, path)
        return True

    def drop(self) -> None:
        self.close()
        self._files.forget(self.name)
        if self._give_back is not None:
            self._give_back()

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
