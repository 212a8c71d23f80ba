"""One tensor-parallel rank of vLLM on a CPU: whole models of both kinds through vLLM's own loader, layer beside layer.

    python tests/support/vllm_worker.py RANK RANKS PORT tensors|experts RESULT MARLIN DENSE [MARLIN DENSE …]

MARLIN is loaded through the plugin, DENSE is the same model with fp16 weights, cut by vLLM itself. Every layer of the
plugin gets random activations of its rank. Its product, of a reference in the kernel's place, is compared with that of
the plain layer: RESULT gets `compare`'s answers as JSON.
With `experts`, ranks share out whole experts. The first model must be a mixture: vLLM makes their process group only
then.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_PLUGINS": ""}

import torch
import vllm.platforms
from torch import Tensor, nn
from torch import library as torch_library
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # without a GPU, vLLM built for CUDA finds no platform at all

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402

from marlin_convert.engines import vllm_calls, vllm_choice, vllm_plugin  # noqa: E402
from marlin_convert.native import reference  # noqa: E402

# with the names that they take from vLLM
plugin: Any = vllm_plugin
calls: Any = vllm_calls
choice: Any = vllm_choice

# vLLM's library is for GPUs; it looks these names up, and nothing here calls them.
_library = torch_library.Library("_C", "FRAGMENT")
for _name in ("silu_and_mul", "gelu_new", "gelu_fast", "gelu_quick"):
    if not hasattr(torch.ops._C, _name):
        _library.define(f"{_name}(Tensor! out, Tensor input) -> ()")


def dequantized(weight: Tensor, scales: Tensor, zeros: Tensor | None, quant_type: Any) -> Tensor:
    """W [K, N], rounded to fp16 as the plain model's, in float64; from the kernel's own arguments."""
    bits = 4 if quant_type in (calls.scalar_types.uint4b8, calls.scalar_types.uint4) else 8
    zeros = zeros if zeros is not None and zeros.numel() else None
    assert (zeros is not None) == (quant_type == calls.scalar_types.uint4)
    return reference.dequantize_layer(weight, scales, zeros, bits=bits, dtype=torch.float16).double()


def multiply(**a: Any) -> Tensor:
    """What vLLM's Marlin kernel computes, from its own arguments."""
    W = dequantized(a["weight"], a["weight_scale"], a["weight_zp"], a["wtype"])
    assert W.shape == (a["input_size_per_partition"], a["output_size_per_partition"])
    assert W.shape[0] == a["input"].shape[-1]
    y = a["input"].double() @ W
    if a["bias"] is not None:  # in the kernel's order of columns
        inverse = torch.argsort(calls.permute_bias(torch.arange(a["bias"].numel())))
        y = y + a["bias"][inverse].double()
    return y


def experts(
    x: Tensor, first: list[Tensor], second: list[Tensor], weights: Tensor, ids: Tensor, own: Tensor | None
) -> Tensor:
    """x [T, H] through its experts: W of gate and up [H, 2I], of down [I, H]; weights, ids [T, k]; `own` [experts] says
    which of this rank's each one is, or -1.
    """
    y = torch.zeros(x.shape, dtype=torch.float64)
    local = ids if own is None else own.long()[ids]
    for token in range(x.shape[0]):
        for weight, number in zip(weights[token].tolist(), local[token].tolist(), strict=True):
            if number < 0:
                continue
            gate, up = (x[token].double() @ first[number]).chunk(2)
            y[token] += weight * ((nn.functional.silu(gate) * up) @ second[number])
    return y


def multiply_experts(**a: Any) -> Tensor:
    """What vLLM's fused product of experts computes, from its own arguments."""
    kind = next(t for t in calls.TYPES.values() if t.id == a["quant_type_id"])

    def stack(w: str) -> list[Tensor]:
        zeros = a[f"{w}_zeros"]
        return [
            dequantized(weight, scales, None if zeros is None else zeros[number], kind)
            for number, (weight, scales) in enumerate(zip(a[w], a[f"{w}_scale"], strict=True))
        ]

    assert a["activation"].value == "silu"
    return experts(a["hidden_states"], stack("w1"), stack("w2"), a["topk_weights"], a["topk_ids"], a["expert_map"])


calls.multiply, calls.multiply_experts = multiply, multiply_experts
if os.environ.get(choice.KERNEL) == "ours":  # our operator has a reference on a CPU
    choice.cuda.load_library = lambda: None
calls.make_workspace = lambda device, blocks=1: torch.zeros(blocks, dtype=torch.int32)


PLAIN = "not even the plain model: "
#: Models that vLLM refuses to run in float16.
BFLOAT16 = ("gemma2", "gemma3_text", "glm4")


def load(folder: str, ranks: int) -> nn.Module:
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    dtype = "bfloat16" if kind in BFLOAT16 else "float16"
    config = EngineArgs(
        model=folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=128,
        tensor_parallel_size=ranks, enable_expert_parallel=sys.argv[4] == "experts",
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            rank, port = int(sys.argv[1]), sys.argv[3]
            init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            initialize_model_parallel(ranks)
        torch.set_default_dtype(config.model_config.dtype)
        try:
            model = initialize_model(config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


def compare(marlin: str, dense: str, ranks: int) -> dict[str, Any] | str:
    """{"errors": relative error by layer, "weights": K · N of all layers of the plugin}, or why it was refused; with
    PLAIN before it if vLLM does not load the plain model either."""
    try:
        plain = dict(load(dense, ranks).named_modules())
    except Exception as refusal:  # noqa: BLE001 - other versions of vLLM know other models
        return f"{PLAIN}{type(refusal).__name__}: {refusal}"
    try:
        model = load(marlin, ranks)
    except Exception as refusal:  # noqa: BLE001 - a test says which are expected
        return f"{type(refusal).__name__}: {refusal}"
    generator = torch.Generator().manual_seed(0)
    errors, weights = {}, 0
    for name, layer in model.named_modules():
        method, other = getattr(layer, "quant_method", None), plain.get(name)
        if isinstance(method, plugin.MarlinCheckpointMethod):
            method.process_weights_after_loading(layer)
            W = other.weight.double().T  # [K, N] of this rank
            x = torch.randn(2, 3, W.shape[0], generator=generator).half()
            bias = getattr(layer, "bias", None)
            expected = x.double() @ W + (0 if bias is None else other.bias.double())
            errors[name] = error(method.apply(layer, x, bias), expected)
            if name.endswith("kv_b_proj"):  # which vLLM takes apart after loading
                apart = get_and_maybe_dequant_weights(layer, out_dtype=torch.float16)
                assert torch.equal(apart.double(), W.T)
            weights += sum(product.K * product.N for product in method.products)
        elif isinstance(method, plugin.MarlinExpertsMethod):
            method.process_weights_after_loading(layer)
            assert isinstance(layer, RoutedExperts)
            first, second = ([W.double().T for W in stack] for stack in (other.w13_weight, other.w2_weight))
            x = torch.randn(5, first[0].shape[0], generator=generator).half()
            ids = torch.rand(5, layer.global_num_experts, generator=generator).argsort(1)[:, :2]
            shares = torch.rand(5, 2, generator=generator)
            expected = experts(x, first, second, shares, ids, other.expert_map)
            assert len(first) == layer.global_num_experts // (ranks if sys.argv[4] == "experts" else 1)
            errors[name] = error(method.apply(layer, x, shares, ids), expected)
            weights += sum(W.numel() for W in (*first, *second))
    return {"errors": errors, "weights": weights}


def main() -> None:
    ranks, result, folders = int(sys.argv[2]), Path(sys.argv[5]), sys.argv[6:]
    pairs = zip(folders[::2], folders[1::2], strict=True)
    result.write_text(json.dumps([compare(*pair, ranks) for pair in pairs]))


if __name__ == "__main__":
    main()
