"""A pseudo-terminal, and what it shows of what a program wrote."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

from tests.support.cli import PATIENCE


class Terminal:
    """What a terminal shows after what a program wrote: text, CR, LF, cursor up, erase line; `frames` is all of it."""

    def __init__(self, raw: str) -> None:
        self.frames, self.cursor_visible = raw, True
        self.lines, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", raw):
            if token == "\n":
                row += 1
                self.lines += [""] * (row + 1 - len(self.lines))
            elif token == "\r":
                column = 0
            elif not token.startswith("\x1b"):
                self.lines[row] = self.lines[row].ljust(column)[:column] + token + self.lines[row][column + 1 :]
                column += 1
            elif token.endswith("A"):
                row = max(0, row - int(token[2:-1] or 1))
            elif token.endswith("K"):
                assert token == "\x1b[2K"
                self.lines[row] = ""
            elif token in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor_visible = token.endswith("h")
            else:
                assert token.endswith("m"), token

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n")


def on_a_terminal(
    command: list[str], *, columns: int = 100, environment: dict[str, str] | None = None
) -> tuple[int, Terminal]:
    """Run `command` with both outputs on a pseudo-terminal."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        stdin=child,
        stdout=child,
        stderr=child,
        env={**inherited, "TERM": "xterm-256color", **(environment or {})},
    )
    os.close(child)
    raw = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not part:
            break
        raw += part
    os.close(parent)
    return process.wait(timeout=PATIENCE), Terminal(raw.decode())
