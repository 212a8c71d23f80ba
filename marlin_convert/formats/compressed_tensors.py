"""What compressed-tensors' pack-quantized tensors and configs mean.

A layer of K inputs and N outputs has `weight_packed` int32 [N, ceil(K bits/32)], `weight_scale` [N, G], `weight_shape`
= [N, K], with zero points `weight_zero_point`, and with act-order `weight_g_idx` [K]. Row n of `weight_packed` is a
stream of bits, the lowest of each word first, in which code k begins at bit k bits: for 4 and 8 bits, the words are
those of GPTQ's `qweight`, its rows and columns exchanged. A code is the quantized number plus 2^(bits-1).

Zero points are signed numbers, too, to which that is added: since compressed-tensors 0.9.4 as such streams along N,
int32 [ceil(N bits/32), G], before as int8 [N, G].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SourceError, UnsupportedError
from ..text import shortened
from . import auto_round
from .gptq_config import CT_METHOD, GPTQSettings, find_configs, normalised, other_tensors
from .layout import gptq_zeros, pack_gptq_zeros, zero_point

Words = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint8]

_FORMATS = ("pack-quantized", "mixed-precision")
#: Formats that hold other numbers than Marlin's → how a person calls them.
_OTHER_FORMATS = {
    "dense": "not quantized",
    "int-quantized": "quantized to int8 without packing, mostly with its activations",
    "naive-quantized": "quantized without packing",
    "float-quantized": "of FP8 numbers",
    "marlin-24": "2:4 sparse, for the kernels of sparse tensor cores",
    "sparse-24-bitmask": "2:4 sparse",
    "sparse-bitmask": "sparse",
    "nvfp4-pack-quantized": "of NVFP4 numbers",
    "mxfp4-pack-quantized": "of MXFP4 numbers",
    "mxfp8-quantized": "of MXFP8 numbers",
}
_INSTEAD = "vLLM runs it as it is, and Marlin holds integer weights of 4 and 8 bits beside unquantized activations only"


# ---- Tensors ----


def packed_bits(K: int, words: int) -> list[int]:
    """Return the bits, of 1 to 8, for which codes of K inputs take so many words."""
    return [bits for bits in range(1, 9) if -(-K * bits // 32) == words]


def codes(packed: Words, bits: int) -> Codes:
    """Turn `weight_packed` [n, words] of 4 or 8 bits into codes [n, codes in the words], by the definition: bit by
    bit."""
    stream = np.ascontiguousarray(packed).astype("<i4").view(np.uint8)  # bytes, the lowest bits first
    if bits == 8:
        return stream
    found = np.empty((len(stream), 2 * stream.shape[1]), np.uint8)
    found[:, 0::2] = stream & 15
    found[:, 1::2] = stream >> 4
    return found


def decode_zeros(stored: npt.NDArray[Any], bits: int, N: int) -> Codes:
    """Turn `weight_zero_point` as it is stored, packed int32 [ceil(N bits/32), G] or int8 [N, G] into zero points [G,
    N].

    Raises ValueError for int8 numbers that have more than `bits` bits, and for bits beyond the last zero point that are
    not 0.
    """
    if stored.dtype == np.int8:
        numbers = stored.T.astype(np.int16) + zero_point(bits)
        if numbers.size and (numbers.min() < 0 or numbers.max() >> bits):
            raise ValueError(f"weight_zero_point has {stored.min()} to {stored.max()}, which {bits} bits cannot hold")
        return np.ascontiguousarray(numbers.astype(np.uint8))
    words = np.ascontiguousarray(stored.T)
    zeros = gptq_zeros(words, bits, N)
    if not np.array_equal(pack_gptq_zeros(zeros, bits), words):
        raise ValueError(f"weight_zero_point has bits beyond N = {N} that are not 0")
    return zeros


def encode_zeros(zeros: Codes, bits: int, dtype: str) -> npt.NDArray[Any]:
    """Turn zero points [G, N] into `weight_zero_point`, packed (`dtype` I32) or as int8: the inverse of
    `decode_zeros`."""
    if dtype == "I8":
        return np.ascontiguousarray((zeros.T.astype(np.int16) - zero_point(bits)).astype(np.int8))
    return np.ascontiguousarray(pack_gptq_zeros(zeros, bits).T)


# ---- Configs ----


def is_config(config: Mapping[str, Any]) -> bool:
    return str(config.get("quant_method", "")).lower() == CT_METHOD


def parse_settings(configs: dict[str, dict[str, Any]]) -> GPTQSettings:
    """Read what the configs of a checkpoint of packed layers say (`Checkpoint.configs`).

    What they say of its layers are claims, and counts only where all groups of layers agree. Raises UnsupportedError
    for a checkpoint of which the packed layers are not all: activations that are quantized, rotations, sparsity; for
    configs of other tensors. Raises SourceError where there is none.
    """
    found = find_configs(configs)
    for where, config in found.items():
        if is_config(config):
            require_supported(where, config)
            return _claims(config)
        if auto_round.is_config(config) and auto_round.packing(config) in auto_round.CT_PACKINGS:
            auto_round.require_supported(where, config)
            return _auto_round_claims(where, config)
    for where, config in found.items():
        raise other_tensors(where, config, "compressed-tensors'")
    raise SourceError(
        "its tensors are those of compressed-tensors (weight_packed), and no config says whether its activations are "
        "quantized too; restore the config.json that was written with them."
    )


def require_supported(where: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what no Marlin checkpoint can hold, by name; SourceError for what is no config."""

    def refuse(what: str) -> None:
        raise UnsupportedError(f"{where}: a compressed-tensors checkpoint, {what}; {_INSTEAD}.")

    for holder in (config, *_groups(where, config).values()):
        layout = holder.get("format")
        if layout is not None and layout not in _FORMATS:
            refuse(_OTHER_FORMATS.get(str(layout), f"in the format {shortened(layout)}"))
    if config.get("transform_config"):
        refuse("whose weights are rotated (transform_config): online rotations would be lost")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        refuse(f"sparse (sparsity_config {shortened(sparsity.get('format'))})")
    if config.get("kv_cache_scheme"):
        refuse("with a quantized cache of keys and values (kv_cache_scheme), whose scales would be lost")
    for name in config.get("config_groups") or {}:
        if name not in _groups(where, config) and not re.fullmatch(r"W[48]A16(_ASYM)?", name):
            refuse(f"whose layers are quantized as {shortened(name)} says")
    for name, group in _groups(where, config).items():
        for what in ("input_activations", "output_activations"):
            if group.get(what):
                bits = group[what].get("num_bits") if isinstance(group[what], dict) else None
                refuse(f"whose activations are quantized too ({name}: {what}{f', {bits} bits' if bits else ''})")
        weights = group.get("weights")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise SourceError(f"{where}: weights of {name} are {shortened(weights)}; an object was expected.")
        if weights.get("type", "int") != "int":
            refuse(f"with weights of type {shortened(weights['type'])} ({name}), not of whole numbers")
        if weights.get("strategy") not in (None, "group", "channel"):
            refuse(f"quantized by {shortened(weights['strategy'])} ({name}), neither by group nor by channel")
        if weights.get("dynamic"):
            refuse(f"whose weights are quantized while it runs ({name}: dynamic)")


def _groups(where: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups = config.get("config_groups")
    if groups is None:
        return {}
    if not isinstance(groups, dict) or not all(isinstance(group, (dict, str, list)) for group in groups.values()):
        raise SourceError(f"{where}: config_groups is {shortened(groups)}; a map of groups was expected.")
    return {str(name): group for name, group in groups.items() if isinstance(group, dict)}


def _auto_round_claims(where: str, config: dict[str, Any]) -> GPTQSettings:
    if config.get("extra_config"):  # layers of their own settings, which their tensors tell
        return GPTQSettings(raw=config)
    known = normalised(where, config)
    return GPTQSettings(bits=known["bits"], group_size=known["group_size"], sym=known["sym"], raw=config)


def _claims(config: dict[str, Any]) -> GPTQSettings:
    weights = [group["weights"] for group in _groups("", config).values() if isinstance(group.get("weights"), dict)]

    def same(values: Iterable[Any], kind: type) -> Any:
        found = list(values)
        return found[0] if found and all(x == found[0] for x in found) and type(found[0]) is kind else None

    strategies = ((-1 if w.get("strategy") == "channel" else w.get("group_size")) for w in weights)
    ordered = [w.get("actorder") in (True, "group", "dynamic") for w in weights]
    return GPTQSettings(
        bits=same((w.get("num_bits") for w in weights), int),
        group_size=same(strategies, int),
        sym=same((w.get("symmetric", True) for w in weights), bool),
        desc_act=True if ordered and all(ordered) else None,
        raw=config,
    )
