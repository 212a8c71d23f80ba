"""vLLM's mixtures of experts on our product, with vLLM's own class of experts, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.pieces import random_layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from marlin_convert.engines import vllm_moe, vllm_plugin  # noqa: E402
from marlin_convert.engines.column_marks import Arriving  # noqa: E402
from marlin_convert.engines.tensor_parallel import Piece  # noqa: E402
from marlin_convert.formats.layout import EXTENDED_NAMES  # noqa: E402
from marlin_convert.formats.marlin_config import LayerSettings, marlin_ext_settings  # noqa: E402
from marlin_convert.native.cuda_library import BATCH_INVARIANT  # noqa: E402
from tests.support.vllm_layers import choose  # noqa: E402

plugin: Any = vllm_plugin
pytestmark = [pytest.mark.filterwarnings("ignore")]

H, INNER, E = 128, 256, 4
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Experts(plugin.RoutedExperts):  # type: ignore[misc]
    """What the plugin sees of one of vLLM's blocks of experts."""

    def __init__(self, rank: int, ranks: int, gated: bool, here: list[int], **settings: Any) -> None:
        torch.nn.Module.__init__(self)
        names = PARTS if gated else {"w1": "up_proj", "w3": "", "w2": "down_proj"}
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = names.values()
        self.moe_config = SimpleNamespace(
            num_logical_experts=E, is_act_and_mul=gated, tp_size=ranks, tp_rank=rank,
            moe_parallel_config=SimpleNamespace(use_all2all_kernels=False, enable_eplb=settings.get("eplb", False)),
        )  # fmt: skip
        self.swiglu_limit = settings.get("limit")
        self.activation = SimpleNamespace(value=settings.get("activation", "silu"))
        self.apply_router_weight_on_input, self.global_num_experts = settings.get("on_input", False), E
        self.here = here

    def _map_global_expert_id_to_local_expert_id(self, number: int) -> int:
        return self.here.index(number) if number in self.here else -1


def load(
    kinds: dict[str, dict[str, Any]], biases: bool = False, rank: int = 0, ranks: int = 1, here: Any = None,
    dtype: torch.dtype = torch.float16, **settings: Any,
) -> tuple[Any, Any, dict[str, torch.Tensor]]:  # fmt: skip
    """(the block, its method, weights and biases by name): `kinds` by name, or by what ends it, of each layer."""
    gated = not str(settings.get("activation", "")).endswith("_no_mul")
    parts = list(PARTS.values()) if gated else ["up_proj", "down_proj"]
    pieces: dict[str, tuple[Piece, torch.Tensor]] = {}
    layers, values, generator = {}, {}, torch.Generator().manual_seed(0)
    for number in range(E):
        for part in parts:
            name = f"experts.{number}.{part}"
            kind = next((k for end, k in kinds.items() if name.endswith(end)), kinds.get("", {}))
            K, N = (INNER, H) if part == "down_proj" else (H, INNER)
            piece, W = random_layer(K, N, seed=len(pieces), **kind)
            size = 2.0 ** -(piece.bits + 1)  # fp16 is to hold what follows
            piece, W = replace(piece, scales=piece.scales * size), W * size
            pieces[name], values[name] = (piece, W), W
            sizes = {
                "in_features": K if piece.stored_K != K else None,
                "out_features": N if piece.stored_N != N else None,
            }
            order = piece.perm is not None
            layers[name] = LayerSettings(piece.bits, kind.get("group", 128), piece.zeros is None, order, **sizes)
            if biases:
                values[f"{name}.bias"] = torch.randn(N, generator=generator).to(dtype)
    config = plugin.MarlinCheckpointConfig.from_config(marlin_ext_settings(layers, lm_head=False))
    config.quantized, config.biases = set(pieces), set(pieces) if biases else set()
    block = Experts(rank, ranks, gated, list(range(E)) if here is None else here, **settings)
    method = config.get_quant_method(block, "experts")
    method.create_weights(block, len(block.here), H, INNER // ranks, dtype)
    config.arriving = Arriving(config.settings, list(pieces))
    tensors = [
        (f"{name}.{ending}", getattr(piece, what))
        for name, (piece, _) in pieces.items()
        for what, ending in EXTENDED_NAMES.items()
        if getattr(piece, what) is not None
    ]
    tensors += [(f"{name}.bias", values[f"{name}.bias"]) for name in pieces if biases]
    shard_of = {name: shard for shard, name in PARTS.items()} if gated else {"up_proj": "w1", "down_proj": "w2"}
    for key, tensor in config.arriving.stream(tensors):
        _, number, part, what = key.split(".")
        shard = shard_of[part]
        parameter = block.get_parameter(f"{'w2' if shard == 'w2' else 'w13'}_{what}")
        assert parameter.weight_loader(parameter, tensor, key, shard, int(number), return_success=True) == (
            int(number) in block.here
        )
    method.finish(block)
    config.arriving = None
    method.process_weights_after_loading(block)
    return block, method, values


def expected(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, values: dict[str, torch.Tensor], activation: Any,
    here: list[int], gated: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Token by token, in float64."""
    y = torch.zeros(x.shape, dtype=torch.float64)

    def product(a: torch.Tensor, name: str) -> torch.Tensor:
        bias = values.get(f"{name}.bias")
        return a @ values[name].double() + (0 if bias is None else bias.double())

    for t in range(x.shape[0]):
        for j, number in enumerate(ids[t].tolist()):
            if number in here:
                name, a = f"experts.{number}", x[t].double()
                up = product(a, f"{name}.up_proj")
                h = activation(product(a, f"{name}.gate_proj"), up) if gated else activation(up)
                y[t] += float(weights[t, j]) * product(h, f"{name}.down_proj")
    return y


def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def limited(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate.clamp(max=0.5), up.clamp(-0.5, 0.5))


def gpt_oss(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def squared(up: torch.Tensor) -> torch.Tensor:
    return torch.relu(up) ** 2


CASES: dict[str, dict[str, Any]] = {
    "plain": {"kinds": {}, "sets": 1, "joined": True},
    "act-order": {"kinds": {"": {"group": 64, "order": True}}},
    "groups of 16": {"kinds": {"": {"group": 16}}, "joined": True},
    "8 bits with zero points": {"kinds": {"": {"bits": 8, "group": 64, "asym": True}}, "joined": True},
    "one group": {"kinds": {"": {"group": -1}}, "joined": True},
    "different settings": {"kinds": {"1.up_proj": {"group": 32}, "3.down_proj": {"bits": 8}}, "sets": 3},
    "biases": {"kinds": {}, "biases": True, "joined": True},
    "a limit": {"kinds": {}, "limit": 0.5, "how": limited, "joined": True},
    "gpt-oss": {"kinds": {}, "activation": "swigluoai", "biases": True, "how": gpt_oss, "joined": True},
    "without a gate": {"kinds": {}, "activation": "relu2_no_mul", "how": squared},
    "experts elsewhere": {"kinds": {"2.up_proj": {"group": 64}}, "here": [3, 2], "sets": 2},
}


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "ours")


@pytest.mark.parametrize("name", CASES)
def test_what_vllm_cannot_and_what_it_can(name: str) -> None:
    case = dict(CASES[name])
    how, sets, joined = case.pop("how", silu), case.pop("sets", 1), case.pop("joined", False)
    block, method, values = load(**case)
    assert (len(method.sets), all(made.joined for made in method.sets)) == (sets, joined)
    torch.manual_seed(0)
    x, ids, weights = torch.randn(6, H).half(), torch.rand(6, E).argsort(1)[:, :2].int(), torch.rand(6, 2)
    want = expected(x, weights, ids, values, how, block.here, gated=how is not squared)
    y = method.apply(block, x, weights, ids)
    assert (y.double() - want).norm() <= 3e-3 * want.norm()


@pytest.mark.parametrize("kind", [{}, {"group": 64, "order": True}, {"group": 32, "asym": True, "order": True}])
def test_ranks_add_up(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, ids, weights = torch.randn(6, H).half(), torch.rand(6, E).argsort(1)[:, :2].int(), torch.rand(6, 2)
    total = torch.zeros(6, H, dtype=torch.float64)
    for rank in range(2):
        block, method, values = load({"": kind}, rank=rank, ranks=2, biases=True)
        total += method.apply(block, x, weights, ids).double()
    want = expected(x, weights, ids, values, silu, list(range(E)))
    assert (total - want).norm() <= 3e-3 * want.norm()


def test_what_arrives_is_stacked_at_once() -> None:
    """No second copy: the stack is made when the first expert comes, and is what is computed with."""
    block, method, _ = load({})
    assert {name for name, _ in block.named_parameters()} == {
        f"marlin0_{shard}_{what}" for shard in ("w13", "w2") for what in ("weight", "scales")
    }
    assert block.marlin0_w13_weight.shape == (E, H // 16, 2 * INNER * 2)
    assert method.sets[0]._stacks == {}


@pytest.mark.parametrize("asked", ["1", "0"])
def test_fixed_bits_when_vllm_promises_them(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", asked)
    block, method, _ = load({})
    passed: list[int] = []

    def product(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append(rest[-1])
        return x

    monkeypatch.setattr(torch.ops.marlin_convert, "experts", product)
    method.apply(block, torch.randn(6, H).half(), torch.rand(6, 2), torch.zeros(6, 2, dtype=torch.int32))
    assert passed == [BATCH_INVARIANT if asked == "1" else 0]


def test_fixed_bits_are_refused_with_vllms_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "vllm")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match=r"^experts: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on"):
        load({})


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="experts: marlin-convert's kernels have no activation situ"):
        load({}, activation="situ")


def test_experts_that_move_or_have_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "ours")
    with pytest.raises(ValueError, match=r"^experts: this plugin does not run experts that --enable-eplb moves"):
        load({}, eplb=True)
    lora = SimpleNamespace(target_modules=None)
    monkeypatch.setattr(vllm_moe, "get_current_vllm_config_or_none", lambda: SimpleNamespace(lora_config=lora))
    for targets in (None, ["q_proj", "model.layers.0.mlp.experts"], ["down_proj"]):
        lora.target_modules = targets
        with pytest.raises(ValueError, match=r"^experts: this plugin does not run LoRA adapters of experts; name"):
            load({})
    lora.target_modules = ["q_proj", "o_proj"]
    load({})
