"""Progress as people see it: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichBars
from rich.table import Column
from rich.text import Text

from ..progress import OnBytes, Progress
from ..text import size

#: Seconds between progress lines when the output is not a terminal.
PLAIN_INTERVAL = 5.0


class LayerColumn(ProgressColumn):
    """The current layer, in the room that other columns leave: the end of its name, which tells most."""

    class Tail:
        def __init__(self, name: str) -> None:
            self.name = name

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            room = options.max_width
            yield Text(self.name if len(self.name) <= room else "…" + self.name[len(self.name) + 1 - room :], "dim")

    def render(self, task: Task) -> Tail:
        return self.Tail(task.fields["layer"])


class Roomy(ProgressColumn):
    """A column that is left out where the terminal is narrower than `least`, and of what cannot be counted."""

    def __init__(self, inner: ProgressColumn, console: Console, least: int = 0, *, uncounted: bool = False) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._inner, self._console, self._least, self._uncounted = inner, console, least, uncounted

    def render(self, task: Task) -> RenderableType:
        shown = self._console.width >= self._least and (task.total is not None or self._uncounted)
        return self._inner(task) if shown else Text("")


class TimeColumn(ProgressColumn):
    """The time that is left, where that is known; of what cannot be counted, the time that has gone by."""

    def __init__(self, waits: Callable[[Task], bool]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._waits, self._left, self._gone = waits, TimeRemainingColumn(), TimeElapsedColumn()

    def render(self, task: Task) -> RenderableType:
        if task.total is None:
            return self._gone(task)
        return Text("") if self._waits(task) else self._left(task)


#: Widths of a terminal from which there is room for the layer's name, the rate, and a bar.
FOR_LAYER, FOR_RATE, FOR_BAR = 80, 72, 60


class Bars(Progress):
    """A live line for each thing that goes on: bytes and their rate (or what is counted instead), time left, layers,
    the layer at hand. What finds no room is left out: the layer first, then the rate, then the bar."""

    def __init__(self, console: Console, *, timings: bool = False) -> None:
        bar = BarColumn(bar_width=10 if console.width < 100 else 24)
        rate = () if timings else (Roomy(TransferSpeedColumn(), console, FOR_RATE),)
        self._bars = RichBars(
            TextColumn("{task.description}"),
            Roomy(bar, console, FOR_BAR, uncounted=True),
            Roomy(MofNCompleteColumn() if timings else DownloadColumn(), console),
            *rate,
            TimeColumn(self._waits),
            TextColumn("{task.fields[layers]}"),
            LayerColumn(table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            transient=True,
            expand=True,
        )
        self._console = console
        self._lock = threading.Lock()
        self._task: TaskID | None = None

    def _waits(self, task: Task) -> bool:
        """Tell whether a task may wait for a download, which alone tells how long it takes."""
        others = (x for x in self._bars.tasks if x.id != self._task and x.total is not None)
        return task.id == self._task and any(not x.finished for x in others)

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self._done, self._layers, self._layer = 0, layers, ""
        self._task = self._bars.add_task(label, total=total_bytes, layers=f"0/{layers} layers", layer="")
        self._bars.start()

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        assert self._task is not None
        with self._lock:
            self._done += done
            self._layer = layer or self._layer
            self._bars.update(
                self._task, advance=nbytes, layers=f"{self._done}/{self._layers} layers",
                layer=self._layer if self._console.width >= FOR_LAYER else "",
            )  # fmt: skip

    def end(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None
        self._bars.stop()

    def transfer(self, label: str, total_bytes: int) -> OnBytes:
        if not total_bytes:
            return super().transfer(label, total_bytes)
        task = self._bars.add_task(label, total=total_bytes, layers="", layer="")
        self._bars.start()
        come = 0

        def on_bytes(nbytes: int) -> None:
            nonlocal come
            come += nbytes
            self._bars.update(task, advance=nbytes, visible=come < total_bytes)

        return on_bytes

    @contextlib.contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        task = self._bars.add_task(label, total=None, layers="", layer="")
        self._bars.start()
        try:
            yield
        finally:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()

    def stop(self) -> None:
        self._bars.stop()


class PlainLines(Progress):
    """One line every few seconds, for logs. `amount` writes what is counted: bytes, unless told otherwise."""

    def __init__(self, console: Console, amount: Callable[[float], str] | None = None) -> None:
        self._console, self._amount = console, amount or size
        self._lock = threading.Lock()

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self._label, self._total, self._layers = label, total_bytes, layers
        self._bytes = self._done = 0
        self._started = self._last = time.monotonic()
        self._print(f"{label}: {layers} layers, {self._amount(total_bytes)}")

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        with self._lock:
            self._bytes += nbytes
            self._done += done
            now = time.monotonic()
            if now - self._last < PLAIN_INTERVAL:
                return
            self._last = now
            rate = self._bytes / (now - self._started)
            left = (self._total - self._bytes) / rate if rate else 0
            self._print(
                f"{self._label}: {100 * self._bytes // max(1, self._total)} %, {self._done}/{self._layers} layers, "
                f"{self._amount(self._bytes)} of {self._amount(self._total)}, {self._amount(rate)}/s, {left:.0f} s left"
                + (f", {layer}" if layer else "")
            )

    def end(self) -> None:
        seconds = time.monotonic() - self._started
        self._print(f"{self._label}: done, {self._layers} layers, {self._amount(self._bytes)} in {seconds:.1f} s")

    def transfer(self, label: str, total_bytes: int) -> OnBytes:
        if not total_bytes:
            return super().transfer(label, total_bytes)
        started = last = time.monotonic()
        come = 0
        self._print(f"{label}: {self._amount(total_bytes)}")

        def on_bytes(nbytes: int) -> None:
            nonlocal come, last
            come, now = come + nbytes, time.monotonic()
            if come >= total_bytes:
                self._print(f"{label}: done, {self._amount(come)} in {now - started:.1f} s")
            elif now - last >= PLAIN_INTERVAL:
                last, rate = now, max(come, 1) / (now - started)
                self._print(
                    f"{label}: {100 * come // total_bytes} %, {self._amount(come)} of {self._amount(total_bytes)}, "
                    f"{self._amount(rate)}/s, {(total_bytes - come) / rate:.0f} s left"
                )

        return on_bytes

    def waiting(self, label: str) -> contextlib.AbstractContextManager[None]:
        return waiting(self._console, label, at_once=False)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


@contextlib.contextmanager
def waiting(console: Console, what: str, *, at_once: bool = True) -> Iterator[None]:
    """Say that `what` goes on, and every few seconds for how long it has, where nothing can be counted; unless
    `at_once`, only if it takes that long."""
    if at_once:
        console.print(what, soft_wrap=True)
    started, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(PLAIN_INTERVAL):
            before = "" if at_once else f"{what} "
            console.print(f"{before}… for {time.monotonic() - started:.0f} s", soft_wrap=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
