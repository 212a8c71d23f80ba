"""Parts of a repository's files, fetched by Range requests and kept in a temporary file."""

from __future__ import annotations

import bisect
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..progress import OnBytes
from .client import explaining, interruptible
from .download import read_range
from .repository import Remote

#: Bytes of a file's beginning that come first: most headers are shorter, and one request then is enough.
_FIRST = 1 << 18
#: Bytes between two parts that are cheaper to read than another request is.
_NEAR = 1 << 16
#: The most bytes of one request, and requests at a time.
_MOST, _REQUESTS = 4 << 20, 16


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end` of a file."""

    file: str
    start: int
    end: int


@dataclass
class _Kept:
    """What is kept of one file: parts that do not overlap, by where they start."""

    starts: list[int] = field(default_factory=list)
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)  # start → end, place in the temporary file

    def at(self, position: int) -> tuple[int, int, int] | None:
        """Return (start, end, place) of the part that holds the byte at `position`."""
        after = bisect.bisect(self.starts, position)
        if not after:
            return None
        start = self.starts[after - 1]
        end, place = self.parts[start]
        return (start, end, place) if position < end else None

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield what is not kept between `start` and `end`."""
        while start < end:
            kept = self.at(start)
            if kept:
                start = kept[1]
                continue
            after = bisect.bisect(self.starts, start)
            stop = min(end, self.starts[after]) if after < len(self.starts) else end
            yield start, stop
            start = stop


class RangeReader:
    """Reads parts of the files of a repository, each from the Hub only once. Thread-safe."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._temporary = tempfile.TemporaryFile(prefix="marlin-convert-")  # noqa: SIM115 - closed by `close`
        self._kept = {name: _Kept() for name in remote.files}
        self._lock = threading.Lock()  # of what is kept
        self._fetching = threading.Lock()  # one at a time, each with many requests: nothing is fetched twice
        self._free: list[int] = []  # places in the temporary file, each with room for one part
        self._places = 0  # where the next one begins
        self._answers = self.bytes_read = 0

    def read_into(self, file: str, position: int, view: memoryview) -> None:
        """Fill `view` with bytes of a file from `position` on. Raises HubError."""
        while view:
            with self._lock:  # while reading too: nothing is released under it
                if kept := self._kept[file].at(position):
                    start, end, place = kept
                    count = os.preadv(self._temporary.fileno(), [view[: end - position]], place + position - start)
                    view, position = view[count:], position + count
                    continue
            self.fetch([Part(file, position, position + len(view))])

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Return what requests must bring so that all of `parts` are kept: near ones together, no very large ones."""
        wanted = _joined(parts)
        for i, part in enumerate(wanted):
            if part.start == 0 and not self._kept[part.file].starts:
                wanted[i] = Part(part.file, 0, max(part.end, min(_FIRST, self._remote.files[part.file].size)))
        with self._lock:
            gaps = [(part.file, *gap) for part in wanted for gap in self._kept[part.file].gaps(part.start, part.end)]
        return [
            Part(file, at, min(at + _MOST, end)) for file, start, end in gaps for at in range(start, end, _MOST)
        ]  # fmt: skip

    def fetch(self, parts: Iterable[Part], on_bytes: OnBytes = lambda nbytes: None) -> None:
        """Fetch what is not kept yet of `parts`; `on_bytes` is told of its bytes. Raises HubError."""
        with self._fetching:
            pieces = self.missing(parts)
            if pieces:
                with explaining(self._remote.repo_id, self._remote.revision):
                    interruptible(lambda: self._request_all(pieces, on_bytes))

    def _request_all(self, pieces: list[Part], on_bytes: OnBytes) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        remote = self._remote
        headers = build_hf_headers(token=remote.token)

        def request(piece: Part) -> None:
            url = hf_hub_url(remote.repo_id, piece.file, revision=remote.commit)
            with self._place() as place:

                def write(position: int, content: bytes) -> None:
                    _write(self._temporary.fileno(), memoryview(content), place + position - piece.start)
                    on_bytes(len(content))

                read_range(remote.repo_id, url, headers, piece.start, piece.end, write, lambda: self._answers)
                self._keep(piece, place)

        with ThreadPoolExecutor(min(_REQUESTS, len(pieces))) as pool:
            try:
                for done in [pool.submit(request, piece) for piece in pieces]:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _place(self) -> Iterator[int]:
        """Have a place in the temporary file for a piece, which is free again if the piece does not come."""
        with self._lock:
            place = self._free.pop() if self._free else self._places
            self._places = max(self._places, place + _MOST)
        try:
            yield place
        except BaseException:
            with self._lock:
                self._free.append(place)
            raise

    def _keep(self, piece: Part, place: int) -> None:
        with self._lock:
            self._answers += 1
            self.bytes_read += piece.end - piece.start
            kept = self._kept[piece.file]
            bisect.insort(kept.starts, piece.start)
            kept.parts[piece.start] = (piece.end, place)

    def release(self, parts: Iterable[Part]) -> None:
        """Let what was fetched for `parts`, given together as they were then, be overwritten."""
        with self._lock:
            for part in _joined(parts):
                kept = self._kept[part.file]
                for start in kept.starts[bisect.bisect_left(kept.starts, part.start) :]:
                    end, place = kept.parts[start]
                    if end > part.end:
                        break
                    kept.starts.remove(start)
                    del kept.parts[start]
                    self._free.append(place)

    def close(self) -> None:
        self._temporary.close()


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Return `parts` in order, those that are near each other as one."""
    joined: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.file, part.start)):
        before = joined[-1] if joined and joined[-1].file == part.file else None
        if before and part.start - before.end <= _NEAR:
            joined[-1] = Part(part.file, before.start, max(before.end, part.end))
        else:
            joined.append(part)
    return joined


def _write(fd: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(fd, view, position)
        view, position = view[count:], position + count
