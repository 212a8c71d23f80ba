"""The SGLang plugin with SGLang's own classes, on a CPU: what is claimed, filled, and refused by name.

Whole models are in `test_sglang_models`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.pieces import random_layer
from tests.support.tiny_models import relative

sglang = pytest.importorskip("sglang", reason="SGLang is not installed")
tomllib = pytest.importorskip("tomllib")

from sglang.srt.layers.linear import ReplicatedLinear  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput  # noqa: E402
from sglang.srt.layers.moe.topk import StandardTopKOutput  # noqa: E402
from sglang.srt.layers.quantization import QUANTIZATION_METHODS  # noqa: E402
from sglang.srt.plugins import GENERAL_PLUGINS_GROUP  # noqa: E402

from marlin_convert.engines import (  # noqa: E402
    serving_config,
    serving_linear,
    sglang_config,
    sglang_loading,
    sglang_moe,
    sglang_plugin,
)
from marlin_convert.engines.serving_loading import fill  # noqa: E402
from marlin_convert.engines.tensor_parallel import Piece  # noqa: E402
from marlin_convert.formats.layout import EXTENDED_NAMES  # noqa: E402
from marlin_convert.formats.marlin_config import LayerSettings, marlin_ext_settings  # noqa: E402

# with the names that they take from SGLang
plugin: Any = sglang_plugin
loading: Any = sglang_loading
config_module: Any = sglang_config
experts_module: Any = sglang_moe

pytestmark = [pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
ORIGINAL = {"quant_method": "gptq", "checkpoint_format": "marlin", "is_marlin_format": True, "bits": 4,
            "group_size": 128, "sym": True, "desc_act": False}  # fmt: skip
GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "sym": True,
        "desc_act": False}  # fmt: skip


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang was started with."""
    given = SimpleNamespace(enable_deterministic_inference=False, enable_eplb=False)
    for module in (config_module, experts_module):
        monkeypatch.setattr(module, "get_server_args", lambda: given)
    monkeypatch.setattr(config_module, "missing_kernels", lambda: "")
    return given


def checkpoint(names: list[str]) -> tuple[Any, list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The settings of a checkpoint with 8-bit asymmetric layers [256, 128], its tensors, and W of each layer."""
    settings, tensors, weights = {}, [], {}
    for seed, name in enumerate(names):
        piece, W = random_layer(256, 128, seed=seed, bits=8, asym=True, group=64)
        assert isinstance(piece, Piece)
        settings[name] = LayerSettings(8, 64, False, False)
        weights[name] = W
        tensors += [
            (f"{name}.{ending}", getattr(piece, what))
            for what, ending in EXTENDED_NAMES.items()
            if getattr(piece, what) is not None
        ]
    config = plugin.MarlinCheckpointConfig.from_config(
        {**marlin_ext_settings(settings, lm_head=False), "packed_modules_mapping": {}, "hf_config": object()}
    )
    config.find_layers([name for name, _ in tensors], "here")
    return config, tensors, weights


class Model(nn.Module):
    """A model of linear layers that SGLang computes for itself, by their names."""

    def __init__(self, config: Any, names: list[str], bias: bool = False) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, ReplicatedLinear(256, 128, bias=bias, quant_config=config, prefix=name))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in parameters:  # SGLang's models pass over biases that they have no place for
                parameter: Any = parameters[name]
                parameter.weight_loader(parameter, tensor)


def filled(model: Model, config: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    fill(loading.ENGINE, model, config, model.load_weights, tensors)


def test_the_entry_point_is_the_one_that_sglang_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"][GENERAL_PLUGINS_GROUP]["marlin_convert"]
    assert pkgutil.resolve_name(entry) is plugin.register


def test_registered_before_all_that_might_claim_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(QUANTIZATION_METHODS)
    registered: list[str] = []
    monkeypatch.setattr(plugin.HookRegistry, "register", lambda target, *_: registered.append(target))
    try:
        plugin.register()
        plugin.register()
        assert [*QUANTIZATION_METHODS] == [serving_config.NAME, *before]
        assert len(registered) == 2
        for target in registered:
            assert callable(pkgutil.resolve_name(target))
    finally:
        QUANTIZATION_METHODS.clear()
        QUANTIZATION_METHODS.update(before)


def test_what_is_claimed() -> None:
    override = plugin.MarlinCheckpointConfig.override_quantization_method
    extended = marlin_ext_settings({"a": LayerSettings(8, 64, False, False)}, lm_head=False)
    for asked in (None, "gptq", "gptq_marlin", "marlin", "marlin_convert"):
        assert override(ORIGINAL, asked) == override(extended, asked) == "marlin_convert"
    assert override(ORIGINAL, "awq") is None
    assert override(GPTQ, None) is None


def test_a_layer_is_filled_and_computed() -> None:
    config, tensors, weights = checkpoint(["a", "b"])
    model = Model(config, ["a", "b"], bias=True)
    biases = [(f"{name}.bias", torch.randn(128)) for name in ("a", "b")]
    filled(model, config, tensors + biases)
    x = torch.randn(3, 256)
    for name, bias in zip(("a", "b"), (bias for _, bias in biases), strict=True):
        layer: Any = model.get_submodule(name)
        layer.quant_method.process_weights_after_loading(layer)
        assert not hasattr(layer, "weight")
        expected = x.double() @ weights[name].double()
        assert relative(layer(x)[0], expected + bias) < 1e-5
        other = torch.randn(128)  # as of a head that is given one
        assert relative(layer.quant_method.apply(layer, x, other), expected + other) < 1e-5


def test_a_bias_that_sglang_passes_over_is_an_error() -> None:
    config, tensors, _ = checkpoint(["a"])
    with pytest.raises(ValueError, match=r"a: it has a bias, and Model of SGLang .* takes none"):
        filled(Model(config, ["a"]), config, [*tensors, ("a.bias", torch.ones(128))])
    config, tensors, _ = checkpoint(["a"])
    filled(Model(config, ["a"]), config, [*tensors, ("a.bias", torch.zeros(128))])


def test_weights_that_have_not_come() -> None:
    config, tensors, _ = checkpoint(["a", "b"])
    model: Any = Model(config, ["a", "b"])
    with pytest.raises(ValueError, match="b: 128 of its 128 columns have not been loaded"):
        filled(model, config, [(name, tensor) for name, tensor in tensors if name.startswith("a.")])
    with pytest.raises(ValueError, match="b: its weights have not been loaded"):
        model.b.quant_method.process_weights_after_loading(model.b)


def test_weights_are_loaded_once() -> None:
    config, tensors, _ = checkpoint(["a"])
    model = Model(config, ["a"])
    filled(model, config, tensors)
    with pytest.raises(ValueError, match="Model: its weights can be loaded once only; start SGLang again"):
        loading._load_model(model, model.load_weights, tensors)


def test_partly_quantized() -> None:
    config, _, _ = checkpoint(["layers.0.q_proj", "layers.0.k_proj"])
    with pytest.raises(ValueError, match=r"layers.0.qkv_proj: SGLang computes it as one layer, and layers.0.v_proj of"):
        ReplicatedLinear(256, 384, quant_config=config, prefix="layers.0.qkv_proj")


def test_names_without_what_stands_before_layers() -> None:
    config, _, _ = checkpoint(["model.layers.0.o_proj"])
    built = ReplicatedLinear(256, 128, quant_config=config, prefix="layers.0.o_proj")
    assert isinstance(built.quant_method, plugin.MarlinCheckpointMethod)
    config, _, _ = checkpoint(["model.layers.0.o_proj", "tower.layers.0.o_proj"])
    assert config.stored_prefix("layers.0.o_proj") == "layers.0.o_proj"


def test_a_layer_that_sglang_takes_apart() -> None:
    config, _, _ = checkpoint(["layers.0.kv_b_proj"])
    with pytest.raises(
        ValueError, match=r"layers.0.kv_b_proj: this plugin does not run layers that SGLang takes apart"
    ):
        ReplicatedLinear(256, 128, quant_config=config, prefix="layers.0.kv_b_proj")


def test_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "missing_kernels", lambda: "they are not built")
    config, _, _ = checkpoint(["a"])
    with pytest.raises(ValueError, match=r"a: marlin-convert's kernels compute .* in SGLang, and they are not built"):
        ReplicatedLinear(256, 128, quant_config=config, prefix="a")


def test_fixed_bits_are_asked_of_the_operator(monkeypatch: pytest.MonkeyPatch, arguments: SimpleNamespace) -> None:
    arguments.enable_deterministic_inference = True
    config, tensors, _ = checkpoint(["a"])
    model: Any = Model(config, ["a"])
    filled(model, config, tensors)
    model.a.quant_method.process_weights_after_loading(model.a)
    asked: list[Any] = []

    def linear(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(rest[-1])
        return x

    ops = SimpleNamespace(marlin_convert=SimpleNamespace(linear=linear))
    monkeypatch.setattr(serving_linear, "torch", SimpleNamespace(ops=ops))
    model.a.quant_method.apply(model.a, torch.randn(2, 256))
    assert asked == [True]


def test_experts_that_are_moved_are_refused(arguments: SimpleNamespace) -> None:
    config, _, _ = checkpoint(["mlp.experts.0.up_proj"])
    arguments.enable_eplb = True
    with pytest.raises(ValueError, match=r"mlp.experts: this plugin does not run experts that --enable-eplb moves"):
        plugin.MarlinExpertsMethod(config, "mlp.experts")


def test_experts_with_biases_are_refused() -> None:
    config, _, _ = checkpoint(["mlp.experts.0.up_proj"])
    config.biases = {"mlp.experts.0.up_proj"}
    with pytest.raises(ValueError, match=r"does not run experts with biases \(mlp.experts.0.up_proj\) in SGLang"):
        plugin.MarlinExpertsMethod(config, "mlp.experts")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"activation": "gelu"}, "experts with the activation gelu"),
        ({"is_gated": False}, "experts without a gate"),
        ({"gemm1_clamp_limit": 7.0}, "experts with a limit on the gate"),
        ({"swiglu_limit": 7.0}, "experts with a limit on the gate"),
        ({"no_combine": True}, "experts whose results are not added up"),
    ],
)
def test_products_of_experts_that_are_refused(change: dict[str, Any], why: str) -> None:
    config, _, _ = checkpoint(["mlp.experts.0.up_proj"])
    method = plugin.MarlinExpertsMethod(config, "mlp.experts")
    plain = {"activation": "silu", "is_gated": True, "no_combine": False, "gemm1_alpha": None, "gemm1_beta": None,
             "gemm1_clamp_limit": None, "swiglu_limit": None}  # fmt: skip
    method.create_moe_runner(None, SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=f"mlp.experts: this plugin does not run {why} in SGLang"):
        method.create_moe_runner(None, SimpleNamespace(**{**plain, **change}))


@pytest.mark.parametrize("fixed", [False, True])
def test_what_a_product_is_asked_for(monkeypatch: pytest.MonkeyPatch, arguments: SimpleNamespace, fixed: bool) -> None:
    """Fixed bits where SGLang promises them; the result scaled as SGLang scales its own."""
    arguments.enable_deterministic_inference = fixed
    config, _, _ = checkpoint(["mlp.experts.0.up_proj"])
    method = plugin.MarlinExpertsMethod(config, "mlp.experts")
    method.count, asked = 1, []

    def product(layer: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(rest[-2:])
        return x

    monkeypatch.setattr(method, "our_product", product)
    x = torch.ones(2, 4)
    sent = StandardDispatchOutput(x, None, StandardTopKOutput(x, x, x))
    for factor, expected in ((None, x), (2.5, 2.5 * x)):
        method.settings = SimpleNamespace(apply_router_weight_on_input=True, routed_scaling_factor=factor)
        assert torch.equal(method.apply(None, sent).hidden_states, expected)
    assert asked == [(True, fixed)] * 2
