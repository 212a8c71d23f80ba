"""What the plugins for vLLM and SGLang have in common, in a small engine of the test: filled, adopted, refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from marlin_convert.engines.serving_config import ServedCheckpoint
from marlin_convert.engines.serving_linear import ServedLinear
from marlin_convert.engines.serving_loading import Engine, fill, methods
from marlin_convert.formats.layout import EXTENDED_NAMES
from marlin_convert.formats.marlin_config import LayerSettings, marlin_ext_settings
from tests.support.pieces import random_layer
from tests.support.tiny_models import relative


class Config(ServedCheckpoint):
    packed_modules_mapping = {"qk": ["q", "k"]}  # noqa: RUF012 - as engines have it


class Method(ServedLinear):
    ENGINE = "Engine"

    def rank(self, layer: Any) -> int:
        return int(layer.rank)

    def invariant(self) -> bool:
        return False


class Linear(nn.Module):
    """A linear layer [256, N] of the engine: `ranks` share out its rows, or it is built for a plain weight."""

    def __init__(self, N: int = 128, config: Any = None, name: str = "", rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.input_size, self.output_size, self.rank = 256, N, rank
        self.input_size_per_partition = 256 // ranks
        self.quant_method: Any = None
        self.bias: Any = None
        if config is None:
            plain: Any = nn.Parameter(torch.empty(N, 256), requires_grad=False)
            plain.weight_loader = self.weight_loader
            self.register_parameter("weight", plain)
        else:
            self.quant_method = Method(config, name)
            self.quant_method.create_weights(self, 256 // ranks, [N], 256, N, torch.float16)

    def weight_loader(self, param: Any, loaded: torch.Tensor, first: int = 0) -> None:
        param.data[first : first + len(loaded)].copy_(loaded)


class Model(nn.Module):
    """Layers by their names; a name with a place in another, in `parts`, is loaded there."""

    def __init__(self, layers: dict[str, Linear], parts: dict[str, tuple[str, int]] | None = None) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.parts = parts or {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            of, dot, what = name.rpartition(".")
            target, first = self.parts.get(of, (of, 0))
            parameter: Any = parameters.get(f"{target}{dot}{what}")
            if parameter is not None:
                parameter.weight_loader(parameter, tensor, first)


def never(*_: Any) -> None:
    raise AssertionError


ENGINE = Engine("Engine", "Engine 1", Linear, nn.Bilinear, nn.Bilinear, Method, nn.Bilinear, never, logging.getLogger())


def checkpoint(*names: str) -> tuple[Config, list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Settings, tensors and W of act-order layers [256, 128] with zero points."""
    settings, tensors, weights = {}, [], {}
    for seed, name in enumerate(names):
        piece, weights[name] = random_layer(256, 128, seed=seed, asym=True, order=True, group=64)
        settings[name] = LayerSettings(4, 64, False, True)
        parts = {ending: getattr(piece, what) for what, ending in EXTENDED_NAMES.items()}
        tensors += [(f"{name}.{ending}", tensor) for ending, tensor in parts.items() if tensor is not None]
    config = Config(marlin_ext_settings(settings, lm_head=False))
    config.find_layers([name for name, _ in tensors], "here")
    return config, tensors, weights


def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    result: torch.Tensor = layer.quant_method.apply(layer, x)
    return result.double()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_rows(rank: int) -> None:
    config, tensors, weights = checkpoint("a")
    model = Model({"a": Linear(config=config, name="a", rank=rank, ranks=2)})
    fill(ENGINE, model, config, model.load_weights, tensors)
    x = torch.randn(3, 128)
    expected = x.double() @ weights["a"][128 * rank : 128 * (rank + 1)]
    assert relative(product(model.a, x), expected) < 1e-5


def test_parts_of_a_layer_and_one_that_was_built_plain() -> None:
    config, tensors, weights = checkpoint("q", "k", "a")
    assert config.quantized_parts("qk", "Engine") == ["q", "k"]
    model: Any = Model(
        {"qk": Linear(256, config, "qk"), "a": Linear(), "b": Linear()}, {"q": ("qk", 0), "k": ("qk", 128)}
    )
    plain = torch.randn(128, 256)
    fill(ENGINE, model, config, model.load_weights, [*tensors, ("b.weight", plain)])
    assert [method.sources for _, method in methods(model, ENGINE)] == [{"q", "k"}, {"a"}]
    assert torch.equal(model.b.weight, plain)
    x = torch.randn(3, 256)
    both = torch.cat([weights["q"], weights["k"]], 1)
    assert relative(product(model.qk, x), x.double() @ both) < 1e-5
    assert relative(product(model.a, x), x.double() @ weights["a"]) < 1e-5
    with pytest.raises(ValueError, match="q: its weights can be loaded once only; start Engine again"):
        Method(config, "q")._arriving.asked(torch.zeros(1))


def test_a_part_that_is_not_quantized() -> None:
    config, _, _ = checkpoint("q")
    with pytest.raises(ValueError, match="qk: Engine computes it as one layer, and k of it is not quantized"):
        config.quantized_parts("qk", "Engine")
    assert config.quantized_parts("other", "Engine") == []


def test_a_bias_that_the_model_passes_over() -> None:
    for bias, lost in ((torch.zeros(128), False), (torch.eye(1, 128)[0], True)):
        config, tensors, _ = checkpoint("a")
        model = Model({"a": Linear(config=config, name="a")})
        if lost:
            with pytest.raises(ValueError, match="a: it has a bias, and Model of Engine 1 takes none"):
                fill(ENGINE, model, config, model.load_weights, [*tensors, ("a.bias", bias)])
        else:
            fill(ENGINE, model, config, model.load_weights, [*tensors, ("a.bias", bias)])


def test_what_does_not_come() -> None:
    config, tensors, _ = checkpoint("a", "b")
    model = Model({"a": Linear(config=config, name="a"), "b": Linear(config=config, name="b")})
    with pytest.raises(ValueError, match="b: 128 of its 128 columns have not been loaded"):
        fill(ENGINE, model, config, model.load_weights, [x for x in tensors if x[0].startswith("a.")])
    config, tensors, _ = checkpoint("a", "b")
    model = Model({"a": Linear(config=config, name="a"), "c": Linear()})
    with pytest.raises(ValueError, match=r"leaves out 1 quantized layers .* \(b\), and 1 layers .* \(c.weight\)"):
        fill(ENGINE, model, config, model.load_weights, tensors)


def test_a_checkpoint_without_its_tensors() -> None:
    config, _, _ = checkpoint("a")
    with pytest.raises(ValueError, match=r"there: the settings say marlin_ext, and no tensor ends in .marlin_qweight"):
        config.find_layers(["a.weight"], "there")
