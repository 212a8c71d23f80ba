"""Other kernels for 4- and 8-bit weights, for benchmarks/gemm.py: those that are installed, on the same weights.

vLLM's Marlin takes the layout that ours does. Machete (vLLM) and humming-kernels have layouts of their own: Machete is
given the same words packed its way, humming random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

Calls = list[Callable[[], object]]
#: Gives the calls that multiply activations by the weights of each copy of a layer.
Peer = Callable[[torch.Tensor], Calls]


class Kind(Protocol):
    bits: int
    group_size: int
    zeros: bool
    act_order: bool


class Layer(Protocol):
    B: torch.Tensor
    s: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None


def find(kind: Kind, k: int, n: int, layers: list[Any], humming: bool = True) -> dict[str, Peer]:
    """The peers that are installed and take these weights, by name; why others do not take part is printed."""
    found = {}
    makers = {"marlin": _marlin, "machete": _machete} | ({"humming": _humming} if humming else {})
    for name, make in makers.items():
        try:
            peer = make(kind, k, n, layers)
        except Exception as error:  # noqa: BLE001 - others' code may raise anything
            print(f"{name} does not take part: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        if peer is not None:
            found[name] = peer
    return found


def _scalar_type(kind: Kind) -> Any:
    types = import_module("vllm.scalar_type").scalar_types
    if kind.zeros:
        return types.uint4 if kind.bits == 4 else types.uint8
    return types.uint4b8 if kind.bits == 4 else types.uint8b128


def _marlin(kind: Kind, k: int, n: int, layers: list[Layer]) -> Peer:
    utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    workspace = torch.zeros(8 * 1024, dtype=torch.int32, device="cuda")
    weights = _scalar_type(kind)
    groups = torch.arange(k, device="cuda").int() // (kind.group_size if kind.group_size > 0 else k)

    def call(x: torch.Tensor, layer: Layer) -> Callable[[], object]:
        order = (none, none) if layer.perm is None else (groups, layer.perm)
        zeros = none if layer.zeros is None else layer.zeros
        rest = (layer.s, zeros, *order, workspace, weights, n, k, True)
        return lambda: utils.apply_gptq_marlin_linear(x, layer.B, *rest)

    return lambda x: [call(x, layer) for layer in layers]


def _machete(kind: Kind, k: int, n: int, layers: list[Layer]) -> Peer | None:
    if kind.zeros or kind.act_order or kind.bits != 4:
        return None
    ops = import_module("vllm._custom_ops")
    weights = _scalar_type(kind)
    packed = [
        ops.machete_prepack_B(
            layer.B.view(k // 8, n).t().contiguous().t(), a_type=torch.float16, b_type=weights,
            group_scales_type=torch.float16,
        )
        for layer in layers
    ]  # fmt: skip

    def call(x: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> Callable[[], object]:
        return lambda: ops.machete_mm(a=x, b_q=b, b_type=weights, b_group_scales=s, b_group_size=kind.group_size)

    return lambda x: [call(x, b, layer.s) for b, layer in zip(packed, layers, strict=True)]


def _humming(kind: Kind, k: int, n: int, layers: list[Layer]) -> Peer | None:
    if kind.zeros or kind.act_order:
        return None
    layer_type = import_module("humming.layer").HummingLayer
    config = {"dtype": f"uint{kind.bits}", "group_size": max(0, kind.group_size)}  # 0: one group

    def layer() -> Any:
        new = layer_type(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
        new.load_from_unquantized(torch.randn(n, k, dtype=torch.half, device="cuda") / k**0.5)
        new.transform()
        return new

    made = [layer() for _ in layers]
    return lambda x: [lambda each=each: each(x) for each in made]
