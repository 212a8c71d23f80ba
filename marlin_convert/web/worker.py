"""One plan, or one conversion, in a process of its own: `main`, with the argument FOLDER.

The order comes as the first line of standard input, token included: arguments and environment can be read by others.
What happens goes to standard output, one JSON document a line: {"progress": …} and {"trouble": …} while it goes on,
then one of {"plan": …}, {"done": …}, {"nothing": …}, {"error": …} and {"interrupted": …}. SIGTERM cancels; the end of
standard input, too: then whoever asked is gone, and nobody else would remove FOLDER.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..checkpoint.writer import shard_names
from ..conversion.convert import convert, plan_only
from ..conversion.digests import complete_report
from ..conversion.names import span
from ..conversion.plan import Plan
from ..conversion.report import Report
from ..engine_support import VLLM, doubts, readers, vllm_needs_our_kernels
from ..errors import AlreadyMarlin, HubError, MarlinConvertError, OutputError
from ..hub.open import Source
from ..hub.upload import default_name, push
from ..interrupts import Interrupted, ignore_signals, raise_on_signals
from ..options import FORMAT_NAMES, PublishTarget
from ..progress import ProgressEvent, Told
from .order import Order

#: Seconds between two lines about one stage.
INTERVAL = 0.2
#: Seconds to wait before each further try of an upload, beside those of each request: what it would carry took long to
#: make, and is gone when this process ends.
UPLOAD_WAITS = (5.0, 20.0, 60.0)


class Voice:
    """Lines to whoever started this process."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self._sent_at: dict[str, float] = {}

    def say(self, **document: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(document) + "\n")
            self._stream.flush()

    def progress(self, event: ProgressEvent) -> None:
        """Pass on a stage's first and last event, and as many between as can be watched."""
        now, begins = time.monotonic(), event.stage not in self._sent_at
        if not begins and event.bytes_done < event.bytes_total and now - self._sent_at[event.stage] < INTERVAL:
            return
        self._sent_at[event.stage] = now
        self.say(progress={**vars(event)})


def main() -> None:
    folder = Path(sys.argv[1])
    order = Order.of_line(sys.stdin.readline())
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)  # printed text must not be taken for an answer
        voice = Voice(stream)
        raise_on_signals()
        orphaned = threading.Event()
        threading.Thread(target=_end_with_asker, args=(orphaned,), daemon=True).start()
        try:
            _work(order, folder, voice)
        except Interrupted:
            if orphaned.is_set():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                voice.say(interrupted=True)
        except AlreadyMarlin as nothing:
            voice.say(nothing=nothing.message)
        except MarlinConvertError as error:
            voice.say(error=error.message)
        except Exception as error:  # noqa: BLE001 - each error ends in one line for the user
            # Without its own text, which may hold anything, in a log that others read.
            sys.stderr.write("".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__}\n")
            voice.say(error=f"{type(error).__name__}: this is a bug in marlin-convert; please report it.")
        ignore_signals()
    os._exit(0)  # a download that was interrupted still has threads


def _end_with_asker(orphaned: threading.Event) -> None:
    while sys.stdin.read(1):
        pass
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(order: Order, folder: Path, voice: Voice) -> None:
    access, told = order.access(cache_dir=_cache(folder)), Told(voice.progress)
    if order.target is None:
        origin, plan = plan_only(order.source, order.options, told, access=access)
        voice.say(plan=summary(origin, plan, order, folder))
        return

    def publish(out: Path, target: PublishTarget, *, force: bool, token: str | None) -> str:
        complete_report(out)
        return published(
            lambda: push(out, target, force=force, token=token, transfer=told.transfer), voice, UPLOAD_WAITS
        )

    report = convert(order.source, folder / "out", order.options, told, access=access, publish=publish)
    ignore_signals()  # it is published
    voice.say(done=outcome(report))


def published(upload: Callable[[], str], voice: Voice, waits: tuple[float, ...]) -> str:
    """Return what `upload` does, which is tried again after each of `waits`."""
    if not waits:
        return upload()
    try:
        return upload()
    except HubError as error:
        voice.say(trouble=f"{error.message} Trying again in {waits[0]:.0f} s.")
    time.sleep(waits[0])
    return published(upload, voice, waits[1:])


def _cache(folder: Path) -> Path | None:
    """Return the cache that this job's visitor alone uses; None, the standard one, where everything is one user's."""
    cache = folder / "cache"
    return cache if cache.is_dir() else None


def summary(origin: Source, plan: Plan, order: Order, folder: Path) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    if plan.already_marlin:
        return {"source": origin.label, "commit": origin.commit, "already_marlin": True}
    kinds = Counter((x.K, x.N, x.bits, x.group_size, x.kind, x.source.scales.dtype.lower()) for x in plan.layers)
    files = shard_names(plan.out_tensors, order.options.max_shard_size)
    facts = plan.result_facts(order.quant_method, len(files))
    needed = plan.bytes_out + _largest_file(plan)
    free = shutil.disk_usage(folder).free
    return {
        "source": origin.label,
        "commit": origin.commit,
        "already_marlin": False,
        "source_format": plan.source_title,
        "format": FORMAT_NAMES[plan.format],
        "kinds": [[count, *kind] for kind, count in kinds.items()],
        "layers": len(plan.layers),
        "layers_found": plan.layers_found,
        "copies": len(plan.copies),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bytes_fp16": fp16_bytes(plan),
        "files": len(files),
        "disk_needed": needed,
        "disk_free": free,
        "room": "" if needed <= free else OutputError(
            f"this page has {free / 1e9:.1f} GB of disk, and the result and a part of the source take "
            f"{needed / 1e9:.1f} GB; convert it on another machine."
        ).message,
        "with_plugin": [engine.name for engine in readers(facts, with_plugin=True)],
        "alone": [engine.name for engine in readers(facts, with_plugin=False)],
        "engine_notes": [
            *(f"{name}: {why}" for name, why in doubts(facts).items()),
            *(f"{VLLM} computes {what} where marlin-convert's CUDA kernels are built: {span(names)}"
              for what, names in vllm_needs_our_kernels(facts.layers).items()),
        ],
        "why_extended": [f"{why}: {span(names)}" for why, names in plan.why_extended.items()] if plan.extended else [],
        "notes": [f"{note}: {span(names)}" if names else note for note, names in plan.notes.items()],
        "refusals": [f"{reason}: {span(names)}" for reason, names in plan.refusals.items()],
        "name": default_name(origin.label),
    }  # fmt: skip


def fp16_bytes(plan: Plan) -> int:
    """Return what the model's tensors would take with every layer in fp16."""
    return sum(2 * x.K * x.N for x in plan.layers) + sum(t.nbytes for t in plan.copies)


def _largest_file(plan: Plan) -> int:
    held: Counter[str] = Counter()
    for tensor in [*(t for x in plan.layers for t in x.source.tensors), *plan.copies]:
        held[tensor.file] += tensor.nbytes
    return max(held.values(), default=0)


def outcome(report: Report) -> dict[str, Any]:
    """Return what the page shows of a conversion that is published."""
    verification = report.verification
    target = report.options.target
    if verification is None or target is None:
        raise AssertionError("the page's conversions are verified and published")
    return {
        "source": report.source.label,
        "commit": report.source.commit,
        "repo_id": target.repo_id,
        "pushed": report.pushed,
        "format": FORMAT_NAMES[report.plan.format],
        "seconds": report.seconds,
        "bytes_in": report.plan.bytes_in,
        "bytes_out": report.plan.bytes_out,
        "bytes_fp16": fp16_bytes(report.plan),
        "files": report.files,
        "verification": verification.as_dict(),
    }
