"""What the vLLM plugin claims, and which layers and experts it takes, by vLLM's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.pieces import random_layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.support.vllm_layers import (  # noqa: E402
    ORIGINAL,
    config_of,
    plugin,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("on_a_cpu")]


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        (ORIGINAL, True),
        ({"quant_method": "marlin", "group_size": 128}, True),
        ({"quant_method": "gptq", "checkpoint_format": "marlin_ext"}, True),
        ({"quant_method": "gptq", "checkpoint_format": "gptq", "is_marlin_format": False}, False),
        ({"quant_method": "gptq", "bits": 4}, False),
        ({"quant_method": "awq"}, False),
    ],
)
def test_claims_marlin_checkpoints_only(settings: dict[str, Any], ours: bool) -> None:
    claimed = plugin.MarlinCheckpointConfig.override_quantization_method(settings, None)
    assert claimed == ("marlin_convert" if ours else None)
    assert plugin.MarlinCheckpointConfig.override_quantization_method(settings, "awq") is None


def test_vllm_knows_the_configuration() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    assert "marlin_convert" in QUANTIZATION_METHODS
    assert get_quantization_config("marlin_convert") is plugin.MarlinCheckpointConfig


def test_quantized_layers_are_those_with_tensors(tmp_path: Path) -> None:
    piece, _ = random_layer(128, 256)
    tensors = {"model.layers.0.mlp.up_proj.B": piece.weight, "model.layers.0.mlp.up_proj.s": piece.scales,
               "model.norm.weight": torch.ones(4)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": ORIGINAL}))
    config = plugin.MarlinCheckpointConfig.from_config(ORIGINAL)
    config.maybe_update_config(str(tmp_path))
    assert config.quantized == {"model.layers.0.mlp.up_proj"}
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    linear = plugin.LinearBase.__new__(plugin.LinearBase)
    with pytest.raises(ValueError, match=r"gate_up_proj: .*gate_proj of it is not quantized"):
        config.get_quant_method(linear, "model.layers.0.mlp.gate_up_proj")
    assert isinstance(config.get_quant_method(linear, "model.layers.0.mlp.down_proj"), plugin.UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(linear, "model.layers.0.mlp.up_proj"), plugin.MarlinCheckpointMethod)


class Experts(plugin.RoutedExperts):  # type: ignore[misc]
    """What the plugin asks one of vLLM's blocks of two experts before it makes their method."""

    def __init__(self, **changes: Any) -> None:
        torch.nn.Module.__init__(self)
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
        settings = {"num_logical_experts": 2, "is_act_and_mul": True, **changes}
        parallel = SimpleNamespace(use_all2all_kernels=settings.pop("all2all", False), enable_eplb=False)
        self.swiglu_limit = settings.pop("swiglu_limit", None)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, **settings)


EXPERTS = [f"mlp.experts.{number}.{part}" for number in (0, 1) for part in ("gate_proj", "up_proj", "down_proj")]


def experts_config(changed: dict[str, dict[str, Any]] | None = None, **kind: Any) -> Any:
    """A configuration in which all EXPERTS are of one kind but for `changed`."""
    pieces = {}
    for name in EXPERTS:
        own = {**kind, **(changed or {}).get(name, {})}
        pieces[name] = (*random_layer(own.pop("K", 256), 128, **own), own)
    return config_of(pieces, True)


def test_experts_get_a_method_of_their_own() -> None:
    config = experts_config(group=64)
    assert isinstance(config.get_quant_method(Experts(), "mlp.experts"), plugin.MarlinExpertsMethod)
    assert config.get_quant_method(Experts(), "model.layers.1.mlp.experts") is None


@pytest.mark.parametrize(
    ("config", "block", "message"),
    [
        (experts_config(group=64, order=True), {}, "experts with act-order, and marlin-convert's kernels are not used"),
        (experts_config({EXPERTS[3]: {"group": 32}}, group=64), {}, "experts of different settings in one block"),
        (experts_config(group=64, K=200), {}, "experts that are stored padded"),
        (experts_config(bits=8, group=64, asym=True), {}, "no 8-bit codes with zero points"),
        (experts_config(group=16), {}, "no groups of 16"),
        (experts_config(), {"all2all": True}, "experts spread over data-parallel ranks"),
        (experts_config(), {"swiglu_limit": 7.0}, "experts without a gate, or with a limit on it"),
        (experts_config(), {"num_logical_experts": 3}, "mlp.experts.2.down_proj is not quantized"),
        (experts_config(), {"num_logical_experts": 1}, "mlp.experts.1.down_proj is not one of them"),
    ],
)
def test_experts_that_are_refused(config: Any, block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^mlp.experts: .*{message}"):
        config.get_quant_method(Experts(**block), "mlp.experts")


def test_experts_with_biases_are_refused() -> None:
    config = experts_config()
    config.biases = {"mlp.experts.1.up_proj"}
    with pytest.raises(ValueError, match=r"experts with biases \(mlp.experts.1.up_proj\)"):
        config.get_quant_method(Experts(), "mlp.experts")
