"""What a Marlin checkpoint says about its quantization: read, and written (docs/concepts/format.md)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import SourceError, UnsupportedError
from ..options import Format, QuantMethod
from ..text import shortened
from .gptq_config import GPTQSettings, normalised
from .layout import EXT_BITS, EXT_GROUP_SIZES


def marlin_settings(
    source: GPTQSettings, *, group_size: int, lm_head: bool, quant_method: QuantMethod
) -> dict[str, Any]:
    """Return the quantization config of an original-format Marlin checkpoint (the same in both of its files).

    `group_size` is 128 or -1; `lm_head` tells whether the head is quantized.
    """
    meta = source.raw.get("meta")
    holders = (meta if isinstance(meta, dict) else {}, source.raw)  # GPTQModel keeps the details in `meta`
    settings = {key: value for holder in holders for key, value in holder.items() if value is not None}
    result: dict[str, Any] = {
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": settings.get("true_sequential", True),
        "lm_head": lm_head,
        "quant_method": str(quant_method),
        "checkpoint_format": str(Format.MARLIN),
        "is_marlin_format": True,
        "model_file_base_name": "model",
    }
    if settings.get("damp_percent") is not None:
        result["damp_percent"] = settings["damp_percent"]
    return result


TIED = "tie_word_embeddings"


def ties(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says on whether head and embedding are one tensor: by the config's part ("" for the
    whole), None where it says nothing and a part's default counts."""
    # Not part of a model, whatever a config holds under such names.
    none = ("", TIED, "quantization_config", "torch_dtype", "dtype")
    parts = {name: part for name, part in config.items() if isinstance(part, dict) and name not in none}
    inner = {name: part[TIED] for name, part in parts.items() if TIED in part}
    if "text_config" in parts:
        inner.setdefault("text_config", None)
    return {"": config.get(TIED), **inner}


def marlin_model_config(
    config: dict[str, Any], quantization: dict[str, Any], *, float16: bool = True, untied_head: bool = False
) -> dict[str, Any]:
    """Return the source's config.json with `quantization` in place of its GPTQ settings.

    With `float16`, both spellings of the model's dtype say so: Marlin's original kernel computes in float16 only.
    With `untied_head`, the head is a quantized layer and not the embedding: engines leave it out where the config
    ties them.
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
    if untied_head:
        for name, tied in ties(config).items():
            if tied is not False:
                (result[name] if name else result)[TIED] = False
    return result


# ---- Read and write (docs/concepts/format.md) ----

EXT_VERSION = 1
_SHARED = ("bits", "group_size", "sym", "desc_act")
_OPTIONAL = ("in_features", "out_features", "source_group_size")


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
    """A Marlin checkpoint's configuration: `format` is MARLIN or MARLIN_EXT; `layers` has the exceptions."""

    format: Format
    default: LayerSettings
    layers: Mapping[str, LayerSettings] = field(default_factory=dict)
    lm_head: bool = False

    def layer(self, name: str) -> LayerSettings:
        """Return the settings of the quantized layer `name` (its module's name in the checkpoint)."""
        return self.layers.get(name, self.default)


def is_marlin(quantization: Mapping[str, Any]) -> bool:
    """Tell whether a quantization config describes a Marlin checkpoint, of either format, whoever made it."""
    claimed = str(quantization.get("checkpoint_format") or quantization.get("format") or "").lower()
    return (
        claimed in (Format.MARLIN, Format.MARLIN_EXT)
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
    if str(quantization.get("checkpoint_format", "")).lower() == Format.MARLIN_EXT:
        return _read_extended(where, quantization)
    known = normalised(where, dict(quantization))
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
    return MarlinSettings(Format.MARLIN, layer, lm_head=quantization.get("lm_head") is True)


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
        if not isinstance(entry, Mapping) or set(entry) - {*_SHARED, *_OPTIONAL}:
            raise SourceError(f"{where}: layers has {shortened(entry)} for {name}, which is not as the format has it.")
        layers[str(name)] = _extended_layer(f"{where}, {name}", {**shared, **entry})
    return MarlinSettings(Format.MARLIN_EXT, default, layers, quantization.get("lm_head") is True)


def _extended_layer(where: str, values: Mapping[str, Any]) -> LayerSettings:
    def expect(key: str, kind: type, allowed: tuple[int, ...] | None = None) -> None:
        value = values.get(key)
        if type(value) is not kind or (allowed is not None and value not in allowed):
            choice = ", ".join(map(str, allowed)) if allowed else "true or false"
            raise SourceError(f"{where}: {key} is {shortened(value)}; one of {choice} was expected.")

    expect("bits", int, EXT_BITS)
    expect("group_size", int, (*sorted(EXT_GROUP_SIZES), -1))
    expect("sym", bool)
    expect("desc_act", bool)
    for key in _OPTIONAL:
        value = values.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise SourceError(f"{where}: {key} is {shortened(value)}; a positive number was expected.")
    return LayerSettings(**dict(values))


def marlin_ext_settings(layers: Mapping[str, LayerSettings], *, lm_head: bool) -> dict[str, Any]:
    """Return the quantization config of a checkpoint in the extended format; `layers` has all of its quantized
    layers."""
    common = Counter(tuple(getattr(x, key) for key in _SHARED) for x in layers.values()).most_common(1)[0][0]
    shared = dict(zip(_SHARED, common, strict=True))
    entries = {}
    for name, layer in layers.items():
        entry = {key: getattr(layer, key) for key in _SHARED if getattr(layer, key) != shared[key]}
        entry |= {key: getattr(layer, key) for key in _OPTIONAL if getattr(layer, key) is not None}
        if entry:
            entries[name] = entry
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": Format.MARLIN_EXT.value,
        "marlin_ext_version": EXT_VERSION,
        **shared,
        "lm_head": lm_head,
    }
    return {**result, "layers": entries} if entries else result
