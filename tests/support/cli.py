"""The program as a test sees it: how it ended, and what it printed."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "marlin_convert.cli"]

#: Seconds after which a process or an answer is taken to hang. Nothing is measured by it.
PATIENCE = 300

#: A token; no output of the program may show it.
SECRET = "hf_SECRETXYZ"


@functools.cache
def schema() -> Any:
    import jsonschema

    text = (Path(__file__).parents[2] / "docs/reference/json.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def validate(document: Any) -> None:
    """Fail unless `document` is one that docs/reference/json.schema.json describes."""
    from jsonschema.exceptions import best_match

    error = best_match(schema().iter_errors(document))
    assert error is None, f"{error.json_path}: {error.message}\n{json.dumps(document, indent=1)[:2000]}"


class Run:
    """What the program printed and how it ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    def json(self) -> Any:
        """The one document that was printed, which must be as the schema says."""
        value = json.loads(self.out)
        validate(value)
        return value


@contextmanager
def running(command: list[Any], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, with text in its pipes; whatever becomes of the test, none of it is left."""
    with subprocess.Popen([str(word) for word in command], text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def document(result: Run) -> dict[str, Any]:
    """The one JSON document on standard output: strict JSON, and nothing before or after it."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    value = json.loads(result.out, parse_constant=no_constant)
    validate(value)
    assert isinstance(value, dict)
    assert "Traceback" not in result.err
    return value


def one_line(result: Run) -> str:
    """The one line of an error, without the program's name; nothing went to standard output."""
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("marlin-convert: ")
    return result.err.removeprefix("marlin-convert: ").rstrip("\n")


def refusal(result: Run) -> str:
    """The message of a refusal: exit code 8, one sentence on one line, no traceback."""
    assert result.code == 8, result.err
    return one_line(result)
