"""AWQ sources of every layout, made here: converted, verified, restored; hostile and mislabelled ones."""

from __future__ import annotations

import json
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
from marlin_convert.errors import SourceError, UnsupportedError
from marlin_convert.formats import awq
from marlin_convert.native import cpu, reference
from marlin_convert.options import Format, Options
from tests.support import format_reader
from tests.support.awq_checkpoints import AWQLayer, awq_config, write_awq
from tests.support.gptq_checkpoints import tensors_of

CPU = Options(device="cpu", verify=True)
EXTENDED = Options(device="cpu", verify=True, format=Format.MARLIN_EXT)


def zeros(G: int, N: int) -> Any:
    return np.random.default_rng(5).integers(0, 16, (G, N))


def plan_of(folder: Path) -> Plan:
    with Checkpoint(folder) as checkpoint:
        return make_plan(checkpoint)


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


# ---- The definition ----


def test_numbers_by_hand() -> None:
    """From the lowest bits up, a word holds columns 0, 2, 4, 6, 1, 3, 5, 7."""
    word = np.array([[0x75316420]], np.int64).astype(np.int32)
    assert awq.numbers(word).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert awq.words(np.arange(8, dtype=np.uint8)[None]).tolist() == word.tolist()


def test_words_by_hand() -> None:
    """Rows 0 to 7 of eight columns, code (row + 2 column) % 16: GPTQ's word of column 1 is 2, 3, … 9 from below."""
    codes = (np.arange(8)[:, None] + 2 * np.arange(8)) % 16
    words = awq.words(codes.astype(np.uint8))
    out = cpu.awq_to_gptq(words, np.empty((1, 8), np.int32))
    assert hex(int(out.view(np.uint32)[0, 1])) == "0x98765432"
    assert hex(int(out.view(np.uint32)[0, 0])) == "0x76543210"
    np.testing.assert_array_equal(cpu.gptq_to_awq(out, np.empty((8, 1), np.int32)), words)


def test_gemv_by_hand() -> None:
    stored = np.array([[0x321], [0x654]], np.int32)
    assert awq.gemv_zeros(stored, 3).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert awq.gemv_zero_words(awq.gemv_zeros(stored, 3), 1).tolist() == stored.tolist()
    with pytest.raises(ValueError, match="beyond its 2 groups"):
        awq.gemv_zeros(stored, 2)
    with pytest.raises(ValueError, match="beyond its 1 groups"):
        awq.gemv_scales(np.ones((2, 8), np.float16), 1)


# ---- Every kind ----

KINDS: dict[str, dict[str, Any]] = {
    "groups of 128": {"K": 256, "N": 256},
    "one group": {"K": 256, "N": 256, "group_size": -1},
    "groups of 64": {"K": 256, "N": 128, "group_size": 64},
    "groups of 32": {"K": 256, "N": 512, "group_size": 32},
    "odd sizes": {"K": 144, "N": 40, "group_size": 48},
    "a short last group": {"K": 1000, "N": 72},
}


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("kind", KINDS)
def test_converted_and_restored(tmp_path: Path, kind: str, asym: bool, layout: str) -> None:
    settings = KINDS[kind]
    size, K, N = settings.get("group_size", 128), settings["K"], settings["N"]
    G = 1 if size == -1 else -(-K // size)
    made = AWQLayer(**settings, zeros=zeros(G, N) if asym else None, layout=layout, width=-(-G // 8) + 1, bias=asym)
    source = write_awq(tmp_path / "source", made, awq_config(group_size=size, version=layout.upper()))
    report = convert(source, tmp_path / "out", EXTENDED)
    assert report.verification is not None
    assert report.verification.layers[0].exact
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


def test_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(blocks, "PANEL_BYTES", 1 << 14)
    monkeypatch.setattr(blocks, "STRIP_ELEMENTS", 300)
    layers = {
        layout: AWQLayer(K=512, N=320, group_size=32, zeros=zeros(16, 320), layout=layout, width=4)
        for layout in ("gemm", "gemv")
    }
    for layout, made in layers.items():
        config = awq_config(group_size=32, version=layout)
        source = write_awq(tmp_path / layout, {"model.lm_head": made}, config)
        convert(source, tmp_path / f"{layout} out", CPU)
        np.testing.assert_array_equal(format_reader.read(tmp_path / f"{layout} out")["model.lm_head"], made.weight)
        restore(tmp_path / f"{layout} out", tmp_path / f"{layout} again", original=True)
        assert_same(tmp_path / f"{layout} again", source)


@pytest.mark.parametrize("group_size", [128, -1])
def test_autoawq_s_marlin_layout_has_other_names(tmp_path: Path, group_size: int) -> None:
    made = AWQLayer(K=256, N=256, group_size=group_size)
    B = reference.pack_marlin(torch.from_numpy(made.codes), 4)
    s = reference.permute_scales(made.scales)
    extra: dict[str, torch.Tensor | None] = {"layer.qweight": B, "layer.scales": s, "layer.qzeros": None}
    config = awq_config(version="marlin", zero_point=False, group_size=group_size)
    source = write_awq(tmp_path / "source", made, config, extra)
    report = convert(source, tmp_path / "out", CPU)
    assert report.plan.format is Format.MARLIN
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["layer.B"], B)
    assert torch.equal(found["layer.s"], s)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


@pytest.mark.parametrize(
    "config",
    [
        awq_config(version=None),
        awq_config(version=None, checkpoint_format="gemm", sym=False, zero_point=None, desc_act=False),
        awq_config(version=None, zero_point=None, quant_method="auto-round", sym=False,
                   packing_format="auto_round:auto_awq", data_type="int"),
    ],
    ids=["no version", "GPTQModel", "AutoRound"],
)  # fmt: skip
def test_writers(tmp_path: Path, config: dict[str, Any]) -> None:
    made = AWQLayer(zeros=zeros(2, 256))
    source = write_awq(tmp_path / "s", made, config)
    assert plan_of(source).notes == {}
    convert(source, tmp_path / "out", CPU)
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)


def test_the_old_config_file(tmp_path: Path) -> None:
    made = AWQLayer(zeros=zeros(2, 256))
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    source = write_awq(tmp_path / "s", made, old=old)
    convert(source, tmp_path / "out", CPU)
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)
    assert "q_group_size" in (tmp_path / "again" / "quant_config.json").read_text()


def test_as_gptq_and_back_it_is_the_same(tmp_path: Path) -> None:
    source = write_awq(tmp_path / "source", AWQLayer(zeros=zeros(2, 256)))
    convert(source, tmp_path / "out", CPU)
    with pytest.raises(UnsupportedError, match=r"layer: it has a zero point of 0.*give --v2"):
        restore(tmp_path / "out", tmp_path / "gptq")
    restore(tmp_path / "out", tmp_path / "gptq", v2=True)
    convert(tmp_path / "gptq", tmp_path / "again", CPU)
    assert_same(tmp_path / "again", tmp_path / "out")


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_a_change_of_one_code_is_found(tmp_path: Path, layout: str) -> None:
    source = write_awq(tmp_path / "source", AWQLayer(layout=layout), awq_config(version=layout))
    convert(source, tmp_path / "out", CPU)
    tensors = load_file(source / "model.safetensors")
    tensors["layer.qweight"][5, 3] ^= 0x30  # gemm: row 5, column 8·3 + 2; gemv: column 5, row 8·3 + 1
    save_file(tensors, source / "model.safetensors")
    (layer,) = verify_pair(source, tmp_path / "out", "cpu").layers
    assert not layer.exact
    assert layer.problem is not None
    place = "row 5, column 26" if layout == "gemm" else "row 25, column 5"
    assert f"the code of {place}" in layer.problem


# ---- Claims, and what is refused ----


@pytest.mark.parametrize(
    ("made", "config", "note"),
    [
        (AWQLayer(), awq_config(), "every zero point is 8; converted as symmetric"),
        (
            AWQLayer(zeros=zeros(2, 256)),
            awq_config(zero_point=False),
            "the config says symmetric and zero points differ",
        ),
        (AWQLayer(group_size=64), awq_config(), "the config says group_size 128, the tensors have 64 rows"),
    ],
    ids=["sym", "asym", "group size"],
)
def test_the_tensors_count(tmp_path: Path, made: AWQLayer, config: dict[str, Any], note: str) -> None:
    source = write_awq(tmp_path / "s", made, config)
    with Checkpoint(source) as checkpoint:
        assert any(note in found for found in make_plan(checkpoint, "marlin_ext").notes)
    convert(source, tmp_path / "out", EXTENDED)
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], made.weight)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (awq_config(version="gemv_fast"), "the layout gemv_fast, which stores zero points only as rounded products"),
        (awq_config(version="llm-awq"), "the layout llm-awq"),
        (
            awq_config(bits=8),
            "an AWQ checkpoint of 8 bits, whose words hold codes of 4; quantize the model with 4 bits",
        ),
        (awq_config(quant_method="gptq", version=None), "it says GPTQ, and the tensors are AWQ's"),
        (awq_config(quant_method="compressed-tensors", version=None), "it says compressed-tensors, and"),
        (awq_config(quant_method=None, version=None), "and the tensors are AWQ's"),
        (awq_config(quant_method="auto-round", packing_format="auto_round:auto_gptq"), "AutoRound in GPTQ's packing"),
        (awq_config(quant_method="auto-round", packing_format="auto_round:fp8"), "of the type 'fp8'"),
    ],
)
def test_refused_by_its_config(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        plan_of(write_awq(tmp_path / "s", AWQLayer(), config))


def replaced(**parts: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    return {f"layer.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (replaced(qzeros=None), "no qzeros, without which AWQ's tensors tell no weight"),
        (replaced(qzeros=torch.zeros(2, 32)), "qzeros are F32"),
        (replaced(scales=torch.ones(2, 256, dtype=torch.float64)), "scales are F64"),
        (replaced(qweight=torch.zeros(252, 32).int()), "K = 252 or N = 256 does not fill whole words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_layers(tmp_path: Path, extra: dict[str, torch.Tensor | None], reason: str) -> None:
    plan = plan_of(write_awq(tmp_path / "s", AWQLayer(), extra=extra))
    assert any(reason in found for found in plan.refusals), plan.refusals


@pytest.mark.parametrize(
    ("layout", "extra", "reason"),
    [
        ("gemm", replaced(qzeros=torch.zeros(3, 32).int()), r"qzeros \[3, 32\] does not match 2 groups of N = 256"),
        ("gemm", replaced(bias=torch.ones(7)), r"bias \[7\] does not match N = 256"),
        ("gemm", {"other.qzeros": torch.zeros(2, 32).int()}, "other: it has qzeros and no qweight"),
        ("gemv", replaced(qzeros=torch.full((256, 1), 0x100).int()), "qzeros has numbers beyond its 2 groups"),
        ("gemv", replaced(scales=torch.ones(256, 8).half()), "scales has numbers beyond its 2 groups"),
        ("gemm", replaced(g_idx=torch.zeros(256).int()), "it has a qweight and, as GPTQ layers do, g_idx"),
        ("gemm", {"layer.B": torch.zeros(1).int()}, "it has a qweight and, as Marlin layers do, B"),
    ],
)
def test_damaged(tmp_path: Path, layout: str, extra: dict[str, torch.Tensor | None], reason: str) -> None:
    source = write_awq(tmp_path / "s", AWQLayer(layout=layout), awq_config(version=layout), extra)
    with pytest.raises(SourceError, match=reason):
        plan_of(source)


def test_gemv_without_a_group_size(tmp_path: Path) -> None:
    config = awq_config(version="gemv", group_size=None)
    with pytest.raises(SourceError, match="a config that tells its group size"):
        plan_of(write_awq(tmp_path / "s", AWQLayer(layout="gemv"), config))


def test_no_layer_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="its config says AWQ, and none of its tensors is a qweight"):
        plan_of(write_awq(tmp_path / "s", {}))


def test_layers_of_several_layouts_go_back_to_their_own(tmp_path: Path) -> None:
    layers = {"a": AWQLayer(), "b": AWQLayer(layout="gemv"), "c": AWQLayer(layout="gemv", width=3)}
    source = write_awq(tmp_path / "source", layers)
    convert(source, tmp_path / "out", CPU)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert_same(tmp_path / "again", source)


@pytest.mark.parametrize("key", ["layout", "layouts", "zeros_width", "zeros_widths", "scales_dtype", "scales_dtypes"])
@pytest.mark.parametrize("value", ["a", 7, None, {}, {"layer": "a"}, {"layer": 7}, [1]])
def test_a_note_that_somebody_changed(tmp_path: Path, key: str, value: object) -> None:
    """The layer is restored by what is left, or refused in a sentence."""
    convert(write_awq(tmp_path / "source", AWQLayer(layout="gemv")), tmp_path / "out", CPU)
    file = tmp_path / "out" / "marlin_convert.json"
    report = json.loads(file.read_text())
    report["source_quantization"][key] = value
    file.write_text(json.dumps(report))
    try:
        restore(tmp_path / "out", tmp_path / "again", original=True)
    except SourceError:
        assert not (tmp_path / "again").exists()
    else:
        assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "source").keys()
