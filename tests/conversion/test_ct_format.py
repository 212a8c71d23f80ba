"""compressed-tensors sources of every kind, made here: converted, verified, restored; hostile and mislabelled ones."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion import blocks
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.plan import Plan, make_plan
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import MarlinConvertError, SourceError, UnsupportedError
from marlin_convert.formats import compressed_tensors
from marlin_convert.options import Format, Options
from tests.support import format_reader
from tests.support.ct_checkpoints import CTLayer, ct_config, stream, write_ct
from tests.support.gptq_checkpoints import shuffled, tensors_of

CPU = Options(device="cpu", verify=True)


def zeros(G: int, N: int, bits: int = 4) -> Any:
    return np.random.default_rng(5).integers(0, 2**bits, (G, N))


def plan_of(folder: Path) -> Plan:
    with Checkpoint(folder) as checkpoint:
        return make_plan(checkpoint)


# ---- The definition ----


def test_codes_by_hand() -> None:
    """Nibble j of a word is the code of input j; byte j for 8 bits."""
    word = np.array([[0x76543210]], np.int32)
    assert compressed_tensors.codes(word, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert compressed_tensors.codes(np.array([[0x04030201]], np.int32), 8).tolist() == [[1, 2, 3, 4]]


def test_zero_points_by_hand() -> None:
    """Packed along N, the first output in the lowest bits; plain int8 numbers count from -8, and -128."""
    packed = np.array([[0x76543210], [0x00000098]], np.int32)
    assert compressed_tensors.decode_zeros(packed, 4, 10).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    plain = np.array([[-8], [0], [7]], np.int8)
    assert compressed_tensors.decode_zeros(plain, 4, 3).tolist() == [[0, 8, 15]]
    assert compressed_tensors.decode_zeros(np.array([[-128, 127]], np.int8), 8, 1).tolist() == [[0], [255]]
    for stored, dtype, N in ((packed, "I32", 10), (plain, "I8", 3)):
        found = compressed_tensors.encode_zeros(compressed_tensors.decode_zeros(stored, 4, N), 4, dtype)
        np.testing.assert_array_equal(found, stored)
        assert found.dtype == stored.dtype


def test_zero_points_that_are_none() -> None:
    with pytest.raises(ValueError, match="has 8 to 8, which 4 bits cannot hold"):
        compressed_tensors.decode_zeros(np.array([[8]], np.int8), 4, 1)
    with pytest.raises(ValueError, match="bits beyond N = 3 that are not 0"):
        compressed_tensors.decode_zeros(np.array([[0x1000]], np.int32), 4, 3)


def test_bits_are_told_by_the_shapes() -> None:
    assert compressed_tensors.packed_bits(4096, 512) == [4]
    assert compressed_tensors.packed_bits(4096, 1024) == [8]
    assert compressed_tensors.packed_bits(1000, 94) == [3]
    assert compressed_tensors.packed_bits(4096, 513) == []


# ---- Every kind ----

KINDS: dict[str, dict[str, Any]] = {
    "groups of 128": {"K": 256, "N": 256},
    "per channel": {"K": 256, "N": 256, "group_size": -1},
    "groups of 32": {"K": 256, "N": 128, "group_size": 32},
    "odd sizes": {"K": 192, "N": 44, "group_size": 48},
    "a short last group": {"K": 1000, "N": 72},
    "many columns": {"K": 64, "N": 1000, "group_size": 32},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("kind", "asym", "order"), list(product(KINDS, (False, True), (False, True))))
def test_converted_and_restored(tmp_path: Path, kind: str, asym: bool, order: bool, bits: int) -> None:
    settings = KINDS[kind]
    size, K, N = settings.get("group_size", 128), settings["K"], settings["N"]
    G = 1 if size == -1 else -(-K // size)
    made = CTLayer(**settings, bits=bits, zeros=zeros(G, N, bits) if asym else None,
                   g_idx=shuffled(K, size) if order and size != -1 else None, bias=asym)  # fmt: skip
    weights = {"num_bits": bits, "symmetric": not asym, "group_size": size}
    source = write_ct(tmp_path / "source", made, ct_config(weights))
    report = convert(source, tmp_path / "out", Options(device="cpu", verify=True, format=Format.MARLIN_EXT))
    assert report.verification is not None
    assert report.verification.layers[0].exact
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_in_the_original_format(tmp_path: Path) -> None:
    made = CTLayer()
    source = write_ct(tmp_path / "source", made)
    report = convert(source, tmp_path / "out", CPU)
    assert report.plan.format is Format.MARLIN
    assert tensors_of(tmp_path / "out").keys() == {"layer.B", "layer.s", "model.norm.weight"}
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_as_int8(tmp_path: Path, bits: int) -> None:
    made = CTLayer(zeros=zeros(2, 256, bits), int8_zeros=True, bits=bits)
    source = write_ct(tmp_path / "source", made, ct_config({"symmetric": False, "num_bits": bits}))
    convert(source, tmp_path / "out", CPU)
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


def test_both_kinds_of_zero_points_in_one_checkpoint(tmp_path: Path) -> None:
    """Each layer goes back to its own; of one layer, there is room for one of them only."""
    zeros = np.random.default_rng(0).integers(0, 16, (2, 256))
    layers = {"a": CTLayer(zeros=zeros), "b": CTLayer(zeros=zeros, int8_zeros=True, seed=1), "c": CTLayer(zeros=zeros)}
    source = write_ct(tmp_path / "s", layers, ct_config({"symmetric": False}))
    convert(source, tmp_path / "out", Options(device="cpu", verify=True))
    for name, weight in format_reader.read(tmp_path / "out").items():
        np.testing.assert_array_equal(weight, layers[name].weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(source)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_in_panels_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in more than one panel, whose tensors lie in several files."""
    monkeypatch.setattr(blocks, "PANEL_BYTES", 1 << 14)
    monkeypatch.setattr(blocks, "STRIP_ELEMENTS", 300)
    made = CTLayer(K=256, N=320, group_size=32, zeros=zeros(8, 320))
    source = write_ct(tmp_path / "source", made, ct_config({"symmetric": False}), shards=3)
    convert(source, tmp_path / "out", Options(device="cpu", verify=True, max_shard_size="40KB"))
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


def test_a_change_of_one_code_is_found(tmp_path: Path) -> None:
    made = CTLayer(K=256, N=64)
    source = write_ct(tmp_path / "source", made)
    convert(source, tmp_path / "out", CPU)
    tensors = load_file(source / "model.safetensors")
    tensors["layer.weight_packed"][5, 3] ^= 0x30  # output 5, input 25
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (layer,) = verify_pair(source, tmp_path / "out", "cpu").layers
    assert not layer.exact
    assert layer.problem is not None
    assert "the code of row 25, column 5" in layer.problem


def test_a_zero_point_of_0_needs_v2_as_gptq(tmp_path: Path) -> None:
    source = write_ct(tmp_path / "source", CTLayer(zeros=zeros(2, 256)), ct_config({"symmetric": False}))
    convert(source, tmp_path / "out", CPU)
    with pytest.raises(UnsupportedError, match=r"layer: it has a zero point of 0.*give --v2"):
        restore(tmp_path / "out", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_without_a_note_nothing_tells_the_source(tmp_path: Path) -> None:
    convert(write_ct(tmp_path / "source", CTLayer()), tmp_path / "out", CPU)
    (tmp_path / "out" / "marlin_convert.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no marlin_convert\.json of marlin-convert tells what"):
        restore(tmp_path / "out", tmp_path / "again", original=True)


# ---- What the config claims ----


def test_all_zero_points_in_the_middle_are_symmetric(tmp_path: Path) -> None:
    source = write_ct(tmp_path / "s", CTLayer(zeros=np.full((2, 256), 8)), ct_config({"symmetric": False}))
    plan = plan_of(source)
    assert plan.layers[0].sym
    assert "converted as symmetric" in "".join(plan.notes)
    convert(source, tmp_path / "out", CPU)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


@pytest.mark.parametrize(
    ("layer", "weights", "note"),
    [
        (CTLayer(zeros=zeros(2, 256)), {}, "the config says symmetric and zero points differ"),
        (CTLayer(bits=8), {}, "the config says 4 bits, the tensors are 8-bit"),
        (CTLayer(), {"group_size": 64}, "the config says group_size 64, the tensors have 128 rows"),
    ],
    ids=["sym", "bits", "group size"],
)
def test_the_tensors_count(tmp_path: Path, layer: CTLayer, weights: dict[str, Any], note: str) -> None:
    source = write_ct(tmp_path / "s", layer, ct_config(weights))
    assert any(note in found for found in plan_of(source).notes)
    convert(source, tmp_path / "out", Options(device="cpu", verify=True, format=Format.MARLIN_EXT))
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], layer.weight)


@pytest.mark.parametrize("said", [True, "group", "dynamic"])
def test_act_order_in_name_only(tmp_path: Path, said: object) -> None:
    layer = CTLayer(g_idx=np.arange(256) // 128)
    plan = plan_of(write_ct(tmp_path / "s", layer, ct_config({"actorder": said})))
    assert not plan.layers[0].act_order
    assert "desc_act in name only" in "".join(plan.notes)


@pytest.mark.parametrize("said", ["static", "weight"])
def test_ordered_while_quantizing_is_plain(tmp_path: Path, said: str) -> None:
    plan = plan_of(write_ct(tmp_path / "s", CTLayer(), ct_config({"actorder": said})))
    assert plan.notes == {}
    assert plan.format is Format.MARLIN


# ---- Refused by name ----


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ct_config(group={"input_activations": {"num_bits": 8}}), "activations are quantized too .*8 bits"),
        (ct_config(group={"output_activations": {"num_bits": 4}}), "activations are quantized too"),
        (ct_config({"type": "float"}), "weights of type 'float'"),
        (ct_config({"strategy": "block"}), "quantized by 'block'"),
        (ct_config({"strategy": "tensor"}), "quantized by 'tensor'"),
        (ct_config({"dynamic": True}), "quantized while it runs"),
        (ct_config(transform_config={"config_groups": {"R1": {}}}), "weights are rotated"),
        (ct_config(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (ct_config(format="marlin-24"), "2:4 sparse"),
        (ct_config(format="nvfp4-pack-quantized"), "NVFP4"),
        (ct_config(format="mxfp4-pack-quantized"), "MXFP4"),
        (ct_config(format="int-quantized"), "quantized to int8 without packing"),
        (ct_config(format="float-quantized"), "FP8"),
        (ct_config(format="something"), "in the format 'something'"),
        (ct_config(group={"format": "float-quantized"}, format="mixed-precision"), "FP8"),
        (ct_config(kv_cache_scheme={"num_bits": 8}), "quantized cache of keys and values"),
        (ct_config(config_groups={"W4A8": ["Linear"]}), "quantized as 'W4A8' says"),
    ],
)  # fmt: skip
def test_refused_by_its_config(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as error:
        plan_of(write_ct(tmp_path / "s", CTLayer(), config))
    assert "vLLM runs it as it is" in error.value.message


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "AutoRound in GPTQ's packing"),
    ],
)
def test_another_config_is_not_believed(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"it says {named}, and the tensors are compressed-tensors'"):
        plan_of(write_ct(tmp_path / "s", CTLayer(), config))


@pytest.mark.parametrize(
    ("own", "note"),
    [
        ({"bits": 4}, None),
        ({"bits": 8}, "the config says 8 bits, the tensors are 4-bit"),
        ({"bits": 8, "extra_config": {"layer": {"bits": 4}}}, None),
    ],
)
def test_auto_rounds_own_config(tmp_path: Path, own: dict[str, Any], note: str | None) -> None:
    """Newer versions say quant_method auto-round of this packing, too."""
    config = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "data_type": "int", **own}
    source = write_ct(tmp_path / "s", CTLayer(), config)
    assert [found for found in plan_of(source).notes if "bits" in found] == (
        [f"{note}; the tensors count"] if note else []
    )
    convert(source, tmp_path / "out", Options(format=Format.MARLIN_EXT, device="cpu"))
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], CTLayer().weight)
    restore(tmp_path / "out", tmp_path / "back", original=True)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"] == config
    with pytest.raises(UnsupportedError, match="of the type 'mx_fp'"):
        plan_of(write_ct(tmp_path / "b", CTLayer(), {**config, "data_type": "mx_fp"}))


def replaced(**parts: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    return {f"layer.weight_{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (replaced(packed=torch.zeros(2, 256, 32).int()), "weight_packed is 3-D"),
        (replaced(packed=torch.zeros(256, 128, dtype=torch.uint8)), "weight_packed is U8"),
        (replaced(scale=torch.ones(256, 2, dtype=torch.float64)), "weight_scale is F64"),
        (replaced(packed=torch.zeros(256, 40).int()), "5-bit weights; Marlin has 4 and 8 bits"),
        (replaced(packed=torch.zeros(256, 24).int()), "3-bit weights"),
        (replaced(zero_point=torch.zeros(256, 2).half()), "weight_zero_point is F16"),
        ({"layer.input_scale": torch.ones(1)}, "input_scale beside weight_packed"),
        (replaced(g_idx=torch.zeros(256).int()), "g_idx puts every row into group 0 of 2"),
        (replaced(packed=torch.zeros(256, 32).int(), shape=torch.tensor([256, 251]), scale=torch.ones(256, 1).half()),
         "K = 251 does not fill whole words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refused_layers(tmp_path: Path, extra: dict[str, torch.Tensor | None], reason: str) -> None:
    plan = plan_of(write_ct(tmp_path / "s", CTLayer(), extra=extra))
    assert any(reason in found for found in plan.refusals), plan.refusals
    with pytest.raises(UnsupportedError):
        plan.require_convertible()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (replaced(scale=None), "weight_packed and no weight_scale"),
        (replaced(shape=None), "weight_packed and no weight_shape"),
        (
            {**CTLayer().tensors("whole"), "layer.weight_packed": None},
            "layer: it has weight_shape and no weight_packed",
        ),
        ({"other.weight_scale": torch.ones(4), "other.weight": torch.ones(4, 4)}, "beside an unpacked weight"),
        (replaced(shape=torch.tensor([255, 256])), "is not that of weight_shape"),
        (replaced(shape=torch.tensor([256, 100000])), "is not that of weight_shape"),
        (replaced(shape=torch.tensor([256, -256])), "an empty layer"),
        (replaced(shape=torch.tensor([256.0, 256.0])), "weight_shape is F32"),
        (replaced(scale=torch.ones(255, 2).half()), "weight_scale .* does not match N = 256"),
        (replaced(scale=torch.ones(256, 0).half()), "weight_scale .* does not match"),
        (replaced(zero_point=torch.zeros(31, 2).int()), "weight_zero_point I32 .* does not match"),
        (replaced(zero_point=torch.zeros(256, 3).to(torch.int8)), "weight_zero_point I8 .* does not match"),
        (replaced(zero_point=torch.full((256, 2), 9).to(torch.int8)), "4 bits cannot hold; the checkpoint is damaged"),
        (replaced(g_idx=torch.zeros(255).int()), "is not one int32 for each row"),
        (replaced(g_idx=torch.full((256,), 7).int()), "g_idx names group 7 of 2"),
        (replaced(g_idx=torch.full((256,), -1).int()), "g_idx names group -1 of 2"),
        ({"layer.bias": torch.ones(3)}, r"bias \[3\] does not match N = 256"),
        ({"layer.B": torch.ones(3).int()}, "it has a weight_packed and, as Marlin layers do, B"),
        ({"a.qweight": torch.ones(4, 4).int(), "a.scales": torch.ones(1, 4)}, "a checkpoint has one format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged(tmp_path: Path, extra: dict[str, torch.Tensor | None], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        plan_of(write_ct(tmp_path / "s", CTLayer(), extra=extra))


def test_the_builder_packs_as_the_library_does() -> None:
    """Of 3 numbers of 4 bits: the first in the lowest."""
    assert stream(np.array([[1, 2, 15]]), 4).tolist() == [[0xF21]]


def test_scales_of_nan_are_refused(tmp_path: Path) -> None:
    extra = replaced(scale=torch.full((256, 2), float("nan")).half())
    with pytest.raises(MarlinConvertError, match="inf or NaN"):
        plan_of(write_ct(tmp_path / "s", CTLayer(), extra=extra)).require_convertible()


def test_no_packed_layer_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match="its config says compressed-tensors, and none of its tensors is a weight_packed"
    ):
        plan_of(write_ct(tmp_path / "s", {}))
    with pytest.raises(UnsupportedError, match="activations are quantized too"):
        plan_of(write_ct(tmp_path / "t", {}, ct_config(group={"input_activations": {"num_bits": 8}})))
