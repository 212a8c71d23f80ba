"""What a GPTQ source says about its quantization.

The spellings vary between the tools that write GPTQ checkpoints; they are brought to one form here. What the
settings say is a claim: `plan` compares it with the tensors, and the tensors win.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import SourceError, UnsupportedError
from ..text import shortened
from . import auto_round, awq
from .dynamic_rules import RuleError, first_matches
from .other_methods import OTHER_METHODS, RUN_BY

#: One name for each setting, then the others under which it is met.
_ALIASES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "sym": ("sym",),
    "desc_act": ("desc_act",),
    "checkpoint_format": ("checkpoint_format", "format", "version"),
    "quant_method": ("quant_method", "method"),
}

_GPTQ_METHODS = {"gptq", "gptqmodel", "marlin"}
_MARLIN_FORMATS = {"marlin", "marlin_ext"}  # read far enough to see whether there is anything to convert
_GPTQ_FORMATS = {"gptq", "gptq_v2"} | _MARLIN_FORMATS
#: GPTQModel's planes of bits: with 4 and 8 bits, which are all that Marlin has, the words are those of gptq_v2.
_PLANAR = "gptq_p"

CT_METHOD = "compressed-tensors"
AWQ_METHODS = {"awq"}
_AWQ_FORMATS = {"gemm", "gemv", "marlin"}
#: Of AWQ too: what they store is a zero point times its scale, rounded, which tells the zero point no longer.
_ROUNDED_ZEROS = {"gemv_fast", "llm-awq"}
#: What those layouts store, and what to do instead.
ROUNDED = (
    "zero points only as rounded products with their scales; quantize the model in the layout gemm, which can be "
    "repacked"
)

#: What a `dynamic` rule can change for the layers that it matches.
_PER_LAYER = ("bits", "group_size", "sym", "desc_act")
#: Where the source's files contradict each other on one of these, none of them is believed.
_CONTESTED = (*_PER_LAYER, "checkpoint_format")


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
        if "autoround" in text or method in auto_round.METHODS or "autoround_version" in self.raw:
            return "autoround"
        if "gptqmodel" in text:
            return "gptqmodel"
        return "autogptq" if "autogptq" in text else None

    def for_layers(self, names: Sequence[str]) -> dict[str, GPTQSettings]:
        """Return the settings of each layer: the first `dynamic` rule whose pattern matches its name overrides.

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
    """Return every quantization config in the source's parsed JSON files: where it stands → the config as it is."""
    found: dict[str, dict[str, Any]] = {}
    main = configs.get("config.json", {})
    text = main.get("text_config")
    for where, holder in (("config.json", main), ("config.json text_config", text)):
        if isinstance(holder, dict) and isinstance(holder.get("quantization_config"), dict):
            found[where] = holder["quantization_config"]
    return found | {name: config for name, config in configs.items() if name != "config.json"}


def parse_settings(configs: dict[str, dict[str, Any]], *, of_awq: bool = False) -> GPTQSettings:
    """Read the settings of a GPTQ source, or of an AWQ one, from its parsed JSON files (`Checkpoint.configs`).

    Raises UnsupportedError when they name another quantization method, or a packing of other tensors.
    """
    found = find_configs(configs)
    merged: dict[str, Any] = {}
    conflicts: dict[str, str] = {}
    is_marlin = False
    dynamic: dict[str, dict[str, Any]] = {}
    for where, raw in found.items():
        (_require_awq if of_awq else _require_gptq)(where, raw)
        known = normalised(where, raw)
        dynamic = dynamic or _dynamic_rules(where, raw.get("dynamic")) or _extra_rules(where, raw.get("extra_config"))
        is_marlin = (
            is_marlin or raw.get("is_marlin_format") is True or known.get("checkpoint_format") in _MARLIN_FORMATS
        )
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
    """Turn `dynamic` as a config has it into each rule's pattern, in order, and the settings that it changes."""
    if rules is None or rules is False:  # GPTQModel writes null where there are none
        return {}
    if not isinstance(rules, dict):
        raise SourceError(f"{where}: dynamic is {shortened(rules)}; a map of rules was expected.")
    parsed = {}
    for pattern, override in rules.items():
        known = normalised(
            f"{where}, dynamic rule {shortened(pattern)}", override if isinstance(override, dict) else {}
        )
        parsed[pattern] = {key: known[key] for key in _PER_LAYER if known[key] is not None}
    return parsed


def _extra_rules(where: str, extra: object) -> dict[str, dict[str, Any]]:
    """Return AutoRound's `extra_config`: what layers, named or by a regular expression, have of their own → as
    `dynamic`."""
    if not extra:
        return {}
    if not isinstance(extra, dict):
        raise SourceError(f"{where}: extra_config is {shortened(extra)}; a map of layers was expected.")
    named = {key if re.search(r"[^\w.-]", key) else f"^{re.escape(key)}$": rule for key, rule in extra.items()}
    return _dynamic_rules(where, {key: rule for key, rule in named.items() if isinstance(rule, dict)})


def normalised(where: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `raw` under one name each, None where it says nothing."""
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
    if known["checkpoint_format"] == _PLANAR:
        known["checkpoint_format"] = "gptq_v2"
    if auto_round.is_config(raw):
        known["checkpoint_format"] = auto_round.GPTQ_PACKINGS.get(auto_round.packing(raw))
    return known


def with_format(config: dict[str, Any], checkpoint_format: str) -> dict[str, Any]:
    """Return a GPTQ source's quantization config, saying that zero points are stored as `checkpoint_format` has them.

    One that says nothing of it is left so where that means the same.
    """
    named = normalised("config", config)["checkpoint_format"]
    if named == checkpoint_format or (named is None and checkpoint_format == "gptq"):
        return config
    if auto_round.is_config(config):
        packing = "auto_gptq" if checkpoint_format == "gptq" else "gptqmodel"
        return {**config, "packing_format": f"auto_round:{packing}"}
    key = "format" if "format" in config and "checkpoint_format" not in config else "checkpoint_format"
    return {**config, key: checkpoint_format}


def _names_a_layout(value: object) -> bool:
    return isinstance(value, str) and value.lower() in _GPTQ_FORMATS | _AWQ_FORMATS | _ROUNDED_ZEROS | {_PLANAR}


def _title(config: dict[str, Any]) -> str:
    """Return what sentences call a checkpoint of this config."""
    if auto_round.is_config(config):
        return auto_round.title(config)
    method = _method(config)
    titles = {**dict.fromkeys(_GPTQ_METHODS, "GPTQ"), **dict.fromkeys(AWQ_METHODS, "AWQ"), CT_METHOD: CT_METHOD}
    return titles.get(method, shortened(method))


def _method(config: dict[str, Any]) -> str:
    """Return the quantization method that a config tells by its layout, or names."""
    claimed = str(config.get("quant_method") or config.get("method") or "").lower()
    layout = str(config.get("checkpoint_format") or config.get("format") or config.get("version") or "").lower()
    if layout in _AWQ_FORMATS - _GPTQ_FORMATS | _ROUNDED_ZEROS:
        return "awq"
    return claimed or "gptq"


def _require_gptq(where: str, raw: dict[str, Any]) -> None:
    method = str(raw.get("quant_method") or raw.get("method") or "gptq").lower()
    layout = normalised(where, raw)["checkpoint_format"]
    if auto_round.is_config(raw):
        auto_round.require_supported(where, raw)
        if auto_round.packing(raw) not in auto_round.GPTQ_PACKINGS:
            raise other_tensors(where, raw, "GPTQ's")
    elif _method(raw) in AWQ_METHODS:
        _require_awq_bits(where, raw)
        raise other_tensors(where, raw, "GPTQ's")
    elif method == CT_METHOD:
        raise other_tensors(where, raw, "GPTQ's")
    elif method in OTHER_METHODS or layout in OTHER_METHODS:
        kind = method if method in OTHER_METHODS else str(layout)
        raise UnsupportedError(
            f"{where}: {OTHER_METHODS[kind]}, which cannot be repacked to Marlin. {RUN_BY[kind]} runs it as it is."
        )
    elif method not in _GPTQ_METHODS:
        raise UnsupportedError(
            f"{where}: quantized with {shortened(method)}, which cannot be repacked to Marlin; a checkpoint of GPTQ, "
            "AWQ, compressed-tensors or AutoRound is needed."
        )
    elif layout is not None and layout not in _GPTQ_FORMATS:
        raise UnsupportedError(
            f"{where}: checkpoint_format {shortened(layout)} cannot be repacked; save the model as gptq, gptq_v2 or "
            "gptq_p."
        )
    pack_dtype = raw.get("pack_dtype")
    if pack_dtype is not None and str(pack_dtype).removeprefix("torch.") != "int32":
        raise UnsupportedError(
            f"{where}: pack_dtype {pack_dtype}: only weights packed in int32 words can be repacked; save "
            "the model with pack_dtype int32."
        )


def _require_awq(where: str, raw: dict[str, Any]) -> None:
    """Raise UnsupportedError for configs of other tensors than AWQ's, and for those of AWQ that cannot be repacked."""
    layout = str(raw.get("version") or raw.get("checkpoint_format") or raw.get("format") or "").lower()
    if auto_round.is_config(raw):
        auto_round.require_supported(where, raw)
        if auto_round.packing(raw) not in auto_round.AWQ_PACKINGS:
            raise other_tensors(where, raw, "AWQ's")
        return
    if layout in _ROUNDED_ZEROS:
        raise UnsupportedError(f"{where}: an AWQ checkpoint in the layout {layout}, which stores {ROUNDED}.")
    old = not (raw.get("quant_method") or raw.get("method")) and ("w_bit" in raw or "q_group_size" in raw)
    if _method(raw) not in AWQ_METHODS and not old:
        raise other_tensors(where, raw, "AWQ's")
    _require_awq_bits(where, raw)


def _require_awq_bits(where: str, raw: dict[str, Any]) -> None:
    bits = normalised(where, raw)["bits"]
    if bits not in (None, awq.BITS):
        raise UnsupportedError(
            f"{where}: an AWQ checkpoint of {bits} bits, whose words hold codes of {awq.BITS}; quantize the model with "
            f"{awq.BITS} bits, or with 8 in another format."
        )


def other_tensors(where: str, config: dict[str, Any], are: str) -> UnsupportedError:
    """Return the error for a config that says something else than the tensors, which are those of `are`."""
    return UnsupportedError(
        f"{where}: it says {_title(config)}, and the tensors are {are}; restore the config that was written with them, "
        "or export the checkpoint again."
    )
