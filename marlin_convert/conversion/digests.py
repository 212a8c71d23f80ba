"""SHA-256 of the files of a checkpoint: what the Hub says about them, or computed from what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import opened, read_json
from ..checkpoint.index import WEIGHT_SUFFIXES
from ..checkpoint.output_folder import json_bytes, replace_files
from ..errors import SourceError
from ..hub.open import Source
from ..options import REPORT_FILE
from ..progress import StartTransfer
from .blocks import run_all

_CHUNK = 1 << 20


def is_large(name: str) -> bool:
    """Tell whether a file holds weights: hashing it takes about as long as reading it from a disk."""
    return name.endswith(WEIGHT_SUFFIXES) and not name.endswith(".json")


def known_digests(origin: Source) -> dict[str, str]:
    """Return what the Hub says: the SHA-256 of the files that it keeps as LFS objects, as it does with weights."""
    files = {} if origin.hub is None else origin.hub.remote.files
    return {name: file.oid for name, file in files.items() if len(file.oid) == 64}


def digest(path: Path, on_bytes: Callable[[int], None] = lambda nbytes: None) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal. Raises SourceError when it cannot be read."""
    hashed = hashlib.sha256()
    with opened(path) as fd:
        try:
            while block := os.read(fd, _CHUNK):
                hashed.update(block)
                on_bytes(len(block))
        except OSError as error:
            raise SourceError(f"{path}: reading failed: {error.strerror}.") from None
    return hashed.hexdigest()


def digests(
    paths: dict[str, Path],
    known: dict[str, str],
    *,
    large: bool,
    transfer: StartTransfer,
) -> dict[str, str | None]:
    """Return the SHA-256 of each file, by name: the one that is `known`, or computed; None for weights, unless `large`
    asks for them. `transfer` shows how far it is, as `Progress.transfer` does."""
    missing = [name for name in paths if name not in known and (large or not is_large(name))]
    total = sum(paths[name].stat().st_size for name in missing if is_large(name))
    on_bytes = transfer("hashing", total) if total else lambda nbytes: None
    found: dict[str, str] = {}

    def compute(name: str) -> None:
        found[name] = digest(paths[name], on_bytes if is_large(name) else lambda nbytes: None)

    run_all(partial(compute, name) for name in missing)
    return {name: known.get(name) or found.get(name) for name in sorted(paths)}


def files_below(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, Path]:
    """Return every file of a result's folder by its name, but for those in `leave_out`."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name not in set(leave_out)}


def complete_report(out: Path) -> None:
    """Add the SHA-256 of the weights to the report of a result that is to be published."""
    noted = _report_of(out)
    if None not in noted.get("result_files", {}).values():
        return
    paths = files_below(out, [REPORT_FILE])
    noted["result_files"] = digests(paths, {}, large=True, transfer=lambda what, total: lambda nbytes: None)
    with contextlib.suppress(OSError):  # a folder that may only be read is published as it is
        replace_files(out, {REPORT_FILE: json_bytes(noted)})


def report_with(changed: dict[str, bytes], out: Path) -> dict[str, bytes]:
    """Return the report of the result `out`, saying the SHA-256 of files that have changed; {} where it says none."""
    noted = _report_of(out)
    if not noted:
        return {}
    new = {name: hashlib.sha256(content).hexdigest() for name, content in changed.items()}
    noted["result_files"] = dict(sorted({**noted["result_files"], **new}.items()))
    return {REPORT_FILE: json_bytes(noted)}


def _report_of(out: Path) -> dict[str, Any]:
    """Return the report of the result `out`, if it is one that says the SHA-256 of files; else {}."""
    with contextlib.suppress(SourceError):  # damaged or missing
        noted = read_json(out / REPORT_FILE)
        if isinstance(noted.get("result_files"), dict):
            return noted
    return {}
