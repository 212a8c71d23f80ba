"""The program: runs a command, and turns every way of ending into one clear line and a documented exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

import click

from ..errors import BUG, INTERRUPTED, MarlinConvertError
from .commands import cli
from .params import OutputOptions


def main(args: list[str] | None = None) -> None:
    """Run the program with `args`, by default those that it was started with; ends the process."""
    output = OutputOptions()
    for number in (signal.SIGTERM, signal.SIGHUP):  # end like Ctrl-C does: stop, clean up, say so
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or a file name that is not UTF-8 is no reason to fail
    try:
        cli.main(args=args, prog_name="marlin-convert", standalone_mode=False, obj=output)
        sys.stdout.flush()
    except MarlinConvertError as error:
        _fail(output, error.exit_code, type(error).__name__, error.message)
    except click.ClickException as error:
        _fail(output, error.exit_code, type(error).__name__, error.format_message(), error.show)
    except (KeyboardInterrupt, click.Abort):
        try:
            _fail(output, INTERRUPTED, "Interrupted", "interrupted; nothing half-done was left behind.")
        finally:
            _leave_download(INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe went away (… | head)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # whichever it was: Python flushes both once more when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(1)
    except Exception as error:
        if output.verbose:
            raise
        text = f"{type(error).__name__}: {error}; this is a bug. Run again with --verbose, and report what it prints."
        _fail(output, BUG, "Bug", text)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave_download(code: int) -> None:
    """Exit at once, with `code`, if a download that was interrupted still has threads."""
    hub = sys.modules.get("marlin_convert.hub.client")
    if hub and hub.downloading():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(output: OutputOptions, code: int, kind: str, text: str, show: Callable[[], None] | None = None) -> None:
    """Say what went wrong, for people on standard error and, with --json, for scripts on standard output; exit.

    Without `text`, everything has been said before.
    """
    if output.as_json and text:
        click.echo(json.dumps({"ok": False, "error": kind, "message": text, "exit_code": code}))
    elif show:
        show()
    elif text:
        click.echo(f"marlin-convert: {text}", err=True)
    sys.exit(code)
