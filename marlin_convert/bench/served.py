"""Tokens per second of whole models in vLLM as users run it: a Marlin checkpoint, its GPTQ source, the same in fp16.

Each side runs in a process of its own (`served_side`), with torch.compile, CUDA graphs and caches of its own that start
empty: nothing that one side has compiled serves another, and the time of the start is that of the first one. The GPTQ
source is loaded without marlin-convert's plugin, on the kernel that vLLM chooses for it. fp16 has the shape of the
Marlin checkpoint and random weights: its values do not decide its speed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

from .. import child
from ..errors import MarlinConvertError, MissingPackageError, SourceError, require
from ..options import HubAccess
from ..progress import Progress
from .gpu import pick_gpu
from .results import Machine
from .shapes import Notes

BATCH = tuple(2**i for i in range(8))  # 1 … 128
PROMPT = NEW = 128  # tokens of each sequence before decoding, and decoded
PREFILLS = ((1, 512), (1, 2000), (4, 2000))  # prompts x tokens, each of one step
LENGTH = 2048  # longest sequence, if the model allows it
TOKENS_OF_A_STEP = 8192

MARLIN, GPTQ, FP16 = "marlin", "gptq", "fp16"
LABELS = {FP16: "fp16", GPTQ: "GPTQ", MARLIN: "Marlin"}


@dataclass(frozen=True)
class Request:
    """What one side is to do. `model` is a folder or a Hub id; `random` leaves its weights aside, in fp16."""

    model: str
    batch: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]
    length: int = LENGTH  # of a sequence, at most
    revision: str | None = None
    random: bool = False


@dataclass(frozen=True)
class Side:
    """What one side answered. Rates are tokens of all sequences together, a second, by batch size and by (prompts,
    tokens); `start_s` is how long `LLM(...)` took; `kernels` are what vLLM computes quantized linear layers with."""

    start_s: float
    decode: dict[int, float]
    prefill: dict[tuple[int, int], float]
    kernels: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "start_s": round(self.start_s, 2),
            "kernels": list(self.kernels),
            "decode": [{"batch": size, "tokens_per_s": round(rate, 1)} for size, rate in self.decode.items()],
            "prefill": [
                {"prompts": prompts, "tokens": tokens, "tokens_per_s": round(rate, 1)}
                for (prompts, tokens), rate in self.prefill.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Side:
        return cls(
            values["start_s"],
            {x["batch"]: x["tokens_per_s"] for x in values["decode"]},
            {(x["prompts"], x["tokens"]): x["tokens_per_s"] for x in values["prefill"]},
            tuple(values["kernels"]),
        )


@dataclass
class Report:
    """All sides of one run, those that vLLM could run, and where it was."""

    title: str
    machine: Machine
    sides: dict[str, Side] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)

    def table(self) -> list[list[str]]:
        """Return headings, then a row for each measurement: tokens/s of each side, and Marlin's share of each other
        one's."""
        others = [name for name in LABELS if name in self.sides and name != MARLIN]
        names = [*others, MARLIN]
        rows = [["", *(LABELS[name] for name in names), *(f"Marlin / {LABELS[name]}" for name in others)]]

        def row(what: str, rates: list[float]) -> None:
            rows.append([what, *(f"{rate:.0f}" for rate in rates), *(f"{rates[-1] / rate:.2f}" for rate in rates[:-1])])

        for batch in self.sides[MARLIN].decode:
            row(f"decode, batch {batch}", [self.sides[name].decode[batch] for name in names])
        for case in self.sides[MARLIN].prefill:
            row(f"prefill, {case[0]} x {case[1]} tokens", [self.sides[name].prefill[case] for name in names])
        rows.append(["start, s", *(f"{self.sides[name].start_s:.1f}" for name in names), *("" for _ in others)])
        return rows

    def method(self) -> str:
        """Return what was measured, in words."""
        return (
            f"tokens of all sequences together, a second; decoding: {NEW} tokens behind prompts of {PROMPT}, from the "
            "first token of the sequence that begins last; each side in processes of its own, its caches empty before; "
            f"{LABELS[next(iter(self.sides))]} was first, and started with files that nothing had read before"
        )

    def kernels(self) -> dict[str, str]:
        """Return, by label, what computes the quantized linear layers."""
        return {LABELS[name]: ", ".join(side.kernels) for name, side in self.sides.items() if side.kernels}

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for `--json`."""
        return {
            "ok": True,
            "engine": "vllm",
            "title": self.title,
            "machine": asdict(self.machine),
            "method": {"prompt": PROMPT, "new": NEW, "tokens_of_a_step": TOKENS_OF_A_STEP},
            "sides": {name: side.as_dict() for name, side in self.sides.items()},
            "notes": [{"note": note, "where": where} for note, where in self.notes.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that `as_dict` was made of."""
        sides = {name: Side.from_dict(side) for name, side in values["sides"].items()}
        notes = {x["note"]: x["where"] for x in values["notes"]}
        return cls(values["title"], Machine(**values["machine"]), sides, notes)


# ---- One side ----


class SideFailed(Exception):
    """vLLM did not run a side; the text says why, in its words."""


def _measure(
    request: Request, environment: Mapping[str, str], verbose: bool, on_step: Callable[[str], object]
) -> tuple[Side, Machine]:
    """Run one side in a process of its own. Raises SideFailed."""
    with (
        tempfile.TemporaryDirectory(prefix="marlin-convert-") as folder,
        _process(request, environment, Path(folder), verbose) as (process, answers),
    ):
        for line in answers:
            kind, value = json.loads(line)
            if kind == "step":
                on_step(value)
            elif kind == "failed":
                raise SideFailed(value)
            else:
                return Side.from_dict(value["side"]), Machine(**value["machine"])
        code = process.wait()
        log = Path(folder, "log")
        printed = (
            [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
        )
        ended = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        raise SideFailed(f"its process {ended}" + (f"; its last words: {printed[-1].strip()}" if printed else ""))


@contextmanager
def _process(
    request: Request, environment: Mapping[str, str], folder: Path, verbose: bool
) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[bytes]]]:
    """Run the process of a side, and the lines of its answers; whatever happens, none of its processes is left."""
    caches = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor",
              "CUDA_CACHE_PATH": "cuda"}  # fmt: skip
    folders = {name: str(folder / path) for name, path in caches.items()}
    read, write = os.pipe()
    try:
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                child.python(f"{__package__}.served_side", str(write), json.dumps(asdict(request))),
                env={**os.environ, **folders, **environment}, pass_fds=(write,), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=sys.stderr if verbose else log, stderr=None if verbose else log,
            )  # fmt: skip
        try:
            os.close(write)
            write = -1
            yield process, _lines(process, read)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)


def _lines(process: subprocess.Popen[bytes], answers: int) -> Iterator[bytes]:
    """Return the lines that come from the file descriptor `answers`, until its other end is closed or the process has
    ended: others that it has started may keep it open."""
    come = b""
    while True:
        ended = process.poll() is not None
        if not select.select([answers], [], [], 0 if ended else 1)[0]:
            if ended:
                return
            continue
        more = os.read(answers, 1 << 16)
        if not more:
            return
        *lines, come = (come + more).split(b"\n")
        yield from lines


# ---- In one call ----


def run(
    out: str | Path,
    gptq: str | Path | None = None,
    *,
    batch: Sequence[int] = BATCH,
    fp16: bool = True,
    device: str = "auto",
    access: HubAccess | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Report:
    """Measure the Marlin checkpoint `out`, `gptq` if given, and `fp16` if the GPU's memory holds it.

    Each is a folder or a Hub id; the revision of `access` is that of `out`. Raises MissingPackageError without vLLM,
    DeviceError without a GPU that suits, MarlinConvertError if vLLM does not run `out`; what else it does not run is
    noted, with its reason.
    """
    if util.find_spec("vllm") is None:
        raise MissingPackageError(
            "--engine vllm measures vLLM, which is not installed here; install it beside marlin-convert: "
            "pip install vllm."
        )
    require("torch", "transformers")
    progress, access = progress or Progress(), access or HubAccess()
    gpu = pick_gpu(device)
    environment = {"CUDA_VISIBLE_DEVICES": _visible(gpu.index), **_access(access)}
    length = min(LENGTH, _longest(out) if Path(out).is_dir() else LENGTH)
    if length < PROMPT + NEW:
        raise SourceError(f"{out}: the model takes {length} tokens; measuring needs {PROMPT + NEW}.")
    prefills = tuple(case for case in PREFILLS if case[1] < length)
    marlin = Request(str(out), tuple(sorted(batch)), prefills, length, access.revision)
    # The first side reads vLLM's and torch's files from the disk, which makes its start longer.
    requests = {FP16: replace(marlin, random=True)} if fp16 else {}
    requests[MARLIN] = marlin
    if gptq is not None:
        requests[GPTQ] = replace(marlin, model=str(gptq), revision=None)
    return bench(Path(str(out)).name, requests, environment, progress, verbose)


def bench(
    title: str, requests: Mapping[str, Request], environment: Mapping[str, str], progress: Progress, verbose: bool
) -> Report:
    """Measure one side after the other, in the order of `requests`. `progress` counts starts and measurements."""
    steps = {name: 1 + len(request.batch) + len(request.prefills) for name, request in requests.items()}
    progress.stage("measuring", sum(steps.values()), len(requests))
    sides: dict[str, Side] = {}
    notes: Notes = {}
    machine: Machine | None = None
    for name, request in requests.items():
        left = steps[name]

        def on_step(what: str, name: str = name) -> None:
            nonlocal left
            left -= 1
            progress.advance(1, f"{LABELS[name]}, {what}")

        progress.advance(0, f"{LABELS[name]}, start")
        # the plugin is loaded only where it is what is measured
        variables = environment if name == MARLIN else {**environment, "VLLM_PLUGINS": ""}
        try:
            sides[name], machine = _measure(request, variables, verbose, on_step)
        except SideFailed as why:
            if name == MARLIN:
                raise MarlinConvertError(
                    f"vLLM does not run {request.model}: {why}. Run again with --verbose for all that it says."
                ) from None
            notes[f"left out: vLLM does not run it ({why})"] = [LABELS[name]]
        progress.advance(left, LABELS[name], done=True)
    progress.end()
    assert machine is not None
    return Report(title, machine, sides, notes)


def _visible(index: int) -> str:
    """Return what CUDA_VISIBLE_DEVICES is for the GPU that the driver shows this process as number `index`."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[index] if shown else str(index)


def _access(access: HubAccess) -> dict[str, str]:
    """Return environment variables by which a side reads the Hub alike: a command line must not hold a token."""
    found = {"HF_TOKEN": access.token, "HF_HUB_CACHE": access.cache_dir and str(Path(access.cache_dir).absolute())}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _longest(folder: str | Path) -> int:
    """Return the most tokens that the model in a folder takes, as its config says; LENGTH if that says nothing."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        limit = config.get("text_config", config).get("max_position_embeddings", LENGTH)
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{folder}: its config.json cannot be read: {error}.") from None
    return int(limit) if isinstance(limit, int) else LENGTH
