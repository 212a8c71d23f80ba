"""The program: runs a command, and turns every way of ending into one clear line and a documented exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import click

from ..errors import BUG, MarlinConvertError, OutputError
from ..interrupts import ignore_signals, raise_on_signals
from ..text import visible
from .commands import cli
from .documents import document
from .params import OutputOptions

#: Errors of the file or device that standard output is redirected to.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(args: list[str] | None = None) -> None:
    """Run the program with `args`, by default those that it was started with; ends the process."""
    output = OutputOptions()
    raise_on_signals()
    _mend_streams()
    try:
        cli.main(args=args, prog_name="marlin-convert", standalone_mode=False, obj=output)
        ignore_signals()
        sys.stdout.flush()
        _say("")
    except MarlinConvertError as error:
        _fail(output, error.exit_code, type(error).__name__, error.message)
    except click.ClickException as error:
        _fail(output, error.exit_code, type(error).__name__, error.format_message(), error.show)
    except (KeyboardInterrupt, click.Abort) as error:  # the latter is click's name for the former
        code = 128 + getattr(error.__cause__ or error, "number", signal.SIGINT)
        try:
            _fail(output, code, "Interrupted", "interrupted; nothing half-done was left behind.")
        finally:
            _leave_download(code)
    except BrokenPipeError:  # the reader of a pipe went away (… | head)
        _leave(sys.stdout, sys.stderr)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - each error ends in one line for the user
        if isinstance(error, OSError) and error.filename is None and error.errno in _FULL:
            _leave(sys.stdout)  # errors of all other files have been caught and named
            _fail(OutputOptions(), 1, "OutputError", f"standard output cannot be written: {error.strerror}.")
        if isinstance(error, OSError) and _nowhere():
            text = "the working directory was removed; change to one that exists."
            _fail(output, OutputError.exit_code, "OutputError", text)
        if output.verbose:
            _say(visible(traceback.format_exc()))
        text = f"{type(error).__name__}: {error}; this is a bug. Run again with --verbose, and report what it prints."
        _fail(output, BUG, "Bug", text)


def _mend_streams() -> None:
    """Let there be a standard output and error, if they are closed, and let them take any text: a terminal or a file
    name that is not UTF-8 is no reason to fail."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - until the program ends
            if stream.fileno() != number:  # no other file may get this descriptor, and what is printed to it
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")


def _nowhere() -> bool:
    """Tell whether there is no working directory any more."""
    try:
        Path.cwd()
    except OSError:
        return True
    return False


def _leave(*streams: TextIO) -> None:
    """Send what is still in the streams nowhere: Python flushes standard output and error once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


def _leave_download(code: int) -> None:
    """Exit at once, with `code`, if a download that was interrupted still has threads."""
    hub = sys.modules.get("marlin_convert.hub.client")
    if hub and hub.downloading():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(
    output: OutputOptions, code: int, kind: str, text: str, show: Callable[[io.StringIO], None] | None = None
) -> None:
    """Say what went wrong, for people on standard error and, with --json, for scripts on standard output; exit.

    Without `text`, everything has been said before.
    """
    ignore_signals()
    if output.as_json and text:
        with contextlib.suppress(OSError):
            value = {"ok": False, "error": kind, "message": text, "exit_code": code}
            click.echo(json.dumps(document(value, output.source)))
    elif show:
        show(shown := io.StringIO())
        _say(visible(shown.getvalue()))
    elif text:
        _say(visible(f"marlin-convert: {text}\n"))
    sys.exit(code)


def _say(text: str) -> None:
    """Write to standard error, whether or not it takes anything."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _leave(sys.stderr)
