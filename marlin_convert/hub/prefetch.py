"""Weights that arrive from the Hub while others are converted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import HubError
from .cache import Use
from .client import DOWNLOAD_THREAD, errors_only, explained
from .download import Hear
from .repository import Remote


class Arrivals:
    """The weight files of a repository, fetched in order, while those that came before are used.

        with Arrivals(remote, files, together, hear) as arrivals:
            for file, path in arrivals:   # waits for the next one
                ...

    With `room`, they are removed from the cache as soon as they are given back (`release`), if they were fetched here,
    or by a run like this that was interrupted, and nobody else needs them (see `cache`). A file is then fetched only
    when `room(nbytes)` says that so many more bytes have room beside those `held`; or when nothing can be given back
    without it, as the sets of files that are needed at once (`together`) tell.
    """

    def __init__(
        self, remote: Remote, files: list[str], together: Iterable[set[str]], hear: Hear,
        room: Callable[[int], bool] | None = None,
    ) -> None:  # fmt: skip
        self._remote, self._files, self._hear, self._room = remote, files, hear, room
        order = {file: i for i, file in enumerate(files)}
        #: The number of the last file that must be there before a file can be given back.
        self._until = dict(order)
        for group in together:
            last = max(order[file] for file in group)
            for file in group:
                self._until[file] = max(self._until[file], last)
        self._held: dict[str, int] = {}  # by file, on its way or arrived: its bytes, if it is to be removed
        self._uses: dict[str, Use] = {}  # by file that arrived
        self._ready: list[tuple[str, Path]] = []
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fetch_all, name=DOWNLOAD_THREAD, daemon=True)

    @property
    def held(self) -> int:
        """Bytes in the cache that will be removed."""
        with self._changed:
            return sum(self._held.values())

    def _fetch_all(self) -> None:
        try:
            for number, file in enumerate(self._files):
                while not (self._stopped or self._has_room(number)):
                    time.sleep(0.02)
                if self._stopped:
                    return
                with errors_only():
                    path = self._fetch(file)
                with self._changed:
                    self._ready.append((file, path))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is raised where the files are waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch(self, file: str) -> Path:
        if self._room is None:
            return self._remote.fetch(file, self._heard)
        with self._changed:
            self._held[file] = self._remote.files[file].size
        path, passing, use = self._remote.fetch_passing(file, self._heard)
        with self._changed:
            self._uses[file] = use
            if not passing:
                self._held[file] = 0
            if self._stopped:
                self._end_uses()
        return path

    def _end_uses(self) -> None:
        for use in self._uses.values():
            use.close()
        self._uses.clear()

    def _heard(self, nbytes: int) -> None:
        if self._stopped:
            raise HubError("the download was stopped.")  # nobody waits for it any more
        self._hear(nbytes)

    def _has_room(self, number: int) -> bool:
        if self._room is None or self._room(self._remote.to_come(self._files[number])):
            return True
        with self._changed:
            return all(self._until[file] >= number for file in self._held)

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        for _ in self._files:
            with self._changed:
                while not self._ready:
                    if self._stopped:
                        return
                    if self._error is not None:
                        with explained(self._remote.repo_id, self._remote.revision):
                            raise self._error
                    self._changed.wait()
                arrived = self._ready.pop(0)
            yield arrived

    def release(self, file: str) -> None:
        """Nothing more is needed of a file that has arrived."""
        with self._changed:
            use = self._uses.pop(file, None)
        if use is not None:
            self._remote.cache.give_up(self._remote.files[file], use)
        with self._changed:
            self._held.pop(file, None)

    def stop(self) -> None:
        """Let whoever waits for a file go on; no further one is fetched."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        with self._changed:
            self._end_uses()
