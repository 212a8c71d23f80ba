"""One tensor-parallel rank of SGLang on a CPU: whole models through SGLang's own loader, layer beside layer.

    python tests/support/sglang_worker.py RANK RANKS PORT tensors|experts RESULT MARLIN DENSE [MARLIN DENSE …]

MARLIN is loaded through the plugin, DENSE is the same model with fp16 weights, cut by SGLang itself. Every layer of the
plugin gets random activations of its rank; our operators compute it, by their references on a CPU, and its product is
compared with that of the plain layer: RESULT gets `compare`'s answers as JSON. With `experts`, ranks share out whole
experts.

SGLang takes the code of its loaders that it takes on a GPU (and not that of its CPU engine). Two names are made up: the
rotary embedding, for which SGLang without a GPU looks in vLLM's library and which is not called; the device of a map of
experts to ranks, which is a CPU here.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

# Without NCCL, as SGLang finds itself where there is no GPU: gloo alone.
os.environ |= {"HF_HUB_OFFLINE": "1", "SGLANG_PLUGINS": "none", "SGLANG_NCCL_SO_PATH": "/nonexistent"}
for _name in ("vllm", "vllm._custom_ops"):
    sys.modules[_name] = types.ModuleType(_name)
sys.modules["vllm._custom_ops"].rotary_embedding = None  # type: ignore[attr-defined]

import torch  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.configs.device_config import DeviceConfig  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed import bootstrap  # noqa: E402
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher import standard  # noqa: E402
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from marlin_convert.engines import sglang_plugin  # noqa: E402
from marlin_convert.native import reference  # noqa: E402

plugin: Any = sglang_plugin  # with the names that it takes from SGLang
standard.get_device = lambda: "cpu"

PLAIN = "not even the plain model: "


def load(folder: str, rank: int, ranks: int, port: str, shared: str) -> nn.Module:
    arguments = ServerArgs(
        model_path=folder, device="cpu", tp_size=ranks, ep_size=ranks if shared == "experts" else 1, dtype="float16",
        skip_tokenizer_init=True,
    )  # fmt: skip
    runtime_context.publish(arguments, role="test", ranks=runtime_context.SpawnRanks(world_rank=rank))
    if not torch.distributed.is_initialized():
        bootstrap._init_parallel_groups(
            backend="gloo", dist_init_method=f"tcp://127.0.0.1:{port}", server_args=arguments, gpu_id=rank
        )
    config = ModelConfig.from_server_args(arguments)
    return DefaultModelLoader(LoadConfig()).load_model(model_config=config, device_config=DeviceConfig("cpu"))


def experts(x: Tensor, first: list[Tensor], second: list[Tensor], weights: Tensor, ids: Tensor) -> Tensor:
    """x [T, H] through its experts: W of gate and up [H, 2I], of down [I, H]; weights, ids [T, k], -1 for none."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, number in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            if number >= 0:
                gate, up = (x[token].double() @ first[number]).chunk(2)
                y[token] += weight * ((nn.functional.silu(gate) * up) @ second[number])
    return y


def check_stacks(layer: Any, method: Any, first: list[Tensor], second: list[Tensor]) -> None:
    """Every stored code of each expert of this rank, where rows stand in their own order."""
    for number, made in enumerate(method.sets):
        for shard in made.shards():
            weight, scales, zeros, perm = (
                getattr(layer, f"marlin{number}_{shard}_{what}") for what in ("weight", "scales", "zeros", "perm")
            )
            for local, row in made.row.items():
                gate, up = first[local].chunk(2, 1)
                W = {"w13": first[local], "w1": gate, "w3": up, "w2": second[local]}[shard]
                own = None if zeros is None else zeros[row]
                bits = made.kinds[shard].bits
                stored = reference.dequantize_layer(weight[row], scales[row], own, bits=bits, dtype=torch.float16)
                if perm is not None:  # rows of zeros, which fill groups up, name the first column
                    real = stored.count_nonzero(1) > 0
                    W, stored = W[perm[row].long()[real]], stored[real]
                assert torch.equal(stored[: W.shape[0], : W.shape[1]], W.half())


def error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


def compare(marlin: str, dense: str, *how: Any) -> dict[str, Any] | str:
    """{"errors": relative error by layer, "weights": K · N of all layers of the plugin}, or why it was refused; with
    PLAIN before it if SGLang does not load the plain model either."""
    try:
        plain = dict(load(dense, *how).named_modules())
    except Exception as refusal:  # noqa: BLE001 - other versions of SGLang know other models
        return f"{PLAIN}{type(refusal).__name__}: {refusal}"
    try:
        model = load(marlin, *how)
    except Exception as refusal:  # noqa: BLE001 - a test says which are expected
        return f"{type(refusal).__name__}: {refusal}"
    generator = torch.Generator().manual_seed(0)
    errors, weights = {}, 0
    for name, layer in model.named_modules():
        method, other = getattr(layer, "quant_method", None), plain.get(name)
        if isinstance(method, plugin.MarlinCheckpointMethod):
            assert other is not None
            W = other.weight.double().T  # [K, N] of this rank
            x = torch.randn(2, 3, W.shape[0], generator=generator).half()
            bias = getattr(layer, "bias", None)
            assert torch.equal(method.apply(layer, torch.eye(W.shape[0]).half()), W.half())  # every stored code
            expected = x.double() @ W + (0 if bias is None else other.bias.double())
            errors[name] = error(method.apply(layer, x, bias), expected)
            weights += sum(product.K * product.N for product in method.products)
        elif isinstance(method, plugin.MarlinExpertsMethod):
            assert other is not None
            assert isinstance(layer, FusedMoE)
            first, second = ([W.double().T for W in stack] for stack in (other.w13_weight, other.w2_weight))
            check_stacks(layer, method, first, second)
            tokens = torch.arange(layer.num_experts)
            ids = torch.stack([tokens, (tokens + 1) % layer.num_experts], 1)  # each expert twice
            x = torch.randn(len(ids), first[0].shape[0], generator=generator).half()
            shares = torch.rand(ids.shape, generator=generator)
            # SGLang's own way to a rank's experts, and this plugin's product
            sent = layer.dispatcher.dispatch(x, StandardTopKOutput(shares, ids, None))
            local = sent.topk_output.topk_ids
            errors[name] = error(layer.run_moe_core(sent).hidden_states, experts(x, first, second, shares, local))
            assert int((local >= 0).sum()) > 0
            weights += sum(W.numel() for W in (*first, *second))
    return {"errors": errors, "weights": weights}


def main() -> None:
    rank, ranks, port, shared, result, *folders = sys.argv[1:]
    plugin.register()
    HookRegistry.apply_hooks()
    pairs = zip(folders[::2], folders[1::2], strict=True)
    answers = [compare(*pair, int(rank), int(ranks), port, shared) for pair in pairs]
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
