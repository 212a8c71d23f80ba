"""What long work tells whoever watches it. The library calls; the command line, or a caller's function, shows."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Takes how many bytes have moved since the last call: fewer than none where some must come again.
OnBytes: TypeAlias = Callable[[int], None]
#: Takes a label and how many bytes will move, and gives what is to be told of every part of them.
StartTransfer: TypeAlias = Callable[[str, int], OnBytes]


class Progress:
    """Hears about stages and their progress, possibly from several threads; this one stays silent."""

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        """Begin a stage that will move `total_bytes` bytes and finish `layers` layers."""

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        """Say that `nbytes` more are finished; `layer` is what is being worked on; `done` says that it is complete
        now."""

    def end(self) -> None:
        """End the current stage."""

    def transfer(self, label: str, total_bytes: int) -> OnBytes:
        """Begin to move `total_bytes` bytes beside the stages; what is returned is to be told of every part of them."""
        return lambda nbytes: None

    def waiting(self, label: str) -> AbstractContextManager[None]:
        """Say, while the context lasts, that something goes on of which nothing can be counted."""
        return nullcontext()


class BytesOnly(Progress):
    """Passes on the bytes of work that goes on within another's stage, which counts the layers."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        self._progress.advance(nbytes, layer)


class StageTimes(Progress):
    """Passes everything on, and notes how long each stage took: (label, bytes, seconds)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stages: list[tuple[str, int, float]] = []
        self.transfer = progress.transfer  # type: ignore[method-assign]
        self.waiting = progress.waiting  # type: ignore[method-assign]
        self.advance = progress.advance  # type: ignore[method-assign]

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self._now, self._started = (label, total_bytes), time.monotonic()
        self._progress.stage(label, total_bytes, layers)

    def end(self) -> None:
        self._progress.end()
        self.stages.append((*self._now, time.monotonic() - self._started))


# ---- For callers of the library ----


@dataclass(frozen=True)
class ProgressEvent:
    """How far a stage is: "downloading", "converting", "verifying", … Counts only grow; a download has no layers.

    `layer` is the layer or tensor at hand.
    """

    stage: str
    bytes_done: int
    bytes_total: int
    layers_done: int = 0
    layers_total: int = 0
    layer: str | None = None


class Told(Progress):
    """Calls `callback` with a ProgressEvent at each step, one call at a time. What it raises stops the work."""

    def __init__(self, callback: Callable[[ProgressEvent], object]) -> None:
        self._callback, self._lock = callback, threading.Lock()

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self._now = ProgressEvent(label, 0, total_bytes, 0, layers)
        with self._lock:
            self._callback(self._now)

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        with self._lock:
            now = self._now
            self._now = ProgressEvent(
                now.stage, now.bytes_done + nbytes, now.bytes_total, now.layers_done + done, now.layers_total,
                layer or now.layer,
            )  # fmt: skip
            self._callback(self._now)

    def transfer(self, label: str, total_bytes: int) -> OnBytes:
        come = 0

        def more(nbytes: int) -> None:
            nonlocal come
            with self._lock:
                come += nbytes
                self._callback(ProgressEvent(label, come, total_bytes))

        return more


class NotebookBars(Progress):
    """A bar for each stage, as notebooks draw it."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self._bar_type, self._lock = tqdm, threading.Lock()
        self._bar: Any = None  # of the stage at hand

    def _new(self, label: str, total_bytes: int) -> Any:
        return self._bar_type(total=total_bytes, desc=label, unit="B", unit_scale=True)

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self._bar = self._new(label, total_bytes)

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        with self._lock:
            self._bar.update(nbytes)

    def end(self) -> None:
        self._bar.close()

    def transfer(self, label: str, total_bytes: int) -> OnBytes:
        if not total_bytes:
            return super().transfer(label, total_bytes)
        bar = self._new(label, total_bytes)

        def more(nbytes: int) -> None:
            bar.update(nbytes)
            if bar.n >= total_bytes:
                bar.close()

        return more


def progress_for(callback: Callable[[ProgressEvent], object] | None) -> Progress:
    """Return what tells `callback`; without one, what shows bars in a notebook and is silent elsewhere."""
    if callback is not None:
        return Told(callback)
    return NotebookBars() if _in_notebook() else Progress()


def _in_notebook() -> bool:
    """Tell whether a Jupyter kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None
