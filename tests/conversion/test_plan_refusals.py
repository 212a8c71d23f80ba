"""What is refused, by name and with every reason; shapes and types that are no GPTQ linear; other checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.conversion.names import span
from marlin_convert.conversion.plan import plan_as_dict
from marlin_convert.errors import SourceError, UnsupportedError
from tests.support.gptq_checkpoints import GPTQLayer, shuffled, write_source
from tests.support.plans import (
    NO_QUANTIZATION,
    assert_converts,
    assert_refused,
    error_of,
    layer_zeros,
    plan_of,
    planned,
)

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
    assert "it says GPTQ, and the tensors are AWQ's" in message


def test_bias_is_copied(tmp_path: Path) -> None:
    """Also an all-zero one, which readers would miss (AutoGPTQ#554)."""
    tensors = changed(bias=torch.zeros(256, dtype=torch.float16))
    plan = planned(tmp_path, {}, tensors)
    assert [t.name for t in plan.copies] == ["the.layer.bias"]
    assert plan.layers[0].bias is not None


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
    assert "a checkpoint of GPTQ, AWQ or compressed-tensors is needed" in message


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "compressed-tensors", "exl2"])
def test_config_of_another_method(tmp_path: Path, method: str) -> None:
    message = error_of(lambda: planned(tmp_path, GPTQLayer(), quant_method=method), UnsupportedError)
    assert method.lower() in message.lower()


def test_no_config_at_all(tmp_path: Path) -> None:
    """The tensors tell everything; that engines need a config.json is said."""
    save_file(GPTQLayer().tensors("layer"), tmp_path / "model.safetensors")
    assert_converts(plan_of(tmp_path), notes="no config.json")
