"""What has become of each checkpoint of a batch: a file of JSON lines that only grows.

Each line is on the disk before the run goes on. Whatever ends a run, at any moment, costs at most the line that was
being written: a torn one is passed over, and the next begins on a line of its own. Several runs may share the file.

Beside it, `FILE.locks/` has a lock for each checkpoint that is being worked on. The process that converts it holds the
lock too, so that nobody begins it again while that still runs, whoever has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import read_file
from ..errors import OutputError, SourceError

#: What is not begun again: converted, nothing to do, or refused with a reason.
SETTLED = ("done", "nothing", "refused")
#: How every line begins, and the most bytes of a file: those of a million checkpoints.
_FIRST, _MAX_BYTES = b'{"job": "', 1 << 30


class State:
    """The state file at `path`; made when it is missing. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path, self._locks = path, path.with_name(f"{path.name}.locks")
        self.torn = 0  # lines that were passed over
        try:
            there = path.exists()
            if there and not path.is_file():
                raise OutputError(f"{path}: it is not a regular file; give another name for the state file.")
            if there:
                self.records()  # nothing is added to another file, and nothing made beside it
            self._locks.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise OutputError(f"{path}: the state file cannot be written: {error.strerror}.") from None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, and wait until it is on the disk. Raises OutputError."""
        stamped = {**record, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": socket.gethostname()}
        content = (json.dumps(stamped) + "\n").encode()
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    content = b"\n" + content  # behind a line that was torn
                while content:
                    content = content[os.write(fd, content) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise OutputError(f"{self.path}: the state file cannot be written: {error.strerror}.") from None

    def records(self) -> list[dict[str, Any]]:
        """Return all lines, in their order, but for torn ones. Raises SourceError when the file is none of these."""
        found, torn = [], []
        for line in filter(None, read_file(self.path, _MAX_BYTES).split(b"\n")):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                torn.append(line)
                continue
            if not isinstance(record, dict) or not isinstance(record.get("job"), str):
                raise self._another()
            found.append(record)
        ours = found or all(line.startswith(_FIRST[: len(line)]) for line in torn)
        if len(torn) > len(found) + 1 or not ours:
            raise self._another()
        self.torn = len(torn)
        return found

    def _another(self) -> SourceError:
        return SourceError(f"{self.path}: it is not a state file of `batch`; give another name.")

    def settled(self, job: str) -> dict[str, Any] | None:
        """Return the line that says that a job needs nothing more."""
        lines = [r for r in self.records() if r["job"] == job and r.get("status") in SETTLED]
        return lines[-1] if lines else None

    def started(self, job: str) -> bool:
        """Tell whether a run has begun a job."""
        return any(r["job"] == job and r.get("status") == "started" for r in self.records())

    @contextlib.contextmanager
    def locked(self, target: str) -> Iterator[int | None]:
        """Hold the lock of a target: a descriptor for the process that works on it, or None where another has it."""
        try:
            fd = os.open(self._locks / target, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{self._locks}: cannot be written: {error.strerror}.") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield fd
        finally:
            os.close(fd)
