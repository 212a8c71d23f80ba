"""A statement about a result, in in-toto's format: these files were made from those, with these options.

in-toto's Statement v1 (https://in-toto.io/Statement/v1) with SLSA's provenance v1 as its predicate
(https://slsa.dev/provenance/v1). Nothing is signed here; that is left to the tool, and the key, of whoever states it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..checkpoint.bounded import read_json
from ..checkpoint.output_folder import json_bytes, replace_files
from ..errors import OutputError, SourceError
from ..options import REPORT_FILE
from .digests import digest

STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"

#: The build type and the builder. SLSA wants URIs; these are URNs, because the project has no address.
BUILD_TYPE, BUILDER = "urn:marlin-convert:conversion:v1", "urn:marlin-convert"


def statement(noted: dict[str, Any], report_digest: str) -> dict[str, Any]:
    """Return the statement about a result whose report is `noted`, with every SHA-256 known, and has the SHA-256
    `report_digest`."""
    source, commit = noted["source"], noted["source_commit"]
    base = f"pkg:huggingface/{quote(source)}@{commit}" if commit else None
    subjects = {**noted["result_files"], REPORT_FILE: report_digest}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": found}} for name, found in sorted(subjects.items())],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"source": source, "revision": commit, "options": noted["options"]},
                "internalParameters": {"marlin_convert": noted["marlin_convert"]},
                "resolvedDependencies": [
                    {
                        "name": name,
                        **({"uri": f"{base}#{quote(name)}"} if base else {}),
                        "digest": {"sha256": found},
                    }
                    for name, found in noted["source_files"].items()
                    if found is not None
                ],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"marlin-convert": noted["marlin_convert"]}}},
        },
    }


def check_place(file: Path, *folders: str | Path) -> None:
    """Raise OutputError, before any work, where no statement can be written: what is there already is none, its folder
    is not there, or it is in one of `folders`, which a statement is about and not a part of."""
    for folder in folders:
        known = os.path.expanduser(folder)  # noqa: PTH111 - no error for ~nobody
        if Path(os.path.realpath(known)) in Path(os.path.realpath(file)).parents:
            raise OutputError(f"{file}: a statement is no file of {folder}; choose a place outside it.")
    if not os.path.isdir(file.parent):  # noqa: PTH112 - no error where it may not be seen
        raise OutputError(f"{file}: there is no folder {file.parent}; create it first.")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{file}: the statement cannot be written: Permission denied.")
    if not os.path.lexists(file):
        return
    with contextlib.suppress(SourceError):
        if stat.S_ISREG(file.lstat().st_mode) and read_json(file).get("_type") == STATEMENT:
            return
    raise OutputError(f"{file}: it exists and is no statement; choose another name.")


def write_statement(file: Path, noted: dict[str, Any], report: Path) -> None:
    """Write the statement about a result with the report at `report`. Raises OutputError; an older file then stays."""
    write_to(file, statement(noted, digest(report)))


def write_to(file: Path, value: dict[str, Any]) -> None:
    """Write a statement. Raises OutputError; an older file then stays."""
    try:
        replace_files(file.parent, {file.name: json_bytes(value)})
    except OSError as error:
        raise OutputError(
            f"{file}: the statement cannot be written: {error.strerror}; the result is complete."
        ) from None
