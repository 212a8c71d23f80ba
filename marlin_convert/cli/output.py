"""What the command line prints: tables, summaries, JSON documents.

People read standard error while work goes on and standard output for the result; with --json, standard output
holds one JSON document and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..checkpoint.writer import shard_names
from ..conversion.names import span
from ..conversion.plan import Plan, plan_as_dict
from ..engine_support import (
    SGLANG,
    VLLM,
    ResultFacts,
    doubts,
    engines_as_dicts,
    readers,
    sglang_refuses,
    vllm_needs_our_kernels,
    vllm_refuses,
)
from ..formats.cuts import tensor_parallel_cuts
from ..hub import client as hub
from ..options import FORMAT_NAMES, Options
from ..progress import Progress
from ..text import size, visible
from .console import Lossy, PlainConsole
from .documents import document
from .progress import FOR_LAYER, Bars, PlainLines, waiting
from .tables import batch_table, plan_table, verification_table

if TYPE_CHECKING:
    from ..conversion.proof import Proof
    from ..conversion.report import Report
    from ..conversion.restore import Restored
    from ..conversion.verify import Verification
    from ..engines.generate import Comparison
    from ..engines.transformers_trial import Trial
    from ..hub.open import Source
    from .params import OutputOptions


class Screen:
    """Where a command prints, as the output options ask for it."""

    def __init__(self, output: OutputOptions) -> None:
        self.as_json, self.verbose = output.as_json, output.verbose
        self.silent = output.quiet or output.as_json
        self._source = output.source
        # A file or a pipe has no width of its own; tables need not be folded for it.
        self.out = PlainConsole(width=None if sys.stdout.isatty() else 200)
        self.err = PlainConsole(file=Lossy(sys.stderr))
        hub.quiet()

    @contextlib.contextmanager
    def progress(self, *, timings: bool = False) -> Iterator[Progress]:
        """Return what shows progress here: bars on a terminal, lines in a log, nothing with --quiet or --json.

        `timings` says that the work is counted in timings, not in bytes.
        """
        if self.silent:
            yield Progress()
        elif self.err.is_terminal:
            bars = Bars(self.err, timings=timings)
            try:
                yield bars
            finally:
                bars.stop()
        else:
            yield PlainLines(self.err, (lambda count: f"{count:.0f} timings") if timings else None)

    def _say(self, text: str = "", label: str = "", style: str = "") -> None:
        """Print one line, behind a coloured `label`."""
        if not self.silent:
            self.out.print(labelled(text, label, style), soft_wrap=True)

    def _note(self, text: str) -> None:
        self._say(text, "note", "yellow")

    def _json(self, value: dict[str, Any]) -> None:
        if self.as_json:
            print(json.dumps(document(value, self._source), indent=2))

    def start(self) -> None:
        """Warn, before a conversion, that it will be slow here."""
        from ..native import cpu

        if not self.silent and not cpu.native_available():
            self.err.print(labelled(cpu.describe(), "slow:", "yellow"), soft_wrap=True)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say that `what` goes on while the context lasts, where nothing is counted."""
        with self.progress() as progress:
            plain = isinstance(progress, PlainLines)
            with waiting(self.err, what) if plain else progress.waiting(what):
                yield

    def already_marlin(self, text: str) -> None:
        self._say(text)
        self._json({"ok": True, "already_marlin": True, "message": text})

    def plan(
        self,
        source: Source,
        plan: Plan,
        options: Options,
        trial: Trial | None = None,
        served: str | None = None,
        ranks: int = 1,
    ) -> None:
        """Show what `--dry-run` says; with the `trial` of the result in Transformers, and what the engine `served`,
        "vllm" or "sglang", does with it on so many tensor-parallel `ranks`."""
        value = {"ok": not plan.refusals, **plan_as_dict(plan, source.label)}
        if not plan.refusals and not plan.already_marlin:
            files = shard_names(plan.out_tensors, options.max_shard_size)
            value["engines"] = engines_as_dicts(plan.result_facts(options.quant_method, len(files)))
        if trial is not None:
            value["transformers"] = asdict(trial)
        if served is not None:
            cuts = tensor_parallel_cuts(plan.layer_facts, ranks)
            value["tensor_parallel"] = {"ranks": ranks, "cuts": [asdict(cut) for cut in cuts]}
        self._json(value)
        if plan.already_marlin:
            self._say(f"{source.label} already is a Marlin checkpoint; there is nothing to convert.")
            return
        if plan.layers:
            self._table(plan_table(source.label, plan))
        if self.verbose:
            for layer in plan.layers:
                kind = f", {layer.kind}" if layer.kind else ""
                self._say(
                    f"  convert {layer.name}  {layer.K} x {layer.N}, {layer.bits} bits, group {layer.group_size}{kind}"
                )
            for tensor in plan.copies:
                self._say(f"  copy    {tensor.name}  {tensor.dtype} {list(tensor.shape)}")
        copied = sum(t.nbytes for t in plan.copies)
        parts = sorted({tensor.name.rpartition(".")[2] for tensor in plan.dropped})
        self._say(
            f"{len(plan.layers)} layers to convert, {len(plan.copies)} tensors to copy ({size(copied)}), "
            f"{len(plan.dropped)} dropped ({', '.join(parts) or 'none'})"
        )
        self._beside(plan)
        self._say(f"{size(plan.bytes_in)} in, {size(plan.bytes_out)} out")
        if not plan.refusals:
            files = shard_names(plan.out_tensors, options.max_shard_size)
            self._format(plan, plan.result_facts(options.quant_method, len(files)))
            if trial is not None:
                self._transformers(trial)
            if served is not None:
                self._served(plan, plan.result_facts(options.quant_method, len(files)).config, served, ranks)
        self._notes(plan)

    def _transformers(self, trial: Trial) -> None:
        """Show what Transformers does with the result."""
        if trial.why_not is not None:
            self._say(f"Transformers 5 with marlin-convert: does not load it: {trial.why_not}")
            return
        how = f" with auto_class={trial.auto_class}" if trial.auto_class else ""
        self._say(f"Transformers 5 with marlin-convert: loads it{how}, as {trial.model}; on GPUs of compute capability")
        self._say("  8.0 and newer with the bundled CUDA kernels, elsewhere with a slow reference")
        if trial.dequantized:
            self._say(f"  with 16-bit weights, as the model computes them itself: {self._names(trial.dequantized)}")

    def _served(self, plan: Plan, config: Mapping[str, Any] | None, engine: str, ranks: int) -> None:
        """Show what vLLM or SGLang does with the result's layers."""
        facts = plan.layer_facts
        cuts = tensor_parallel_cuts(facts, ranks)
        faults = sglang_refuses(facts) if engine == "sglang" else vllm_refuses(facts, config)
        refused = {name for cut in cuts if cut.refused for name in cut.layers}.union(*faults.values())
        rest = f"refuses {len(refused)} of {len(facts)} layers" if refused else "takes every layer"
        known = SGLANG if engine == "sglang" else VLLM
        self._say(f"{known} with marlin-convert, {ranks} rank{'' if ranks == 1 else 's'}: {rest}")
        for fault, names in faults.items():
            self._say(f"  {fault}: {self._names(names)}: refused; in Transformers they run")
        for cut in cuts:
            self._say(f"  {cut.what}: {self._names(cut.layers)}: {cut.effect}")
        if engine == "sglang":
            self._say("  computed on GPUs of compute capability 8.0 and newer by marlin-convert's CUDA kernels alone")

    def _beside(self, plan: Plan) -> None:
        """Show weights that are not the model's own, every one by name."""
        for name, nbytes in plan.weights_beside.items():
            self._say(f"beside the model's weights, copied as it is: {name} ({size(nbytes)})")

    def _format(self, plan: Plan, facts: ResultFacts) -> None:
        """Show which format, why, and who reads it."""
        count = len(readers(facts, with_plugin=True) + readers(facts, with_plugin=False))
        known = f", which {_readers(facts)} {'read' if count > 1 else 'reads'}" if count else ""
        self._say(f"format: {FORMAT_NAMES[plan.format]}{known}")
        self._caveats(plan, facts)

    def _caveats(self, plan: Plan, facts: ResultFacts) -> None:
        """Show what of the result vLLM takes only here; which engine is not known to take it; why it is extended."""
        for name, why in doubts(facts).items():
            self._say(f"  {name}: {why}")
        for what, names in vllm_needs_our_kernels(facts.layers).items():
            self._say(f"  vLLM computes {what} where marlin-convert's CUDA kernels are built: {self._names(names)}")
        for reason, names in plan.why_extended.items() if plan.extended else ():
            self._say(f"  extended, because {reason}: {self._names(names)}")

    def _names(self, names: list[str]) -> str:
        return ", ".join(names) if self.verbose else span(names)

    def _notes(self, plan: Plan) -> None:
        for note, names in plan.notes.items():
            where = "" if not names else f": {', '.join(names) if self.verbose else span(names)}"
            self._note(f"{note}{where}")

    def report(
        self, report: Report, stages: Sequence[tuple[str, int, float]] = (), texts: Comparison | None = None,
        missing: str | None = None,
    ) -> None:  # fmt: skip
        """Show the end of a conversion, in five lines. `stages`: how long each took; `texts`: what source and result
        made of a prompt, or why nothing."""
        continuation = {} if texts is None and missing is None else {"continuation": texts and texts.as_dict()}
        self._json({**report.as_dict(), **continuation})
        if report.verification and (self.verbose or not report.verification.ok):
            self._verification_table(report.verification)
        plan = report.plan
        facts = plan.result_facts(report.options.quant_method, len(report.files))
        self._beside(plan)
        self._caveats(plan, facts)
        self._notes(plan)
        if plan.scale_rounding:
            self._note(f"scales rounded, by at most {plan.scale_rounding:.2e} of their value")
        if report.device_note:
            self._note(report.device_note)
        if missing:
            self._note(f"no prompt was continued: {missing}")
        if texts:
            self._continuation(texts)
        where = shlex.quote(str(report.out))
        files = ", ".join(report.files) if len(report.files) < 3 else f"{len(report.files)} weight files"
        on_cpu = report.device.kind == "cpu"
        following = f"vllm serve {where}"
        if on_cpu:
            following = f'marlin-convert generate {where} --prompt "…"   (on this CPU, slowly)'
        made = (
            f"{report.out} ({files}): {FORMAT_NAMES[plan.format]}, {len(plan.layers)} layers converted, "
            f"{len(plan.copies)} tensors copied, {size(plan.bytes_in)} in, {size(plan.bytes_out)} out"
        )
        unread = "each block, as it was written; --verify reads the result back and compares all of it"
        lines = [
            ("result", made),
            ("verified", _verdict(report.verification) if report.verification else unread),
            ("time", _times(stages, report)),
            ("read by", _readers(facts)),
            ("next", following),
        ]
        self._aligned([*lines, *([("hub", report.pushed)] if report.pushed else [])])

    def environment(self, found: dict[str, Any]) -> None:
        """Show what `marlin-convert env` says."""
        self._json(found)
        gpus = found["gpus"]
        if isinstance(gpus, list):
            gpus = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in gpus)
        told = {
            "marlin-convert": f"{found['marlin_convert']}, {found['folder']}",
            "python": found["python"],
            "system": f"{found['system']}, {found['libc']}",
            "cpu": f"{found['cpu']}, {found['cpus']} usable, {size(found['memory_bytes'])} of memory",
            "cpu library": found["cpu_library"],
            "cuda library": found["cuda_library"] or "not built",
            "gpus": gpus if found["driver"] is None else f"{gpus}; driver {found['driver']}",
            **{name: version or "not installed" for name, version in found["packages"].items()},
            **found["variables"],
        }
        self._aligned(list(told.items()))

    def _aligned(self, lines: list[tuple[str, str]]) -> None:
        """Print lines with labels before them, broken at words."""
        width = max(len(label) for label, _ in lines) + 2
        if not self.out.is_terminal:  # as long as they are
            for label, text in lines:
                self._say(text, label.ljust(width - 1))
            return
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(style="green", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in lines:
            table.add_row(label, visible(text))
        self._table(table)

    def restored(self, report: Restored) -> None:
        """Show the result of `marlin-convert to-gptq`."""
        self._json({**report.as_dict(), "source": report.source.label})
        self._say(
            f"{len(report.layers)} layers from {report.format} to {report.restored_format}, "
            f"{len(report.copies)} tensors copied; {size(report.bytes_out)} out, {report.seconds:.1f} s",
            "restored", "green",
        )  # fmt: skip
        if not report.settings_known:
            self._note("the source's own settings are not known here: they are what the tensors imply")
        self._say(f"where: {report.out}")

    def _continuation(self, texts: Comparison) -> None:
        self._say(f"prompt: {texts.prompt}")
        for name, text in (("source, dequantized", texts.source), ("result", texts.result)):
            self._say(f"  {name + ':':<20} {' '.join(text.split())}")
        self._say(f"  {'the same text' if texts.equal else 'not the same text: two tokens were almost equally likely'}")

    def pushed(self, address: str) -> None:
        """Show the result of `marlin-convert push`."""
        self._json({"ok": True, "pushed": address})
        self._say(address, "published", "green")

    def serving(self, address: str) -> None:
        """Show where the page of `marlin-convert web` is."""
        self._json({"ok": True, "address": address})
        self._say(f"{address}   (Ctrl-C ends it)", "page", "green")
        sys.stdout.flush()

    def verification(self, report: Verification, out: Path) -> None:
        """Show the result of `marlin-convert verify`."""
        self._json({**report.as_dict(), "out": str(out)})
        if self.verbose or not report.ok:
            self._verification_table(report)
        for problem in report.problems:
            self._say(problem, "differs", "red")
        self._say(_verdict(report), *(("verified", "green") if report.ok else ("not equal", "red")))

    def proof(self, report: Proof, statement: Path | None) -> None:
        """Show the result of `marlin-convert verify` with a result alone."""
        self._json({**report.as_dict(), "statement": statement and str(statement)})
        if self.verbose or not report.verification.ok:
            self._verification_table(report.verification)
        for problem in report.verification.problems:
            self._say(problem, "differs", "red")
        for name, text in report.files.items():
            if text:
                self._say(f"{name}: {text}", "differs", "red")
        for note in report.notes:
            self._note(note)
        source = f"{report.source.label} at commit {report.source.commit}"
        if report.ok:
            self._say(f"{_verdict(report.verification)}; {len(report.files)} files as converted", "verified", "green")
            self._say(f"{report.result.label} is exactly what {source} gives")
        else:
            self._say(f"{report.result.label} is not exactly what {source} gives", "not equal", "red")
        if statement:
            self._say(f"statement: {statement}")

    def batch_line(self, text: str) -> None:
        """Print a line while `marlin-convert batch` works."""
        if not self.silent:
            self.err.print(text, soft_wrap=True)

    def batch(self, rows: list[dict[str, Any]], counts: dict[str, int], styles: dict[str, str]) -> None:
        """Show the result of `marlin-convert batch`: what became of each line."""
        self._json({"ok": "failed" not in counts, "counts": counts, "checkpoints": rows})
        narrow = self.out.is_terminal and self.out.width < FOR_LAYER
        self._table(batch_table(rows, styles, verbose=self.verbose, narrow=narrow))
        self._say(", ".join(f"{count} {status}" for status, count in counts.items()))

    def _verification_table(self, report: Verification) -> None:
        table, hidden = verification_table(report, verbose=self.verbose)
        self._table(table)
        if hidden:
            self._say("", f"… and {hidden} more layers (--verbose shows all)", "dim")

    def _table(self, table: Table) -> None:
        if not self.silent:
            self.out.print(table)


def _readers(facts: ResultFacts) -> str:
    """Return who reads a result, in words."""
    beside, alone = ([engine.name for engine in readers(facts, with_plugin=x)] for x in (True, False))
    named = " and ".join([", ".join(beside[:-1]), beside[-1]] if beside[1:] else beside)
    words = [f"{named} with marlin-convert"] if beside else []
    return ", and ".join([*words, *([", ".join(alone)] if alone else [])]) or "no engine that is known"


def _times(stages: Sequence[tuple[str, int, float]], report: Report) -> str:
    """Return how long each stage took, at what rate, and all of it."""
    parts = [f"{label} {seconds:.1f} s ({size(nbytes / max(seconds, 1e-9))}/s)" for label, nbytes, seconds in stages]
    return ", ".join([*parts, f"{report.seconds:.1f} s in all, {report.backend}"])


def labelled(text: str, label: str, style: str) -> Text:
    return Text.assemble((label, style), " " if label and text else "", text)


def _verdict(report: Verification) -> str:
    equal = sum(x.exact for x in report.layers)
    return (
        f"{equal} of {len(report.layers)} layers exactly equal, {report.tensors_equal} other tensors byte for byte; "
        f"outputs on {report.device}: largest relative error {report.worst:.1e}"
    )
