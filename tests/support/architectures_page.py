"""The page of architectures, from what became of each; and back."""

from __future__ import annotations

import re
import textwrap

from tests.support.architectures import Outcome

_TEXT = """# Architectures in Transformers

Every model type that Transformers {version} has a configuration for was built small from it with random weights,
{total} in all. Every linear that GPTQ can hold was quantized (the heads not; routers, and the experts of mixtures
one by one), the checkpoint converted, loaded by `marlin_convert.load` on a CPU, and compared in float32 with the
same model with the dequantized weights: {loads} of them load, and {outputs} give the same outputs, to 10⁻³ of their
norm and most to the last bit. `tools/architectures.py` does it and writes this page.

Models whose code is in their own repository are not among them.

## They load, and give the same outputs

{outputs_list}.

## They load, and each layer gives the same

The inputs of these whole models (pictures in patches, sounds, several at once) are not made here: each quantized
layer was compared by itself.

{layers_list}.

## There is nothing to quantize

{nothing_list}.

## They were not tried

| model type | why |
| --- | --- |
{reasons}
"""

_REASONS = (
    ("no class of a model by itself", "it is a part of others, with no model of its own"),
    ("parameters at its smallest", "its smallest is too large for this"),
    ("requires the|No module named", "it needs a package that is not there"),
)


def combined(found: list[Outcome]) -> dict[str, int]:
    """How many there are of each state."""
    return {state: sum(outcome.state == state for outcome in found) for state in {x.state for x in found}}


def page(found: list[Outcome], version: str) -> str:
    """The page of the documentation that tells of `found`."""

    def listed(*chosen: Outcome) -> str:
        words = ", ".join(f"`{outcome.model_type}`" for outcome in chosen)
        return "\n".join(textwrap.wrap(words, 140, break_on_hyphens=False)) or "None"

    loads = [outcome for outcome in found if outcome.state == "loads"]
    rows = [
        f"| `{x.model_type}` | {_reason(x)} |"
        for x in found
        if x.state not in ("loads", "nothing to quantize") and "no class" not in x.why
    ]
    parts = [x for x in found if x.state == "not built" and "no class" in x.why]
    if parts:
        rows.append(f"| {len(parts)} others | they are parts of others, with no model of their own |")
    return _TEXT.format(
        version=version, total=len(found), loads=len(loads),
        outputs=sum(x.compared == "outputs" for x in loads),
        outputs_list=listed(*(x for x in loads if x.compared == "outputs")),
        layers_list=listed(*(x for x in loads if x.compared == "layers")),
        nothing_list=listed(*(x for x in found if x.state == "nothing to quantize")),
        reasons="\n".join(rows),
    )  # fmt: skip


def _reason(outcome: Outcome) -> str:
    for pattern, text in _REASONS:
        if re.search(pattern, outcome.why):
            return text
    if outcome.state == "nor plain":
        return "Transformers itself does not load what it saves of it"
    if outcome.failed:
        return f"**{outcome.state}**"
    return "its configuration by itself builds no small model"


def outcomes_of(text: str) -> dict[str, str]:
    """What a page says of the model types that load: "outputs" or "layers" → what was compared."""
    found: dict[str, str] = {}
    for compared, heading in (("outputs", "and give the same outputs"), ("layers", "and each layer gives the same")):
        part = text.split(f"## They load, {heading}")[1].split("\n## ")[0]
        found |= dict.fromkeys(re.findall(r"`([\w.-]+)`", part), compared)
    return found
