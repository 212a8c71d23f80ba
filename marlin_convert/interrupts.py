"""Signals that ask the program to end, as exceptions in its main thread."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

#: Ctrl-C, a request of the system or of another program, a terminal that went away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds during which further signals do not interrupt the cleanup that the first one started.
_PAUSE = 3.0
_raised_at = float("-inf")


class Interrupted(KeyboardInterrupt):
    """The signal `number` came."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def raise_on_signals() -> None:
    """Raise Interrupted when one of SIGNALS comes; those that are ignored, as nohup and scripts do, stay so."""
    global _raised_at
    _raised_at = float("-inf")
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def ignore_signals() -> None:
    """Let what is left of the program end by itself: nothing can be undone any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Let a signal that comes meanwhile act when the block is left: a thread that has begun is known by then to whoever
    ends it. Python handles signals in its main thread alone; others are not held up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[signal.Signals(came[0])](came[0], None)


def _raise(number: int, frame: FrameType | None) -> None:
    global _raised_at
    if time.monotonic() - _raised_at < _PAUSE:
        return
    _raised_at = time.monotonic()
    raise Interrupted(number)
