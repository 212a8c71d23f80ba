"""The list of a batch: one checkpoint a line, as text, as CSV, or as JSON lines.

org/name-gptq                                             text: SOURCE [TARGET] [--revision R] [OPTIONS]
org/other  other-marlin --revision v2 --format marlin_ext --verify

source,revision,target,options                            CSV, .csv: the first line names the columns
org/name-gptq,,,--verify

{"source": "org/name-gptq", "options": {"verify": true}}  JSON lines, .jsonl
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import read_file
from ..errors import OptionError, SourceError
from ..hub.address import repository
from ..hub.upload import default_name
from ..options import Format, Options, QuantMethod, ZeroPointReading
from ..text import shortened

#: What a line may say about the conversion, as `Options` names it: switches, and options with a value.
SWITCHES, VALUES = ("verify", "low_disk"), ("format", "zero_points", "max_shard_size", "quant_method")
_COLUMNS = ("source", "revision", "target", "options")
#: Of a target: file systems have 255, of which the hidden folder beside it takes some.
_MAX_NAME_BYTES = 200
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Line:
    """One checkpoint of a list, from its line `number` on. `target` is a folder's or a repository's name."""

    number: int
    source: str
    revision: str | None
    target: str
    options: dict[str, Any] = field(default_factory=dict)


def read_list(path: Path, defaults: dict[str, Any]) -> list[Line]:
    """Return the lines of a list; `defaults` are the options of those that do not say otherwise.

    Raises SourceError when it cannot be read, OptionError for a line that is none, or for two with one target.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: not UTF-8 text; a list of checkpoints is needed.") from None
    suffix = path.suffix.lower()
    kind = _csv_lines if suffix == ".csv" else _json_lines if suffix in _JSON_SUFFIXES else _text_lines
    lines: list[Line] = []
    where: dict[str, int] = {}
    try:
        for number, found in kind(text):
            try:
                line = _line(number, found, defaults)
            except (OptionError, SourceError) as error:
                raise OptionError(f"{path}, line {number}: {error.message}") from None
            if line.target in where:
                raise OptionError(
                    f"{path}, line {number}: line {where[line.target]} has the target {line.target} too; name another "
                    "in one of both."
                )
            where[line.target] = number
            lines.append(line)
    except csv.Error as error:
        raise OptionError(f"{path}: not CSV ({error}).") from None
    if not lines:
        raise OptionError(f"{path}: no checkpoint in it; write one a line.")
    return lines


def _text_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise OptionError(f"line {number}: {str(error).lower()}; close the quotes.") from None
        if not words:
            continue
        names = [word for i, word in enumerate(words) if not word.startswith("--") and not _takes(words[i - 1 : i])]
        found: dict[str, Any] = {"source": names[0] if names else "", "options": []}
        if len(names) > 1:
            found["target"] = names[1]
        if len(names) > 2:
            raise OptionError(f"line {number}: {shortened(names[2])} is one word too many.")
        rest = iter(word for i, word in enumerate(words) if word.startswith("--") or _takes(words[i - 1 : i]))
        for word in rest:
            if word == "--revision":
                found["revision"] = next(rest, "")
            else:
                found["options"].append(word)
        yield number, found


def _takes(before: list[str]) -> bool:
    """Tell whether the word before takes this one as its value."""
    name = before[0].removeprefix("--").replace("-", "_") if before and before[0].startswith("--") else ""
    return name in (*VALUES, "revision")


def _csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    unknown = set(reader.fieldnames or ()) - set(_COLUMNS)
    if "source" not in (reader.fieldnames or ()) or unknown:
        raise OptionError(f"the first line of a CSV list names its columns, of {', '.join(_COLUMNS)}.")
    for row in reader:
        if None in row:
            raise OptionError(f"line {reader.line_num}: it has more columns than the first line names.")
        yield reader.line_num, {key: value for key, value in row.items() if value}


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise OptionError(f"line {number}: not a JSON object; write one a line.") from None
        if not isinstance(found, dict) or set(found) - set(_COLUMNS):
            raise OptionError(f"line {number}: write an object with {', '.join(_COLUMNS)}.")
        yield number, found


def _line(number: int, found: dict[str, Any], defaults: dict[str, Any]) -> Line:
    texts = {key: found.get(key) for key in ("source", "revision", "target")}
    for key, value in texts.items():
        if not (value is None or (isinstance(value, str) and value.isprintable())):
            raise OptionError(f"its {key} is {shortened(value)}.")
    source = texts["source"]
    if not source:
        raise OptionError("it names no source.")
    source, revision = repository(source, texts["revision"] or None)
    target = texts["target"] or default_name(source.rstrip("/"))
    if "/" in target or target in (".", "..") or target.startswith(("-", ".")):
        raise OptionError(f"its target is {shortened(target)}; give a name, without a folder or an owner.")
    if len(target.encode()) > _MAX_NAME_BYTES:
        raise OptionError(f"its target is {shortened(target)}; give a name of at most {_MAX_NAME_BYTES} bytes.")
    options = {**defaults, **_options(found.get("options"))}
    made = Options(**{key: options[key] for key in VALUES if options.get(key) is not None})
    return Line(number, source, revision, target, {
        "format": Format(made.format).value,
        "zero_points": None if made.zero_points is None else ZeroPointReading(made.zero_points).value,
        "max_shard_size": made.max_shard_size,
        "quant_method": QuantMethod(made.quant_method).value,
        **{key: bool(options.get(key)) for key in SWITCHES},
    })  # fmt: skip


def _options(given: Any) -> dict[str, Any]:
    """Return what a line says about the conversion: words as on the command line, or an object."""
    if given is None:
        return {}
    if isinstance(given, dict):
        named = {str(key).replace("-", "_"): value for key, value in given.items()}
        for key, value in named.items():
            if key not in (*SWITCHES, *VALUES) or (key in SWITCHES and type(value) is not bool):
                raise OptionError(f"{key} is {shortened(value)}; a line may have {_known()}.")
        return named
    try:
        words = shlex.split(given) if isinstance(given, str) else given
    except ValueError:  # open quotes
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise OptionError(f"its options are {shortened(given)}; write them as on the command line.")
    found: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name in SWITCHES and not given:
            found[name] = True
        elif name in VALUES:
            found[name] = value if given else next(rest, "")
        else:
            raise OptionError(f"{shortened(word)} is not an option of a line, which may have {_known()}.")
    return found


def _known() -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in (*SWITCHES, *VALUES))
