"""Weights that arrive from the Hub while others are converted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ..errors import HubError
from ..progress import OnBytes
from .cache import Use
from .client import DOWNLOAD_THREAD, errors_only
from .repository import Remote
from .weights import RemoteWeightFile


class Prefetch:
    """Fetches weight files of a repository in order, in the background; whoever needs one waits for it.

        with Prefetch(remote, files, together, on_bytes):
            for file in files:
                file.wait()
                ...

    With `room`, they are removed from the cache as soon as they are dropped, if they were fetched here, or by a run
    like this that was interrupted, and nobody else needs them (see `cache`). A file is then fetched only when
    `room(nbytes, held)` says that so many more bytes have room beside those that are held; or when nothing can be
    dropped without it, as the sets of files that are needed at once (`together`) tell.
    """

    def __init__(
        self, remote: Remote, files: list[RemoteWeightFile], together: Iterable[set[str]], on_bytes: OnBytes,
        room: Callable[[int, int], bool] | None = None,
    ) -> None:  # fmt: skip
        self._remote, self._files, self._on_bytes, self._room = remote, files, on_bytes, room
        order = {file.name: i for i, file in enumerate(files)}
        #: The number of the last file that must have arrived before a file can be dropped.
        self._until = dict(order)
        for group in together:
            last = max(order[name] for name in group)
            for name in group:
                self._until[name] = max(self._until[name], last)
        self._held: dict[str, int] = {}  # by name, on its way or arrived: its bytes, if it is to be removed
        self._uses: dict[str, Use] = {}  # by name of what arrived
        self._stopped = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._fetch_all, name=DOWNLOAD_THREAD, daemon=True)

    def _fetch_all(self) -> None:
        try:
            for number, file in enumerate(self._files):
                while not (self._stopped or self._has_room(number)):
                    time.sleep(0.02)
                if self._stopped:
                    return
                with errors_only():
                    path = self._fetch(file.name)
                file.arrive(path, partial(self._give_back, file.name))
        except BaseException as error:  # noqa: BLE001 - it is raised where the files are waited for
            for file in self._files:
                file.fail(error)
        finally:
            if self._stopped:
                self._end()

    def _fetch(self, name: str) -> Path:
        if self._room is None:
            return self._remote.fetch(name, self._count)
        with self._lock:
            self._held[name] = self._remote.files[name].size
        path, temporary, use = self._remote.fetch_temporarily(name, self._count)
        with self._lock:
            self._uses[name] = use
            if not temporary:
                self._held[name] = 0
        return path

    def _count(self, nbytes: int) -> None:
        if self._stopped:
            raise HubError("the download was stopped.")  # nobody is waiting for it any more
        self._on_bytes(nbytes)

    def _has_room(self, number: int) -> bool:
        with self._lock:
            held = dict(self._held)
        if self._room is None or self._room(self._remote.missing_bytes(self._files[number].name), sum(held.values())):
            return True
        return all(self._until[name] >= number for name in held)

    def _give_back(self, name: str) -> None:
        """Let a file leave the cache that has arrived and been dropped."""
        with self._lock:
            use = self._uses.pop(name, None)
        if use is not None:
            self._remote.cache.give_up(self._remote.files[name], use)
        with self._lock:
            self._held.pop(name, None)

    def stop(self) -> None:
        """Let whoever waits for a file go on; no further one is fetched."""
        self._stopped = True
        for file in self._files:
            file.stop()

    def _end(self) -> None:
        with self._lock:
            uses, self._uses = list(self._uses.values()), {}
        for use in uses:
            use.close()

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._end()
