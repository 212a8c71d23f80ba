"""Signals that ask the program to end, as exceptions in its main thread."""

from __future__ import annotations

import signal
import time
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


def _raise(number: int, frame: FrameType | None) -> None:
    global _raised_at
    if time.monotonic() - _raised_at < _PAUSE:
        return
    _raised_at = time.monotonic()
    raise Interrupted(number)
