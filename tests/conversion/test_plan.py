"""What becomes of every tensor. The tensors decide, and not what the config says about them; each variation that is
met in the wild is here and in the other tests of plans, and must be converted rightly or refused by name.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.plan import make_plan, plan_as_dict
from marlin_convert.engine_support import vllm_needs_our_kernels
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, shuffled, two_layers, write_source
from tests.support.plans import assert_converts, assert_refused, layer_zeros, plan_of, planned

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


def test_what_vllm_lacks_is_said(tmp_path: Path) -> None:
    """The same as its plugin asks for when it loads (test_vllm_linear.py, test_vllm_choice.py)."""
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
    needed = {
        "groups of 16": ["a", "b", "l.4.experts.0.up_proj"],
        "8 bits with zero points": ["c"],
        "experts of different settings in one block": ["l.1.experts.0.up_proj", "l.1.experts.1.up_proj"],
        "experts with act-order": ["l.2.experts.0.up_proj"],
        "experts with biases": ["l.2.experts.0.up_proj"],
        "experts that are stored padded": ["l.3.experts.0.up_proj"],
    }
    assert vllm_needs_our_kernels(plan.layer_facts) == needed
    document = plan_as_dict(plan, "s")
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
            "source_format": "gptq",
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
