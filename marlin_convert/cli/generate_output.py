"""What `generate` prints: the text while it is made, and how fast it came."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..text import visible
from .output import Screen, labelled

if TYPE_CHECKING:
    from ..engines.generate import Generated


class GenerateScreen(Screen):
    """Where `generate` prints."""

    @contextlib.contextmanager
    def text(self, prompt: str) -> Iterator[Callable[[str], None]]:
        """Give where generated text goes, piece by piece; the prompt before it, unless --quiet wants the text alone."""
        started = False

        def piece(text: str) -> None:
            nonlocal started
            if not started and not self.silent:
                self.out.print(prompt, style="dim", end="", soft_wrap=True)
            started = True
            if not self.as_json:
                sys.stdout.write(visible(text))
                sys.stdout.flush()

        log = logging.getLogger("marlin_convert")
        level = log.level
        if self.silent:
            log.setLevel(logging.ERROR)  # silences the warning that a CPU is slow
        try:
            yield piece
        finally:
            log.setLevel(level)
        if not self.as_json:
            print(flush=True)

    def generated(self, done: Generated) -> None:
        """Show what `generate` says after the text: on standard error, so that the text can go into a file."""
        self._json(done.as_dict())
        if self.silent:
            return
        self.err.print(
            f"{done.new_tokens} tokens in {done.seconds:.1f} s, {done.tokens_per_second:.1f} tokens/s on {done.device} "
            f"in {done.dtype}; loaded in {done.load_seconds:.1f} s",
            soft_wrap=True,
        )  # fmt: skip
        if done.note:
            self.err.print(labelled(done.note, "note", "yellow"), soft_wrap=True)
