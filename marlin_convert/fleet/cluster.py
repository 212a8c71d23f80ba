"""The jobs of a batch as tasks of a Ray cluster. Scheduling, placement and retries are Ray's own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..errors import INSTALL_RAY, HubError, MarlinConvertError, MissingPackageError, OptionError
from .job import PASSING, Job, work

#: Seconds for which an address is waited for.
_ANSWER = 10.0


class TryAgain(Exception):
    """A job failed in a way that may pass; its outcome is the argument."""


def task(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job on a node, in a process that ends with it. Raises TryAgain, upon which Ray starts it again."""
    outcome = work(Job(**job))
    if outcome["status"] == "failed" and outcome["exit_code"] in PASSING:
        raise TryAgain(outcome)
    return outcome


class Cluster:
    """Runs each job as a task on the Ray cluster at `address`, which takes `resources` ("CPU", "memory", or names of
    one's own) and is tried again `retries` times. Raises MissingPackageError without Ray, HubError
    without a cluster."""

    def __init__(self, address: str, *, retries: int, resources: dict[str, float]) -> None:
        try:
            import ray
        except ImportError:
            raise MissingPackageError(f"--ray needs ray, here and on every node: {INSTALL_RAY}.") from None
        self._ray, self._lock = ray, threading.Lock()
        self._running: set[Any] = set()
        try:
            _require_answer(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="marlin-convert")
        except (OSError, ValueError, RuntimeError) as error:
            raise HubError(f"{address}: no Ray cluster answers ({type(error).__name__}); see `ray status`.") from None
        custom = {key: value for key, value in resources.items() if key not in ("CPU", "memory")}
        memory = {"memory": resources["memory"]} if "memory" in resources else {}
        # max_calls: a process of its own for each checkpoint.
        self._task = ray.remote(
            num_cpus=resources.get("CPU", 1), resources=custom, max_calls=1, max_retries=retries,
            retry_exceptions=[TryAgain], scheduling_strategy="SPREAD", **memory,
        )(task)  # fmt: skip

    def __call__(self, job: Job, lock: int, moved: Callable[[int, int], None]) -> dict[str, Any]:
        """Run the job as a task; the lock stays with the driver, with which the task ends."""
        reference = self._task.options(name=f"marlin-convert {job.source}").remote(asdict(job))
        with self._lock:
            self._running.add(reference)
        try:
            outcome: dict[str, Any] = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, TryAgain):
                return dict(cause.args[0])
            return _failed(f"its task ended by {type(cause or error).__name__}")
        except self._ray.exceptions.RayError as error:  # a node or a worker that died, more often than it was retried
            return _failed(f"its task ended by {type(error).__name__}")
        finally:
            with self._lock:
                self._running.discard(reference)
        return outcome

    def end(self) -> None:
        """Cancel every task; none leaves anything half-done."""
        with self._lock, contextlib.suppress(Exception):  # the cluster may be what has gone
            for reference in self._running:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        self._ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def resources(text: str) -> dict[str, float]:
    """Return what `CPU=2,disk=1` asks for. Raises OptionError."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, given, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            given = ""
        if not (given and name.strip() and 0 <= found[name.strip()] < 1e18):
            raise OptionError(f"{text!r} are not resources; write them like CPU=2,disk=1.")
    return found


def _failed(message: str) -> dict[str, Any]:
    return {"status": "failed", "message": message, "exit_code": MarlinConvertError.exit_code}
