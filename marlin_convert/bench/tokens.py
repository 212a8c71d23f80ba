"""Tokens per second of a whole model against batch size: its weights in fp16 against Marlin.

What is timed is decoding: sequences with CONTEXT tokens behind them, each given one greedy token after another. The
fp16 model is the same one with its layers dequantized (`verify` has shown these weights equal to the source's), so that
both run the same code of Transformers but for the linear layers. Embeddings, attention and head take their time in
both: the ratio is what a user sees, and lower than that of the products alone, which `bench` without --tokens shows.

A step of a 7B model is hundreds of launches, which Python issues more slowly than a GPU runs them at small batches.
So a step (forward, argmax, the token put back as input, the static cache one place further) is captured once as a CUDA
graph and replayed, as serving engines do it; both models alike. A model whose code cannot be captured (one that asks
the GPU for a number in the middle, as mixtures of experts do here) is timed as it is, launches included, and the report
says so.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..engines.generate import transformers_quietly
from ..errors import DeviceError, SourceError, require
from ..options import HubAccess
from ..progress import Progress
from .gpu import cuda_rig, pick_gpu
from .results import Machine
from .shapes import Notes

if TYPE_CHECKING:
    import torch

BATCH = tuple(2**i for i in range(8))  # 1 … 128
CONTEXT = 128  # tokens that each sequence has behind it
STEPS = 64  # tokens that are timed
REPEATS = 3  # of all steps; odd, so that the median is one of them

GRAPHS, LAUNCHES = "CUDA graph", "launched from Python"


@dataclass(frozen=True)
class Cell:
    """Tokens/s of all sequences of a batch together; None where the memory did not suffice."""

    batch: int
    fp16: float | None
    marlin: float | None

    @property
    def speedup(self) -> float | None:
        return self.marlin / self.fp16 if self.fp16 and self.marlin else None

    def as_dict(self) -> dict[str, Any]:
        numbers = {"fp16": self.fp16, "marlin": self.marlin, "speedup": self.speedup}
        return {"batch": self.batch} | {key: value and round(value, 3) for key, value in numbers.items()}


@dataclass
class Report:
    title: str
    machine: Machine
    weight_bytes: dict[str, int]  # "fp16" and "marlin" → bytes of the model's tensors
    cells: list[Cell] = field(default_factory=list)
    execution: dict[str, str] = field(default_factory=dict)  # "fp16" and "marlin" → GRAPHS or LAUNCHES
    notes: Notes = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for `--json`. Rates are tokens of all sequences together, a second."""
        return {
            "ok": True,
            "title": self.title,
            "machine": asdict(self.machine),
            "method": {"context": CONTEXT, "steps": STEPS, "repeats": REPEATS, "execution": self.execution},
            "weight_bytes": self.weight_bytes,
            "cells": [cell.as_dict() for cell in self.cells],
            "notes": [{"note": note, "where": where} for note, where in self.notes.items()],
        }


class Decoder:
    """Greedy decoding of `batch` sequences with a static cache: `prefill`, then `step` after `step`.

    The prompt is random. Every step reads and writes the same tensors, so that a graph of one step is all steps.
    """

    def __init__(self, model: Any, batch: int, context: int = CONTEXT, steps: int = STEPS) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.batch = model, batch
        self.cache = StaticCache(config=model.config, max_cache_len=context + steps)
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(vocabulary, (batch, context), generator=generator).to(model.device)
        self.tokens = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        few = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if few else {}  # logits of a whole prompt are large

    def prefill(self) -> None:
        """Start afresh: the prompt into the cache, its continuation's first token into `tokens`."""
        self.cache.reset()  # type: ignore[no-untyped-call]
        self._run(self.prompt)

    def step(self) -> None:
        self._run(self.tokens)

    def _run(self, ids: torch.Tensor) -> None:
        import torch

        with torch.no_grad():
            logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **self._last).logits
            self.tokens.copy_(logits[:, -1:].argmax(-1))


#: Times a decoder: (seconds that a step takes, GRAPHS or LAUNCHES, why no graph).
Timer = Callable[[Decoder, int], tuple[float, str, str | None]]


def time_launched(decoder: Decoder, steps: int, synchronize: Callable[[], object] = lambda: None) -> float:
    """Return seconds of a step, every launch from Python: the median over REPEATS of `steps` steps."""
    seconds = []
    for _ in range(REPEATS):
        decoder.prefill()
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            decoder.step()
        synchronize()
        seconds.append((time.perf_counter() - started) / steps)
    return median(seconds)


def capture(decoder: Decoder) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of one step; `decoder` has to be prefilled afterwards. Raises RuntimeError if it cannot
    be."""
    import torch

    stream = torch.cuda.Stream(decoder.tokens.device)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(decoder.tokens.device)
    with torch.cuda.stream(stream):
        decoder.prefill()
        decoder.step()  # loads and tunes kernels, which must not happen during graph capture
    torch.cuda.synchronize(decoder.tokens.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        decoder.step()
    return graph


def time_on_gpu(decoder: Decoder, steps: int) -> tuple[float, str, str | None]:
    """Return seconds of a step of a captured graph, or launched where that fails."""
    import torch

    from ..engines.expert_modules import MarlinExperts

    device = decoder.tokens.device
    synchronize = partial(torch.cuda.synchronize, device)
    if any(isinstance(module, MarlinExperts) for module in decoder.model.modules()):
        why = "experts are chosen with numbers from the GPU"
        return time_launched(decoder, steps, synchronize), LAUNCHES, why
    try:
        graph = capture(decoder)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        synchronize()
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return time_launched(decoder, steps, synchronize), LAUNCHES, why
    seconds = []
    for _ in range(REPEATS):
        decoder.prefill()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        synchronize()
        start.record()
        for _ in range(steps):
            graph.replay()
        end.record()
        synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / steps)  # from ms
    graph.reset()
    return median(seconds), GRAPHS, None


@dataclass(frozen=True)
class ModelRig:
    """All that a measurement asks of a machine; tests bring their own."""

    describe: Callable[[], Machine]
    time: Timer
    release: Callable[[], None]  # returns memory that no tensor uses to the driver


def bench(
    title: str, model: Any, rig: ModelRig, *, batch: Sequence[int] = BATCH, progress: Progress | None = None
) -> Report:
    """Measure `model`, which has Marlin layers, then the same in fp16, which it stays. `progress` counts timings.

    Sizes that the memory does not suffice for are left out with a note; DeviceError if that is everything.
    """
    progress = progress or Progress()
    progress.stage("measuring", 2 * len(batch), 2)
    report = Report(title, rig.describe(), {})
    rates: dict[str, list[float | None]] = {}
    for kind in ("marlin", "fp16"):
        if kind == "fp16":
            rig.release()
            model = _in_fp16(model, report)
        rates[kind] = [None] * len(batch)
        if model is not None:
            report.weight_bytes[kind] = model.get_memory_footprint(return_buffers=True)
            rates[kind] = [_rate(model, size, kind, rig, report, progress) for size in batch]
        progress.advance(0, kind, done=True)
    progress.end()
    rows = zip(batch, rates["fp16"], rates["marlin"], strict=True)
    report.cells = [Cell(size, fp16, marlin) for size, fp16, marlin in rows if fp16 or marlin]
    if not report.cells:
        raise DeviceError(f"nothing could be measured on {report.machine.name}: {'; '.join(report.notes)}.")
    return report


def _in_fp16(model: Any, report: Report) -> Any:
    """Return `model` with its Marlin layers dequantized in place; None, with a note, when that does not fit the
    memory."""
    import torch

    try:
        model.dequantize(dtype=model.dtype)
    except torch.OutOfMemoryError:
        report.notes.setdefault("left out: the GPU's memory does not hold the model", []).append("fp16")
        return None
    return model


def _rate(model: Any, size: int, kind: str, rig: ModelRig, report: Report, progress: Progress) -> float | None:
    """Return tokens a second of `size` sequences together."""
    import torch

    progress.advance(0, f"{kind}, batch {size}")
    try:
        seconds, report.execution[kind], why = rig.time(Decoder(model, size), STEPS)
    except torch.OutOfMemoryError:
        report.notes.setdefault("left out: the GPU's memory ran out", []).append(f"{kind}, batch {size}")
        return None
    finally:
        rig.release()
        progress.advance(1)
    if why:
        report.notes.setdefault(f"timed with every launch from Python, no CUDA graph: {why}", []).append(
            f"{kind}, batch {size}"
        )
    return size / seconds


def run(
    source: str | Path,
    *,
    batch: Sequence[int] = BATCH,
    device: str = "auto",
    access: HubAccess | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the Marlin checkpoint `source`, a folder or a Hub id, on the GPU that `device` names.

    Raises DeviceError without a GPU that suits, and what `load` raises.
    """
    require("torch", "transformers")
    import torch

    access, gpu = access or HubAccess(), pick_gpu(device)
    kernels = cuda_rig(gpu)
    with transformers_quietly() as hf, torch.cuda.device(kernels.device):
        model = hf.load(
            source, device=str(gpu), dtype=torch.float16, revision=access.revision, token=access.token,
            cache_dir=access.cache_dir,
        )  # fmt: skip
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and limit < CONTEXT + STEPS:
            raise SourceError(f"{source}: the model takes {limit} tokens; measuring needs {CONTEXT + STEPS}.")

        def release() -> None:
            gc.collect()
            torch.cuda.empty_cache()

        rig = ModelRig(kernels.describe, time_on_gpu, release)
        return bench(Path(str(source)).name, model, rig, batch=batch, progress=progress)
