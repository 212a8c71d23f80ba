"""Small GPTQ checkpoints made by GPTQModel, with its own dequantized weights as references.

python tools/quantizers/with_gptqmodel.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the library compiles its dequantization otherwise

import tiny
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear

SETTINGS: dict[str, dict[str, Any]] = {
    "gptqmodel-g128": {"group_size": 128},
    "gptqmodel-g128-v2": {"group_size": 128, "format": "gptq_v2"},
    "gptqmodel-g128-act-order": {"group_size": 128, "desc_act": True},
    "gptqmodel-g32": {"group_size": 32},
    "gptqmodel-g64-asym": {"group_size": 64, "sym": False},
    "gptqmodel-g64-asym-v2": {"group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptqmodel-8bit": {"bits": 8, "group_size": 128},
    "gptqmodel-8bit-g32-asym-act-order": {"bits": 8, "group_size": 32, "sym": False, "desc_act": True},
    "gptqmodel-dynamic": {
        "group_size": 128,
        "dynamic": {
            r"+:.*\.down_proj": {"bits": 8, "group_size": 32},
            r"+:.*\.[kv]_proj": {"group_size": 64, "sym": False},
            r"-:.*\.o_proj": {},
        },
    },
    "gptq_p-g32-asym": {"group_size": 32, "sym": False, "format": "gptq_p"},
    "gptq_p-8bit-g64-asym": {"bits": 8, "group_size": 64, "sym": False, "format": "gptq_p"},
}


def quantize(source: Path, folder: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(tiny.SEED)
    config = QuantizeConfig(**{"bits": 4, "sym": True, "desc_act": False, "offload_to_disk": False, **settings})
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float16)
    rows = [row[None] for row in tiny.calibration_tokens()]
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=8)
    model.save(str(folder))


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What GPTQModel itself makes of the checkpoint: `TorchLinear.dequantize_weight`, `[K, N]`, of every layer."""
    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.eval()
    return {name: m.dequantize_weight() for name, m in model.named_modules() if isinstance(m, TorchLinear)}


def make(source: Path, folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    quantize(source, folder, SETTINGS[name])
    about = {"tool": "GPTQModel", "version": version("gptqmodel"), "settings": SETTINGS[name]}
    return dequantized(folder), about


if __name__ == "__main__":
    tiny.main(__doc__, SETTINGS, make)
