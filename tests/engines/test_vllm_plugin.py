"""The vLLM plugin with vLLM's own classes, on a CPU: loading, tensor parallelism with patched ranks, refusals.

The product itself needs a GPU; here a reference stands in its place, which decodes what the kernel would be given.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engines.test_tensor_parallel import layer as random_layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config.utils import hash_factors  # noqa: E402

from marlin_convert.engines import vllm_calls, vllm_choice, vllm_plugin  # noqa: E402
from marlin_convert.engines.column_marks import Arriving  # noqa: E402
from marlin_convert.engines.tensor_parallel import Piece  # noqa: E402
from marlin_convert.errors import DeviceError  # noqa: E402
from marlin_convert.formats.layout import EXTENDED_NAMES, ORIGINAL_NAMES  # noqa: E402
from marlin_convert.formats.marlin_config import marlin_ext_settings  # noqa: E402
from marlin_convert.native import reference as twin  # noqa: E402

# with the names that they take from vLLM
plugin: Any = vllm_plugin
calls: Any = vllm_calls
choice: Any = vllm_choice

pytestmark = [pytest.mark.filterwarnings("ignore")]

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


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
    from marlin_convert.formats.marlin_config import LayerSettings

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
    expected = x.double() @ W + (0 if bias is None else bias.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert y.shape == expected.shape
    assert error < close, error


QKV = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
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


@pytest.mark.parametrize(
    ("kernel", "missing", "capability", "ours", "why"),
    [
        ("auto", "", (9, 0), True, "the faster one on compute capability 9.0"),
        ("", "", (9, 0), True, "the faster one on compute capability 9.0"),
        ("auto", "", (8, 0), False, "ours has not been measured to be faster on compute capability 8.0"),
        ("auto", "", (12, 0), False, "ours has not been measured to be faster on compute capability 12.0"),
        ("auto", "not built.", (9, 0), False, "not built"),
        ("vllm", "", (9, 0), False, "MARLIN_CONVERT_VLLM_KERNEL=vllm"),
        ("Ours", "", (8, 0), True, "MARLIN_CONVERT_VLLM_KERNEL=ours"),
    ],
)
def test_which_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str, missing: str, capability: tuple[int, int], ours: bool, why: str
) -> None:
    choose(monkeypatch, kernel, missing, capability)
    assert choice.kernel()[:2] == (ours, why)


@pytest.mark.parametrize(
    ("kernel", "missing", "message"),
    [
        ("ours", "not built.", "MARLIN_CONVERT_VLLM_KERNEL=ours: not built"),
        ("marlin", "", "MARLIN_CONVERT_VLLM_KERNEL is 'marlin'; it should be one of auto, ours, vllm"),
    ],
)
def test_kernels_that_cannot_be(monkeypatch: pytest.MonkeyPatch, kernel: str, missing: str, message: str) -> None:
    choose(monkeypatch, kernel, missing)
    with pytest.raises(ValueError, match=message):
        choice.kernel()


def test_one_line_says_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a logger that vLLM shows."""
    choose(monkeypatch, "auto")
    lines = []
    monkeypatch.setattr(choice.logger, "info", lambda message, *arguments: lines.append(message % arguments))
    choice.say.cache_clear()
    for name in ("a", "b"):
        plugin.MarlinCheckpointMethod(config_of({}, False), name)
    why = "the faster one on compute capability 9.0"
    assert lines == [f"Quantized layers of this Marlin checkpoint are computed by marlin-convert's kernels: {why}"]
    assert choice.logger.name.startswith("vllm.")


def test_compiled_graphs_are_keyed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM itself takes for the key of its cache."""
    keys = []
    for kernel in ("ours", "vllm", "ours"):
        choose(monkeypatch, kernel)
        keys.append(hash_factors(vllm.envs.compile_factors()))
    assert keys[0] == keys[2] != keys[1]


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


def test_batch_invariance_is_refused_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "vllm")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(
        ValueError, match=r"^x: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the number"
    ):
        plugin.MarlinCheckpointMethod(config_of({}, False), "x")


@pytest.mark.parametrize("asked", ["1", "0"])
def test_our_kernels_are_batch_invariant_when_vllm_promises_it(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    choose(monkeypatch, "ours")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", asked)
    pieces: dict[str, Any] = {"a": (*random_layer(256, 64), {})}
    linear = Linear(0)
    method = load(config_of(pieces, False), ["a"], pieces, linear, (256, [64], 256, 64), [None], False)
    passed: list[bool | None] = []

    def product(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append(rest[8])
        return x.new_zeros(*x.shape[:-1], rest[7])

    monkeypatch.setattr(torch.ops.marlin_convert, "linear", product)
    method.apply(linear, torch.randn(3, 256).half())
    assert passed == [True if asked == "1" else None]


def test_what_the_kernel_lacks_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"group": 16}, "no groups of 16"), ({"bits": 8, "asym": True}, "no 8-bit codes with zero")
    ]  # fmt: skip
    for kind, message in cases:
        pieces = {"a": (*random_layer(256, 64, **kind), kind)}
        with pytest.raises(ValueError, match=f"a: vLLM's Marlin kernel has {message}"):
            plugin.MarlinCheckpointMethod(config_of(pieces, True), "a", ["a"])


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
        parallel = SimpleNamespace(use_all2all_kernels=settings.pop("all2all", False))
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
