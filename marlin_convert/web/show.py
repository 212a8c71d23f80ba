"""What the page shows, as HTML: plans, progress, proofs, errors. Text from outside is escaped, all of it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from html import escape
from typing import Any

from ..text import size, visible
from .jobs import CANCELLED, RUNNING, WAITING, Job, Stage

#: Options of the command line that messages name → what the page has for them.
_WORDS = {
    "log in with `hf auth login` or give --token": "log in, or give a token",
    "log in with `hf auth login`, or give another --token": "log in, or give another token",
    "needs a token (`hf auth login` or --token)": "needs a token of yours",
    "or --create-pr": "or let it be a pull request",
    "leave --private out": "do not ask for a private one",
    "overwrite them with --force": "let them be overwritten",
    "give --zero-points": "choose as zero points, under More,",
    "--revision": "the revision given",
    "; run it again to resume": "; try again",
}  # fmt: skip

#: Rows of a proof's table that are shown without a click.
SHORT_TABLE = 12


def page_words(message: str) -> str:
    """Return a message of the library with the page's words in place of the command line's."""
    for option, words in _WORDS.items():
        message = message.replace(option, words)
    return message


def problem(message: str) -> str:
    """Return an error, or several lines of them."""
    first, *lines = visible(page_words(message)).split("\n")
    listed = _list(line.removeprefix("  - ") for line in lines)
    return f'<div class="mc-problem" role="alert"><p>{_sentence(first)}</p>{listed}</div>'


def note(text: str) -> str:
    return f'<p class="mc-note">{escape(visible(text))}</p>'


def plan_of(job: Job) -> str:
    """Return a plan, or how it is with making it."""
    if job.state in (WAITING, RUNNING):
        bars = "".join(_bar(stage) for stage in job.stages.values())
        return bars or '<p class="mc-busy">Asking the Hub …</p>'
    if not job.result:
        return problem(job.message) if job.message else ""
    plan = job.result
    where = f"{plan['source']} at commit {(plan['commit'] or '')[:8]}"
    if plan["already_marlin"]:
        return note(f"{where} already is a Marlin checkpoint; there is nothing to convert.")
    parts = [f"<h3>{escape(visible(where))}</h3>"]
    if plan["refusals"]:
        several = f"{plan['layers_found'] - plan['layers']} of {plan['layers_found']} quantized layers"
        parts.append(problem("\n".join([f"{several} cannot be converted:", *plan["refusals"]])))
    else:
        if plan["room"]:
            parts.append(problem(plan["room"]))
        parts.append(_facts({
            "from": plan["source_format"],
            "to": plan["format"],
            "layers": f"{plan['layers']} to convert, {plan['copies']} other tensors to copy",
            "size": f"{size(plan['bytes_in'])} in, {size(plan['bytes_out'])} out, {plan['files']} "
                    f"file{'s' if plan['files'] > 1 else ''}; in fp16 it would be {size(plan['bytes_fp16'])}",
            "disk": f"{size(plan['disk_needed'])} needed, {size(plan['disk_free'])} free",
            "runs in": _engines(plan),
        }))  # fmt: skip
    heads = ("layers", "K x N", "bits", "group", "", "scales")
    rows = [(n, f"{K} x {N}", bits, group, kind, dtype) for n, K, N, bits, group, kind, dtype in plan["kinds"]]
    parts.append(_table(heads, rows))
    parts.append(_list([*plan["why_extended"], *plan["engine_notes"], *map(page_words, plan["notes"])]))
    return "".join(parts)


def _engines(plan: dict[str, Any]) -> str:
    beside = [" and ".join(plan["with_plugin"]) + " with marlin-convert"] if plan["with_plugin"] else []
    alone = [", ".join(plan["alone"])] if plan["alone"] else []
    return "; ".join(beside + alone) or "no engine that is known"


def progress_of(job: Job, ahead: int) -> str:
    """Return how far a conversion is: a bar for each stage, and what is at hand."""
    if job.state == WAITING:
        many = f"{ahead} conversion{'s are' if ahead > 1 else ' is'} ahead of it." if ahead else "It begins at once."
        return note(f"Waiting. {many}")
    if job.state == CANCELLED:
        what = (
            "Cancelled while it was being published: the repository is as it was, or has all of it."
            if "uploading" in job.stages
            else "Cancelled. Nothing was published, and nothing is left here."
        )
        return note(what)
    if job.over:
        return problem(job.message) if job.message else ""
    bars = [_bar(stage) for stage in job.stages.values()]
    if job.message:
        bars.append(note(page_words(job.message)))
    if job.cancelling:
        bars.append(note("Cancelling …"))
    return "".join(bars) or '<p class="mc-busy">Asking the Hub …</p>'


def _bar(stage: Stage) -> str:
    event = stage.event
    done, total, ended = event["bytes_done"], event["bytes_total"], event["bytes_done"] >= event["bytes_total"]
    words = [f"{size(done)} of {size(total)}"]
    if event["layers_total"]:
        words.insert(0, f"{event['layers_done']} of {event['layers_total']} layers")
    if stage.rate and not ended:
        words.append(f"{size(stage.rate)}/s")
    if stage.seconds_left is not None and not ended:
        words.append(f"{duration(stage.seconds_left)} left")
    layer = f'<div class="mc-layer">{escape(visible(event["layer"]))}</div>' if event["layer"] and not ended else ""
    return (
        f'<div class="mc-stage" data-stage="{escape(event["stage"])}"><b>{escape(event["stage"])}</b> '
        f"<span>{escape(', '.join(words))}</span>"
        f'<progress max="{max(total, 1)}" value="{done if total else 1}"></progress>{layer}</div>'
    )


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 3 min, 1 h 20 min."""
    if not math.isfinite(seconds) or seconds < 90:
        return f"{min(seconds, 90):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def result_of(job: Job) -> str:
    """Return what came of a conversion that was published: where it is, its proof, how to use it."""
    done = job.result
    if not done:
        return ""
    proof = done["verification"]
    equal = sum(layer["exact"] for layer in proof["layers"])
    repo = escape(visible(done["repo_id"]))
    address = escape(done["pushed"], quote=True)
    heads = ("layer", "K x N", "exact", "max error", "relative")
    rows = [
        (x["name"], f"{x['K']} x {x['N']}", "equal" if x["ok"] else x["problem"] or "differs",
         _number(x["max_error"]), _number(x["relative_error"]))
        for x in proof["layers"]
    ]  # fmt: skip
    rest = ""
    if len(rows) > SHORT_TABLE:
        more = _table(heads, rows[SHORT_TABLE:])
        rest = f"<details><summary>{len(rows) - SHORT_TABLE} more layers</summary>{more}</details>"
    verdict = (
        f"{equal} of {len(rows)} layers exactly equal, {proof['tensors_equal']} other tensors byte for byte; outputs "
        f"on {proof['device']}: largest relative error {proof['worst_relative_error']:.1e}"
    )
    return (
        f'<h3>Published: <a href="{address}" target="_blank" rel="noopener noreferrer">{repo}</a></h3>'
        + _facts({
            "proof": verdict,
            "format": done["format"],
            "size": f"{size(done['bytes_in'])} in, {size(done['bytes_out'])} out",
            "time": duration(done["seconds"]),
            "load": f"vllm serve {done['repo_id']}   (with marlin-convert installed)",
        })
        + f'<img class="mc-picture" alt="Error by layer, and sizes" src="{_data(picture(done))}">'
        + _table(heads, rows[:SHORT_TABLE]) + rest
    )  # fmt: skip


def picture(done: dict[str, Any]) -> bytes:
    """Return an SVG: each layer's relative error against the tolerance, and the sizes of fp16, source and result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    errors, sizes = figure.subplots(1, 2, width_ratios=[3, 2])
    proof = done["verification"]
    points = [(i, x["relative_error"]) for i, x in enumerate(proof["layers"]) if isinstance(x["relative_error"], float)]
    errors.plot([x for x, _ in points], [y for _, y in points], ".", markersize=4, label="layers")
    errors.set_yscale("symlog", linthresh=1e-8)  # with a place for 0, which a CPU gives
    errors.set_ylim(-1e-9, 10 * proof["tolerance"])
    errors.axhline(proof["tolerance"], color="0.4", linestyle="--", linewidth=1, label="tolerance")
    errors.set_xlabel("layer, in the order of the model")
    errors.set_ylabel("relative error of outputs")
    errors.grid(alpha=0.3)
    errors.legend(loc="center right", fontsize="small")
    names = ("fp16", "source", "result")
    bars = sizes.barh(names, [done[key] for key in ("bytes_fp16", "bytes_in", "bytes_out")], color=["0.7", "C0", "C2"])
    sizes.bar_label(bars, labels=[size(done[key]) for key in ("bytes_fp16", "bytes_in", "bytes_out")], padding=3)
    sizes.margins(x=0.35)
    sizes.invert_yaxis()
    sizes.set_xticks([])
    sizes.set_title("size", fontsize="medium")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _number(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else "-" if value is None else str(value)


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(visible(text))}</dd>" for name, text in facts.items())
    return f'<dl class="mc-facts">{rows}</dl>'


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(visible(str(cell)))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="mc-table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{_sentence(visible(line))}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


#: An address within a sentence.
_ADDRESS = re.compile(r"https?://[^\s<>\"']+[^\s<>\"'.,;:)]")


def _sentence(text: str) -> str:
    """Return text, escaped, with its addresses as links."""
    parts, at = [], 0
    for match in _ADDRESS.finditer(text):
        address = escape(match[0], quote=True)
        parts += [
            escape(text[at : match.start()]),
            f'<a href="{address}" target="_blank" rel="noopener noreferrer">{address}</a>',
        ]
        at = match.end()
    return "".join([*parts, escape(text[at:])])


CSS = """
.mc-problem {border-left: 4px solid #c0392b; background: #c0392b18; padding: .5em 1em; border-radius: 4px}
.mc-note, .mc-busy {color: var(--body-text-color-subdued)}
.mc-facts {display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em}
.mc-facts dt {font-weight: 600}
.mc-facts dd {margin: 0; overflow-wrap: anywhere; white-space: pre-wrap}
.mc-facts + .mc-table, .mc-table + ul {margin-top: .8em}
.mc-table {overflow-x: auto; max-width: 100%}
.mc-table table {border-collapse: collapse; font-size: .9em}
.mc-table th, .mc-table td {padding: .15em .8em .15em 0; text-align: left; white-space: nowrap}
.mc-stage {margin: .6em 0}
.mc-stage progress {width: 100%; height: 1em; accent-color: #2a9d4a}
.mc-layer {font-family: monospace; font-size: .85em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.mc-picture {width: 100%; background: white; border-radius: 4px}
@media (max-width: 640px) {.mc-facts {grid-template-columns: 1fr} .mc-facts dt {margin-top: .4em}}
"""
