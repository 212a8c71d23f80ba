"""What AutoRound's configs say: in which packing a checkpoint is, and whether it is of whole numbers.

The tensors are those of another format: GPTQ's, AWQ's or compressed-tensors', by `packing_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedError
from ..text import shortened

NAME = "AutoRound"
METHODS = ("auto-round", "auto_round", "autoround", "intel/auto-round")

#: GPTQ's packings → the checkpoint_format in whose way zero points are stored.
GPTQ_PACKINGS = {
    "auto_gptq": "gptq", "gptq": "gptq", "auto_round": "gptq_v2", "gptqmodel": "gptq_v2", "exllamav2": "gptq_v2",
}  # fmt: skip
AWQ_PACKINGS = ("auto_awq", "awq")
CT_PACKINGS = ("llm_compressor",)

#: Of whole numbers; what is floating-point has other types, or packings of its own.
_INTEGER_TYPES = ("int", "int_sym", "int_asym", "int_asym_dq")
_FLOAT_PACKINGS = ("mx_fp", "nv_fp", "fp8")
#: What the settings of rotations are called in some way.
_ROTATIONS = ("rotation", "hadamard", "spinquant", "quarot", "transform")
_AGAIN = "quantize the model again with scheme='W4A16' or 'W8A16' and format='auto_round', which can be repacked"


def is_config(config: Mapping[str, Any]) -> bool:
    return str(config.get("quant_method", "")).lower() in METHODS


def packing(config: Mapping[str, Any]) -> str:
    """Return the packing without what all of them begin with; an empty text where none is named."""
    return str(config.get("packing_format") or "").lower().removeprefix("auto_round:")


def title(config: Mapping[str, Any]) -> str:
    """Return what sentences call a checkpoint of this config."""
    named = packing(config)
    whose = "AWQ's" if named in AWQ_PACKINGS else "compressed-tensors'" if named in CT_PACKINGS else "GPTQ's"
    return f"{NAME} in {whose} packing"


def require_supported(where: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what no Marlin checkpoint can hold, by name."""

    def refuse(what: str) -> None:
        raise UnsupportedError(f"{where}: an {NAME} checkpoint {what}; {_AGAIN}.")

    named, kind, activations = packing(config), str(config.get("data_type") or "int"), config.get("act_bits")
    if kind not in _INTEGER_TYPES or named.startswith(_FLOAT_PACKINGS):
        refuse(f"of the type {shortened(named if kind in _INTEGER_TYPES else kind)}, not of whole numbers")
    if isinstance(activations, int) and activations < 16:
        refuse(f"whose activations are quantized too ({activations} bits), where Marlin holds weights alone")
    rotations = [key for key, value in config.items() if value and any(word in key.lower() for word in _ROTATIONS)]
    if rotations:
        refuse(f"whose weights are rotated ({rotations[0]}), which would be lost")
    if not named:
        refuse("that names no packing_format, which tells how zero points are stored")
    if named not in {*GPTQ_PACKINGS, *AWQ_PACKINGS, *CT_PACKINGS}:
        refuse(f"in the packing {shortened(named)}, which cannot be repacked")
