"""Help, its examples, completion and version. That they load nothing heavy is tests/test_rooms.py's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import marlin_convert
from marlin_convert.cli import commands
from marlin_convert.cli.examples import EXAMPLES
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


@pytest.mark.parametrize("command", ["", *commands.cli.commands])
def test_examples_are_of_commands_that_there_are(main: Callable[..., Run], command: str) -> None:
    """Three for each, that the command itself takes."""
    assert len(EXAMPLES[command]) == 3
    shown = main(*([command] if command else []), "--help").out
    for example, meaning in EXAMPLES[command].items():
        assert f"  {example}" in shown
        assert len(f"  {example}") <= 80
        assert meaning.split()[0] in shown
        program, *words = shlex.split(example.split(" > ")[0])
        assert program == "marlin-convert"
        name = words[0] if words[0] in commands.cli.commands else "convert"
        assert command in ("", name)
        arguments = words[words[0] in commands.cli.commands :]
        parent = click.Context(commands.cli, **commands.cli.context_settings)
        commands.cli.commands[name].make_context(name, list(arguments), parent=parent)


def test_completion_in_the_shell(run: Callable[..., Run]) -> None:
    result = run(env={"_MARLIN_CONVERT_COMPLETE": "bash_source"})
    assert result.code == 0
    assert "complete -o nosort -F _marlin_convert_completion marlin-convert" in result.out


def test_help_in_other_words(main: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("help").out == main("--help").out
    assert main("help", "verify").out == main("verify", "--help").out
    assert main("help", "nothing").out == main("--help").out
