"""Whole models on a GPU: the module eager, compiled and in a CUDA graph; Transformers; and the proof on the demo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import library as torch_library
from transformers import AutoModelForCausalLM, AutoTokenizer

import marlin_convert
from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.convert import convert
from marlin_convert.engines.generate import Sampling, compare, generate
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.native import cuda
from marlin_convert.options import Options
from tests.support.extended_layers import EXTENDED, extended
from tests.support.gptq_checkpoints import GPTQLayer
from tests.support.tiny_models import (
    BLOCKS,
    PROMPT,
    SAMPLE,
    dequantized_demo,
    llama,
    make,
    mixtral,
    perplexity,
    qwen3_moe,
    relative,
    tokens,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


# ---- The module ----


def plain(K: int = 512, N: int = 768, group_size: int = 128) -> tuple[Any, torch.Tensor]:
    """A layer of the original format on the GPU, with a bias, and its weight in float64."""
    from marlin_convert.native import reference as twin

    layer = GPTQLayer(K=K, N=N, group_size=group_size, bias=True)
    tensors = layer.tensors("x")
    module = MarlinLinear(K, N, True, group_size=group_size)
    module.load_state_dict({
        "B": twin.gptq_to_marlin(tensors["x.qweight"]), "s": twin.permute_scales(tensors["x.scales"]),
        "bias": layer.bias_tensor,
    })  # fmt: skip
    return module.cuda(), torch.from_numpy(layer.weight).cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (300,), (0,)])
def test_module(rows: tuple[int, ...], group_size: int, dtype: torch.dtype) -> None:
    module, W = plain(group_size=group_size)
    module.to(dtype)
    assert module.s.dtype == torch.float16
    assert (module.s.device.type, module.bias.dtype) == ("cuda", dtype)
    x = torch.randn(*rows, 512, device="cuda").to(dtype)
    y = module(x)
    assert (y.shape, y.dtype) == ((*rows, 768), dtype)
    if y.numel():
        assert relative(y, x.double() @ W + module.bias.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", EXTENDED)
def test_module_in_the_extended_format(kind: str, dtype: torch.dtype) -> None:
    module, W = extended(GPTQLayer(**{"K": 384, "N": 256, **EXTENDED[kind]}))
    module, W = module.cuda().to(dtype), W.cuda()
    assert module.marlin_scales.dtype == EXTENDED[kind].get("scale_dtype", torch.float16)
    for rows in (1, 7, 64, 300):
        x = torch.randn(rows, W.shape[0], device="cuda").to(dtype)
        assert relative(module(x), x.double() @ W) <= TOLERANCE[dtype]
    assert relative(module.dequantize(dtype), W) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [None, "padded and everything"])
def test_compiled_and_captured(kind: str | None) -> None:
    """No graph break, the same bits; and in a CUDA graph with new inputs."""
    if kind is None:
        module, _ = plain()
        module.half()
    else:
        module = extended(GPTQLayer(**{"K": 384, "N": 256, **EXTENDED[kind]}))[0].cuda()
    K = module.in_features
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 4, 9):
            x = torch.randn(rows, K, device="cuda").half()
            assert torch.equal(compiled(x), module(x))
        x = torch.randn(4, K, device="cuda").half()
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for seed in range(3):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, module(x))


def test_operator() -> None:
    module, _ = plain()
    x, bias = torch.randn(3, 512, device="cuda").half(), module.bias.half()
    arguments = (x, module.B, module.s, bias, None, None, 4, 512, 768)
    torch_library.opcheck(torch.ops.marlin_convert.linear.default, arguments)
    assert torch.equal(torch.ops.marlin_convert.linear(*arguments), module.half()(x))


def test_state_after_a_round_trip_to_the_gpu() -> None:
    module, _ = plain()
    back = copy.deepcopy(module).to(torch.bfloat16).cpu()
    assert torch.equal(back.B, module.B.cpu())
    assert torch.equal(back.s, module.s.cpu())
    assert module.state_dict().keys() == {"B", "s", "bias"}


# ---- Transformers ----

#: Kinds of checkpoint: (model, settings of its quantized layers).
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "group 128": (llama, {}),
    "per channel": (llama, {"group_size": -1}),
    "biases": (lambda: llama(attention_bias=True), {}),
    "mixtral": (mixtral, {}),
    "qwen3-moe": (qwen3_moe, {}),
}


def same_logits(model: Any, reference: Any, tolerance: float) -> None:
    ids = tokens(model.config.vocab_size).cuda()
    with torch.no_grad():
        assert relative(model(ids).logits, reference(ids).logits) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_small_models(kind: str, tmp_path: Path) -> None:
    config, layer = KINDS[kind]
    pair = make(tmp_path, config(), **layer)
    # With bf16's noise, a router near a tie sends a token to another expert: that is no error of the layers.
    experts = hasattr(config(), "num_experts_per_tok")
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2))[: 1 if experts else 2]:
        model = marlin_convert.load(pair.out, device="cuda:0", dtype=dtype)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        same_logits(model, pair.reference(dtype).cuda(), tolerance)


#: The same in the extended format, written by the tests themselves.
EXTENDED_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups of 32": (BLOCKS, {"group_size": 32}),
    "8 bits": (BLOCKS, {"bits": 8}),
    "one group, 8 bits": (BLOCKS, {"bits": 8, "group_size": -1}),
    "bf16 scales": (BLOCKS, {"scale_dtype": torch.bfloat16}),
    "asymmetric": (r"(gate|up)_proj$", {"group_size": -1, "stored_zero": np.arange(512)[None] % 15}),
    "act-order": (r"(q|k|v|o|gate|up)_proj$", {"g_idx": np.random.default_rng(5).permutation(np.arange(256) // 128)}),
}


@pytest.mark.parametrize("kind", EXTENDED_KINDS)
def test_logits_of_the_extended_format(kind: str, tmp_path: Path) -> None:
    which, layer = EXTENDED_KINDS[kind]
    pair = make(tmp_path, llama(attention_bias=True), which, by_hand=True, **layer)
    model = marlin_convert.load(pair.out, device="cuda:0", dtype=torch.float16)
    same_logits(model, pair.reference().cuda(), 2e-3)


def test_logits_of_a_padded_model(tmp_path: Path) -> None:
    config = llama(hidden_size=200, intermediate_size=328, head_dim=40)
    pair = make(tmp_path, config, by_hand=True, group_size=-1)
    same_logits(marlin_convert.load(pair.out, device="cuda:0"), pair.reference().cuda(), 2e-3)


def test_from_pretrained_then_moved(tmp_path: Path) -> None:
    pair = make(tmp_path, llama())
    model: Any = AutoModelForCausalLM.from_pretrained(pair.out)
    model.to("cuda")
    same_logits(model, pair.reference().cuda(), 2e-3)
    with torch.no_grad():
        ids = tokens(512).cuda()
        compiled = torch.compile(model, fullgraph=True)
        assert relative(compiled(ids).logits, pair.reference().cuda()(ids).logits) <= 4e-3


# ---- Proof, on the demo's model ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """(the converted checkpoint, its model, the model with dequantized weights, the tokenizer)"""
    folder = tmp_path_factory.mktemp("demo")
    convert(DEMO_FOLDER, folder / "out", Options(device="cpu"))
    reference: Any = AutoModelForCausalLM.from_pretrained(dequantized_demo(folder / "dense"), dtype=torch.float16)
    reference.cuda()
    model = marlin_convert.load(folder / "out", device="cuda:0")
    return folder / "out", model, reference, AutoTokenizer.from_pretrained(folder / "out")


def test_demo_logits(demo: tuple[Path, Any, Any, Any]) -> None:
    _, model, reference, tokenizer = demo
    ids = tokenizer(SAMPLE.read_text()[:1500], return_tensors="pt")["input_ids"][:, :256].cuda()
    with torch.no_grad():
        assert relative(model(ids).logits, reference(ids).logits) <= 2e-3


def test_demo_perplexity(demo: tuple[Path, Any, Any, Any]) -> None:
    _, model, reference, tokenizer = demo
    text = SAMPLE.read_text()
    measured, wanted = perplexity(model, tokenizer, text), perplexity(reference, tokenizer, text)
    assert 5 < wanted < 50
    assert f"{measured:.3g}" == f"{wanted:.3g}"


def test_demo_continuation(demo: tuple[Path, Any, Any, Any]) -> None:
    out, model, reference, tokenizer = demo
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to("cuda")
    texts = [m.generate(**inputs, max_new_tokens=64, do_sample=False)[0] for m in (model, reference)]
    assert torch.equal(*texts)
    done = generate(out, PROMPT, Sampling(max_new_tokens=64), "cuda:0")
    assert done.device == "cuda:0"
    assert done.text == tokenizer.decode(texts[1][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert compare(DEMO_FOLDER, out, PROMPT, 32, "cuda:0").equal
