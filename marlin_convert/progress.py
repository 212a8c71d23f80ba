"""What long work tells whoever watches it. The library calls; the command line draws."""

from collections.abc import Callable


class Progress:
    """Hears about stages and their progress, possibly from several threads; this one stays silent."""

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        """A stage begins that will move `total_bytes` bytes and finish `layers` layers."""

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        """`nbytes` more are finished; `layer` is what is being worked on; `done` says that it is complete now."""

    def end(self) -> None:
        """The current stage is over."""

    def meanwhile(self, label: str, total_bytes: int) -> Callable[[int], None]:
        """Beside the stages, `total_bytes` bytes begin to move; tell what is returned of every part of them."""
        return lambda nbytes: None


class BytesOnly(Progress):
    """Passes on the bytes of work that goes on within another's stage, which counts the layers."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        self._progress.advance(nbytes, layer)
