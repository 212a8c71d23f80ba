"""The one way by which text reaches a terminal: as text, whatever is in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.theme import Theme

from ..text import visible

#: Colours of the bars; red is for what is wrong.
_THEME = Theme({"progress.data.speed": "cyan", "bar.complete": "green", "bar.finished": "green", "bar.pulse": "green"})


class PlainConsole(Console):
    """A console on which text is what it is: no markup, and nothing that a terminal would obey. Styles come from
    objects of rich."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, theme=_THEME, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        """Leave it to `cli.main` what to do when the reader of a pipe went away; rich would exit at once."""
        raise BrokenPipeError


class Lossy:
    """A stream whose errors do not end the program, but for that of a pipe without a reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._quietly():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._quietly():
            self._stream.flush()

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError:
            return
