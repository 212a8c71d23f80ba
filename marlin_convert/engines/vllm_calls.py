"""What is called of vLLM's kernels, whose arguments change between its versions.

Looked up here when they are called: on a machine without a GPU, tests put references in their place.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    MARLIN_SUPPORTED_GROUP_SIZES,
    apply_gptq_marlin_linear,
    marlin_make_workspace_new,
    marlin_permute_bias,
)
from vllm.scalar_type import scalar_types

#: What the kernel calls codes of so many bits, by whether they have zero points of their own.
TYPES = {
    (4, False): scalar_types.uint4b8, (8, False): scalar_types.uint8b128, (4, True): scalar_types.uint4,
}  # fmt: skip
GROUP_SIZES = tuple(MARLIN_SUPPORTED_GROUP_SIZES)

multiply = apply_gptq_marlin_linear
multiply_experts = fused_marlin_moe
make_workspace = marlin_make_workspace_new
permute_bias = marlin_permute_bias

# vLLM 0.33 has no g_idx parameters any more.
_parameters = inspect.signature(apply_gptq_marlin_linear).parameters
_EMPTY = tuple(name for name in ("g_idx", "g_idx_sort_indices") if name in _parameters)
_FIXED = {"is_k_full": True} if "is_k_full" in _parameters else {}
_GIVEN = {
    "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
    "input_size_per_partition", "bias", *_EMPTY, *_FIXED,
}  # fmt: skip
_unknown = [n for n, p in _parameters.items() if p.default is inspect.Parameter.empty and n not in _GIVEN]
if _unknown or not set(_parameters) >= _GIVEN:
    raise ImportError(f"this version of vLLM calls its Marlin kernel in a new way ({_unknown}); update marlin-convert")


def without_order(nothing: Tensor) -> dict[str, Any]:
    """Return the arguments of `multiply` that say that there is no act-order, which is done around it; `nothing` is an
    empty tensor."""
    return {**dict.fromkeys(_EMPTY, nothing), **_FIXED}


def rank(layer: Any) -> int:
    """Return this process's rank in the layer's tensor parallelism."""
    known = getattr(layer, "tp_rank", None)
    if known is not None:
        return int(known)
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def kernel_bias(bias: Tensor, stored_N: int) -> Tensor:
    """Return a bias [N], padded, in the order of columns that the kernel adds it in."""
    padded: Tensor = permute_bias(nn.functional.pad(bias.data, (0, stored_N - bias.shape[0])))
    return padded
