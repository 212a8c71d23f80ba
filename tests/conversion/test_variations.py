"""Every kind of GPTQ layer through a whole conversion: weights equal to the definition's, the way back, verification.

Expected values are the test's own, in float64, from the GPTQ definition.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import UnsupportedError
from marlin_convert.native import cpu, reference
from marlin_convert.native.choose import CUDAPacker
from marlin_convert.options import Format, Options
from tests.support import format_reader
from tests.support.gptq_checkpoints import GPTQLayer, Source, asymmetric, quantization_config, shuffled, write_source
from tests.support.results import assert_exact, assert_restored

NAME = "model.layers.0.mlp.down_proj"
CPU = Options(device="cpu", verify=True)


def assert_published(source: Source, out: Path) -> None:
    """The same by a reader that knows docs/concepts/format.md and nothing else."""
    found = format_reader.read(out)
    assert sorted(found) == sorted(source.layers)
    for name, layer in source.layers.items():
        np.testing.assert_array_equal(found[name], layer.weight, err_msg=name)


KINDS: dict[str, dict[str, Any]] = {
    "groups of 128": {"K": 256, "N": 256},
    "per-channel": {"K": 256, "N": 256, "group_size": -1},
    "groups of 32": {"K": 256, "N": 128, "group_size": 32},
    "groups of 64": {"K": 256, "N": 128, "group_size": 64},
    "groups of 16": {"K": 128, "N": 64, "group_size": 16},
    "groups of 256": {"K": 512, "N": 64, "group_size": 256},
    "groups of 1024": {"K": 2048, "N": 64, "group_size": 1024},
    "groups of 96": {"K": 288, "N": 64, "group_size": 96},
    "8 bits": {"K": 256, "N": 256, "bits": 8},
    "8 bits, groups of 32": {"K": 256, "N": 64, "bits": 8, "group_size": 32},
    "a short last group": {"K": 1000, "N": 64},
    "a short last group of 256, 8 bits": {"K": 600, "N": 96, "group_size": 256, "bits": 8},
    "odd sizes": {"K": 896, "N": 128},
    "very odd sizes": {"K": 72, "N": 40, "group_size": 16},
    "hidden size 576": {"K": 576, "N": 576, "group_size": 64},
}


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path: Path, kind: str, order: bool, asym: bool) -> None:
    """Converted, verified, equal to the definition, verified again from disk, and brought back bit for bit."""
    layer = dict(KINDS[kind])
    bits, size = layer.get("bits", 4), layer.get("group_size", 128)
    layer["stored_zero"] = asymmetric(layer["K"], layer["N"], size, bits) if asym else 2 ** (bits - 1) - 1
    if order and size != -1:
        layer["g_idx"] = shuffled(layer["K"], size)
    desc_act = order and size != -1
    source = write_source(
        tmp_path / "source",
        {NAME: GPTQLayer(**layer, bias=asym)},
        quantization=quantization_config(bits=bits, group_size=size, sym=not asym, desc_act=desc_act),
    )
    report = convert(source.folder, tmp_path / "out", CPU)
    original = not asym and not desc_act and kind in ("groups of 128", "per-channel")
    assert report.plan.format == ("marlin" if original else "marlin_ext")
    assert report.verification is not None
    assert report.verification.worst < 1e-3
    assert_exact(source, tmp_path / "out")
    if not original:
        assert_published(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {"B", "s", "marlin_qweight", "marlin_scales", "marlin_qzeros", "marlin_perm"}
    plain = source.plain | ({f"{NAME}.bias": source.layers[NAME].bias_tensor} if asym else {})
    assert {name for name in found if name.rpartition(".")[2] not in kinds} == plain.keys()
    for name, tensor in plain.items():  # the bias too: as it is, neither permuted nor padded
        assert torch.equal(found[name], tensor), name
    assert verify_pair(source.folder, tmp_path / "out", "cpu").ok
    restore(tmp_path / "out", tmp_path / "back")
    assert_restored(source, tmp_path / "back")
    before = json.loads((source.folder / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before


def test_layers_side_by_side(tmp_path: Path) -> None:
    """Mixed settings as `dynamic` makes them, experts, a quantized head, unquantized layers, two shards."""
    layers = {
        "model.layers.0.self_attn.q_proj": GPTQLayer(K=256, N=256),
        "model.layers.0.mlp.experts.0.w1": GPTQLayer(K=256, N=128, bits=8, group_size=64, stored_zero=127, seed=1),
        "model.layers.0.mlp.experts.1.w1": GPTQLayer(K=256, N=128, group_size=-1, seed=2),
        "model.layers.0.self_attn.o_proj": GPTQLayer(K=256, N=256, g_idx=shuffled(256, 128), seed=3),
        "lm_head": GPTQLayer(K=256, N=200, seed=4),
    }
    dynamic = {r"+:.*experts\.0": {"bits": 8, "group_size": 64}, r"-:.*\.gate$": {}}
    source = write_source(tmp_path / "source", layers, quantization=quantization_config(dynamic=dynamic), shards=2)
    convert(source.folder, tmp_path / "out", CPU)
    assert_exact(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "gptq", "checkpoint_format": "marlin_ext", "marlin_ext_version": 1, "bits": 4,
        "group_size": 128, "sym": True, "desc_act": False, "lm_head": True,
        "layers": {
            "model.layers.0.mlp.experts.0.w1": {"bits": 8, "group_size": 64},
            "model.layers.0.mlp.experts.1.w1": {"group_size": -1},
            "model.layers.0.self_attn.o_proj": {"desc_act": True},
            "lm_head": {"out_features": 200},
        },
    }  # fmt: skip
    assert "torch_dtype" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_published(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert_restored(source, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("panel", "strip"), [(1, 1), (60_000, 20_000), (10**9, 20_000)])
def test_act_order_in_many_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, panel: int, strip: int
) -> None:
    """One tile column at a time; several; strips within one panel: the seams are where a wrong offset would show."""
    monkeypatch.setattr("marlin_convert.conversion.blocks.PANEL_BYTES", panel)
    monkeypatch.setattr("marlin_convert.conversion.blocks.BLOCK_BYTES", strip)
    stored = asymmetric(352, 1000, 32, bits)
    layers = {
        NAME: GPTQLayer(K=352, N=1000, bits=bits, group_size=32, stored_zero=stored, g_idx=shuffled(352, 32)),
        "lm_head": GPTQLayer(
            K=384, N=704, bits=bits, group_size=64, stored_zero=2 ** (bits - 1) - 1, g_idx=shuffled(384, 64)
        ),
    }
    quantization = quantization_config(bits=bits, group_size=32, sym=False, desc_act=True)
    source = write_source(tmp_path / "source", layers, quantization=quantization)
    report = convert(source.folder, tmp_path / "out", CPU)
    assert report.verification is not None
    assert report.verification.ok
    assert_exact(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert_restored(source, tmp_path / "back")


def test_another_packer_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the rows are sorted on the CPU and packed there."""
    layer = GPTQLayer(K=352, N=200, group_size=32, g_idx=shuffled(352, 32))
    quantization = quantization_config(group_size=32, desc_act=True)
    source = write_source(tmp_path / "source", {NAME: layer}, quantization=quantization)
    convert(source.folder, tmp_path / "ours", CPU)

    class Other(CUDAPacker):
        def pack(self, words: Any, B: Any, bits: int) -> None:
            B[...] = reference.gptq_to_marlin(torch.from_numpy(words), bits).numpy()

    monkeypatch.setattr("marlin_convert.conversion.convert.packer", lambda *_: Other(torch.device("cpu")))
    convert(source.folder, tmp_path / "theirs", CPU)
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("ours", "theirs"))
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("value", [1e5, 1e-9])
def test_scales_beyond_fp16_stay_bf16(tmp_path: Path, value: float) -> None:
    scales = np.full((2, 256), 0.01)
    scales[1, 200] = value
    source = write_source(tmp_path / "source", {NAME: GPTQLayer(scales=scales, scale_dtype=torch.bfloat16)})
    report = convert(source.folder, tmp_path / "out", CPU)
    assert report.plan.format == "marlin_ext"
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.marlin_scales"].dtype == torch.bfloat16
    assert_exact(source, tmp_path / "out")
    assert_published(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back")
    assert_restored(source, tmp_path / "back")


def test_mislabelled_act_order_is_converted_with_it(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", {NAME: GPTQLayer(g_idx=shuffled(256, 128))})
    report = convert(source.folder, tmp_path / "out", CPU)
    assert "the config says desc_act false and g_idx is shuffled; converted with act-order" in report.plan.notes
    assert_exact(source, tmp_path / "out")


def test_mislabelled_symmetry_is_converted_without_it(tmp_path: Path) -> None:
    stored = asymmetric(256, 256)
    source = write_source(tmp_path / "source", {NAME: GPTQLayer(stored_zero=stored)})
    report = convert(source.folder, tmp_path / "out", CPU)
    assert "the config says sym and zero points differ; converted as asymmetric" in report.plan.notes
    assert_exact(source, tmp_path / "out")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "2 bits": ({"bits": 2, "stored_zero": 1}, {"bits": 2}, "2-bit weights; Marlin has 4 and 8 bits"),
    "3 bits": ({"bits": 3, "stored_zero": 3}, {"bits": 3}, "3-bit weights"),
    "unequal groups": (
        {"g_idx": np.random.default_rng(0).permutation(np.repeat([0, 1], [127, 129]))},
        {"desc_act": True},
        r"act-order with groups of unequal size \(group 0 has 127 rows, not 128\)",
    ),
    "groups of 40": ({"K": 280, "group_size": 40}, {"group_size": 40}, "groups of 40; .* multiple of 16 rows"),
    "a zero point of 0, unknown writer": (
        {"stored_zero": np.full((2, 256), 15)},
        {"sym": False},
        "stored as 15: its writers differ .*--zero-points word",
    ),
    "a zero point of 0 by AutoGPTQ": (
        {"stored_zero": np.full((2, 256), 15)},
        {"sym": False, "meta": {"quantizer": "auto_gptq:0.7.1"}},
        "AutoGPTQ, which wrote it, loses the numbers beside it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_neither_format_can_hold(tmp_path: Path, name: str) -> None:
    layer, quantization, message = REFUSED[name]
    write_source(tmp_path / "source", {NAME: GPTQLayer(**layer)}, quantization=quantization_config(**quantization))
    for format_ in (Format.AUTO, Format.MARLIN_EXT):
        with pytest.raises(UnsupportedError, match=message) as error:
            convert(tmp_path / "source", tmp_path / "out", Options(device="cpu", format=format_))
        assert "cannot be converted to either Marlin format" in error.value.message
        assert not (tmp_path / "out").exists()


def test_the_format_on_request(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", {NAME: GPTQLayer()})
    convert(source.folder, tmp_path / "out", Options(device="cpu", verify=True, format=Format.MARLIN_EXT))
    assert_exact(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"{NAME}.marlin_qweight", f"{NAME}.marlin_scales"} <= set(tensors)
    odd = write_source(tmp_path / "odd", {NAME: GPTQLayer(N=320)})
    with pytest.raises(UnsupportedError, match="do not fit the original Marlin format"):
        convert(odd.folder, tmp_path / "other", Options(device="cpu", format=Format.MARLIN))


@pytest.mark.parametrize("part", ["marlin_qweight", "marlin_scales", "marlin_qzeros", "marlin_perm"])
def test_verification_finds_a_change(tmp_path: Path, part: str) -> None:
    from safetensors.torch import save_file

    layer = GPTQLayer(K=320, N=72, group_size=64, g_idx=shuffled(320, 64),
                      stored_zero=asymmetric(320, 72, 64))  # fmt: skip
    source = write_source(
        tmp_path / "source", {NAME: layer}, quantization=quantization_config(sym=False, group_size=64)
    )
    convert(source.folder, tmp_path / "out", CPU)
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    changed = tensors[f"{NAME}.{part}"]
    if part == "marlin_perm":
        changed[[0, 1]] = changed[[1, 0]]
    else:
        changed.view(torch.int16 if part == "marlin_scales" else torch.int32)[1, 3] ^= 1 << 4
    save_file(tensors, file, {"format": "pt"})
    report = verify_pair(source.folder, tmp_path / "out", "cpu")
    assert not report.ok
    assert report.layers[0].problem is not None
    wanted = {"marlin_qweight": "the code of row", "marlin_scales": "the scale of group 1",
              "marlin_qzeros": "the zero point of group 1", "marlin_perm": "stored row 0 is said to be"}  # fmt: skip
    assert wanted[part] in report.layers[0].problem


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([4, 8]), size=st.sampled_from([-1, 16, 32, 48, 64, 128, 256]), groups=st.integers(1, 5),
    rest=st.integers(0, 3), N=st.integers(1, 30), asym=st.booleans(), order=st.booleans(), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_layer(
    tmp_path_factory: pytest.TempPathFactory, bits: int, size: int, groups: int, rest: int, N: int, asym: bool,
    order: bool, seed: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    K = 8 * (groups * 16 + rest) if size == -1 else max(8, groups * size - 8 * rest)
    layer: dict[str, Any] = {
        "K": K,
        "N": 8 * N,
        "bits": bits,
        "group_size": size,
        "seed": seed % 1000,
        "scale_dtype": dtype,
    }
    middle = 2 ** (bits - 1) - 1
    layer["stored_zero"] = asymmetric(K, 8 * N, size, bits) if asym else middle
    if order and size != -1:
        layer["g_idx"] = shuffled(K, size, seed)
    source = write_source(
        folder / "source", {NAME: GPTQLayer(**layer)}, {},
        quantization=quantization_config(bits=bits, group_size=size, sym=not asym, desc_act=order),
    )  # fmt: skip
    convert(source.folder, folder / "out", Options(device="cpu", verify=True, format=Format.MARLIN_EXT))
    assert_exact(source, folder / "out")
    restore(folder / "out", folder / "back")
    assert_restored(source, folder / "back")


def test_the_twin_converts_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.native_available():
        pytest.skip("the native library is not built")
    layer = GPTQLayer(K=200, N=72, bits=8, group_size=64, g_idx=shuffled(200, 64), stored_zero=127)
    source = write_source(tmp_path / "source", {NAME: layer}, quantization=quantization_config(bits=8, group_size=64))
    convert(source.folder, tmp_path / "a", CPU)
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    convert(source.folder, tmp_path / "b", CPU)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
