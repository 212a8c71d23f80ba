"""The module: what it computes on a CPU, what its state is, and what it survives."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import library as torch_library

import marlin_convert
from marlin_convert.engines import linear
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.errors import DeviceError
from marlin_convert.native import cuda
from marlin_convert.native import reference as twin
from tests.support.extended_layers import EXTENDED, extended
from tests.support.gptq_checkpoints import GPTQLayer


def original(**changes: Any) -> tuple[GPTQLayer, Any]:
    """A layer of known weights, and the module with its tensors."""
    layer = GPTQLayer(**{"K": 384, "N": 512, "bias": True, **changes})
    tensors = layer.tensors("x")
    state = {
        "B": twin.gptq_to_marlin(tensors["x.qweight"]), "s": twin.permute_scales(tensors["x.scales"]),
        "bias": layer.bias_tensor,
    }  # fmt: skip
    module = MarlinLinear(layer.K, layer.N, True, group_size=layer.group_size)
    module.load_state_dict(state)
    return layer, module


def exact(*shape: int) -> tuple[Any, torch.Tensor]:
    """A module and activations whose sums are whole numbers below 2048, over 256: exact in float16 and float32 alike,
    in whatever order a library adds them. What is compared bit for bit says nothing about that library then.
    """
    scales = np.exp2(np.random.default_rng(1).integers(-8, -6, (3, 512)))
    layer, module = original(scales=scales, bias=False)
    x = torch.randint(-1, 2, (*shape, 384), generator=torch.Generator().manual_seed(0))
    assert float((x.double() @ torch.from_numpy(layer.weight)).abs().max()) * 256 < 2048
    return module, x.half()


def expected(x: torch.Tensor, layer: GPTQLayer) -> torch.Tensor:
    """x · W + bias in float64, from the GPTQ definition."""
    return x.double() @ torch.from_numpy(layer.weight) + layer.bias_tensor.double()


def test_the_package_offers_it_late() -> None:
    assert marlin_convert.MarlinLinear is MarlinLinear
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = marlin_convert.no_such_name


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 3e-4)])
@pytest.mark.parametrize("shape", [(384,), (3, 384), (2, 5, 384), (0, 384)])
def test_product(group_size: int, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    layer, module = original(group_size=group_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = module(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 512), dtype)
    if y.numel():
        reference = expected(x, layer)
        assert float((y.double() - reference).norm() / reference.norm()) <= tolerance


def test_the_weight_that_other_code_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a plain linear layer; what only asks for its kind does not have it dequantized."""
    layer, module = original()
    module.to(torch.bfloat16).half()
    dense = torch.from_numpy(layer.weight).to(torch.float16)
    assert torch.equal(module.weight + 0, dense.t())
    assert torch.equal(module.weight.t() @ torch.eye(512).half(), dense)
    module.weight.zero_()  # nothing can be written into it
    assert torch.equal(module.weight.clone(), dense.t())
    assert not [name for name in module.state_dict() if "weight" in name]
    assert list(module.parameters()) == []
    module.weight_by_rows = True
    assert torch.equal(module.weight * 1, dense)
    monkeypatch.setattr(MarlinLinear, "dequantize", None)
    weight = module.to(torch.bfloat16).weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type) == ((384, 512), torch.bfloat16, "cpu")
    assert "384, 512" in repr(weight)
    assert (MarlinLinear(128, 64, device="meta").weight * 2).shape == (64, 128)


def test_wide_layers_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = exact(3)
    whole = module(x)
    monkeypatch.setattr(linear, "BLOCK_COLUMNS", 192)
    assert torch.equal(module(x), whole)


def test_state_is_the_checkpoints_tensors() -> None:
    _, module = original()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()} == {
        "B": (torch.int32, (24, 1024)),
        "s": (torch.float16, (3, 512)),
        "bias": (torch.float32, (512,)),
    }
    assert list(module.parameters()) == []  # nothing to train
    assert MarlinLinear(384, 512).state_dict().keys() == {"B", "s"}


def test_extended_state() -> None:
    """Names, types and shapes as docs/concepts/format.md has them: K' = 1024, N' = 640 for K = 1000, N = 576."""
    module = MarlinLinear(
        1000, 576, True, bits=8, group_size=32, sym=False, desc_act=True, extended=True,
        scale_dtype=torch.bfloat16, dtype=torch.bfloat16,
    )  # fmt: skip
    assert {name: (t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()} == {
        "marlin_qweight": (torch.int32, (64, 576 * 4)),
        "marlin_scales": (torch.bfloat16, (32, 576)),
        "marlin_qzeros": (torch.int32, (32, 144)),
        "marlin_perm": (torch.int32, (1000,)),
        "bias": (torch.bfloat16, (576,)),
    }
    narrow = MarlinLinear(100, 70, group_size=-1, extended=True).state_dict()
    assert [tuple(t.shape) for t in narrow.values()] == [(8, 256), (1, 128)]


def test_casting_leaves_the_scales_alone() -> None:
    layer, module = original()
    s = module.s.clone()
    for cast in (module.bfloat16, module.float, module.half, module.double):
        cast()
        assert module.s.dtype == torch.float16
        assert torch.equal(module.s, s)
    assert module.bias.dtype == torch.float64  # as any module's bias
    nested = torch.nn.Sequential(module).to(torch.bfloat16)
    assert (nested[0].s.dtype, nested[0].bias.dtype) == (torch.float16, torch.bfloat16)
    x = torch.randn(2, 384).bfloat16()
    reference = expected(x, layer)
    assert float((nested(x).double() - reference).norm() / reference.norm()) <= 8e-3


def test_scales_of_another_dtype_are_not_loaded() -> None:
    module = MarlinLinear(128, 256, group_size=-1)
    state = {**module.state_dict(), "s": torch.ones(1, 256, dtype=torch.bfloat16)}
    with pytest.raises(RuntimeError, match=re.escape("s is torch.bfloat16; this layer was made for torch.float16")):
        module.load_state_dict(state)


def test_repr_and_copies() -> None:
    assert repr(MarlinLinear(4096, 14336)) == "MarlinLinear(K=4096, N=14336, group=128, bits=4)"
    odd = MarlinLinear(100, 70, True, bits=8, group_size=16, sym=False, desc_act=True, extended=True)
    assert repr(odd) == "MarlinLinear(K=100, N=70, group=16, bits=8, asymmetric, act-order, bias)"
    module, x = exact(2)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    meta = MarlinLinear(256, 256, device="meta")
    assert meta.to_empty(device="cpu").s.dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits is 3; Marlin has 4 and 8"),
        ({"group_size": 96, "extended": True}, "group_size is 96; it should be 16, 32, 64, 128 or -1"),
        ({"scale_dtype": torch.float32}, "scale_dtype is torch.float32"),
        ({"bits": 8}, "the original format holds 4-bit symmetric layers"),
        ({"desc_act": True}, "give extended=True"),
        ({"sym": False}, "give extended=True"),
        ({"group_size": 64}, "give extended=True"),
        ({"in_features": 192}, "K a multiple of 128"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MarlinLinear(**{"in_features": 256, "out_features": 256, **settings})


def test_it_says_once_that_the_reference_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    _, module = original()
    linear._warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            module(torch.zeros(1, 384, dtype=torch.float16))
    assert len(caplog.records) == 1
    assert "exact, and slow" in caplog.text


@pytest.mark.slow
def test_compiled_and_as_an_operator() -> None:
    """One operator, no graph break; the same product as the eager call."""
    module, x = exact(4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (1, 4):
        assert torch.equal(compiled(x[:rows]), module(x[:rows]))
    _, module = original()
    arguments = (x, module.B, module.s, module.bias.half(), None, None, 4, 384, 512)
    torch_library.opcheck(torch.ops.marlin_convert.linear.default, arguments)


def test_batch_invariant_rows_are_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the GPU too: each row by itself; also compiled, and when the environment asks for it."""
    module, x = exact(5)
    alone = torch.cat([module(x[i : i + 1]) for i in range(5)])
    rows: list[int] = []
    plain = torch.nn.functional.linear

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    module.batch_invariant = True
    assert torch.equal(module(x), alone)
    assert torch.equal(module(x.view(1, 5, -1)), alone.view(1, 5, -1))
    assert module(x[:0]).shape == (0, alone.shape[1])
    assert set(rows) == {1}
    module.batch_invariant = None
    monkeypatch.setattr(cuda, "INVARIANT", True)
    assert torch.equal(module(x), alone)
    assert set(rows) == {1}
    module.batch_invariant = False
    assert torch.equal(module(x), alone)  # whole numbers: exact in any order
    assert 5 in rows
    arguments = (x, module.B, module.s, None, None, None, 4, 384, 512, True)
    torch_library.opcheck(torch.ops.marlin_convert.linear.default, arguments)


def test_no_gradient_rather_than_a_wrong_one() -> None:
    module, x = exact(2)
    y = module(x.float().requires_grad_())
    assert torch.equal(y, module(x.float()))
    with pytest.raises(NotImplementedError, match="MarlinLinear is for inference"):
        y.sum().backward()


def test_a_gpu_that_does_not_suit_is_refused_when_the_layer_moves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first token. The "GPU" is a fake tensor's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked: list[int] = []

    def device_info(index: int) -> None:
        asked.append(index)
        raise DeviceError(f"cuda:{index} (an old GPU) has compute capability 7.5; Marlin needs 8.0 or newer.")

    monkeypatch.setattr(cuda, "device_info", device_info)
    with FakeTensorMode(), pytest.raises(DeviceError, match="an old GPU"):
        MarlinLinear(256, 256).to("cuda:1")
    assert asked == [1]


def test_the_reference_agrees_with_the_twin() -> None:
    """The native dequantization and the twin's, through the module: the same weights, bit for bit."""
    layer, module = original(bias=False)
    W = module(torch.eye(384).half()) - module.bias.half()
    np.testing.assert_allclose(W.double().numpy(), layer.weight, atol=2e-3)
    assert torch.equal(
        linear._weight(module.B, module.s, None, 4, torch.float16), twin.dequantize_marlin(module.B, module.s)
    )


@pytest.mark.parametrize(("K", "N"), [(576, 576), (576, 1536), (256, 72), (200, 96), (256, 576)])
def test_kernels_are_told_the_size_of_a_padded_layer(K: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the extended format K is padded to 128 and N to 64: either alone is enough. The "GPU" is a fake tensor's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    told: list[tuple[int, int]] = []

    def matmul(x: torch.Tensor, B: torch.Tensor, s: torch.Tensor, *_: Any, **sizes: Any) -> torch.Tensor:
        told.append((sizes.get("in_features", B.shape[0] * 16), sizes.get("out_features", s.shape[1])))
        return x.new_empty(*x.shape[:-1], N)

    monkeypatch.setattr(cuda, "matmul", matmul)
    with FakeTensorMode():
        layer = MarlinLinear(K, N, group_size=64, extended=True, device="cuda")
        layer(torch.empty(3, K, dtype=torch.float16, device="cuda"))
    assert told == [(K, N)]


# ---- The extended format ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", EXTENDED)
def test_extended_product(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of layer, in whole and in blocks of columns, against float64."""
    module, W = extended(GPTQLayer(**{"K": 384, "N": 256, **EXTENDED[kind]}))
    x = torch.randn(3, W.shape[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = x.double() @ W
    for columns in (1024, 64):
        monkeypatch.setattr(linear, "BLOCK_COLUMNS", columns)
        y = module(x)
        assert (y.shape, y.dtype) == (reference.shape, dtype)
        error = float((y.double() - reference).norm() / reference.norm())
        assert error <= {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    assert torch.equal(module.dequantize(torch.float32).double(), W)


@pytest.mark.parametrize("kind", ["act-order", "padded and everything"])
def test_act_order_adds_in_the_sources_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums depend on the order of their terms: the library that adds gets the operands of the plain linear layer."""
    module, W = extended(GPTQLayer(**{"K": 384, "N": 256, **EXTENDED[kind]}))
    assert not torch.equal(module.marlin_perm, torch.arange(len(W)))  # the stored order is another one
    x = torch.randn(32, W.shape[0], generator=torch.Generator().manual_seed(0)).to(module.scale_dtype)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = torch.nn.functional.linear

    def recording(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        given.append((x, weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", recording)
    module(x)
    ((activations, weight),) = given
    assert torch.equal(activations, x)
    assert weight.is_contiguous()
    assert torch.equal(weight, W.to(x.dtype).t())
