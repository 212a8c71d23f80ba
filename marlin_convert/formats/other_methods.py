"""Checkpoints of other kinds of numbers than whole codes with whole zero points: how each is told, and who runs it."""

from __future__ import annotations

#: quant_method → how a person calls it, for sources that are recognised and cannot be repacked.
OTHER_METHODS = {
    "bitsandbytes": "a bitsandbytes checkpoint",
    "gguf": "a GGUF checkpoint",
    "fp8": "an FP8 checkpoint",
    "fbgemm_fp8": "an FP8 checkpoint",
    "higgs": "a HIGGS checkpoint",
    "spqr": "an SpQR checkpoint",
    "vptq": "a VPTQ checkpoint",
    "aqlm": "an AQLM checkpoint",
    "hqq": "an HQQ checkpoint",
    "exl2": "an EXL2 checkpoint",
    "exl3": "an EXL3 checkpoint",
    "eetq": "an EETQ checkpoint",
    "quanto": "a Quanto checkpoint",
    "torchao": "a torchao checkpoint",
    "mxfp4": "an MXFP4 checkpoint",
    "modelopt": "a ModelOpt checkpoint",
    "paroquant": "a ParoQuant checkpoint, whose weights are rotated",
    "qqq": "a QQQ checkpoint, whose activations are quantized too",
}

#: quant_method of these → who runs it as it is.
RUN_BY = {
    "bitsandbytes": "Transformers", "gguf": "llama.cpp", "fp8": "vLLM",
    "aqlm": "Transformers", "hqq": "Transformers", "exl2": "ExLlamaV2", "exl3": "ExLlamaV3", "eetq": "Transformers",
    "quanto": "Transformers", "torchao": "Transformers", "mxfp4": "vLLM", "modelopt": "vLLM",
    "paroquant": "GPTQModel", "qqq": "GPTQModel", "fbgemm_fp8": "vLLM", "higgs": "Transformers", "spqr": "Transformers",
    "vptq": "Transformers",
}  # fmt: skip

#: Tensor-name endings that give away other quantization methods when no config does.
_ENDINGS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".q_weight": "exl2",
    ".trellis": "exl3",
    ".W_q": "hqq",
    "_proj_blocks": "mxfp4",
}


def method_of(name: str, dtype: str) -> str | None:
    """Return the quant_method that a tensor, by its name or its type, gives away."""
    found = (method for ending, method in _ENDINGS.items() if name.endswith(ending))
    return next(found, "fp8" if dtype.startswith("F8_") else None)
