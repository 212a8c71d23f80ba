"""The page's work: plans, and conversions one at a time, each in a process of its own that alone knows its token.

A process leaves nothing behind: its folder holds the result until it is published, and on a page for many visitors the
cache and huggingface_hub's own home too. The folder is removed when the process has ended, and what an earlier server
left, killed or crashed, when the next one starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import child
from ..checkpoint.output_folder import locked_folder
from ..errors import MarlinConvertError, OutputError
from ..text import shortened
from .order import Order

#: Plans that are made at the same time; conversions are made one after another.
PLANNERS = 2
#: The longest queue, for each kind of job.
LONGEST_QUEUE = 20
#: How long a finished job can still be viewed, in seconds, and how many are kept at most.
KEPT_SECONDS, KEPT_JOBS = 3600.0, 500
#: Seconds that a cancelled process gets to end.
GRACE = 15.0
#: Seconds over which a rate is taken.
RATE_SPAN = 10.0

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"

#: Environment variables hidden from visitors' processes: logins of whoever runs the page.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "OAUTH_CLIENT_SECRET", "OAUTH_CLIENT_ID")


@dataclass
class Stage:
    """How far a stage is, as its last event said, and how fast it was of late."""

    event: dict[str, Any]
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def hear(self, event: dict[str, Any], now: float) -> None:
        self.event = event
        self.recent.append((now, event["bytes_done"]))
        while len(self.recent) > 2 and now - self.recent[0][0] > RATE_SPAN:
            self.recent.popleft()

    @property
    def rate(self) -> float:
        """Bytes in a second; 0 while nothing can be said."""
        (first, before), (last, after) = self.recent[0], self.recent[-1]
        return (after - before) / (last - first) if last > first else 0.0

    @property
    def seconds_left(self) -> float | None:
        left = self.event["bytes_total"] - self.event["bytes_done"]
        return left / self.rate if self.rate else None


@dataclass
class Job:
    """A plan or a conversion. Who knows its `id` may look at it and cancel it: nobody can guess one."""

    order: Order
    id: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    owner: str = ""
    state: str = WAITING
    stages: dict[str, Stage] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    message: str = ""  # why there is no result, or what goes wrong for a while
    ended: float = 0.0
    cancelling: bool = False
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        return self.state not in (WAITING, RUNNING)


class Jobs:
    """What is waiting, under way and over; `parent` is the folder that all of it happens in."""

    def __init__(self, parent: Path | None = None) -> None:
        self._lock = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._queues: dict[bool, deque[Job]] = {True: deque(), False: deque()}  # conversions, plans
        self._closed = False
        self._cleaning = contextlib.ExitStack()
        self.folder = self._cleaning.enter_context(_own_folder(parent))
        self._threads = [threading.Thread(target=self._serve, args=(True,), daemon=True)]
        self._threads += [threading.Thread(target=self._serve, args=(False,), daemon=True) for _ in range(PLANNERS)]
        for thread in self._threads:
            thread.start()

    def submit(self, order: Order) -> Job:
        """Put an order into its queue; raises MarlinConvertError when that is full, or has this visitor's already."""
        job = Job(order, owner=_owner(order.token))
        with self._lock:
            self._forget()
            queue = self._queues[order.target is not None]
            if len(queue) >= LONGEST_QUEUE:
                raise MarlinConvertError(f"{LONGEST_QUEUE} others are waiting already; come back later.")
            theirs = [x for x in self._jobs.values() if x.owner == job.owner and not x.over and x.order.target]
            if order.target and job.owner and not order.local_user and theirs:
                raise MarlinConvertError("one conversion of yours is waiting or under way; wait for it, or cancel it.")
            self._jobs[job.id] = job
            queue.append(job)
            self._lock.notify_all()
        return job

    def get(self, id: object) -> Job | None:
        with self._lock:
            return self._jobs.get(id) if isinstance(id, str) else None

    def ahead(self, job: Job) -> int:
        """Return how many of its kind come before a job that is waiting."""
        convert = job.order.target is not None
        with self._lock:
            if job not in self._queues[convert]:
                return 0
            running = sum(x.state == RUNNING and (x.order.target is not None) == convert for x in self._jobs.values())
            return self._queues[convert].index(job) + running

    def cancel(self, id: object) -> None:
        """Take a job out of its queue, or end its process; no harm where it is over."""
        job = self.get(id)
        if job is None:
            return
        with self._lock:
            if job.state == WAITING:
                self._queues[job.order.target is not None].remove(job)
                self._end(job, CANCELLED)
            elif job.state == RUNNING and not job.cancelling:
                job.cancelling = True
                _stop(job.process)

    def close(self) -> None:
        """End every process, and remove what they had."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                if not job.over:
                    job.cancelling = True
                    _stop(job.process)
            self._lock.notify_all()
        for thread in self._threads:
            thread.join(2 * GRACE)
        self._cleaning.close()

    # ---- what the threads do

    def _serve(self, convert: bool) -> None:
        queue = self._queues[convert]
        while True:
            with self._lock:
                self._lock.wait_for(lambda: queue or self._closed)
                if self._closed:
                    return
                job = queue.popleft()
                job.state = RUNNING
            try:
                self._run(job)
            except OSError as error:
                with self._lock:
                    self._end(job, FAILED, f"this page cannot work: {error.strerror or error}.")

    def _run(self, job: Job) -> None:
        folder = self.folder / job.id
        try:
            place = _prepared(folder, private=not job.order.local_user)
            command = child.python("marlin_convert.web.worker", str(folder))
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", cwd=place,
                env=_environment(folder, private=not job.order.local_user), start_new_session=True,
            ) as process:  # fmt: skip
                assert process.stdin is not None
                assert process.stdout is not None
                with self._lock:
                    job.process = process
                    if job.cancelling:
                        _stop(process)
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(job.order.as_line())
                    process.stdin.flush()
                with self._lock:
                    job.order = job.order.without_token()
                for line in process.stdout:
                    self._hear(job, json.loads(line))
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            with self._lock:
                if not job.over:
                    self._end(job, CANCELLED if job.cancelling else FAILED, _died(process.returncode))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _hear(self, job: Job, document: dict[str, Any]) -> None:
        with self._lock:
            if event := document.get("progress"):
                job.message = ""
                if event["stage"] not in job.stages:
                    job.stages[event["stage"]] = Stage(event)
                job.stages[event["stage"]].hear(event, time.monotonic())
            elif trouble := document.get("trouble"):
                job.message = trouble
            elif "interrupted" in document:
                self._end(job, CANCELLED)
            elif "error" in document or "nothing" in document:
                self._end(job, FAILED, document.get("error") or document["nothing"])
            else:
                job.result = document.get("plan") or document["done"]
                self._end(job, DONE)

    def _end(self, job: Job, state: str, message: str = "") -> None:
        job.state, job.message, job.ended, job.process = state, message, time.monotonic(), None
        job.order = job.order.without_token()

    def _forget(self) -> None:
        """Drop what is over for long, and the oldest of too much."""
        over = sorted((x for x in self._jobs.values() if x.over), key=lambda job: job.ended)
        old = [x for x in over if time.monotonic() - x.ended > KEPT_SECONDS]
        for job in [*old, *over[: max(0, len(self._jobs) - KEPT_JOBS)]]:
            self._jobs.pop(job.id, None)


def _owner(token: str | None) -> str:
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


def _stop(process: subprocess.Popen[str] | None) -> None:
    """Ask a process to end, and make it end if it does not."""
    if process is None:
        return
    process.terminate()
    timer = threading.Timer(GRACE, process.kill)
    timer.daemon = True
    timer.start()


def _died(code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process ended without an answer ({how}): this computer may be short of memory; try again later."


def _prepared(folder: Path, *, private: bool) -> Path:
    """Make a job's folder, and in it the empty one that its process runs in: no Hub id is a folder's name there."""
    place = folder / "empty"
    place.mkdir(mode=0o700, parents=True)
    if private:
        (folder / "cache").mkdir(mode=0o700)
        (folder / "home").mkdir(mode=0o700)
    return place


def _environment(folder: Path, *, private: bool) -> dict[str, str]:
    """Return the environment of a job's process; a `private` one finds no login and no cache but its own."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TMPDIR": str(folder),
    }  # fmt: skip
    if private:
        environment = {name: value for name, value in environment.items() if name not in _SECRETS}
        environment |= {"HF_HOME": str(folder / "home"), "HF_XET_CACHE": str(folder / "home" / "xet")}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE"):
            environment.pop(name, None)
    return environment


@contextlib.contextmanager
def _own_folder(parent: Path | None) -> Iterator[Path]:
    """Make a folder for one server, which goes away with it; those of servers that are gone are removed. Raises
    OutputError where there can be none."""
    above = parent or Path(tempfile.gettempdir()) / f"marlin-convert-web-{os.getuid()}"
    with contextlib.ExitStack() as cleaning:
        try:
            above.mkdir(mode=0o700, parents=True, exist_ok=True)
            if parent is None:
                found = above.lstat()  # where anybody may have made it, or a link to another
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    raise OutputError(f"{above} belongs to another user; name another folder with --work-dir.")
            folder = cleaning.enter_context(locked_folder(above / "server"))
        except OSError as error:
            raise OutputError(
                f"{above}: it cannot be the folder to work in: {shortened(error.strerror or error)}."
            ) from None
        yield folder
