"""Bits, groups and act-order of a plan: the tensors decide, and not what the config says about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.plan import make_plan
from marlin_convert.errors import SourceError
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, shuffled, write_source
from tests.support.plans import assert_converts, assert_refused, error_of, layer_zeros, plan_of, planned

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
