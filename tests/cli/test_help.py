"""Help and version. That they load nothing heavy is tests/test_rooms.py's."""

from __future__ import annotations

import re
from collections.abc import Callable

import click
import pytest

import marlin_convert
from marlin_convert.cli import commands
from marlin_convert.errors import EXIT_CODES
from tests.support.cli import Run


def test_version(run: Callable[..., Run]) -> None:
    result = run("--version")
    assert (result.code, result.out, result.err) == (0, f"marlin-convert {marlin_convert.__version__}\n", "")


@pytest.mark.parametrize("command", [None, *commands.cli.commands])
def test_help(main: Callable[..., Run], command: str | None) -> None:
    args = [] if command is None else [command]
    result = main(*args, "--help")
    assert (result.code, result.err) == (0, "")
    assert main(*args, "-h").out == result.out
    shown = commands.cli.commands[command or "convert"]
    options = [p for p in shown.params if isinstance(p, click.Option)]
    assert options
    for option in options:
        assert option.help, option.name
        assert option.help.endswith((".", ")")), option.help
        for name in option.opts:
            assert name in result.out
    assert shown.help
    if command is None:
        assert all(f"  {name} " in result.out for name in commands.cli.commands)
        assert all(re.search(rf"^  {code} +\S", result.out, re.MULTILINE) for code in EXIT_CODES)
