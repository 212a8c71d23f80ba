"""What can be converted when: everything at once from a folder; a layer as soon as its files are there from the Hub."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from ..checkpoint.output_folder import check_space, existing
from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import Shards
from ..hub.prefetch import Prefetch
from ..hub.repository import Remote
from ..hub.weights import HubFiles
from ..progress import Progress
from .layer import Layer
from .plan import Plan

#: What is converted, or copied, as one.
Item: TypeAlias = "Layer | Tensor"


def files_of(item: Item) -> set[str]:
    """Return the weight files that hold what is read of `item`."""
    if isinstance(item, Tensor):
        return {item.file}
    return {tensor.file for tensor in item.source.tensors}


def items(plan: Plan) -> list[Item]:
    """Return all layers, then all tensors that are copied."""
    return [*plan.layers, *plan.copies]


def check_room(result: int, checkpoint: Checkpoint, remote: Remote | None, out: Path, *, low_disk: bool) -> None:
    """Raise OutputError unless the disks have room for the result, of `result` bytes at `out`, and for what is to be
    fetched from `remote` beside it."""
    coming = [] if remote is None else [remote.missing_bytes(file) for file in checkpoint.weight_files]
    beside = 0 if remote is None else sum(map(remote.missing_bytes, checkpoint.weights_beside))
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


@contextlib.contextmanager
def prefetching(
    checkpoint: Checkpoint, plan: Plan, hub: HubFiles | None, shards: Shards, progress: Progress, *, low_disk: bool
) -> Iterator[Callable[[], None]]:
    """Fetch the weight files that are still on the Hub, in the background; yields a function that stops it.

    With `low_disk`, a file is fetched when it has room within what the result (`shards`) takes in the end and one more
    file of the source; on a disk of its own, the cache holds two files.
    """
    if hub is None:
        yield lambda: None
        return
    remote, files = hub.remote, [hub.weights[name] for name in checkpoint.weight_files]
    largest = max(remote.files[file].size for file in checkpoint.weight_files)
    one_disk = _one_disk(remote.cache.folder, shards.folder)

    def room(nbytes: int, held: int) -> bool:
        limit, used = (plan.bytes_out + largest, shards.written) if one_disk else (2 * largest, 0)
        return held + nbytes + used <= limit

    on_bytes = progress.transfer("downloading", sum(map(remote.missing_bytes, checkpoint.weight_files)))
    together = [files_of(item) for item in items(plan)]
    with Prefetch(remote, files, together, on_bytes, room if low_disk else None) as prefetch:
        yield prefetch.stop


class Schedule:
    """The items of a plan (see `items`), each as soon as the weight files that it is read from have arrived.

    `stop` lets whoever waits for a file go on. With `drop`, a file is let go once all its items are `finished`.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, stop: Callable[[], None], *, drop: bool) -> None:
        self._checkpoint, self.stop, self._drop = checkpoint, stop, drop
        order = {file: number for number, file in enumerate(checkpoint.weight_files)}
        self._complete: dict[str, list[Item]] = {file: [] for file in order}  # keyed by the last file that they need
        self._users: Counter[str] = Counter()
        for item in items(plan):
            files = files_of(item)
            self._complete[max(files, key=order.__getitem__)].append(item)
            self._users.update(files)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Item]:
        for file in self._checkpoint.weight_files:
            if not self._checkpoint.wait_for(file):
                return
            if not self._users[file]:
                self._let_go(file)
            yield from self._complete[file]

    def finished(self, item: Item) -> None:
        """Tell that nothing more is read of `item`. From any thread."""
        for file in files_of(item):
            with self._lock:
                self._users[file] -= 1
                last = not self._users[file]
            if last:
                self._let_go(file)

    def _let_go(self, file: str) -> None:
        if self._drop:
            self._checkpoint.drop(file)
