"""Linear layers in vLLM by its own loading, on a CPU, tensor parallelism with patched ranks.

The product itself needs a GPU; here a reference stands in its place, which decodes what the kernel would be given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.pieces import random_layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from marlin_convert.engines.column_marks import Arriving  # noqa: E402
from tests.support.vllm_layers import (  # noqa: E402
    QKV,
    Linear,
    check,
    choose,
    config_of,
    load,
    loader_of,
    plugin,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("on_a_cpu")]


KINDS = [
    (False, {}),
    (False, {"group": -1}),
    (True, {"group": 32, "bits": 8}),
    (True, {"group": 64, "order": True}),
    (True, {"group": 64, "asym": True, "order": True}),
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("extended", "kind"), KINDS)
def test_fused_qkv(ranks: int, extended: bool, kind: dict[str, Any]) -> None:
    """4 ranks, 2 heads of keys and values: two ranks share each."""
    widths = [512, 128, 128]
    pieces = {
        n: (*random_layer(256, w, seed=i, **kind), kind) for i, (n, w) in enumerate(zip(QKV, widths, strict=True))
    }
    config = config_of(pieces, extended)
    replicas = max(1, ranks // 2)
    own = [512 // ranks, 128 * replicas // ranks, 128 * replicas // ranks]
    x, bias = torch.randn(3, 256).half(), torch.randn(sum(own)).half()
    for rank in range(ranks):
        linear = Linear(rank, bias, replicas)
        method = load(config, QKV, pieces, linear, (256, own, 256, sum(own) * ranks), ["q", "k", "v"], extended)
        assert len(method.products) == (3 if kind.get("order") else 1)
        parts = []
        for i, name in enumerate(QKV):
            first = (rank if i == 0 else rank // replicas) * own[i]
            parts.append(pieces[name][1][:, first : first + own[i]])
        check(method.apply(linear, x, linear.bias), x, torch.cat(parts, 1), bias)
        check(method.apply(linear, x), x, torch.cat(parts, 1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("extended", "kind"), [k for k in KINDS if not k[1].get("order")])
def test_row_parallel(ranks: int, extended: bool, kind: dict[str, Any]) -> None:
    """At 4 ranks of 512 rows in groups of 128, each rank has a single group."""
    name = "model.layers.0.mlp.down_proj"
    pieces = {name: (*random_layer(512, 256, **kind), kind)}
    config = config_of(pieces, extended)
    own = 512 // ranks
    for rank in range(ranks):
        linear = Linear(rank)
        method = load(config, [name], pieces, linear, (own, [256], 512, 256), [None], extended)
        x = torch.randn(2, 5, own).half()
        check(method.apply(linear, x), x, pieces[name][1][rank * own : (rank + 1) * own])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", [{"group": 64}, {"group": 128, "asym": True}, {"group": -1}, {"bits": 8, "group": 32}])
def test_row_parallel_act_order(monkeypatch: pytest.MonkeyPatch, ranks: int, kind: dict[str, Any]) -> None:
    """Each rank has some rows of every group: on our kernels, in groups of 16."""
    choose(monkeypatch, "auto", capability=(8, 0))
    name, kind = "model.layers.0.mlp.down_proj", {**kind, "order": True}
    pieces = {name: (*random_layer(512, 256, **kind), kind)}
    own = 512 // ranks
    for rank in range(ranks):
        linear = Linear(rank, torch.randn(256).half())
        method = load(config_of(pieces, True), [name], pieces, linear, (own, [256], 512, 256), [None], True)
        assert method.products[0].ours == (ranks > 1 and kind["group"] != -1)
        x = torch.randn(2, 5, own).half()
        check(method.apply(linear, x), x, pieces[name][1][rank * own : (rank + 1) * own])


def test_row_parallel_act_order_is_refused_without_our_kernels() -> None:
    name = "model.layers.0.mlp.down_proj"
    kind: dict[str, Any] = {"group": 64, "order": True}
    pieces = {name: (*random_layer(512, 256, **kind), kind)}
    message = r"layer: rows 0 to 256 of 512, of this rank, become groups of 16 \(it has act-order\)"
    with pytest.raises(ValueError, match=message):
        load(config_of(pieces, True), [name], pieces, Linear(0), (256, [256], 512, 256), [None], True)


def test_parts_of_different_kinds_and_padding() -> None:
    names = ["mlp.gate_proj", "mlp.up_proj"]
    kinds: list[dict[str, Any]] = [{"group": 32}, {"group": 64, "bits": 8}]
    pieces = {n: (*random_layer(200, 72, seed=i, **k), k) for i, (n, k) in enumerate(zip(names, kinds, strict=True))}
    linear = Linear(0, torch.randn(144).half())
    method = load(config_of(pieces, True), names, pieces, linear, (200, [72, 72], 200, 144), [0, 1], True)
    x = torch.randn(7, 200).half()
    check(method.apply(linear, x, linear.bias), x, torch.cat([pieces[n][1] for n in names], 1), linear.bias.data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [{"group": 16}, {"bits": 8, "asym": True, "group": 64}])
def test_what_vllm_lacks_is_ours_on_every_gpu(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], dtype: torch.dtype
) -> None:
    """One part of each kind in a layer with a bias, padded; our operator's reference on a CPU."""
    choose(monkeypatch, "auto", capability=(8, 6))
    names, kinds = ["gate_proj", "up_proj"], [kind, {"group": 64}]
    pieces = {n: (*random_layer(200, 72, seed=i, **k), k) for i, (n, k) in enumerate(zip(names, kinds, strict=True))}
    linear = Linear(0, torch.randn(144).to(dtype))
    method = load(config_of(pieces, True), names, pieces, linear, (200, [72, 72], 200, 144), [0, 1], True, dtype)
    assert [product.ours for product in method.products] == [True, False]
    W, x = torch.cat([pieces[n][1] for n in names], 1), torch.randn(3, 200).to(dtype)
    check(method.apply(linear, x, linear.bias), x, W, linear.bias.data, 1e-3 if dtype == torch.float16 else 2e-2)
    check(method.apply(linear, x), x, W, None, 1e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("kind", [{}, {"group": 64, "order": True}, {"group": -1}, {"bits": 8, "group": 32}])
def test_our_kernel(monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]) -> None:
    choose(monkeypatch, "ours")
    widths = [512, 128, 128]
    pieces = {
        n: (*random_layer(256, w, seed=i, **kind), kind) for i, (n, w) in enumerate(zip(QKV, widths, strict=True))
    }
    linear, W = Linear(0, torch.randn(768).half()), torch.cat([pieces[n][1] for n in QKV], 1)
    method = load(config_of(pieces, True), QKV, pieces, linear, (256, widths, 256, 768), ["q", "k", "v"], True)
    assert all(product.ours for product in method.products)
    x = torch.randn(2, 5, 256).half()
    check(method.apply(linear, x, linear.bias), x, W, linear.bias.data)


def test_columns_that_have_not_come_are_an_error() -> None:
    pieces: dict[str, Any] = {"a": (*random_layer(256, 64), {})}
    config, linear = config_of(pieces, False), Linear(0)
    method = plugin.MarlinCheckpointMethod(config, "layer", ["a"])
    method.create_weights(linear, 256, [64], 256, 64, torch.float16, weight_loader=lambda param, loaded: None)
    config.arriving = Arriving(config.settings, ["a"])
    with pytest.raises(ValueError, match="layer: 64 of its 64 columns have not been loaded"):
        method.finish(linear)
    with pytest.raises(ValueError, match="layer: its weights have not been loaded"):
        method.process_weights_after_loading(linear)


def test_a_part_that_is_not_quantized_is_an_error() -> None:
    config, linear = config_of({"a": (*random_layer(256, 64), {})}, False), Linear(0)
    method = plugin.MarlinCheckpointMethod(config, "layer", ["a"])
    method.create_weights(linear, 256, [64], 256, 64, torch.float16, weight_loader=lambda param, loaded: None)
    with pytest.raises(ValueError, match="layer: vLLM computes it as one layer, and a part of it is not quantized"):
        loader_of(linear)(linear.weight, torch.zeros(64, 256))
