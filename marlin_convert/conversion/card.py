"""The model card of a result: the README.md that the Hub shows, and its metadata, which the Hub's filters use.

Nothing in it depends on the time or on the folders of the machine: the same source gives the same card.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint.bounded import read_file
from ..checkpoint.output_folder import write_file
from ..checkpoint.reader import Checkpoint
from ..engine_support import SGLANG, TRANSFORMERS, VLLM, doubts, readers
from ..errors import INSTALL_AND_RUN
from ..hub.open import Source
from ..options import CARD_FILE, QuantMethod
from .plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from .verify import Verification

TAGS = ("marlin",)

#: Tags by which the Hub offers commands that do not load a Marlin checkpoint.
_OFFERING = {"transformers", "text-generation-inference", "vllm"}
#: What the source's card says about itself alone; its evaluation results and successors are not this repository's.
_NOT_CARRIED_OVER = {"model-index", "model_name", "eval_results", "new_version", "ignore_metadata_errors", "self"}
#: Placeholder for the repository's id in a card that is written before the id is known.
_SOME_REPOSITORY = "REPO"
#: Bytes of a card, and characters of its metadata, that are read.
_MAX_CARD_BYTES, _MAX_METADATA = 16 << 20, 1 << 16
_LONG_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXob_:.]{40,}")
#: The metadata at the top of a card, as the Hub's library finds it, whose class for cards takes long to import.
_METADATA = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_VERIFICATION = re.compile(r"(?<=## Verification\n\n).*?(?=\n\n## )", re.DOTALL)


#: Around the source's card.
_FOLD, _FOLD_END = "<details>\n<summary>Card of the source</summary>\n", "\n</details>\n"


@dataclass(frozen=True)
class CardFacts:
    """What a card tells about a conversion, beside its plan. `options` are those that shaped the result."""

    source: Source
    quant_method: QuantMethod
    weight_files: int
    scale_rounding: float
    options: tuple[str, ...] = ()
    repo_id: str | None = None  # where the result will be published
    verification: Verification | None = None


def model_card(checkpoint: Checkpoint, plan: Plan, card: CardFacts) -> str:
    """Return the whole README.md, of a result of `plan`."""
    metadata, text = _source_card(checkpoint)
    tags = [plan.source_format.name, *(f"{bits}-bit" for bits in sorted({layer.bits for layer in plan.layers}))]
    data = _metadata(metadata, card.source, tags)
    content = f"---\n{data.to_yaml()}\n---\n\n{_body(plan, card)}"
    if text.strip():
        content += f"\n{_FOLD}\nAs it came with {_source_link(card.source)}:\n\n{text.strip()}\n{_FOLD_END}"
    return content


def source_card_in(text: str) -> str | None:
    """Return the source's card out of one that `model_card` wrote; None where it holds none."""
    _, _, rest = text.partition(f"\n{_FOLD}")
    _, _, card = rest.partition(":\n\n")
    return card.removesuffix(_FOLD_END) or None


def card_bytes(text: str) -> bytes:
    """Return a card in UTF-8: what that cannot hold (half of a surrogate pair) becomes a `?`."""
    return text.encode("utf-8", "replace")


def write_card(folder: Path, text: str) -> None:
    """Put a card into a new folder."""
    write_file(folder / CARD_FILE, card_bytes(text))


def with_verdict(folder: Path, verification: Verification) -> bytes | None:
    """Return the card of an earlier result, if it is one of ours, saying what verifying it now has shown; None where
    that changes nothing."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    text = path.read_bytes().decode("utf-8", "replace")
    told = _VERIFICATION.sub(lambda _: _verdict(verification), text, count=1)
    return None if told == text else card_bytes(told)


# ---------------------------------------------------------------------------------------------------------------
# Metadata


def _source_card(checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
    """Return metadata and text of the source's card. Metadata that is no YAML mapping counts as none."""
    import yaml  # as huggingface_hub reads it

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML in which a short text cannot become a large value: no references, types by name or very long numbers."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
                raise yaml.YAMLError("an anchor, an alias or a tag")
            if isinstance(event, yaml.ScalarEvent) and event.style is None and _LONG_NUMBER.fullmatch(event.value):
                raise yaml.YAMLError("a number of very many digits")
            return super().compose_node(parent, index)

    if CARD_FILE not in checkpoint.extra_files:
        return {}, ""
    content = (
        read_file(checkpoint.path(CARD_FILE), _MAX_CARD_BYTES, checkpoint.called(CARD_FILE))
        .decode("utf-8-sig", "replace")
        .replace("\r\n", "\n")
    )
    block = _METADATA.search(content)
    if block is None:
        return {}, content
    metadata = None
    if len(block.group(1)) <= _MAX_METADATA:
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):  # ValueError: an invalid date
            metadata = yaml.load(block.group(1), Loader)
    return metadata if isinstance(metadata, dict) else {}, content[block.end() :]


def _metadata(source: dict[str, Any], origin: Source, format_tags: list[str]) -> ModelCardData:
    """Return the source's metadata, with what has changed."""
    from huggingface_hub import ModelCardData

    kept = {
        key: value
        for key, value in source.items()
        if isinstance(key, str) and key not in _NOT_CARRIED_OVER and not hasattr(ModelCardData, key)
    }
    if "language" in kept:
        kept["language"] = _languages(kept["language"])
    base_model = origin.label if origin.on_hub else kept.get("base_model")
    kept.pop("base_model_relation", None)
    relation = {"base_model_relation": "quantized"} if base_model else {}
    # By these the Hub offers commands, for Transformers and for vLLM alone, which do not load a Marlin checkpoint.
    kept.pop("pipeline_tag", None)
    kept["library_name"] = "marlin-convert"
    given = kept.pop("tags", None)
    tags = [given] if isinstance(given, str) else [tag for tag in given if tag] if isinstance(given, list) else []
    all_tags = [tag for tag in dict.fromkeys([*map(str, tags), *TAGS, *format_tags]) if tag not in _OFFERING]
    return ModelCardData(**{**kept, "base_model": base_model, **relation, "tags": all_tags})


def _languages(value: Any) -> Any:
    """Return a card's languages as texts: YAML takes Norwegian, `no`, for False."""
    if isinstance(value, list):
        return [_languages(language) for language in value]
    return "no" if value is False else value


# ---------------------------------------------------------------------------------------------------------------
# Text


def _body(plan: Plan, card: CardFacts) -> str:
    sections = [
        f"# {_plain(card.source.label.split('/')[-1])} in Marlin format",
        (
            f"{_source_link(card.source)}, a {_widths(plan)}-bit {plan.source_title} checkpoint, "
            "repacked into the tile order of the "
            "[Marlin](https://github.com/IST-DASLab/marlin) kernel. Nothing was quantized again: the codes and the "
            "scales are the source's own."
        ),
        "## Use",
        *_use(plan, card),
        "The kernels need an NVIDIA GPU of compute capability 8.0 or newer"
        + (", in bf16 or fp16." if plan.extended else ", and compute in fp16.")
        + " Without a GPU, Transformers runs it too: exactly, and slowly.",
        "## Quantization",
        _table(_quantization(plan, card)),
        "## Verification",
        _verdict(card.verification),
        "## Check it yourself",
        _check(card),
        "## How it was made",
        f"With marlin-convert {__version__}:",
        f"```\n{_command(card)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _source_link(source: Source) -> str:
    if not source.on_hub:
        return _code(source.label)
    url = f"https://huggingface.co/{source.label}"
    return f"[{source.label}]({url}) at commit [`{source.commit}`]({url}/tree/{source.commit})"


def _widths(plan: Plan) -> str:
    return " and ".join(str(bits) for bits in sorted({layer.bits for layer in plan.layers}))


def _quantization(plan: Plan, card: CardFacts) -> list[tuple[str, str]]:
    def summary(values: list[bool]) -> str:
        return "yes" if all(values) else "no" if not any(values) else f"{sum(values)} of {len(values)} layers"

    sizes = [layer.group_size for layer in plan.layers] if plan.extended else [plan.group_size]
    groups = ", ".join("per channel (-1)" if size == -1 else str(size) for size in sorted(set(sizes)))
    kinds = {"BF16": "bf16", "F16": "fp16"}
    scales = " and ".join(sorted({kinds[layer.stored_scales] for layer in plan.layers}))
    rounding = f", rounded by at most {card.scale_rounding:.2e} of their value" if card.scale_rounding else ""
    method = QuantMethod.GPTQ if plan.extended else card.quant_method
    return [
        ("", ""),
        ("bits", _widths(plan)),
        ("group size", groups),
        ("symmetric", summary([layer.sym for layer in plan.layers])),
        ("act-order", summary([layer.act_order for layer in plan.layers])),
        ("scales", f"{scales}{rounding}"),
        ("`quant_method`, `checkpoint_format`", f"`{method}`, `{plan.format}`"),
        ("quantized layers", str(len(plan.layers))),
        ("other tensors", f"{len(plan.copies)}, as in the source"),
        ("size", f"{plan.bytes_out / 1e6:,.1f} MB (source: {plan.bytes_in / 1e6:,.1f} MB)"),
    ]


_SERVE = "```sh\nvllm serve {repo}\n```"
_LLM = """```python
from vllm import LLM, SamplingParams

llm = LLM("{repo}")
print(llm.generate("The capital of France is", SamplingParams(max_tokens=32))[0].outputs[0].text)
```"""
_SGLANG = "```sh\npython -m sglang.launch_server --model-path {repo}\n```"
_TRANSFORMERS = """```python
import marlin_convert
from transformers import AutoTokenizer

model = marlin_convert.load("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```"""


def _use(plan: Plan, card: CardFacts) -> list[str]:
    """Return how to run this very result, in blocks that run as they stand."""
    repo, facts = card.repo_id or _SOME_REPOSITORY, plan.result_facts(card.quant_method, card.weight_files)
    doubt = doubts(facts)
    where = "" if card.repo_id else f" `{_SOME_REPOSITORY}` stands for its id, or for a folder that holds it."
    sections = [
        f"With marlin-convert {__version__} or newer, installed from its checkout by `{INSTALL_AND_RUN}`.{where}",
        _with_doubt(f"In {VLLM}, in the same environment:", doubt.get(VLLM)),
        _SERVE.replace("{repo}", repo),
        _LLM.replace("{repo}", repo),
        _with_doubt(f"In {SGLANG}, in the same environment:", doubt.get(SGLANG)),
        _SGLANG.replace("{repo}", repo),
        _with_doubt("In Transformers 5:", doubt.get(TRANSFORMERS)),
        _TRANSFORMERS.replace("{repo}", repo),
    ]
    if alone := readers(facts, with_plugin=False):
        rows = [("without marlin-convert, by what they say of themselves; not run here", "how")]
        sections.append(_table([*rows, *((engine.name, engine.instruction(repo)) for engine in alone)]))
    return sections


def _with_doubt(text: str, doubt: str | None) -> str:
    return text if doubt is None else f"{text.removesuffix(':')} (not promised: {_plain(doubt)}):"


def _verdict(report: Verification | None) -> str:
    if report is None:
        return "Every block was unpacked again and compared with its source before it was written."
    if not report.ok:
        return "**Not equal to its source**; see `verify.json`."
    count = len(report.layers)
    rows = [
        ("read back from disk, against the source", ""),
        ("layers exactly equal", f"{count} of {count}"),
        ("other tensors, byte for byte", str(report.tensors_equal)),
        ("outputs on random activations", f"differ by at most {report.worst:.1e} of their size"),
    ]
    return f"{_table(rows)}\n\nLayer by layer: `verify.json`."


def _check(card: CardFacts) -> str:
    if card.source.on_hub:
        repo = card.repo_id or _SOME_REPOSITORY
        return (
            f"`marlin-convert verify {repo}` reads this repository and its source from the Hub, in parts, converts the "
            "source again, and says whether every file here is exactly what comes of it. The SHA-256 of every file is "
            "in `marlin_convert.json`."
        )
    return (
        "Whoever has the source can compare it with a folder that holds this repository: `marlin-convert verify SOURCE "
        "OUT`."
    )


def _command(card: CardFacts) -> str:
    source = card.source
    words = ["marlin-convert", source.label if source.on_hub else f"./{source.label}", "./out"]
    if source.commit:
        words += ["--revision", source.commit]
    return _plain(shlex.join([*words, *card.options])).replace("```", "'''")


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in rows]
    return "\n".join([lines[0], "| --- | --- |", *lines[1:]])


def _plain(text: str) -> str:
    """Put text on one line: a folder's name may hold any character."""
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"`{_plain(text).replace('`', chr(39))}`"
