"""Checkpoints of other kinds of numbers: each is refused by its name, and told what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.conversion.convert import convert
from marlin_convert.errors import UnsupportedError
from marlin_convert.options import Options
from tests.support.awq_checkpoints import awq_config
from tests.support.ct_checkpoints import CTLayer, ct_config

LINEAR = {"l.weight": torch.zeros(4, 4)}
PACKED = CTLayer(K=128, N=64).tensors("l")
FAST = {"l.qweight": torch.zeros(64, 256).short(), "l.scales": torch.ones(8, 256).half()}
ZEROS = torch.zeros(8, 256).half()
BITS = "-bit weights; Marlin has 4 and 8 bits"
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def gptq(bits: int) -> dict[str, torch.Tensor]:
    return {
        "l.qweight": torch.zeros(256 * bits // 32, 256).int(),
        "l.qzeros": torch.zeros(2, 256 * bits // 32).int(),
        "l.scales": torch.ones(2, 256).half(),
        "l.g_idx": (torch.arange(256) // 128).int(),
    }


def packed(bits: int) -> dict[str, torch.Tensor]:
    return {**PACKED, "l.weight_packed": torch.zeros(64, 128 * bits // 32).int()}


#: What it is → its quantization config, its tensors, and what is said of it.
KINDS: dict[str, tuple[dict[str, Any] | None, dict[str, torch.Tensor], str]] = {
    "W4A8": (ct_config(group={"input_activations": ACTIVATIONS}), PACKED, "activations are quantized too"),
    "W8A8": (ct_config(format="int-quantized"), LINEAR, "int8 without packing, mostly with its activations"),
    "rotated": (ct_config(transform_config={"config_groups": {"R1": {}}}), PACKED, "rotated (transform_config)"),
    "2:4": (ct_config(sparsity_config={"format": "sparse-24-bitmask"}), PACKED, "sparse"),
    "2:4, unsaid": (ct_config(), {**PACKED, "l.bitmask": torch.zeros(3).byte()}, "sparse weights"),
    "marlin-24": (ct_config(format="marlin-24"), PACKED, "2:4 sparse"),
    "FP8 packed": (ct_config(format="float-quantized"), LINEAR, "FP8"),
    "NVFP4": (ct_config(format="nvfp4-pack-quantized"), LINEAR, "NVFP4"),
    "NVFP4, unsaid": (ct_config(), {**PACKED, "l.weight_global_scale": torch.ones(1)}, "NVFP4"),
    "MXFP4 packed": (ct_config(format="mxfp4-pack-quantized"), LINEAR, "MXFP4"),
    **{
        f"{bits} bits packed": (ct_config({"num_bits": bits}), packed(bits), f"{bits}{BITS}")
        for bits in (2, 3, 5, 6, 7)
    },
    **{
        f"{bits} bits": ({"quant_method": "gptq", "bits": bits}, gptq(bits), f"{bits}{BITS}")
        for bits in (2, 3, 5, 6, 7)
    },
    **{
        method: ({"quant_method": method}, LINEAR, f"{name} checkpoint")
        for method, name in {
            "hqq": "HQQ",
            "torchao": "torchao",
            "gguf": "GGUF",
            "bitsandbytes": "bitsandbytes",
            "exl2": "EXL2",
            "exl3": "EXL3",
            "fp8": "FP8",
            "fbgemm_fp8": "FP8",
            "mxfp4": "MXFP4",
            "modelopt": "ModelOpt",
            "aqlm": "AQLM",
            "eetq": "EETQ",
            "quanto": "Quanto",
            "higgs": "HIGGS",
            "spqr": "SpQR",
            "vptq": "VPTQ",
        }.items()
    },
    "paroquant": ({"quant_method": "paroquant"}, LINEAR, "ParoQuant checkpoint, whose weights are rotated"),
    "qqq": ({"quant_method": "qqq"}, LINEAR, "QQQ checkpoint, whose activations are quantized too"),
    "bitsandbytes, unsaid": (
        None,
        {"l.weight.quant_state.bitsandbytes__nf4": torch.zeros(3)},
        "bitsandbytes checkpoint",
    ),
    "EXL2, unsaid": (None, {"l.q_weight": torch.zeros(4)}, "EXL2 checkpoint"),
    "EXL3, unsaid": (None, {"l.trellis": torch.zeros(4)}, "EXL3 checkpoint"),
    "HQQ, unsaid": (None, {"l.W_q": torch.zeros(4)}, "HQQ checkpoint"),
    "MXFP4, unsaid": (None, {"mlp.experts.gate_up_proj_blocks": torch.zeros(4)}, "MXFP4 checkpoint"),
    "FP8, unsaid": (None, {"l.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, "FP8 checkpoint"),
    "GPTQModel's exl3": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "exl3"}, gptq(4), "EXL3 checkpoint"),
    "GPTQModel's bitblas": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "bitblas"},
        gptq(4),
        "save the model as gptq, gptq_v2 or gptq_p",
    ),
    "gemv_fast": (
        awq_config(version="gemv_fast"),
        {**FAST, "l.qzeros": ZEROS},
        "quantize the model in the layout gemm",
    ),
    "gemv_fast, unsaid": (awq_config(version="gemv"), {**FAST, "l.qzeros": ZEROS}, "rounded products"),
    "llm-awq": (awq_config(version="llm-awq"), {**FAST, "l.scaled_zeros": ZEROS}, "rounded products"),
    **{
        f"AutoRound's {packing}": (
            {"quant_method": "auto-round", "bits": 4, "packing_format": f"auto_round:{packing}"},
            gptq(4),
            f"'{packing}'",
        )
        for packing in ("mx_fp4", "nv_fp4", "fp8", "mlx")
    },
    "AutoRound, rotated": (
        {"quant_method": "auto-round", "packing_format": "auto_round", "spinquant_config": {"r1": True}},
        gptq(4),
        "rotated (spinquant_config)",
    ),
}


#: What a refusal says to do.
ADVICE = ("as it is", "runs them", "has to be quantized", "quantize the model", "save the model")


@pytest.mark.parametrize("kind", KINDS)
def test_refused(tmp_path: Path, kind: str) -> None:
    quantization, tensors, reason = KINDS[kind]
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    said = {} if quantization is None else {"quantization_config": quantization}
    (source / "config.json").write_text(json.dumps({"model_type": "llama", **said}))
    with pytest.raises(UnsupportedError) as error:
        convert(source, tmp_path / "out", Options(device="cpu"))
    message = str(error.value)
    assert reason in message
    assert any(advice in message for advice in ADVICE), "it does not say what to do instead"
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedError, match=r"a GGUF checkpoint .* llama.cpp runs it as it is"):
        convert(tmp_path, tmp_path / "out", Options(device="cpu"))
