"""Quantization settings: what a GPTQ source says about itself, and what a Marlin checkpoint must say.

The spellings vary between the tools that write GPTQ checkpoints; they are brought to one form here. What the
settings say is a claim: `plan` compares it with the tensors, and the tensors win.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SourceError, UnsupportedError
from ..text import shortened
from .dynamic_rules import RuleError, first_matches

#: One name for each setting, then the others under which it is met.
_ALIASES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "checkpoint_format": ("checkpoint_format", "format", "version"),
    "quant_method": ("quant_method", "method"),
}

#: quant_method → how a person calls it, for sources that are recognised and cannot be repacked.
OTHER_METHODS = {
    "awq": "an AWQ checkpoint",
    "bitsandbytes": "a bitsandbytes checkpoint",
    "compressed-tensors": "a compressed-tensors checkpoint",
    "gguf": "a GGUF checkpoint",
    "fp8": "an FP8 checkpoint",
    "aqlm": "an AQLM checkpoint",
    "hqq": "an HQQ checkpoint",
    "exl2": "an EXL2 checkpoint",
    "exl3": "an EXL3 checkpoint",
    "eetq": "an EETQ checkpoint",
    "quanto": "a Quanto checkpoint",
    "torchao": "a torchao checkpoint",
    "mxfp4": "an MXFP4 checkpoint",
    "modelopt": "a ModelOpt checkpoint",
}

_GPTQ_METHODS = {"gptq", "gptqmodel", "marlin"}
_AUTO_ROUND_METHODS = {"auto-round", "auto_round", "autoround", "intel/auto-round"}
_GPTQ_FORMATS = {"gptq", "gptq_v2", "marlin"}
_AWQ_FORMATS = {"gemm", "gemv", "gemv_fast"}

#: What a `dynamic` rule can change for the layers that it matches.
_PER_LAYER = ("bits", "group_size", "sym", "desc_act")
#: Where the source's files contradict each other on one of these, none of them is believed.
_CONTESTED = (*_PER_LAYER, "checkpoint_format")

#: What a result's quant_method may be: "gptq" for vLLM ≤ 0.10.0, AutoGPTQ and candle-vllm, "marlin" for TGI.
QUANT_METHODS = ("gptq", "marlin")


@dataclass(frozen=True)
class GPTQSettings:
    """What the source's configuration says; None where it says nothing.

    `conflicts` names the settings on which the source's own files disagree (their value here is None).
    `dynamic` has a source's per-layer rules in their order: pattern → what it changes.
    """

    bits: int | None = None
    group_size: int | None = None  # rows of K that share a scale; -1 is all of K
    sym: bool | None = None
    desc_act: bool | None = None
    checkpoint_format: str | None = None  # "gptq" stores zero point - 1, "gptq_v2" the zero point itself
    is_marlin: bool = False
    dynamic: dict[str, dict[str, Any]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)

    @property
    def writer(self) -> str | None:
        """The quantizer that wrote the checkpoint, if a config names it: "gptqmodel", "autogptq" or "autoround"."""
        meta = self.raw.get("meta")
        named = meta.get("quantizer") if isinstance(meta, dict) else None
        method = str(self.raw.get("quant_method", "")).lower()
        text = (
            " ".join(map(str, named if isinstance(named, list) else [named])).lower().replace("_", "").replace("-", "")
        )
        if "autoround" in text or method in _AUTO_ROUND_METHODS or "autoround_version" in self.raw:
            return "autoround"
        if "gptqmodel" in text:
            return "gptqmodel"
        return "autogptq" if "autogptq" in text else None

    def for_layers(self, names: Sequence[str]) -> dict[str, GPTQSettings]:
        """The settings of each layer: the first `dynamic` rule whose pattern matches its name overrides.

        A rule's key is a regular expression (`re.match`); "+:" before it is decoration, "-:" means that the
        layer was left unquantized and overrides nothing. Raises SourceError for a rule that cannot be used.
        """
        rules = list(self.dynamic)
        try:
            found = first_matches([rule.removeprefix("+:").removeprefix("-:") for rule in rules], names)
        except RuleError as error:
            raise SourceError(f"the dynamic rule {shortened(rules[error.rule])} cannot be used: {error.why}.") from None
        overrides = [None if rule is None or rules[rule].startswith("-:") else rules[rule] for rule in found]
        return {name: self._overridden(rule) for name, rule in zip(names, overrides, strict=True)}

    def _overridden(self, rule: str | None) -> GPTQSettings:
        if rule is None:
            return self
        override = self.dynamic[rule]
        left = {key: text for key, text in self.conflicts.items() if key not in override}
        return replace(self, conflicts=left, **override)


def find_configs(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every quantization config in the source's parsed JSON files: where it stands → the config as it is."""
    found: dict[str, dict[str, Any]] = {}
    main = configs.get("config.json", {})
    text = main.get("text_config")
    for where, holder in (("config.json", main), ("config.json text_config", text)):
        if isinstance(holder, dict) and isinstance(holder.get("quantization_config"), dict):
            found[where] = holder["quantization_config"]
    return found | {name: config for name, config in configs.items() if name != "config.json"}


def parse_settings(configs: dict[str, dict[str, Any]]) -> GPTQSettings:
    """Read the source's settings from its parsed JSON files (`Checkpoint.configs`).

    Raises UnsupportedError when they name another quantization method or a packing that is not GPTQ's.
    """
    found = find_configs(configs)
    merged: dict[str, Any] = {}
    conflicts: dict[str, str] = {}
    is_marlin = False
    dynamic: dict[str, dict[str, Any]] = {}
    for where, raw in found.items():
        _require_gptq(where, raw)
        known = _normalise(where, raw)
        dynamic = dynamic or _dynamic_rules(where, raw.get("dynamic"))
        is_marlin = is_marlin or raw.get("is_marlin_format") is True or known.get("checkpoint_format") == "marlin"
        is_marlin = is_marlin or str(known.get("quant_method", "")).lower() == "marlin"
        for key, value in known.items():
            if value is None or key in conflicts:
                continue
            if key in merged and merged[key][0] != value:
                if key in _CONTESTED:
                    conflicts[key] = f"{merged[key][1]} says {merged[key][0]}, {where} says {value}"
            elif key not in merged:
                merged[key] = (value, where)
    values = {k: v for k, (v, _) in merged.items() if k not in conflicts}
    raw_first: dict[str, Any] = {}
    for raw in reversed(list(found.values())):  # config.json last, so that it wins
        raw_first.update(raw)
    return GPTQSettings(
        bits=values.get("bits"),
        group_size=values.get("group_size"),
        sym=values.get("sym"),
        desc_act=values.get("desc_act"),
        checkpoint_format=values.get("checkpoint_format"),
        is_marlin=is_marlin,
        dynamic=dynamic,
        raw=raw_first,
        conflicts=conflicts,
    )


def _dynamic_rules(where: str, rules: object) -> dict[str, dict[str, Any]]:
    """`dynamic` as a config has it → each rule's pattern, in order, and the settings that it changes."""
    if rules is None or rules is False:  # GPTQModel writes null where there are none
        return {}
    if not isinstance(rules, dict):
        raise SourceError(f"{where}: dynamic is {shortened(rules)}; a map of rules was expected.")
    parsed = {}
    for pattern, override in rules.items():
        known = _normalise(
            f"{where}, dynamic rule {shortened(pattern)}", override if isinstance(override, dict) else {}
        )
        parsed[pattern] = {key: known[key] for key in _PER_LAYER if known[key] is not None}
    return parsed


def _normalise(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of `raw` under one name each, None where it says nothing."""
    known: dict[str, Any] = {}
    for key, names in _ALIASES.items():
        known[key] = next((raw[n] for n in names if raw.get(n) is not None), None)
    if raw.get("checkpoint_format") is None and raw.get("format") is None and not _names_a_layout(raw.get("version")):
        known["checkpoint_format"] = None  # `version` is met as a layout's name, and as a plain version number
    if known["sym"] is None and isinstance(raw.get("zero_point"), bool):
        known["sym"] = not raw["zero_point"]
    for key in ("bits", "group_size"):
        value = known[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise SourceError(f"{where}: {key} is {shortened(value)}; a whole number was expected.")
    for key in ("sym", "desc_act"):
        if known[key] is not None and not isinstance(known[key], bool):
            raise SourceError(f"{where}: {key} is {shortened(known[key])}; true or false was expected.")
    for key in ("checkpoint_format", "quant_method"):
        known[key] = None if known[key] is None else str(known[key]).lower()
    return known


def _names_a_layout(value: object) -> bool:
    return isinstance(value, str) and value.lower() in _GPTQ_FORMATS | _AWQ_FORMATS


def _require_gptq(where: str, raw: dict[str, Any]) -> None:
    method = str(raw.get("quant_method") or raw.get("method") or "gptq").lower()
    packing = str(raw.get("packing_format") or "").lower()
    if method in OTHER_METHODS:
        raise UnsupportedError(f"{where}: {OTHER_METHODS[method]}; only GPTQ checkpoints can be repacked to Marlin.")
    if method in _AUTO_ROUND_METHODS:
        if packing.removeprefix("auto_round:") not in ("auto_gptq", "gptq"):
            named = f"the packing {packing}" if packing else "a packing that it does not name"
            raise UnsupportedError(
                f"{where}: an AutoRound checkpoint in {named}; "
                "export it with format='auto_gptq', which can be repacked."
            )
    elif method not in _GPTQ_METHODS:
        raise UnsupportedError(
            f"{where}: quantized with {shortened(method)}; only GPTQ checkpoints can be repacked to Marlin."
        )
    layout = _normalise(where, raw)["checkpoint_format"]
    if method not in _AUTO_ROUND_METHODS and layout is not None and layout not in _GPTQ_FORMATS:
        if layout in _AWQ_FORMATS:
            raise UnsupportedError(
                f"{where}: an AWQ checkpoint ({layout}); only GPTQ checkpoints can be repacked to Marlin."
            )
        raise UnsupportedError(
            f"{where}: checkpoint_format {shortened(layout)} cannot be repacked; "
            f"{', '.join(sorted(_GPTQ_FORMATS - {'marlin'}))} can."
        )
    pack_dtype = raw.get("pack_dtype")
    if pack_dtype is not None and str(pack_dtype).removeprefix("torch.") != "int32":
        raise UnsupportedError(f"{where}: pack_dtype {pack_dtype}: only weights packed in int32 words can be repacked.")


def marlin_settings(source: GPTQSettings, *, group_size: int, lm_head: bool, quant_method: str) -> dict[str, Any]:
    """The quantization config of an original-format Marlin checkpoint (the same in both of its files).

    `group_size` is 128 or -1; `lm_head` tells whether the head is quantized; `quant_method` is "gptq" (what
    vLLM ≤ 0.10.0, AutoGPTQ and candle-vllm look for) or "marlin" (what TGI turns its kernels on by).
    """
    meta = source.raw.get("meta")
    holders = (meta if isinstance(meta, dict) else {}, source.raw)  # GPTQModel keeps the details in `meta`
    said = {key: value for holder in holders for key, value in holder.items() if value is not None}
    result: dict[str, Any] = {
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": said.get("true_sequential", True),
        "lm_head": lm_head,
        "quant_method": quant_method,
        "checkpoint_format": "marlin",
        "is_marlin_format": True,
        "model_file_base_name": "model",
    }
    if said.get("damp_percent") is not None:
        result["damp_percent"] = said["damp_percent"]
    return result


def marlin_model_config(
    config: dict[str, Any], quantization: dict[str, Any], *, float16: bool = True
) -> dict[str, Any]:
    """The source's config.json with `quantization` in place of its GPTQ settings.

    With `float16`, both spellings of the model's dtype say so: Marlin's original kernel computes in float16 only.
    """
    result = copy.deepcopy(config)
    text = result.get("text_config")
    for holder in (result, text):
        if isinstance(holder, dict):
            if holder is result or "quantization_config" in holder:
                holder["quantization_config"] = quantization
            for key in ("torch_dtype", "dtype") if float16 else ():
                if holder is result or key in holder:
                    holder[key] = "float16"
    return result


# ---------------------------------------------------------------------------------------------------------------
# What a Marlin checkpoint says, for those that write and read it (docs/concepts/format.md)

#: `checkpoint_format` of the two formats.
MARLIN, MARLIN_EXT = "marlin", "marlin_ext"
EXT_VERSION = 1
_EXT_BITS = (4, 8)
_EXT_GROUP_SIZES = (16, 32, 64, 128, -1)
_SHARED = ("bits", "group_size", "sym", "desc_act")
_OWN = ("in_features", "out_features", "source_group_size")


@dataclass(frozen=True)
class LayerSettings:
    """One layer of a Marlin checkpoint, as its configuration describes it.

    `group_size` counts stored rows (-1: one group over all). `in_features` and `out_features` are None where they
    are the stored sizes, `source_group_size` is where the source's group size is the stored one.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    in_features: int | None = None
    out_features: int | None = None
    source_group_size: int | None = None


@dataclass(frozen=True)
class MarlinSettings:
    """A Marlin checkpoint's configuration: `format` is "marlin" or "marlin_ext"; `layers` has the exceptions."""

    format: str
    default: LayerSettings
    layers: Mapping[str, LayerSettings] = field(default_factory=dict)
    lm_head: bool = False

    def layer(self, name: str) -> LayerSettings:
        """The settings of the quantized layer `name` (its module's name in the checkpoint)."""
        return self.layers.get(name, self.default)


def is_marlin(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization config describes a Marlin checkpoint, of either format, whoever made it."""
    said = str(quantization.get("checkpoint_format") or quantization.get("format") or "").lower()
    return (
        said in (MARLIN, MARLIN_EXT)
        or quantization.get("is_marlin_format") is True
        or str(quantization.get("quant_method", "")).lower() == "marlin"
    )


def read_marlin_settings(quantization: Mapping[str, Any]) -> MarlinSettings:
    """Read a Marlin checkpoint's `quantization_config`: ours of either format, or another tool's original one.

    Raises UnsupportedError for what is not Marlin and for versions that are not known, SourceError for values that
    the format does not have.
    """
    where = "quantization_config"
    if not is_marlin(quantization):
        raise UnsupportedError(f"{where}: it does not describe a Marlin checkpoint; convert a GPTQ one first.")
    if str(quantization.get("checkpoint_format", "")).lower() == MARLIN_EXT:
        return _read_extended(where, quantization)
    known = _normalise(where, dict(quantization))
    layer = LayerSettings(
        bits=4 if known["bits"] is None else known["bits"],
        group_size=-1 if known["group_size"] is None else known["group_size"],
        sym=known["sym"] is not False,
        desc_act=known["desc_act"] is True and known["group_size"] != -1,
    )
    if layer.bits != 4 or layer.group_size not in (128, -1) or not layer.sym or layer.desc_act:
        raise SourceError(
            f"{where}: the original Marlin format has 4 bits, groups of 128 or -1, no zero points and no act-order; "
            f"here it is {layer.bits} bits, group_size {layer.group_size}, sym {str(layer.sym).lower()}, "
            f"desc_act {str(layer.desc_act).lower()}."
        )
    return MarlinSettings(MARLIN, layer, lm_head=quantization.get("lm_head") is True)


def _read_extended(where: str, quantization: Mapping[str, Any]) -> MarlinSettings:
    version = quantization.get("marlin_ext_version")
    if version != EXT_VERSION or isinstance(version, bool):
        raise UnsupportedError(
            f"{where}: marlin_ext_version is {shortened(version)} and this is a reader of version {EXT_VERSION}; "
            "update marlin-convert."
        )
    shared = {key: quantization.get(key) for key in _SHARED}
    default = _extended_layer(where, shared)
    entries = quantization.get("layers", {})
    if not isinstance(entries, Mapping):
        raise SourceError(f"{where}: layers is {shortened(entries)}; a map from layers to settings was expected.")
    layers = {}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or set(entry) - {*_SHARED, *_OWN}:
            raise SourceError(f"{where}: layers has {shortened(entry)} for {name}, which is not as the format has it.")
        layers[str(name)] = _extended_layer(f"{where}, {name}", {**shared, **entry})
    return MarlinSettings(MARLIN_EXT, default, layers, quantization.get("lm_head") is True)


def _extended_layer(where: str, values: Mapping[str, Any]) -> LayerSettings:
    def expect(key: str, kind: type, allowed: tuple[int, ...] | None = None) -> None:
        value = values.get(key)
        if type(value) is not kind or (allowed is not None and value not in allowed):
            choice = ", ".join(map(str, allowed)) if allowed else "true or false"
            raise SourceError(f"{where}: {key} is {shortened(value)}; one of {choice} was expected.")

    expect("bits", int, _EXT_BITS)
    expect("group_size", int, _EXT_GROUP_SIZES)
    expect("sym", bool)
    expect("desc_act", bool)
    for key in _OWN:
        value = values.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise SourceError(f"{where}: {key} is {shortened(value)}; a positive number was expected.")
    return LayerSettings(**dict(values))


def marlin_ext_settings(layers: Mapping[str, LayerSettings], *, lm_head: bool) -> dict[str, Any]:
    """The quantization config of a checkpoint in the extended format; `layers` has all of its quantized layers."""
    common = Counter(tuple(getattr(x, key) for key in _SHARED) for x in layers.values()).most_common(1)[0][0]
    shared = dict(zip(_SHARED, common, strict=True))
    entries = {}
    for name, layer in layers.items():
        entry = {key: getattr(layer, key) for key in _SHARED if getattr(layer, key) != shared[key]}
        entry |= {key: getattr(layer, key) for key in _OWN if getattr(layer, key) is not None}
        if entry:
            entries[name] = entry
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": MARLIN_EXT,
        "marlin_ext_version": EXT_VERSION,
        **shared,
        "lm_head": lm_head,
    }
    return {**result, "layers": entries} if entries else result
