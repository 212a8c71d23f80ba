"""One checkpoint of a batch: what is to be done, whether it has been done, and doing it.

As a program, `main` reads a job as one line of JSON from standard input and writes what
happens as lines of JSON: `{"bytes": n, "of": m}` now and then, and at last the outcome. It ends, and leaves nothing
half-done, when its standard input is closed: whoever started it has gone then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.bounded import read_json
from ..checkpoint.files import Folder
from ..conversion.convert import convert, plan_only
from ..conversion.publish import push_result
from ..conversion.report import shaping
from ..errors import BUG, AlreadyMarlin, MarlinConvertError, UnsupportedError
from ..hub.answers import describe, files_of
from ..hub.client import checked_token, explaining, interruptible, is_folder, quiet
from ..hub.repository import Remote
from ..interrupts import Interrupted, raise_on_signals
from ..options import REPORT_FILE, HubAccess, Options, PublishTarget
from ..progress import Progress

#: Exit codes after which another try may go better: the disk, the network, memory, the machine.
PASSING = (1, 6, 7, 8, BUG)
#: Seconds between two lines about progress.
_INTERVAL = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be done with one source. `identity` is its commit, or for a folder what its files look like.

    The result goes to the folder `out`, or, by way of it, to the repository `publish`.
    """

    source: str
    identity: str
    out: str
    publish: str | None
    options: dict[str, Any]
    private: bool = False
    force: bool = False
    device: str = "auto"
    cache_dir: str | None = None
    begun: bool = False  # whether a run has begun it before
    dry_run: bool = False
    token: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The same for the same work: source, its commit or state, options, target and version."""
        what = [self.source, self.identity, self.publish or self.out, self.options, __version__]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def commit(self) -> str | None:
        return None if is_folder(self.source) else self.identity

    @property
    def made_with(self) -> Options:
        chosen = {key: value for key, value in self.options.items() if value is not None}
        target = None if self.publish is None else PublishTarget(self.publish, private=self.private)
        return Options(**chosen, device=self.device, force=self.force, target=target)


def identity(source: str, revision: str | None, token: str | None) -> str:
    """Return the commit that a revision of a Hub source is now; of a folder, a hash of its files' names, sizes and
    times."""
    if not is_folder(source):
        with explaining(source, revision):
            return describe(source, revision, checked_token(token)).commit
    if revision:
        raise MarlinConvertError(f"{source} is a folder; a revision applies to a Hub id only.")
    files = Folder(Path(source).expanduser())
    states = {name: files.state(name) for name in files.names}
    seen = [(name, state.nbytes, state.mtime_ns) for name, state in states.items() if state]
    return f"files {hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]}"


def work(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Do a job; the outcome: `status` is done, nothing, refused or failed, `message` says why, or where."""
    started = time.monotonic()
    outcome: dict[str, Any] = {"exit_code": 0}
    try:
        outcome |= _planned(job) if job.dry_run else _done(job, progress or Progress())
    except AlreadyMarlin as nothing:
        outcome |= {"status": "nothing", "message": nothing.message}
    except UnsupportedError as error:
        outcome |= {"status": "refused", "message": error.message, "exit_code": error.exit_code}
    except MarlinConvertError as error:
        outcome |= {"status": "failed", "message": error.message, "exit_code": error.exit_code}
    except Exception as error:  # noqa: BLE001 - the other checkpoints go on
        outcome |= {"status": "failed", "message": f"{type(error).__name__}: {error}; this is a bug", "exit_code": BUG}
    return {**outcome, "seconds": round(time.monotonic() - started, 1)}


def _planned(job: Job) -> dict[str, Any]:
    _, plan = plan_only(job.source, job.made_with, access=_access(job))
    if plan.already_marlin:
        raise AlreadyMarlin(f"{job.source} already is a Marlin checkpoint; there is nothing to convert.")
    plan.require_convertible()
    return {
        "status": "would convert", "message": str(plan.format), "layers": len(plan.layers), "bytes_out": plan.bytes_out,
    }  # fmt: skip


def _done(job: Job, progress: Progress) -> dict[str, Any]:
    out, options = Path(job.out), job.made_with
    if job.publish is not None and _published(job):
        shutil.rmtree(out, ignore_errors=True)
        return {"status": "done", "message": f"{job.publish} has it", "found": True}
    there = _report(out)
    found = there is not None and _same(there, job) and (job.commit is not None or job.begun)
    done: dict[str, Any] = {"status": "done", "message": str(out), "found": found}
    if there is not None and found:
        done |= _sizes(there)
        if job.publish is not None:
            done["message"] = push_result(
                out, PublishTarget(job.publish, job.private), force=job.force, token=job.token
            )
    else:
        report = convert(job.source, out, options, progress, access=_access(job))
        done |= _sizes(report.as_file())
        if job.publish is not None:
            done["message"] = report.pushed
    if job.publish is not None:
        shutil.rmtree(out, ignore_errors=True)
    return done


def _access(job: Job) -> HubAccess:
    return HubAccess(job.commit, job.token, None if job.cache_dir is None else Path(job.cache_dir))


def _sizes(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": report.get("layers_converted"), "format": report.get("format"), "bytes_in": report.get("bytes_in"),
        "bytes_out": report.get("bytes_out"), "verified": report.get("verified"),
    }  # fmt: skip


def _report(out: Path) -> dict[str, Any] | None:
    with contextlib.suppress(MarlinConvertError):
        return read_json(out / REPORT_FILE)
    return None


def _same(report: dict[str, Any], job: Job) -> bool:
    """Tell whether a report is that of what this job makes."""
    label = job.source if job.commit else Path(job.source).expanduser().resolve().name
    return (
        report.get("marlin_convert") == __version__
        and (report.get("source"), report.get("source_commit")) == (label, job.commit)
        and report.get("options") == json.loads(json.dumps(shaping(job.made_with)))
    )


def _published(job: Job) -> bool:
    """Tell whether the repository that the result goes to has it; another run may have been ended before it could say
    so."""
    from huggingface_hub import errors

    repo_id, token = str(job.publish), checked_token(job.token)
    with explaining(repo_id, None):
        try:
            commit = describe(repo_id, None, token).commit
        except errors.RepositoryNotFoundError:
            return False
        files = files_of(repo_id, commit, token)
        if REPORT_FILE not in files:
            return False
        cache = None if job.cache_dir is None else Path(job.cache_dir)
        remote = Remote(repo_id, None, commit, token, cache, files)
        folder = interruptible(lambda: remote.fetch_small([REPORT_FILE]))
    report = _report(folder)
    return report is not None and _same(report, job) and set(report.get("weight_files", [])) <= files.keys()


# ---------------------------------------------------------------------------------------------------------------
# As a process of its own


class _Lines(Progress):
    """Tells how far the work is as lines of JSON."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell, self._lock = tell, threading.Lock()
        self._done = self._total = 0
        self._last = 0.0

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        with self._lock:
            self._done, self._total = 0, total_bytes

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last >= _INTERVAL:
                self._last = now
                self._tell({"bytes": self._done, "of": self._total})


def main() -> None:
    """Do the job that standard input names."""
    raise_on_signals()
    quiet()
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    out, lock = sys.stdout, threading.Lock()

    def tell(value: dict[str, Any]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            out.write(json.dumps(value) + "\n")
            out.flush()

    try:
        outcome = work(job, _Lines(tell))
    except Interrupted as signalled:
        outcome = {"status": "failed", "message": "interrupted", "exit_code": 128 + signalled.number}
    tell(outcome)
    os._exit(0)  # a download that was interrupted may still have threads


def _end_with_the_starter() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def as_line(job: Job) -> str:
    """Return a job, as the program reads it."""
    return json.dumps(asdict(job)) + "\n"
