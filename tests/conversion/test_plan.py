"""What becomes of every tensor. The tensors decide, and not what the config says about them; each variation that is
met in the wild is here, and must be converted rightly or refused by name.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.names import span
from marlin_convert.conversion.plan import Plan, make_plan, plan_as_dict
from marlin_convert.engine_support import vllm_needs_our_kernels, vllm_refuses
from marlin_convert.errors import MarlinConvertError, SourceError, UnsupportedError
from tests.support.gptq_checkpoints import (
    GPTQLayer,
    Source,
    pack_columns,
    quantization_config,
    shuffled,
    two_layers,
    write_source,
)

NO_QUANTIZATION: dict[str, Any] = {}


def plan_of(folder: Path) -> Plan:
    with Checkpoint(folder) as checkpoint:
        return make_plan(checkpoint, "marlin")


def planned(
    tmp_path: Path,
    layers: dict[str, GPTQLayer] | GPTQLayer | None = None,
    plain: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Plan:
    """The plan for a checkpoint of these layers; `config` changes its quantization config (None removes a key)."""
    layers = {"layer": layers} if isinstance(layers, GPTQLayer) else layers
    write_source(tmp_path / "m", layers, plain or {}, quantization=quantization_config(**config))
    return plan_of(tmp_path / "m")


def assert_converts(plan: Plan, *names: str, notes: str | None = None) -> None:
    """All of `names` (default: one layer named "layer") are converted; one note contains `notes`, or there is none."""
    assert plan.refusals == {}
    assert [x.name for x in plan.layers] == list(names or ["layer"])
    plan.require_convertible()
    if notes is None:
        assert plan.notes == {}
    else:
        assert len(plan.notes) == 1, plan.notes
        assert notes in next(iter(plan.notes))


def assert_refused(plan: Plan, *reasons: str, name: str = "layer") -> None:
    """Layer `name` is refused for exactly these reasons (a part of each), and not converted."""
    found = [reason for reason, names in plan.refusals.items() if name in names]
    assert len(found) == len(reasons), found
    for reason, part in zip(found, reasons, strict=True):
        assert part in reason
    assert name not in [x.name for x in plan.layers]
    with pytest.raises(UnsupportedError) as caught:
        plan.require_convertible()
    assert all(part in caught.value.message for part in reasons)


def error_of(make: Callable[[], object], kind: type[MarlinConvertError]) -> str:
    with pytest.raises(kind) as caught:
        make()
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---- What it converts ----


def test_plain(tmp_path: Path) -> None:
    plan = planned(tmp_path, GPTQLayer(K=384, N=512, bias=True))
    assert_converts(plan)
    (layer,) = plan.layers
    assert (layer.K, layer.N, layer.G, layer.bits, layer.group_size, layer.rows_per_group) == (384, 512, 3, 4, 128, 128)
    assert (layer.B.name, layer.B.dtype, layer.B.shape, layer.B.nbytes) == (
        "layer.B",
        "I32",
        (24, 1024),
        384 * 512 // 2,
    )
    assert (layer.s.name, layer.s.dtype, layer.s.shape, layer.s.nbytes) == ("layer.s", "F16", (3, 512), 3 * 512 * 2)
    assert [t.name for t in plan.copies] == ["layer.bias"]
    assert sorted(t.name for t in plan.dropped) == ["layer.g_idx", "layer.qzeros"]
    assert plan.group_size == 128


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_dtypes(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    plan = planned(tmp_path, GPTQLayer(scale_dtype=scale_dtype))
    assert_converts(plan)
    assert plan.layers[0].s.dtype == "F16"


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_scale_dtypes(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    assert_refused(planned(tmp_path, GPTQLayer(scale_dtype=scale_dtype)), "scales are F")


def test_out_tensors_are_in_the_order_of_the_source_and_complete(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", two_layers(bias=True), shards=3)
    plan = plan_of(source.folder)
    weight_map = json.loads((source.folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [t.name for t in plan.out_tensors]
    expected = {f"{n}.{part}" for n in source.layers for part in ("B", "s", "bias")} | source.plain.keys()
    assert set(names) == expected
    assert len(names) == len(expected)
    for layer in source.layers:
        assert names.index(f"{layer}.s") == names.index(f"{layer}.B") + 1
    files = [weight_map.get(n) or weight_map[n[:-1].rstrip(".") + ".qweight"] for n in names if not n.endswith(".s")]
    assert files == sorted(files)
    for tensor in plan.out_tensors:
        if tensor.name in source.plain:
            assert tensor.nbytes == source.plain[tensor.name].nbytes
            assert tensor.shape == tuple(source.plain[tensor.name].shape)


def test_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", two_layers(bias=True, scale_dtype=torch.float32))
    plan = plan_of(source.folder)
    tensors = load_file(source.folder / "model.safetensors")
    assert plan.bytes_in == sum(t.nbytes for t in tensors.values())
    layers = sum(x.K * x.N // 2 + x.G * x.N * 2 + x.N * 2 for x in source.layers.values())
    assert plan.bytes_out == layers + sum(t.nbytes for t in source.plain.values())


def test_bytes_in_count_refused_layers_too(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", {"a": GPTQLayer(), "b": GPTQLayer(g_idx=shuffled(256))}, {})
    tensors = load_file(source.folder / "model.safetensors")
    assert plan_of(source.folder).bytes_in == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("head", ["lm_head", "model.lm_head", None])
def test_quantized_head(tmp_path: Path, head: str | None) -> None:
    layers = {"model.layers.0.q_proj": GPTQLayer()} | ({head: GPTQLayer()} if head else {})
    assert planned(tmp_path, layers, {"x.not_lm_head": torch.ones(1)}).lm_head is (head is not None)


def test_experts_and_what_is_not_quantized(tmp_path: Path) -> None:
    """What has a qweight is quantized, and nothing else, whatever the config says of modules and heads."""
    experts = {f"model.layers.0.mlp.experts.{i}.{p}": GPTQLayer() for i in range(3) for p in ("gate_proj", "down_proj")}
    plain = {
        "model.layers.0.mlp.gate.weight": torch.ones(3, 256),
        "lm_head.weight": torch.ones(8, 256),
        "visual.blocks.0.attn.qkv.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
        "model.layers.0.self_attn.q_proj.scales": torch.ones(4),  # a name alone makes no GPTQ layer
    }
    plan = planned(
        tmp_path, experts, plain, lm_head=True, modules_in_block_to_quantize=[["self_attn.q_proj"]],
        dynamic={"-:.*experts.*": {}},
    )  # fmt: skip
    assert_converts(plan, *sorted(experts))
    assert {t.name for t in plan.copies} == plain.keys()
    assert not plan.lm_head


# ---- Bits ----


@pytest.mark.parametrize("said", [2, 3, 8])
def test_bits_come_from_the_shapes(tmp_path: Path, said: int) -> None:
    plan = planned(tmp_path, GPTQLayer(), bits=said)
    assert_converts(plan, notes=f"the config says {said} bits, the tensors are 4-bit")
    assert (plan.layers[0].bits, plan.layers[0].K) == (4, 256)


@pytest.mark.parametrize("said", [4, None])
def test_8_bit_whatever_the_config_says(tmp_path: Path, said: int | None) -> None:
    assert_refused(planned(tmp_path, GPTQLayer(bits=8, stored_zero=127), bits=said), "8-bit weights")


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("g_idx", ["sequential", None])
@pytest.mark.parametrize("qzeros", [True, False])
def test_other_bits(tmp_path: Path, bits: int, g_idx: str | None, qzeros: bool) -> None:
    layer = GPTQLayer(K=384, bits=bits, g_idx=g_idx, stored_zero=2 ** (bits - 1) - 1 if qzeros else None)
    assert_refused(planned(tmp_path, layer, bits=bits), f"{bits}-bit weights")


@pytest.mark.parametrize(("g_idx", "stored_zero"), [("sequential", None), (None, 7), ("sequential", 7)])
def test_bits_without_a_config(tmp_path: Path, g_idx: str | None, stored_zero: int | None) -> None:
    plan = planned(tmp_path, GPTQLayer(g_idx=g_idx, stored_zero=stored_zero), bits=None)
    assert_converts(plan)
    assert plan.layers[0].K == 256


@pytest.mark.parametrize("said", [None, 5])
def test_bits_that_nothing_tells(tmp_path: Path, said: int | None) -> None:
    plan = planned(tmp_path, GPTQLayer(g_idx=None, stored_zero=None), bits=said)
    assert_refused(plan, "neither qzeros, nor g_idx, nor the config tells the number of bits")


def test_bits_that_only_the_config_tells(tmp_path: Path) -> None:
    assert_converts(planned(tmp_path, GPTQLayer(g_idx=None, stored_zero=None)))


def test_bits_on_which_configs_disagree(tmp_path: Path) -> None:
    """The shapes decide; where they cannot, the layer is refused."""
    for name, g_idx in (("a", "sequential"), ("b", None)):
        write_source(
            tmp_path / name, {"layer": GPTQLayer(g_idx=g_idx, stored_zero=None)}, {},
            quantization=quantization_config(), quantize_config=quantization_config(bits=8),
        )  # fmt: skip
    assert_converts(plan_of(tmp_path / "a"), notes="disagree on bits (config.json says 4, quantize_config.json says 8)")
    assert_refused(plan_of(tmp_path / "b"), "neither qzeros")


# ---- Groups ----


@pytest.mark.parametrize("said", [32, 64, 256, -1])
def test_group_size_comes_from_the_shapes(tmp_path: Path, said: int) -> None:
    plan = planned(tmp_path, GPTQLayer(K=512), group_size=said)
    assert_converts(plan, notes=f"the config says group_size {said}, the tensors have 128 rows in a group")
    assert (plan.group_size, plan.layers[0].group_size) == (128, 128)


def test_group_size_missing(tmp_path: Path) -> None:
    assert_converts(planned(tmp_path, GPTQLayer(K=512), group_size=None))


@pytest.mark.parametrize("said", [-1, 512, 1024])
def test_one_group_under_any_name(tmp_path: Path, said: int) -> None:
    """group_size -1, all of K, or more than K: one group each."""
    plan = planned(tmp_path, GPTQLayer(K=512, group_size=-1), group_size=said)
    assert_converts(plan)
    assert (plan.group_size, plan.layers[0].group_size, plan.layers[0].rows_per_group) == (-1, -1, 512)


def test_one_group_though_the_config_says_more(tmp_path: Path) -> None:
    plan = planned(tmp_path, GPTQLayer(K=512, group_size=-1), group_size=128)
    assert_converts(plan, notes="the config says group_size 128, the tensors have one group over all rows")
    assert plan.group_size == -1


@pytest.mark.parametrize("said", [128, -1])
def test_group_as_large_as_K(tmp_path: Path, said: int) -> None:
    """K = 128: one group, which is right as 128 and as -1, beside layers of either kind."""
    plan = planned(tmp_path, GPTQLayer(K=128, group_size=said), group_size=said)
    assert_converts(plan)
    assert plan.layers[0].G == 1
    assert plan.group_size == 128  # of the two, the one that every reader takes: candle-vllm cannot read -1
    for other, expected in ((128, 128), (-1, -1)):
        folder = tmp_path / str(other)
        layers = {"small": GPTQLayer(K=128), "wide": GPTQLayer(K=512, group_size=other)}
        plan = planned(folder, layers, group_size=other)
        assert_converts(plan, "small", "wide")
        assert plan.group_size == expected


@pytest.mark.parametrize("group_size", [16, 32, 64, 256, 512])
@pytest.mark.parametrize("said", [True, False])
def test_other_group_sizes(tmp_path: Path, group_size: int, said: bool) -> None:
    plan = planned(tmp_path, GPTQLayer(K=1024, group_size=group_size), group_size=group_size if said else 128)
    assert_refused(plan, f"groups of {group_size}; the original format has groups of 128")


def test_group_size_1024(tmp_path: Path) -> None:
    assert_refused(planned(tmp_path, GPTQLayer(K=2048, group_size=1024), group_size=1024), "groups of 1024;")


@pytest.mark.parametrize(
    ("K", "N", "reasons"),
    [
        (896, 128, ["N = 128 is not a multiple of 256"]),  # Qwen2-0.5B, k and v
        (896, 256, []),
        (896, 896, ["N = 896 is not a multiple of 256"]),
        (256, 4544, ["N = 4544 is not a multiple of 256"]),  # Falcon-7B
        (320, 256, ["groups of 128 with a short last one (K = 320)", "K = 320 is not a multiple of 128"]),
        (64, 256, ["K = 64 is not a multiple of 128"]),
        (320, 128, ["short last one", "K = 320 is not a multiple of 128", "N = 128 is not a multiple of 256"]),
    ],
)
@pytest.mark.parametrize("g_idx", ["sequential", None])
def test_shapes(tmp_path: Path, K: int, N: int, reasons: list[str], g_idx: str | None) -> None:
    plan = planned(tmp_path, GPTQLayer(K=K, N=N, g_idx=g_idx))
    if reasons:
        assert_refused(plan, *reasons)
    else:
        assert_converts(plan)


def test_short_last_group_that_looks_like_groups_of_128(tmp_path: Path) -> None:
    """K = 1024 in groups of 144: 8 groups as with 128, but other rows. g_idx tells."""
    plan = planned(tmp_path, GPTQLayer(K=1024, group_size=144), group_size=144)
    assert_refused(plan, "groups of 144 with a short last one (K = 1024)")


@pytest.mark.parametrize(("K", "group_size"), [(288, 96), (72, 16), (600, 256), (1024, 144)])
@pytest.mark.parametrize("order", [False, True])
def test_g_idx_tells_the_size_of_groups(tmp_path: Path, K: int, group_size: int, order: bool) -> None:
    """The config says 128, and by the shapes alone that may be so: 288 rows in 3 groups."""
    groups = np.arange(K) // group_size
    layer = GPTQLayer(
        K=K, N=64, group_size=group_size, g_idx=np.random.default_rng(0).permutation(groups) if order else groups
    )
    write_source(tmp_path / "m", {"a": layer})
    with Checkpoint(tmp_path / "m") as checkpoint:
        plan = make_plan(checkpoint)
    assert plan.refusals == {}
    assert (plan.layers[0].group_rows, plan.layers[0].act_order) == (group_size, order)
    assert (
        f"the config says group_size 128, the tensors have {group_size} rows in a group; the tensors count"
        in plan.notes
    )


def test_groups_that_do_not_divide_K(tmp_path: Path) -> None:
    layer = GPTQLayer(K=512, group_size=128)
    tensors = {**layer.tensors("layer"), "layer.scales": torch.ones(3, 256), "layer.qzeros": layer_zeros(3, 256)}
    del tensors["layer.g_idx"]
    assert_refused(planned(tmp_path, {}, tensors), "3 groups that do not divide K = 512")


def layer_zeros(G: int, N: int, stored: int = 7) -> torch.Tensor:
    return torch.from_numpy(pack_columns(np.full((G, N), stored)))


@pytest.mark.parametrize(("grouped", "single", "few"), [(3, 1, "single"), (1, 3, "grouped")])
def test_grouped_and_per_channel_layers_mixed(tmp_path: Path, grouped: int, single: int, few: str) -> None:
    """The format has one group_size for all layers; the fewer are named."""
    layers = {f"grouped{i}": GPTQLayer(K=512) for i in range(grouped)}
    layers |= {f"single{i}": GPTQLayer(K=512, group_size=-1) for i in range(single)}
    plan = planned(tmp_path, layers)
    assert len(plan.refusals) == 1
    ((reason, names),) = plan.refusals.items()
    assert "the original format has one group_size for all" in reason
    assert names == [n for n in layers if n.startswith(few)]
    assert reason.startswith("one group per column" if few == "single" else "groups of 128")


# ---- Act-order ----


@pytest.mark.parametrize("K", [256, 512])
@pytest.mark.parametrize("group_size", [128, -1])
def test_act_order_in_name_only(tmp_path: Path, K: int, group_size: int) -> None:
    plan = planned(tmp_path, GPTQLayer(K=K, group_size=group_size), desc_act=True, group_size=group_size)
    assert_converts(plan, notes="desc_act in name only" if group_size == 128 else None)


@pytest.mark.parametrize("claimed", [True, None])
def test_act_order(tmp_path: Path, claimed: bool | None) -> None:
    plan = planned(tmp_path, GPTQLayer(K=512, g_idx=shuffled(512)), desc_act=claimed)
    assert_refused(plan, "act-order (g_idx is shuffled)")


def test_act_order_though_the_config_denies_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, GPTQLayer(K=512, g_idx=shuffled(512)), desc_act=False)
    assert_refused(plan, "act-order (g_idx is shuffled, although the config says desc_act false)")


def test_two_rows_swapped_are_act_order(tmp_path: Path) -> None:
    g_idx = np.arange(512) // 128
    g_idx[[127, 128]] = g_idx[[128, 127]]
    assert_refused(planned(tmp_path, GPTQLayer(K=512, g_idx=g_idx), desc_act=False), "act-order")


def test_groups_in_another_order_are_act_order(tmp_path: Path) -> None:
    assert_refused(planned(tmp_path, GPTQLayer(K=512, g_idx=3 - np.arange(512) // 128)), "act-order")


def test_sequential_groups_of_unequal_size_are_refused(tmp_path: Path) -> None:
    g_idx = np.repeat([0, 1, 2, 3], [120, 136, 128, 128])
    assert_refused(planned(tmp_path, GPTQLayer(K=512, g_idx=g_idx)), "g_idx")


@pytest.mark.parametrize("claimed", [False, None])
@pytest.mark.parametrize("group_size", [128, -1])
def test_g_idx_missing(tmp_path: Path, claimed: bool | None, group_size: int) -> None:
    """As AutoRound exports: sequential."""
    layer = GPTQLayer(K=512, g_idx=None, group_size=group_size)
    assert_converts(planned(tmp_path, layer, desc_act=claimed, group_size=group_size))


def test_g_idx_missing_though_the_config_says_act_order(tmp_path: Path) -> None:
    plan = planned(tmp_path, GPTQLayer(K=512, g_idx=None), desc_act=True)
    assert_refused(plan, "act-order (desc_act) and the g_idx that it needs is missing")


def test_g_idx_missing_in_one_group_needs_none(tmp_path: Path) -> None:
    """Within one group, the order of rows changes nothing."""
    assert_converts(planned(tmp_path, GPTQLayer(K=512, g_idx=None, group_size=-1), desc_act=True, group_size=-1))


def test_g_idx_missing_and_configs_disagree(tmp_path: Path) -> None:
    for name, g_idx in (("a", None), ("b", "sequential")):
        write_source(
            tmp_path / name, {"layer": GPTQLayer(g_idx=g_idx)}, {},
            quantization=quantization_config(desc_act=False), quantize_config=quantization_config(desc_act=True),
        )  # fmt: skip
    assert_refused(plan_of(tmp_path / "a"), "the configs disagree on desc_act")
    assert_converts(plan_of(tmp_path / "b"), notes="disagree on desc_act")


@pytest.mark.parametrize("claimed", [True, False, None])
def test_constant_g_idx_in_one_group(tmp_path: Path, claimed: bool | None) -> None:
    layer = GPTQLayer(K=512, group_size=-1, g_idx=np.zeros(512, np.int32))
    assert_converts(planned(tmp_path, layer, desc_act=claimed, group_size=-1))


@pytest.mark.parametrize("group", [0, 3])
def test_constant_g_idx_in_several_groups(tmp_path: Path, group: int) -> None:
    """It says that three of four groups of scales are never used; readers that ignore it compute something else."""
    plan = planned(tmp_path, GPTQLayer(K=512, g_idx=np.full(512, group)))
    assert_refused(plan, f"g_idx puts every row into group {group} of 4")


@pytest.mark.parametrize("group", [4, 1000, -1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("row", [0, 511])
def test_g_idx_out_of_range(tmp_path: Path, group: int, row: int) -> None:
    g_idx = np.arange(512) // 128
    g_idx[row] = group
    message = error_of(lambda: planned(tmp_path, {"the.layer": GPTQLayer(K=512, g_idx=g_idx)}), SourceError)
    assert message.startswith("the.layer: ")
    assert f"names group {group} of 4" in message


@pytest.mark.parametrize(
    "g_idx",
    [torch.zeros(255, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(16, 16, dtype=torch.int32),
     torch.zeros(256, dtype=torch.float32), torch.zeros(256, dtype=torch.int16)],
    ids=["short", "empty", "2-D", "float", "int16"],
)  # fmt: skip
def test_g_idx_of_another_kind(tmp_path: Path, g_idx: torch.Tensor) -> None:
    tensors = {**GPTQLayer().tensors("the.layer"), "the.layer.g_idx": g_idx}
    message = error_of(lambda: planned(tmp_path, {}, tensors), SourceError)
    assert message.startswith("the.layer: ")
    assert "g_idx" in message


def test_g_idx_in_int64(tmp_path: Path) -> None:
    tensors = GPTQLayer(K=512).tensors("layer")
    tensors["layer.g_idx"] = tensors["layer.g_idx"].long()
    assert_converts(planned(tmp_path, {}, tensors))


# ---- Zero points ----

#: (stored, checkpoint_format, sym) → what the layer is: v1 stores z - 1 and v2 stores z; with sym, labels of the
#: layout are known to lie, and both 7 and 8 mean 8; without sym, the label is all there is.
ZERO_POINTS = [
    (7, "gptq", True, "plain"), (7, "gptq", None, "plain"), (7, "gptq", False, "noted"),
    (8, "gptq", True, "noted"), (8, "gptq", None, "noted"), (8, "gptq", False, "which is 9 in checkpoint_format gptq"),
    (7, "gptq_v2", True, "noted"), (7, "gptq_v2", None, "noted"),
    (7, "gptq_v2", False, "which is 7 in checkpoint_format gptq_v2"),
    (8, "gptq_v2", True, "plain"), (8, "gptq_v2", None, "plain"), (8, "gptq_v2", False, "noted"),
    (7, None, True, "plain"), (7, None, None, "plain"), (7, None, False, "noted"),
    (8, None, True, "noted"), (8, None, None, "noted"), (8, None, False, "which is 9 in checkpoint_format gptq"),
    (7, "marlin", True, "plain"),
    *((z, f, sym, "asymmetric (zero points are not all 8")
      for z in (0, 6, 9, 15) for f in ("gptq", "gptq_v2") for sym in (True, False, None)),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "layout", "sym", "outcome"), ZERO_POINTS)
def test_zero_points(tmp_path: Path, stored: int, layout: str | None, sym: bool | None, outcome: str) -> None:
    plan = planned(tmp_path, GPTQLayer(stored_zero=stored), checkpoint_format=layout, sym=sym)
    if outcome == "plain":
        assert_converts(plan)
    elif outcome == "noted":
        assert_converts(plan, notes="symmetric")
    else:
        assert_refused(plan, outcome)


@pytest.mark.parametrize("sym", [True, False, None])
@pytest.mark.parametrize("stored", [7, 8])
@pytest.mark.parametrize("at", [(0, 0), (1, 255), (1, 100)])
@pytest.mark.parametrize("deviation", [-1, 1])
def test_one_deviating_zero_point(
    tmp_path: Path, sym: bool | None, stored: int, at: tuple[int, int], deviation: int
) -> None:
    zeros = np.full((2, 256), stored)
    zeros[at] += deviation
    plan = planned(tmp_path, GPTQLayer(stored_zero=zeros), sym=sym)
    claim = ", although the config says sym" if sym else ""
    assert_refused(plan, f"asymmetric (zero points are not all 8{claim})")


def test_sevens_and_eights_mixed_are_asymmetric(tmp_path: Path) -> None:
    zeros = np.full((2, 256), 7)
    zeros[1] = 8
    assert_refused(planned(tmp_path, GPTQLayer(stored_zero=zeros)), "asymmetric")


def test_layers_may_differ_in_the_stored_zero_point(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"a": GPTQLayer(stored_zero=7), "b": GPTQLayer(stored_zero=8)})
    assert_converts(plan, "a", "b", notes="read as symmetric")
    assert list(plan.notes.values()) == [["b"]]


@pytest.mark.parametrize(
    ("stored", "sym", "outcome"), [(7, True, None), (8, True, None), (7, False, "disagree"), (8, False, "disagree")]
)
def test_configs_disagree_on_the_layout(tmp_path: Path, stored: int, sym: bool, outcome: str | None) -> None:
    """With sym it does not matter; without it, nothing tells what a stored number means."""
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=stored)}, {}, quantization=quantization_config(sym=sym),
        quantize_config=quantization_config(sym=sym, checkpoint_format="gptq_v2"),
    )  # fmt: skip
    plan = plan_of(tmp_path / "m")
    if outcome:
        assert_refused(plan, outcome)
    else:
        assert plan.refusals == {}
        assert any("disagree on checkpoint_format" in note for note in plan.notes)


@pytest.mark.parametrize(("stored", "layout"), [(7, "gptq"), (8, "gptq_v2"), (8, "gptq"), (7, "gptq_v2")])
def test_configs_disagree_on_sym(tmp_path: Path, stored: int, layout: str) -> None:
    """The label of the layout decides: where the stored number means 8 by it, the layer is symmetric."""
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=stored)}, {},
        quantization=quantization_config(sym=True, checkpoint_format=layout),
        quantize_config=quantization_config(sym=False, checkpoint_format=layout),
    )  # fmt: skip
    plan = plan_of(tmp_path / "m")
    if (stored, layout) in ((7, "gptq"), (8, "gptq_v2")):
        assert_converts(plan, notes="disagree on sym")
    else:
        assert_refused(plan, f"asymmetric (every zero point is stored as {stored}")


@pytest.mark.parametrize(
    ("sym", "reason"),
    [(True, None), (False, "no qzeros, and the config says sym false"),
     (None, "no qzeros, and no config says whether it is symmetric")],
)  # fmt: skip
def test_qzeros_missing(tmp_path: Path, sym: bool | None, reason: str | None) -> None:
    plan = planned(tmp_path, GPTQLayer(stored_zero=None), sym=sym)
    if reason:
        assert_refused(plan, reason)
    else:
        assert_converts(plan)


def test_qzeros_missing_and_configs_disagree(tmp_path: Path) -> None:
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=None)}, {}, quantization=quantization_config(sym=True),
        quantize_config=quantization_config(sym=False),
    )  # fmt: skip
    assert_refused(plan_of(tmp_path / "m"), "no qzeros, and the configs disagree on sym")


def test_nibbles_behind_the_last_column_are_not_zero_points(tmp_path: Path) -> None:
    """N = 260 takes 32.5 words: half a word is padding, and is zero here."""
    assert_refused(planned(tmp_path, GPTQLayer(N=260)), "N = 260 is not a multiple of 256")
    zeros = np.full((2, 260), 7)
    zeros[1, 259] = 6
    plan = planned(tmp_path / "x", GPTQLayer(N=260, stored_zero=zeros))
    assert_refused(plan, "N = 260 is not a multiple of 256", "asymmetric")


@pytest.mark.parametrize(
    "qzeros",
    [torch.zeros(3, 32, dtype=torch.int32), torch.zeros(2, 33, dtype=torch.int32), torch.zeros(64, dtype=torch.int32),
     torch.zeros(2, 0).int()],
    ids=["groups", "columns", "1-D", "empty"],
)  # fmt: skip
def test_qzeros_of_another_kind(tmp_path: Path, qzeros: torch.Tensor) -> None:
    tensors = {**GPTQLayer().tensors("the.layer"), "the.layer.qzeros": qzeros}
    message = error_of(lambda: planned(tmp_path, {}, tensors), SourceError)
    assert message.startswith("the.layer: ")
    assert "qzeros" in message


# ---- Shapes and types that are no GPTQ linear ----


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of `the.layer`, K = N = 256, with some of its parts replaced, or (None) left out."""
    tensors = GPTQLayer().tensors("the.layer")
    for part, tensor in changes.items():
        if tensor is None:
            del tensors[f"the.layer.{part}"]
        else:
            tensors[f"the.layer.{part}"] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (changed(qweight=torch.zeros(4, 32, 256).int()), "qweight is 3-D, scales are 2-D"),
        (
            changed(qweight=torch.zeros(4, 32, 256).int(), scales=torch.ones(4, 2, 256)),
            "qweight is 3-D, scales are 3-D",
        ),
        (changed(scales=torch.ones(256)), "qweight is 2-D, scales are 1-D"),
        (changed(qweight=torch.zeros(128, 256, dtype=torch.int8), g_idx=None, qzeros=None), "qweight is I8"),
        (changed(qweight=torch.zeros(16, 256, dtype=torch.int64), g_idx=None, qzeros=None), "qweight is I64"),
        (changed(qweight=torch.zeros(64, 256, dtype=torch.int16), g_idx=None, qzeros=None), "qweight is I16"),
        (changed(qweight=torch.zeros(32, 256)), "qweight is F32"),
        (changed(scales=torch.ones(2, 256, dtype=torch.int32)), "scales are I32"),
    ],
    ids=["3-D", "both 3-D", "1-D scales", "int8", "int64", "int16", "float", "integer scales"],
)
def test_refused_by_kind(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    assert_refused(planned(tmp_path, {}, tensors), reason, name="the.layer")


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (changed(scales=None), ["no scales", "incomplete"]),
        (changed(qweight=None), ["no qweight", "incomplete"]),
        (changed(scales=torch.ones(2, 255)), ["qweight [32, 256] and scales [2, 255] differ in N"]),
        (changed(scales=torch.ones(2, 512)), ["differ in N"]),
        (changed(scales=torch.ones(0, 256), qzeros=torch.zeros(0, 32).int()), ["empty"]),
        (changed(qweight=torch.zeros(0, 256).int(), qzeros=None, g_idx=None), ["empty"]),
        (changed(qweight=torch.zeros(32, 0).int(), scales=torch.ones(2, 0), qzeros=None), ["empty"]),
        (changed(qweight=torch.zeros(31, 256).int()), ["no bit width explains"]),
        (changed(bias=torch.ones(255)), ["bias [255] does not match N = 256"]),
        (changed(bias=torch.ones(1, 256)), ["bias [1, 256] does not match N = 256"]),
        (changed(bias=torch.ones(())), ["bias [] does not match N = 256"]),
        (changed(B=torch.zeros(16, 512).int()), ["a qweight and", "B"]),
        (changed(s=torch.zeros(2, 256).half()), ["a qweight and", "s"]),
    ],
)  # fmt: skip
def test_contradictions(tmp_path: Path, tensors: dict[str, torch.Tensor], parts: list[str]) -> None:
    """Another, sound layer stands beside it, so that it is not the absence of any qweight that is refused."""
    message = error_of(lambda: planned(tmp_path, {"good": GPTQLayer()}, tensors), SourceError)
    assert message.startswith("the.layer: ")
    for part in parts:
        assert part in message


def test_scales_that_are_all_zero_are_said(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"empty": GPTQLayer(scales=np.zeros((2, 256))), "full": GPTQLayer()})
    assert [(note.split(",")[0], names) for note, names in plan.notes.items()] == [("every scale is 0", ["empty"])]


@pytest.mark.parametrize("dtype", [torch.uint32, torch.int64, torch.float16])
def test_zero_points_of_another_type_are_named_by_it(tmp_path: Path, dtype: torch.dtype) -> None:
    name = {torch.uint32: "U32", torch.int64: "I64", torch.float16: "F16"}[dtype]
    tensors = {**GPTQLayer().tensors("layer"), "layer.qzeros": torch.zeros((2, 32), dtype=dtype)}
    assert_refused(
        planned(tmp_path, {}, tensors), f"qzeros are {name}; only zero points packed in int32 words can be repacked"
    )


OWN_NAMES = ("B", "s", "marlin_qweight", "marlin_scales", "marlin_qzeros", "marlin_perm")


@pytest.mark.parametrize("part", OWN_NAMES)
@pytest.mark.parametrize("bits", [4, 8])  # of the original format and of the extended one
def test_names_that_the_result_takes_are_refused(tmp_path: Path, part: str, bits: int) -> None:
    """Two tensors would have one name, or a reader of the result would see a part that the layer does not have."""
    layer = GPTQLayer(bits=bits, stored_zero=2 ** (bits - 1) - 1)
    with pytest.raises(SourceError, match=rf"^layer: it has a qweight and, as Marlin layers do, {part};"):
        planned(tmp_path, layer, {f"layer.{part}": torch.zeros(2)})


@pytest.mark.parametrize("part", OWN_NAMES)
def test_a_marlin_layer_among_gptq_ones(tmp_path: Path, part: str) -> None:
    words, scales = torch.zeros((8, 512), dtype=torch.int32), torch.zeros((1, 256), dtype=torch.float16)
    other = {"other.B": words, "other.s": scales} if part in ("B", "s") else {f"other.{part}": words}
    with pytest.raises(SourceError, match=rf"^other\.{'B' if part == 's' else part}: a tensor of a Marlin layer"):
        planned(tmp_path, GPTQLayer(), other)


@pytest.mark.parametrize("extra", ["g_idx", "none"])
def test_awq_tensors_labelled_gptq(tmp_path: Path, extra: str) -> None:
    """AWQ packs qweight along N: [K, N/8]; qzeros and scales look as GPTQ's do."""
    tensors = {
        "the.layer.qweight": torch.zeros(256, 32, dtype=torch.int32),
        "the.layer.qzeros": layer_zeros(2, 256),
        "the.layer.scales": torch.ones(2, 256, dtype=torch.float16),
    }
    if extra == "g_idx":
        tensors["the.layer.g_idx"] = torch.zeros(256, dtype=torch.int32)
    message = error_of(lambda: planned(tmp_path, {}, tensors), UnsupportedError)
    assert "AWQ" in message
    assert "the.layer" in message


def test_bias_is_copied(tmp_path: Path) -> None:
    """Also an all-zero one, which readers would miss (AutoGPTQ#554)."""
    tensors = changed(bias=torch.zeros(256, dtype=torch.float16))
    plan = planned(tmp_path, {}, tensors)
    assert [t.name for t in plan.copies] == ["the.layer.bias"]
    assert plan.layers[0].bias is not None


# ---- Per-layer settings ----


def test_dynamic_settings_of_a_layer(tmp_path: Path) -> None:
    """Each layer is judged by its own settings: what one of them says does not touch the others."""
    layers = {
        "model.layers.0.a": GPTQLayer(stored_zero=None),  # sym for all: converts
        "model.layers.0.b": GPTQLayer(stored_zero=None),  # dynamic: not sym, and no qzeros to tell
        "model.layers.0.c": GPTQLayer(K=512, g_idx=None),  # dynamic: act-order, and no g_idx
        "model.layers.0.d": GPTQLayer(bits=8, stored_zero=127),
        "model.layers.0.e": GPTQLayer(K=512, group_size=32),
    }
    plan = planned(
        tmp_path, layers,
        dynamic={"+:.*\\.b$": {"sym": False}, ".*\\.c": {"desc_act": True}, ".*\\.d": {"bits": 8},
                 ".*\\.e": {"group_size": 32}, ".*": {"bits": 8}},
    )  # fmt: skip
    assert [x.name for x in plan.layers] == ["model.layers.0.a"]
    assert_refused(plan, "no qzeros, and the config says sym false", name="model.layers.0.b")
    assert_refused(plan, "the g_idx that it needs is missing", name="model.layers.0.c")
    assert_refused(plan, "8-bit weights", name="model.layers.0.d")
    assert_refused(plan, "groups of 32", name="model.layers.0.e")
    assert plan.notes == {"the config says 8 bits, the tensors are 4-bit; the tensors count": ["model.layers.0.a"]}


# ---- What is refused is said ----


def test_200_layers_with_one_cause_are_one_line(tmp_path: Path) -> None:
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    tensors = {"model.norm.weight": torch.ones(4)}
    for i in range(50):
        for part in parts:
            tensors |= GPTQLayer(K=128, N=256, bits=8, stored_zero=127).tensors(f"model.layers.{i}.{part}")
    tensors |= GPTQLayer(K=256, g_idx=shuffled(256)).tensors("lm_head")
    tensors |= GPTQLayer(K=256).tensors("good")
    plan = planned(tmp_path, {}, tensors)
    with pytest.raises(UnsupportedError) as caught:
        plan.require_convertible()
    first, *lines = caught.value.message.split("\n")
    assert first.startswith("201 of 202 quantized layers do not fit the original Marlin format")
    assert "nothing was converted" in first
    assert len(lines) == 2
    (eight,) = [line for line in lines if "8-bit" in line]
    (order,) = [line for line in lines if "act-order" in line]
    assert order.endswith("(g_idx is shuffled, although the config says desc_act false): lm_head")
    assert "200 layers" in eight
    for part in parts:
        assert f"model.layers.{{0-49}}.{part}" in eight
    assert len(eight) < 300
    names = [f"model.layers.{i}.{part}" for i in range(50) for part in parts]
    (listed,) = [x["layers"] for x in plan_as_dict(plan, "x")["refused"] if "8-bit" in x["reason"]]
    assert sorted(listed) == sorted(names)


def test_every_reason_of_a_layer_is_said_and_the_layer_counted_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, GPTQLayer(K=320, N=128, stored_zero=3, g_idx=None))
    assert_refused(
        plan, "groups of 128 with a short last one", "K = 320 is not", "N = 128 is not", "asymmetric"
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"^1 of 1 quantized layers"):
        plan.require_convertible()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.b"], "a.b"),
        (["a.b", "a.c"], "2 layers, a.b, a.c"),
        (["l.0.x", "l.1.x"], "2 layers, l.{0-1}.x"),
        (["l.1.x", "l.10.x", "l.2.x", "l.0.x"], "4 layers, l.{0-2,10}.x"),
        (["l.0.x", "l.0.y", "l.1.x", "l.1.y"], "4 layers, l.{0-1}.x, l.{0-1}.y"),
        ([f"l.{i}.e.{j}.w{k}" for i in range(4) for j in range(8) for k in (1, 2, 3)],
         "96 layers, l.{0-3}.e.{0-7}.w{1-3}"),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1", "l.2.e.1"], "5 layers, l.{0-1}.e.{0-1}, l.2.e.1"),
        (["l.0.x", "l.2.x", "l.4.x"], "3 layers, l.{0,2,4}.x"),
        (["l.00.x", "l.01.x"], "2 layers, l.00.x, l.01.x"),  # no number: it would be lost what stands before it
        (["0", "1"], "2 layers, {0-1}"),
    ],
)  # fmt: skip
def test_names_in_a_few_words(names: list[str], expected: str) -> None:
    assert span(names) == expected


# ---- Other sources ----


def marlin_tensors() -> dict[str, torch.Tensor]:
    return {"layer.B": torch.zeros(16, 512, dtype=torch.int32), "layer.s": torch.ones(2, 256, dtype=torch.float16)}


MARLIN_LABELS: list[dict[str, Any]] = [
    {"checkpoint_format": "marlin"}, {"checkpoint_format": "marlin_ext"}, {"is_marlin_format": True},
    {"quant_method": "marlin"}, {}, {"is_marlin_format": False},
]  # fmt: skip


@pytest.mark.parametrize("label", MARLIN_LABELS, ids=str)
def test_already_marlin(tmp_path: Path, label: dict[str, Any]) -> None:
    plan = planned(tmp_path, {}, marlin_tensors(), **label)
    assert plan.already_marlin
    assert plan.layers == []
    assert not plan_as_dict(plan, "x")["convertible"]


def test_already_marlin_without_a_word_about_it(tmp_path: Path) -> None:
    write_source(tmp_path, {}, marlin_tensors(), quantization=NO_QUANTIZATION)
    assert plan_of(tmp_path).already_marlin


@pytest.mark.parametrize("label", MARLIN_LABELS, ids=str)
def test_gptq_tensors_labelled_marlin(tmp_path: Path, label: dict[str, Any]) -> None:
    """The tensors decide."""
    plan = planned(tmp_path, GPTQLayer(), **label)
    assert not plan.already_marlin
    assert_converts(plan)


@pytest.mark.parametrize("label", MARLIN_LABELS[:4], ids=str)
def test_labelled_marlin_with_neither_kind_of_tensors(tmp_path: Path, label: dict[str, Any]) -> None:
    message = error_of(lambda: planned(tmp_path, {}, {"a.weight": torch.ones(2)}, **label), UnsupportedError)
    assert "Marlin" in message
    assert "qweight" in message
    assert str(tmp_path) in message


FOREIGN = {
    "unquantized": ({"model.layers.0.q_proj.weight": torch.ones(4, 4)}, "an unquantized checkpoint"),
    "compressed-tensors": ({"a.weight_packed": torch.ones(4, 4).int()}, "compressed-tensors"),
    "bitsandbytes nf4": ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(4).byte()}, "bitsandbytes"),
    "bitsandbytes fp4": ({"a.weight.quant_state.bitsandbytes__fp4": torch.ones(4).byte()}, "bitsandbytes"),
    "bitsandbytes int8": ({"a.SCB": torch.ones(4)}, "bitsandbytes"),
    "EXL2": ({"a.q_weight": torch.ones(4, 4).int()}, "EXL2"),
    "B and s that are no Marlin": ({"a.B": torch.ones(4), "a.s": torch.ones(4)}, "unquantized"),
    "B alone": ({"a.B": torch.ones(4, 4).int()}, "unquantized"),
    "no tensors": ({}, "unquantized"),
}


@pytest.mark.parametrize(("tensors", "named"), FOREIGN.values(), ids=FOREIGN)
def test_other_sources_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], named: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    message = error_of(lambda: plan_of(tmp_path), UnsupportedError)
    assert named in message
    assert str(tmp_path) in message
    assert "a GPTQ checkpoint is needed" in message


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "compressed-tensors", "exl2"])
def test_config_of_another_method(tmp_path: Path, method: str) -> None:
    message = error_of(lambda: planned(tmp_path, GPTQLayer(), quant_method=method), UnsupportedError)
    assert method.lower() in message.lower()


def test_no_config_at_all(tmp_path: Path) -> None:
    """The tensors tell everything; that engines need a config.json is said."""
    save_file(GPTQLayer().tensors("layer"), tmp_path / "model.safetensors")
    assert_converts(plan_of(tmp_path), notes="no config.json")


# ---- What is read ----


class Reads:
    """Bytes that were read from files while it watches: (file name, start, end)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        preadv, pread = os.preadv, os.pread

        def watched_preadv(fd: int, buffers: Any, at: int) -> int:
            count = preadv(fd, buffers, at)
            self._note(fd, at, count)
            return count

        def watched_pread(fd: int, length: int, at: int) -> bytes:
            data = pread(fd, length, at)
            self._note(fd, at, len(data))
            return data

        monkeypatch.setattr(os, "preadv", watched_preadv)
        monkeypatch.setattr(os, "pread", watched_pread)
        for module, unwatched in ((os, "read"), (os, "readv"), (os, "sendfile"), (mmap, "mmap")):
            monkeypatch.setattr(module, unwatched, None)

    def _note(self, fd: int, at: int, count: int) -> None:
        self.ranges.append((Path(f"/proc/self/fd/{fd}").readlink().name, at, at + count))


def tensors_touched(source: Source, reads: Reads) -> set[str]:
    touched = set()
    for path in source.folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + x for x in entry["data_offsets"])
                if any(file == path.name and a < end and b > begin for file, a, b in reads.ranges):
                    touched.add(name)
    return touched


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True}, {"g_idx": None}, {"stored_zero": None}, {"bits": 8, "stored_zero": 127},
     {"scale_dtype": torch.float32, "group_size": -1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_and_plain_tensors_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], shards: int
) -> None:
    source = write_source(tmp_path / "m", two_layers(**changes), shards=shards)
    with monkeypatch.context() as context:
        reads = Reads(context)
        plan_of(source.folder)
    touched = tensors_touched(source, reads)
    assert {name.rsplit(".", 1)[1] for name in touched} <= {"g_idx", "qzeros", "scales"}
    if not changes:
        assert touched == {f"{n}.{part}" for n in source.layers for part in ("g_idx", "qzeros", "scales")}


def test_plan_of_a_70b_model_reads_zero_points_and_the_scales_of_what_it_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 GB of holes on disk: whoever reads weights here is found out by the count, and by the clock."""
    layers, N, K = 80, 28672, 8192
    zeros = layer_zeros(K // 128, N).numpy().tobytes()
    header, position, places = {}, 0, []
    for i in range(layers):
        parts = {"qweight": ("I32", [K // 8, N], 4), "scales": ("F16", [K // 128, N], 2),
                 "qzeros": ("I32", [K // 128, N // 8], 4)}  # fmt: skip
        for part, (dtype, shape, size) in parts.items():
            nbytes = shape[0] * shape[1] * size
            header[f"model.layers.{i}.mlp.up_proj.{part}"] = {
                "dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes],
            }  # fmt: skip
            if part == "qzeros":
                places.append(position)
            position += nbytes
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
        for place in places[:2]:  # the others stay 0, and are refused as asymmetric
            file.seek(8 + len(raw) + place)
            file.write(zeros)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config()}))
    with monkeypatch.context() as context:
        reads = Reads(context)
        plan = plan_of(tmp_path)
    assert [x.name for x in plan.layers] == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert_refused(plan, "asymmetric", name="model.layers.79.mlp.up_proj")
    assert (
        sum(b - a for file, a, b in reads.ranges if file == "model.safetensors")
        == 8 + len(raw) + layers * len(zeros) + len(plan.layers) * K // 128 * N * 2
    )
    assert plan.bytes_in == position


# ---- Engines ----


def test_what_vllm_refuses_is_said(tmp_path: Path) -> None:
    """The same as its plugin refuses when it loads (test_vllm.py)."""
    order = np.random.default_rng(0).permutation(np.arange(256) // 128)
    layers = {
        "l.0.experts.0.up_proj": GPTQLayer(),
        "l.0.experts.10.up_proj": GPTQLayer(),
        "l.0.shared_experts.up_proj": GPTQLayer(group_size=64, bias=True),
        "l.1.experts.0.up_proj": GPTQLayer(),
        "l.1.experts.1.up_proj": GPTQLayer(group_size=64),
        "l.2.experts.0.up_proj": GPTQLayer(g_idx=order, bias=True),
        "l.3.experts.0.up_proj": GPTQLayer(N=72),
        "l.4.experts.0.up_proj": GPTQLayer(group_size=16),
        "a": GPTQLayer(K=128, N=64, group_size=16),
        "b": GPTQLayer(K=144, N=64, group_size=48),
        "c": GPTQLayer(bits=8, stored_zero=np.arange(512).reshape(2, 256) % 200),
        "d": GPTQLayer(bits=8, stored_zero=127),
        "e": GPTQLayer(stored_zero=np.arange(512).reshape(2, 256) % 15),
    }
    write_source(tmp_path / "m", layers, quantization=quantization_config(sym=False))
    with Checkpoint(tmp_path / "m") as checkpoint:
        plan = make_plan(checkpoint)
    assert {x.name for x in plan.layers} == layers.keys()
    refused = vllm_refuses(plan.layer_facts)
    assert refused == {
        "groups of 16": ["l.4.experts.0.up_proj"],
        "experts of different settings in one block": ["l.1.experts.0.up_proj", "l.1.experts.1.up_proj"],
        "experts with act-order": ["l.2.experts.0.up_proj"],
        "experts with biases": ["l.2.experts.0.up_proj"],
        "experts that are stored padded": ["l.3.experts.0.up_proj"],
    }
    needed = {"groups of 16": ["a", "b"], "8 bits with zero points": ["c"]}
    assert vllm_needs_our_kernels(plan.layer_facts) == needed
    document = plan_as_dict(plan, "s")
    assert {x["what"]: x["layers"] for x in document["vllm_refuses"]} == refused
    assert {x["what"]: x["layers"] for x in document["vllm_needs_our_kernels"]} == needed


# ---- For scripts ----


def test_plan_as_dict(tmp_path: Path) -> None:
    layers = {
        "a": GPTQLayer(K=384, N=512, bias=True, scale_dtype=torch.bfloat16, stored_zero=8),
        "b": GPTQLayer(bits=8, stored_zero=127),
    }
    plan = planned(tmp_path, layers, {"norm.weight": torch.ones(3, 5)})
    assert json.loads(json.dumps(plan_as_dict(plan, "the/source"))) == {
        "source": "the/source",
        "already_marlin": False,
        "convertible": False,
        "format": "marlin",
        "group_size": 128,
        "layers": [
            {"name": "a", "K": 384, "N": 512, "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
             "stored_K": 384, "stored_N": 512, "stored_group_size": 128, "scales": "BF16", "bias": True,
             "action": "convert"}
        ],
        "why_extended": [],
        "vllm_refuses": [],
        "vllm_needs_our_kernels": [],
        "refused": [{"reason": "8-bit weights; the original format has 4 bits only", "layers": ["b"]}],
        "notes": [
            {"note": "checkpoint_format gptq stores zero point 8 as 7, here it is 8; read as symmetric",
             "layers": ["a"]},
            {"note": "the config says 4 bits, the tensors are 8-bit; the tensors count", "layers": ["b"]},
        ],
        "copied": [
            {"name": "norm.weight", "dtype": "F32", "shape": [3, 5], "bytes": 60},
            {"name": "a.bias", "dtype": "F16", "shape": [512], "bytes": 1024},
        ],
        "weights_beside": [],
        "dropped": ["a.g_idx", "a.qzeros", "b.g_idx", "b.qzeros"],
        "bytes_in": sum(t.nbytes for t in load_file(tmp_path / "m" / "model.safetensors").values()),
        "bytes_out": 384 * 512 // 2 + 3 * 512 * 2 + 60 + 1024,
    }  # fmt: skip


def test_plan_as_dict_of_a_convertible_source(source: Source) -> None:
    value = plan_as_dict(plan_of(source.folder), "s")
    assert value["convertible"] is True
    assert value["refused"] == []
    assert {x["name"] for x in value["layers"]} == source.layers.keys()
