"""What long work tells whoever watches it. The library calls; the command line draws."""


class Progress:
    """Hears about stages and their progress, possibly from several threads; this one stays silent."""

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        """A stage begins that will move `total_bytes` bytes and finish `layers` layers."""

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        """`nbytes` more are finished; `layer` is what is being worked on; `done` says that it is complete now."""

    def end(self) -> None:
        """The current stage is over."""
