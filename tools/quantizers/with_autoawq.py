"""Small AWQ checkpoints made by AutoAWQ, with its own dequantized weights as references.

python tools/quantizers/with_autoawq.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
from awq.quantize import quantizer
from awq.utils.packing_utils import dequantize_gemm
from transformers import AutoTokenizer

#: Of `down_proj` a group of 128 has two, of 64 four, of 32 eight: each has its own padding in the layout gemv.
SETTINGS: dict[str, dict[str, Any]] = {
    "awq-g64": {"q_group_size": 64, "version": "GEMM"},
    "awq-g32": {"q_group_size": 32, "version": "GEMM"},
    "awq-gemv-g128": {"q_group_size": 128, "version": "GEMV"},
    "awq-gemv-g64": {"q_group_size": 64, "version": "GEMV"},
    "awq-gemv-g32": {"q_group_size": 32, "version": "GEMV"},
}


def quantize(source: Path, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write the checkpoint; return its weights, [K, N].

    AutoAWQ dequantizes without a GPU in the layout gemm only. Of a layer in the layout gemv, the reference is what
    `dequantize_gemm` makes of the same linear, scales and zero points, packed by AutoAWQ in that layout.
    """
    weights: list[torch.Tensor] = []
    pack = WQLinear_GEMV.from_linear

    def packed(linear: torch.nn.Linear, w_bit: int, group_size: int, *args: Any, **given: torch.Tensor) -> Any:
        if "scales" in given:
            turned = {key: given[key].t().contiguous() for key in ("scales", "zeros")}
            weights.append(dequantized(WQLinear_GEMM.from_linear(linear, w_bit, group_size, **turned)))
        return pack(linear, w_bit, group_size, *args, **given)

    torch.manual_seed(tiny.SEED)
    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float16)
    quantizer.WQLinear_GEMV.from_linear = packed
    try:
        model.quantize(
            AutoTokenizer.from_pretrained(source),
            {"zero_point": True, "w_bit": 4, **SETTINGS[name]},
            calib_data=tiny.calibration_tokens().tolist(),
            max_calib_seq_len=tiny.CONTEXT,
            apply_clip=False,  # it takes outputs by 64, of which k and v have 32
        )
    finally:
        quantizer.WQLinear_GEMV.from_linear = pack
    model.save_quantized(str(folder))
    gemv = [key for key, module in model.model.named_modules() if isinstance(module, WQLinear_GEMV)]
    gemm = {key: dequantized(m) for key, m in model.model.named_modules() if isinstance(m, WQLinear_GEMM)}
    return gemm | dict(zip(gemv, weights, strict=True))


def dequantized(layer: WQLinear_GEMM) -> torch.Tensor:
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size)


def make(source: Path, folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    weights = quantize(source, folder, name)
    return weights, {"tool": "AutoAWQ", "version": version("autoawq"), "settings": SETTINGS[name]}


if __name__ == "__main__":
    tiny.main(__doc__, SETTINGS, make)
