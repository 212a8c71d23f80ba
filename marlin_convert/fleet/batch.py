"""Working through a list: what is settled is passed over, each other checkpoint gets a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import child
from .._version import __version__
from ..errors import BUG, MarlinConvertError
from ..hub.client import is_folder
from ..interrupts import SIGNALS, postponed
from .job import PASSING, Job, as_line, identity
from .listing import Line
from .state import State

#: Seconds between looks at a checkpoint that another run is working on.
_LOOK = 1.0


@dataclass(frozen=True)
class Plan:
    """How a list is worked through. Results go below `out`, or to the Hub as repositories of `owner`."""

    out: Path | None
    owner: str | None
    jobs: int = 1
    retries: int = 0
    private: bool = False
    force: bool = False
    dry_run: bool = False
    device: str = "auto"
    cache_dir: Path | None = None
    token: str | None = field(default=None, repr=False)

    def job(self, line: Line, found: str, state: State) -> Job:
        """Return what is to be done for a line whose source is `found` now."""
        publish = None if self.owner is None else f"{self.owner}/{line.target}"
        folder = state.path.with_name(f"{state.path.name}.work") if self.out is None else self.out
        source = str(Path(line.source).expanduser().resolve()) if is_folder(line.source) else line.source
        return Job(
            source=source, identity=found, out=str((folder / line.target).absolute()), publish=publish,
            options=line.options,            private=self.private, force=self.force, device=self.device,
            cache_dir=None if self.cache_dir is None else str(self.cache_dir.absolute()), dry_run=self.dry_run,
            token=self.token,
        )  # fmt: skip


class Watcher(Protocol):
    """Who shows what goes on. Called from several threads."""

    def begun(self, line: Line) -> None: ...
    def moved(self, line: Line, done: int, total: int) -> None: ...
    def ended(self, line: Line, outcome: dict[str, Any]) -> None: ...


class Runner(Protocol):
    """Where jobs are done: does one, telling `moved`, while a process that holds `lock` lives; `end` stops all."""

    def __call__(self, job: Job, lock: int, moved: Callable[[int, int], None]) -> dict[str, Any]: ...
    def end(self) -> None: ...


def shard(lines: list[Line], part: tuple[int, int]) -> list[Line]:
    """Return part i of n of a list: every n-th line from the i-th on."""
    index, count = part
    return lines[index - 1 :: count]


def run(lines: Iterable[Line], plan: Plan, state: State, watcher: Watcher, runner: Runner) -> dict[int, dict[str, Any]]:
    """Do what is to be done of `lines`; the outcome of each, by the line's number. Failures are outcomes.

    `status` is done, nothing, refused, failed, or before: settled by an earlier run, as `settled` then says. Raises
    OutputError when the state file cannot be written; Ctrl-C ends the processes, and is passed on.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    waiting: list[Line] = []
    stop, lock = threading.Event(), threading.Lock()
    left = iter(list(lines))

    def following() -> Line | None:
        with lock:
            line = next(left, None)
            if line is None and waiting:
                line = waiting.pop(0)
        return line

    def go() -> None:
        looked: dict[int, float] = {}
        while not stop.is_set() and (line := following()) is not None:
            if line.number in looked:
                stop.wait(max(0.0, looked[line.number] + _LOOK - time.monotonic()))
            outcome = _one(line, plan, state, watcher, runner, stop)
            if outcome is None:
                looked[line.number] = time.monotonic()
                with lock:
                    waiting.append(line)
                continue
            outcomes[line.number] = outcome
            watcher.ended(line, outcome)

    with ThreadPoolExecutor(plan.jobs, thread_name_prefix="marlin-convert-batch") as pool:
        futures: list[Future[None]] = []
        try:
            with postponed():
                futures += [pool.submit(go) for _ in range(plan.jobs)]
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            runner.end()
            raise
        if any(future.done() and future.exception() for future in futures):
            stop.set()
            runner.end()
    for future in futures:
        future.result()
    return outcomes


def _one(
    line: Line, plan: Plan, state: State, watcher: Watcher, runner: Runner, stop: threading.Event
) -> dict[str, Any] | None:
    """Return the outcome of a line; None while another run works on it."""
    with state.locked(line.target) as held:
        if held is None:
            return None
        for tried in range(plan.retries + 1):
            watcher.begun(line)
            outcome = _attempt(line, plan, state, watcher, runner, held)
            again = outcome["status"] == "failed" and outcome.get("exit_code", BUG) in PASSING
            if not again or tried == plan.retries or stop.is_set():
                break
        return outcome


def _attempt(line: Line, plan: Plan, state: State, watcher: Watcher, runner: Runner, lock: int) -> dict[str, Any]:
    try:
        job = plan.job(line, identity(line.source, line.revision, plan.token), state)
    except MarlinConvertError as error:
        outcome = {"status": "failed", "message": error.message, "exit_code": error.exit_code}
        _note(state, line, f"line {line.source}", outcome, plan)
        return outcome
    if settled := state.settled(job.name):
        return {**settled, "status": "before", "settled": settled["status"]}
    if not plan.dry_run:
        job = Job(**{**job.__dict__, "begun": state.started(job.name)})
        state.append(_record(line, job.name, {"status": "started", "identity": job.identity}))
    outcome = runner(job, lock, lambda done, total: watcher.moved(line, done, total))
    outcome["identity"] = job.identity
    _note(state, line, job.name, outcome, plan)
    return outcome


def _note(state: State, line: Line, job: str, outcome: dict[str, Any], plan: Plan) -> None:
    if not plan.dry_run:
        state.append(_record(line, job, outcome))


def _record(line: Line, job: str, outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        "job": job, "source": line.source, "revision": line.revision, "target": line.target, "options": line.options,
        "version": __version__, **outcome,
    }  # fmt: skip


def _died(code: int) -> dict[str, Any]:
    """Return what became of a process that ended with `code`, as subprocess has it, before it could say so."""
    if -code in SIGNALS:  # as it starts; later, it says so itself
        return {"message": "interrupted", "exit_code": 128 - code}
    if -code == signal.SIGKILL:
        message = "its process was killed; this computer may be short of memory"
        return {"message": message, "exit_code": MarlinConvertError.exit_code}
    why = f"signal {-code}" if code < 0 else f"exit code {code}"
    return {"message": f"its process ended by {why}", "exit_code": BUG}


class Processes:
    """Runs each job in a process of its own on this machine; `end` asks all of them to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._ended = threading.Lock(), False

    def __call__(self, job: Job, lock: int, moved: Callable[[int, int], None]) -> dict[str, Any]:
        with self._lock:
            if self._ended:
                return {"status": "failed", "message": "interrupted", "exit_code": 130}
            process = subprocess.Popen(
                child.python("marlin_convert.fleet.job"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, pass_fds=(lock,), start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        try:
            return self._outcome(process, job, moved)
        finally:
            with self._lock:
                self._running.discard(process)

    @staticmethod
    def _outcome(process: subprocess.Popen[str], job: Job, moved: Callable[[int, int], None]) -> dict[str, Any]:
        assert process.stdin
        assert process.stdout
        outcome: dict[str, Any] | None = None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(as_line(job))
            process.stdin.flush()
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if "status" in answer:
                    outcome = answer
                else:
                    moved(answer["bytes"], answer["of"])
        code = process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        return outcome or {"status": "failed", **_died(code)}

    def end(self) -> None:
        """Ask every process to stop; they leave nothing half-done."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()
