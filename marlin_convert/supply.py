"""What can be converted when: everything at once from a folder; a layer as soon as its files are there from the Hub."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeAlias

from .checkpoint import Checkpoint, Tensor
from .download import Arrivals
from .plan import Layer, Plan

#: What is converted, or copied, as one.
Item: TypeAlias = "Layer | Tensor"


def files_of(item: Item) -> set[str]:
    """The weight files that hold what is read of `item`."""
    if isinstance(item, Tensor):
        return {item.file}
    return {t.file for t in (item.qweight, item.scales, item.qzeros, item.g_idx) if t is not None}


def items(plan: Plan) -> list[Item]:
    """All layers, then all tensors that are copied."""
    return [*plan.layers, *plan.copies]


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


def counted(tasks: list[Callable[[], None]], finished: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """`tasks`, of which the last to end calls `finished`; they may run on several threads."""
    left, lock = len(tasks), threading.Lock()

    def run(task: Callable[[], None]) -> None:
        nonlocal left
        task()
        with lock:
            left -= 1
            last = not left
        if last:
            finished()

    for task in tasks:
        yield lambda task=task: run(task)  # type: ignore[misc]
    if not tasks:
        finished()
