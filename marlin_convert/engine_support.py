"""Which engine reads which result: the one table of it, and the rules that tell for a result at hand.

The README's table, the model card, what a dry run and a conversion say, and the refusals of the plugins for vLLM and
SGLang are all taken from here; tests compare them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .options import Format, QuantMethod

#: What the plugin for vLLM is made for.
VLLM = "vLLM 0.26 to 0.33"
TRANSFORMERS = "Transformers 5"
#: What the plugin for SGLang is made for, and how far it was run.
SGLANG = "SGLang 0.5.23 (run on a CPU so far)"

# What vLLM's own Marlin kernel has, as its versions above say it; marlin-convert's kernels have all of both formats.
VLLM_GROUP_SIZES = (-1, 32, 64, 128)
VLLM_KINDS = ((4, False), (8, False), (4, True))  # bits, and whether there are zero points

# What vLLM's own fused product of experts cannot compute, in words.
DIFFERENT = "experts of different settings in one block"
SORTED = "experts with act-order"
PADDED = "experts that are stored padded"
BIASED = "experts with biases"

#: What SGLang takes apart itself after loading: projections of latent attention.
TAKEN_APART = "layers that SGLang takes apart after loading"

#: Kinds of models (`model_type`) that were tried in each engine; tests hold it to what they try.
_MODEL_TYPES = Path(__file__).parent / "data" / "model_types.json"

#: A linear of one expert in a mixture, Mixtral's, Qwen's or DeepSeek's, up to its number.
EXPERTS = re.compile(r"(.*\.)?experts\.(?=\d+\.)")


@dataclass(frozen=True)
class LayerFacts:
    """What decides whether an engine computes a layer. `group_size` counts stored rows, -1 is one group."""

    name: str
    bits: int
    group_size: int
    zeros: bool = False
    act_order: bool = False
    padded: bool = False
    bias: bool = False
    K: int = 0
    N: int = 0


@dataclass(frozen=True)
class ResultFacts:
    """What decides whether an engine reads a result."""

    format: Format
    layers: Sequence[LayerFacts]
    group_size: int  # of the original format
    quant_method: QuantMethod
    weight_files: int
    config: Mapping[str, Any] | None = field(default_factory=dict)  # config.json; None: there is none


def kernel_lacks(bits: int, zeros: bool, group_size: int) -> str | None:
    """Return what vLLM's own Marlin kernel does not have of such a layer, in words; None if it has all."""
    if (bits, zeros) not in VLLM_KINDS:
        return f"{bits} bits with zero points"
    return None if group_size in VLLM_GROUP_SIZES else f"groups of {group_size}"


def expert_faults(layers: Iterable[LayerFacts]) -> dict[str, list[str]]:
    """Return why vLLM's own product cannot compute the `layers` of one block's experts → the layers that are so."""
    layers = list(layers)
    kinds = {replace(x, name="", bias=False, K=0, N=0) for x in layers}
    found: dict[str, list[str]] = {}
    for x in layers:
        faults = {
            kernel_lacks(x.bits, x.zeros, x.group_size): True, DIFFERENT: len(kinds) > 1, SORTED: x.act_order,
            PADDED: x.padded, BIASED: x.bias,
        }  # fmt: skip
        for fault, applies in faults.items():
            if fault is not None and applies:
                found.setdefault(fault, []).append(x.name)
    return found


def vllm_needs_our_kernels(layers: Sequence[LayerFacts]) -> dict[str, list[str]]:
    """Return what vLLM computes only where marlin-convert's CUDA kernels are built → the layers that have it."""
    blocks: dict[str, list[LayerFacts]] = {}
    found: dict[str, list[str]] = {}
    for x in layers:
        if match := EXPERTS.match(x.name):
            blocks.setdefault(match[0], []).append(x)
        elif lacking := kernel_lacks(x.bits, x.zeros, x.group_size):
            found.setdefault(lacking, []).append(x.name)
    for block in blocks.values():
        for fault, names in expert_faults(block).items():
            found.setdefault(fault, []).extend(names)
    return found


def vllm_refuses(layers: Iterable[LayerFacts], config: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Return what the plugin for vLLM refuses of a result of this model, whatever computes it → the layers."""
    experts = [x.name for x in layers if EXPERTS.match(x.name)]
    if config is None or not experts or config.get("model_type") not in tried("vllm")["refused"]:
        return {}
    return {f"experts of {_kind(config)}": experts}


def sglang_refuses(layers: Iterable[LayerFacts]) -> dict[str, list[str]]:
    """Return what SGLang's plugin refuses of a result's layers → the layers that are so."""
    found: dict[str, list[str]] = {}
    for x in layers:
        if x.name.endswith("kv_b_proj"):
            found.setdefault(TAKEN_APART, []).append(x.name)
        elif x.bias and EXPERTS.match(x.name):
            found.setdefault(BIASED, []).append(x.name)
    return found


@functools.cache
def tried(engine: str) -> Any:
    """Return the kinds of models that were tried in `engine`, "transformers", "vllm" or "sglang": `load`, and `refused`
    or the `version` that they were tried in."""
    return json.loads(_MODEL_TYPES.read_text(encoding="utf-8"))[engine]


def _model_doubt(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return "there is no config.json, which says what the model is"
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return "config.json has no model_type, which says what the model is"
    return None


def _kind(config: Mapping[str, Any]) -> str:
    """Return the model's kind, and whether its code is its own."""
    has_code = "auto_map" in config and config["model_type"] not in tried("transformers")["load"]
    return f"models of type {config['model_type']!r}" + (", with code of their own," if has_code else "")


def transformers_doubt(result: ResultFacts) -> str | None:
    """Return why it cannot be promised that Transformers loads `result`; None if such models were tried and load."""
    config, known = result.config, tried("transformers")
    if (doubt := _model_doubt(config)) or config is None:
        return doubt
    if config["model_type"] in known["load"]:
        return None
    return f"{_kind(config)} are not among those that were tried and load (Transformers {known['version']})"


def vllm_doubt(result: ResultFacts) -> str | None:
    """Return why it cannot be promised that vLLM loads `result`; None if such models were tried and load."""
    config, known = result.config, tried("vllm")
    if (doubt := _model_doubt(config)) or config is None:
        return doubt
    if config["model_type"] in known["load"]:
        return None
    if refused := vllm_refuses(result.layers, config):
        return f"{' and '.join(refused)} are refused"
    return f"{_kind(config)} are not among those that were tried and load"


def sglang_doubt(result: ResultFacts) -> str | None:
    """Return why it cannot be promised that SGLang loads `result`; None if such models were tried and load."""
    config, known = result.config, tried("sglang")
    if (doubt := _model_doubt(config)) or config is None:
        return doubt
    if refused := sglang_refuses(result.layers):
        return f"{' and '.join(refused)} are refused"
    if config["model_type"] in known["load"]:
        return None
    return f"{_kind(config)} are not among those that were tried and load"


@dataclass(frozen=True)
class Engine:
    """One row of the table. `original` and `extended` are its cells, in Markdown; `how` is for the model card, with
    {repo} for the repository; `reads` tells for a result's format, `doubt` why it is not promised for its model;
    `beside` is what the table says after the name."""

    name: str
    original: str
    extended: str
    how: str = ""
    reads: Callable[[ResultFacts], bool] = lambda result: False
    doubt: Callable[[ResultFacts], str | None] = lambda result: _model_doubt(result.config)
    with_plugin: bool = False  # needs marlin-convert installed
    beside: str = ""

    def instruction(self, repo: str) -> str:
        """Return how to load a result from `repo`, in Markdown."""
        return self.how.replace("{repo}", repo)


def _original(result: ResultFacts) -> bool:
    return result.format is Format.MARLIN


def _original_as_gptq(result: ResultFacts) -> bool:
    return _original(result) and result.quant_method is QuantMethod.GPTQ


def _one_gptq_file(result: ResultFacts) -> bool:
    return _original_as_gptq(result) and result.weight_files == 1


ENGINES = (
    Engine(
        VLLM,
        "yes", "yes, but for [what it refuses](docs/guides/vllm.md#what-is-refused)",
        "`vllm serve {repo}`",
        lambda result: True,
        vllm_doubt,
        with_plugin=True,
        beside=" with marlin-convert installed",
    ),
    Engine(
        SGLANG,
        "yes", "yes, but for [what it refuses](docs/guides/sglang.md#what-is-refused)",
        "`python -m sglang.launch_server --model-path {repo}`",
        lambda result: True,
        sglang_doubt,
        with_plugin=True,
        beside=" with marlin-convert installed",
    ),
    Engine(
        TRANSFORMERS, "yes", "yes",
        '`import marlin_convert; model = marlin_convert.load("{repo}")`',
        lambda result: True,
        transformers_doubt,
        with_plugin=True,
        beside=" with `import marlin_convert.hf`",
    ),
    Engine(
        "vLLM 0.3.3 to 0.10.0", "`vllm serve ./out --dtype float16`; every linear must be Marlin", "no",
        "`vllm serve {repo} --dtype float16`",
        _original_as_gptq,
    ),
    Engine("vLLM 0.10.1 and newer, alone", "no: its reader was removed", "no"),
    Engine(
        "AutoGPTQ 0.7.1", "one file only (`--max-shard-size 100GB`)", "no",
        '`AutoGPTQForCausalLM.from_quantized("{repo}", use_marlin=True)`',
        _one_gptq_file,
    ),
    Engine(
        "TGI 3.x", "with `--quantize marlin`", "no",
        "`text-generation-launcher --model-id {repo} --quantize marlin`",
        _original,
    ),
    Engine(
        "candle-vllm", "group_size 128 and one file", "no",
        "reads it as it is",
        lambda result: _one_gptq_file(result) and result.group_size != -1,
    ),
    Engine("GPTQModel", "no", "no"),
)  # fmt: skip


def readers(result: ResultFacts, *, with_plugin: bool) -> list[Engine]:
    """Return the engines that load `result`, with marlin-convert beside them or alone, in the table's order."""
    return [
        engine for engine in ENGINES
        if engine.with_plugin is with_plugin and engine.reads(result) and engine.doubt(result) is None
    ]  # fmt: skip


def doubts(result: ResultFacts) -> dict[str, str]:
    """Return the engines that marlin-convert is made for and that may not load `result` → why."""
    found = {engine.name: engine.doubt(result) for engine in ENGINES if engine.with_plugin}
    return {name: why for name, why in found.items() if why is not None}


def engines_as_dicts(result: ResultFacts) -> list[dict[str, Any]]:
    """Return for scripts which engines load `result`, and why those that marlin-convert is made for may not."""
    return [
        {"name": x.name, "with_marlin_convert": x.with_plugin, "reads": x.reads(result) and x.doubt(result) is None,
         "doubt": x.doubt(result) if x.with_plugin else None}
        for x in ENGINES
    ]  # fmt: skip


def markdown_table() -> str:
    """Return the table of engines as the README has it."""
    rows = [("engine", "original format", "extended format"), ("---", "---", "---")]
    rows += [(engine.name + engine.beside, engine.original, engine.extended) for engine in ENGINES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
