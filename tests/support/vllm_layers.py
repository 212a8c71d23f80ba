"""vLLM's linear layers as its plugin sees them, on a CPU, and what stands in the place of its kernel.

Importable where vLLM is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlin_convert.engines import vllm_calls, vllm_choice, vllm_plugin
from marlin_convert.engines.column_marks import Arriving
from marlin_convert.engines.tensor_parallel import Piece
from marlin_convert.errors import DeviceError
from marlin_convert.formats.layout import EXTENDED_NAMES, ORIGINAL_NAMES
from marlin_convert.formats.marlin_config import LayerSettings, marlin_ext_settings
from marlin_convert.native import reference as twin

# with the names that they take from vLLM
plugin: Any = vllm_plugin
calls: Any = vllm_calls
choice: Any = vllm_choice

ORIGINAL = {"quant_method": "gptq", "checkpoint_format": "marlin", "is_marlin_format": True, "bits": 4,
            "group_size": 128, "sym": True, "desc_act": False}  # fmt: skip


def reference(**a: Any) -> torch.Tensor:
    """What vLLM's Marlin kernel computes, from its own arguments."""
    bits = 4 if a["wtype"] in (calls.scalar_types.uint4b8, calls.scalar_types.uint4) else 8
    zeros = a["weight_zp"] if a["weight_zp"].numel() else None
    assert (zeros is not None) == (a["wtype"] == calls.scalar_types.uint4)
    W = twin.dequantize_layer(a["weight"], a["weight_scale"], zeros, bits=bits, dtype=torch.float32)
    assert (
        W.shape == (a["input_size_per_partition"], a["output_size_per_partition"]) == (a["input"].shape[-1], W.shape[1])
    )
    y = a["input"].float() @ W
    if a["bias"] is not None:  # in the kernel's order of columns
        inverse = torch.argsort(calls.permute_bias(torch.arange(a["bias"].numel())))
        y = y + a["bias"][inverse].float()
    return y.to(a["input"].dtype)


def run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference in the place of vLLM's product; each layer says itself which rank it is of."""
    monkeypatch.setattr(calls, "multiply", reference)
    monkeypatch.setattr(calls, "make_workspace", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(calls, "rank", lambda layer: layer.rank)
    choose(monkeypatch, "vllm")


def choose(
    monkeypatch: pytest.MonkeyPatch, kernel: str, missing: str = "", capability: tuple[int, int] = (9, 0)
) -> None:
    """MARLIN_CONVERT_VLLM_KERNEL, on a machine of one's own: our kernels there or `missing`, a GPU of `capability`."""

    def load() -> None:
        if missing:
            raise DeviceError(missing)

    monkeypatch.setenv(choice.KERNEL, kernel)
    monkeypatch.setattr(choice.cuda, "load_library", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    choice.kernel.cache_clear()


def config_of(pieces: dict[str, tuple[Piece, torch.Tensor, dict[str, Any]]], extended: bool) -> Any:
    if not extended:
        result = plugin.MarlinCheckpointConfig.from_config(ORIGINAL)
    else:
        layers = {}
        for name, (piece, _, kind) in pieces.items():
            sizes = {
                "in_features": piece.K if piece.stored_K != piece.K else None,
                "out_features": piece.N if piece.stored_N != piece.N else None,
            }
            layers[name] = LayerSettings(
                piece.bits, kind.get("group", 128), piece.zeros is None, piece.perm is not None, **sizes
            )
        result = plugin.MarlinCheckpointConfig.from_config(marlin_ext_settings(layers, lm_head=False))
    result.quantized = set(pieces)
    result.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return result


def loader_of(linear: Any) -> Any:
    """What loads its weight."""
    return linear.weight.weight_loader


class Linear(torch.nn.Module):
    """What the plugin sees of one of vLLM's linear layers."""

    def __init__(self, rank: int, bias: torch.Tensor | None = None, replicas: int = 1) -> None:
        super().__init__()
        self.rank, self.num_kv_head_replicas = rank, replicas
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)


def load(
    config: Any, names: list[str], pieces: dict[str, Any], linear: Linear, sizes: tuple[int, list[int], int, int],
    shards: list[Any], extended: bool, dtype: torch.dtype = torch.float16,
) -> Any:  # fmt: skip
    """Through the steps of vLLM's loading: create, load marks cut as vLLM cuts a plain weight, process."""
    method = plugin.MarlinCheckpointMethod(config, "layer", names)
    own_K, widths, all_K, all_N = sizes

    def cut(param: Any, loaded: torch.Tensor, shard: Any = None) -> None:
        part = {"q": 0, "k": 1, "v": 2}.get(shard, shard or 0)
        rank = linear.rank // (linear.num_kv_head_replicas if part else 1) if all_N > sum(widths) else 0
        first = sum(widths[:part])
        param.data[first : first + widths[part]] = loaded.narrow(0, rank * widths[part], widths[part])

    method.create_weights(linear, own_K, widths, all_K, all_N, dtype, weight_loader=cut)
    weights = [
        (f"{name}.{ending}", getattr(pieces[name][0], what))
        for name in names
        for what, ending in (EXTENDED_NAMES if extended else ORIGINAL_NAMES).items()
        if getattr(pieces[name][0], what) is not None
    ]
    config.arriving = Arriving(config.settings, names)
    of_name = dict(zip(names, shards, strict=True))
    for key, marks in config.arriving.stream(weights):
        shard = of_name[key.removesuffix(".weight")]
        loader_of(linear)(linear.weight, marks, *(() if shard is None else (shard,)))
    method.finish(linear)
    config.arriving = None
    method.process_weights_after_loading(linear)
    assert not hasattr(linear, "weight")
    return method


def check(
    y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None, close: float = 1e-3
) -> None:
    """That y is x @ W + bias, but for roundings."""
    expected = x.double() @ W + (0 if bias is None else bias.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert y.shape == expected.shape
    assert error < close, error


QKV = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
