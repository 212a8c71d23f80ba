"""What can be converted when: everything at once from a folder; a layer as soon as its files are there from the Hub."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from ..checkpoint.output_folder import check_space, existing
from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import Shards
from ..hub.open import Source
from ..hub.prefetch import Arrivals
from ..progress import Progress
from .layer import Layer
from .plan import Plan

#: What is converted, or copied, as one.
Item: TypeAlias = "Layer | Tensor"


def files_of(item: Item) -> set[str]:
    """The weight files that hold what is read of `item`."""
    if isinstance(item, Tensor):
        return {item.file}
    return {tensor.file for tensor in item.source.tensors}


def items(plan: Plan) -> list[Item]:
    """All layers, then all tensors that are copied."""
    return [*plan.layers, *plan.copies]


def check_room(result: int, checkpoint: Checkpoint, origin: Source, out: Path, *, low_disk: bool) -> None:
    """Raise OutputError unless the disks have room for the result, of `result` bytes at `out`, and for what is to be
    fetched beside it."""
    remote = origin.remote
    coming = [] if remote is None else [remote.to_come(file) for file in checkpoint.weight_files]
    beside = 0 if remote is None else sum(map(remote.to_come, checkpoint.weights_beside))
    if remote is None or not (any(coming) or beside):
        check_space(out.parent, result)
        return
    largest, whole = max(coming) + beside, sum(coming) + beside
    if not _one_disk(remote.cache.folder, out):
        check_space(out.parent, result)
        held = min(whole, 2 * max(coming) + beside) if low_disk else whole
        check_space(remote.cache.folder, held, "what is downloaded takes", "" if low_disk else ", or use --low-disk")
        return
    small = result + largest
    if low_disk:
        check_space(out.parent, small, "the result and a part of the source take")
    else:
        advice = f", or use --low-disk, which takes {small / 1e9:.2f} GB" if small < result + whole else ""
        check_space(out.parent, result + whole, "the result and the download of the source take", advice)


def _one_disk(cache: Path, out: Path) -> bool:
    return existing(cache).stat().st_dev == existing(out).stat().st_dev


def arrivals(
    checkpoint: Checkpoint, plan: Plan, origin: Source, shards: Shards, progress: Progress, *, low_disk: bool
) -> contextlib.AbstractContextManager[Arrivals | None]:
    """The weight files that are still on the Hub, on their way; None where all are here.

    With `low_disk`, a file is fetched when it has room within what the result (`shards`) takes in the end and one more
    file of the source; on a disk of its own, the cache holds two files.
    """
    remote = origin.remote
    if remote is None:
        return contextlib.nullcontext()
    largest = max(remote.files[file].size for file in checkpoint.weight_files)
    one_disk = _one_disk(remote.cache.folder, shards.folder)

    def room(nbytes: int) -> bool:
        limit, used = (plan.bytes_out + largest, shards.written) if one_disk else (2 * largest, 0)
        return weights.held + nbytes + used <= limit

    hear = progress.meanwhile("downloading", sum(map(remote.to_come, checkpoint.weight_files)))
    together = [files_of(item) for item in items(plan)]
    weights = Arrivals(remote, checkpoint.weight_files, together, hear, room if low_disk else None)
    return weights


class Supply:
    """The items of a plan, in the order in which they can be converted; see `items`.

    `weights` brings the files of `checkpoint`, all of which are there without it. With `release`, a file is closed and
    given back to `weights` once all its items are `finished`.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, weights: Arrivals | None, *, release: bool) -> None:
        self._checkpoint, self._items, self._weights, self._release = checkpoint, items(plan), weights, release
        self._users = Counter(file for item in self._items for file in files_of(item))
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Item]:
        if self._weights is None:
            yield from self._items
            return
        there: set[str] = set()
        left = self._items
        for file, path in self._weights:
            self._checkpoint.arrived(file, path)
            there.add(file)
            if not self._users[file]:
                self._give_back(file)
            ready = [item for item in left if files_of(item) <= there]
            left = [item for item in left if not files_of(item) <= there]
            yield from ready

    def finished(self, item: Item) -> None:
        """Nothing more is read of `item`. From any thread."""
        for file in files_of(item):
            with self._lock:
                self._users[file] -= 1
                last = not self._users[file]
            if last:
                self._give_back(file)

    def _give_back(self, file: str) -> None:
        if self._release and self._weights is not None:
            self._checkpoint.release(file)
            self._weights.release(file)

    def stop(self) -> None:
        """Let whoever waits for the next item go on."""
        if self._weights is not None:
            self._weights.stop()
