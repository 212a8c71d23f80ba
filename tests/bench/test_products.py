"""`bench` on a CPU, with a clock and products of our own: what is timed, what the numbers mean, what memory allows.

The timer and the kernels are injected; all else is the code that runs on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from marlin_convert.bench import products as b
from marlin_convert.bench import results
from marlin_convert.bench.products import Peer
from marlin_convert.bench.results import Limits, Machine, Speed
from marlin_convert.bench.shapes import DEFAULT_PRESET, PRESETS, Shape, source_shapes
from marlin_convert.cli import commands
from marlin_convert.conversion.convert import convert
from marlin_convert.errors import DeviceError, SourceError, UnsupportedError
from marlin_convert.native import reference
from marlin_convert.options import HubAccess, Options
from tests.support.bench import MACHINE, SHAPE, Bench, Heard
from tests.support.gptq_checkpoints import GPTQLayer, two_layers, write_source

# ---- What is measured ----


def test_the_presets_are_the_models() -> None:
    sizes = {name: [(x.name, x.K, x.N) for x in shapes] for name, shapes in PRESETS.items()}
    small = [("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096)]
    assert sizes == {
        "mistral-7b": small,
        "llama-3-8b": small,
        "llama-70b": [("qkv", 8192, 10240), ("o", 8192, 8192), ("gate_up", 8192, 57344), ("down", 28672, 8192)],
    }
    assert {x.group_size for shapes in PRESETS.values() for x in shapes} == {128}
    assert DEFAULT_PRESET in PRESETS
    assert b.BATCH[0] == 1
    assert b.BATCH[-1] == 4096


def test_the_help_names_the_presets() -> None:
    preset = next(p for p in commands.cli.commands["bench"].params if p.name == "preset")
    assert preset.metavar == "|".join(PRESETS)
    assert DEFAULT_PRESET in str(preset.help)


def test_shapes_of_a_gptq_checkpoint(tmp_path: Path) -> None:
    layers = {
        f"model.layers.{i}.{name}": GPTQLayer(K=K, N=N)
        for i in range(2)
        for name, (K, N) in {"attn.k_proj": (256, 256), "attn.v_proj": (256, 256), "mlp.up": (256, 512)}.items()
    }
    write_source(tmp_path / "source", layers | {"odd": GPTQLayer(K=256, N=320), "few": GPTQLayer(bits=2)})
    label, shapes, notes = source_shapes(tmp_path / "source", HubAccess())
    assert label == "source"
    assert set(shapes) == {
        Shape("k_proj/v_proj", 256, 256, 2, 4), Shape("up", 256, 512, 2, 2), Shape("odd", 256, 320, 2),
    }  # fmt: skip
    ((note, left),) = notes.items()
    assert note.startswith("left out, Marlin cannot hold it: 2-bit weights; Marlin has 4 and 8 bits")
    assert left == ["few"]


@pytest.mark.parametrize("group_size", [128, -1])
def test_shapes_of_a_marlin_checkpoint_are_those_of_its_source(tmp_path: Path, group_size: int) -> None:
    write_source(tmp_path / "source", two_layers(group_size=group_size))
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    ours = source_shapes(tmp_path / "out", HubAccess())[1]
    assert set(ours) == set(source_shapes(tmp_path / "source", HubAccess())[1])
    assert {x.group_size for x in ours} == {group_size}


def test_shapes_of_the_extended_format(tmp_path: Path) -> None:
    """Padding, bits, groups, zero points and act-order, from a GPTQ source as from what becomes of it."""
    K, N = 200, 96
    order = np.random.default_rng(0).permutation(np.arange(K) // 32)
    zeros = np.arange(7 * N).reshape(7, N) % 250
    layers = {
        "a.eight": GPTQLayer(K=K, N=N, bits=8, group_size=32, stored_zero=zeros, g_idx=order),
        "a.four": GPTQLayer(K=256, N=256, group_size=64),
    }
    write_source(tmp_path / "source", layers)
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    expected = {
        Shape("eight", K, N, 8, bits=8, zeros=True, act_order=True), Shape("four", 256, 256, 4)
    }  # fmt: skip
    for folder in ("source", "out"):
        label, shapes, notes = source_shapes(tmp_path / folder, HubAccess())
        assert (label, set(shapes), notes) == (folder, expected, {})
    eight = next(x for x in shapes if x.bits == 8)
    assert eight.stored == (256, 128)
    assert eight.group_size == 32
    assert eight.packed_bytes == 256 * 128 + 8 * 128 * 2 + 8 * 128 + K * 4
    machine = Bench()
    report = b.bench("x", shapes, machine.rig, batch=[1, 3])
    assert {(what, M, K_, N_) for what, M, K_, N_ in machine.products if what == "marlin"} == {
        ("marlin", 1, 256, 128), ("marlin", 3, 256, 128), ("marlin", 1, 256, 256), ("marlin", 3, 256, 256),
    }  # fmt: skip
    assert [x.as_dict()["bits"] for x in report.layers] == [x.bits for x in shapes]


def test_a_source_with_nothing_to_measure(tmp_path: Path) -> None:
    write_source(tmp_path / "source", two_layers(bits=2))
    with pytest.raises(UnsupportedError, match="2-bit weights"):
        source_shapes(tmp_path / "source", HubAccess())


@pytest.mark.parametrize(
    ("B", "s"), [((16, 512, 1), (2, 256)), ((16, 500), (2, 250)), ((16, 512), (3, 256)), ((16, 512), (2, 255))]
)
def test_marlin_tensors_that_make_no_layer(tmp_path: Path, B: tuple[int, ...], s: tuple[int, ...]) -> None:
    plain = {"layer.B": torch.zeros(B, dtype=torch.int32), "layer.s": torch.zeros(s, dtype=torch.float16)}
    write_source(tmp_path / "source", {}, plain, quantization={"quant_method": "gptq", "checkpoint_format": "marlin"})
    with pytest.raises(SourceError, match=r"^layer: "):
        source_shapes(tmp_path / "source", HubAccess())


# ---- Numbers ----


def test_a_known_cell() -> None:
    """4096 x 4096, M = 1, 3 TB/s, 600 TFLOP/s: 8.4 MB of codes and 0.26 MB of scales take 2.9 µs."""
    nbytes = 4096 * 4096 // 2 + 32 * 4096 * 2 + 2 * (4096 + 4096)
    assert nbytes == 8_667_136
    limits = Limits(3e12, 600e12)
    speed = Speed(9.5, nbytes, 2 * 4096 * 4096, limits.us(nbytes, 2 * 4096 * 4096), "memory")
    assert limits.bound(nbytes, 2 * 4096 * 4096) == "memory"
    assert speed.limit_us == pytest.approx(2.889, abs=1e-3)
    assert speed.gb_per_s == pytest.approx(912.3, abs=0.1)
    assert speed.tflop_per_s == pytest.approx(3.532, abs=1e-3)
    assert speed.share_of_limit == pytest.approx(0.3041, abs=1e-4)
    flops = 2 * 2048 * 4096 * 4096
    assert limits.bound(nbytes, flops) == "compute"
    assert limits.us(nbytes, flops) == pytest.approx(flops / 600e6)


def test_a_report() -> None:
    machine = Bench()
    report = b.bench("model", [SHAPE], machine.rig, batch=(1, 256))
    K, N, packed = 256, 128, 256 * 128 // 2 + 2 * 128 * 2
    # The copy takes 10 µs, and moves 1 MiB each way; the product of 64³ takes 8 µs.
    assert report.limits.copy_bytes_per_s == pytest.approx(2 * (1 << 20) / 10e-6)
    assert report.limits.fp16_flop_per_s == pytest.approx(2 * 64**3 / 8e-6)
    assert report.machine is MACHINE
    assert report.notes == {}
    (layer,) = report.layers
    assert layer.shape is SHAPE
    assert [(c.M, c.method, c.speedup, c.peers) for c in layer.cells] == [
        (1, "kernel", 4.0, {}), (256, "dequantize", 4.0, {})
    ]  # fmt: skip
    for cell in layer.cells:
        rows = 2 * cell.M * (K + N)
        assert (cell.fp16.us, cell.fp16.nbytes) == (8.0, 2 * K * N + rows)
        assert (cell.marlin.us, cell.marlin.nbytes) == (2.0, packed + rows)
        assert cell.fp16.flops == cell.marlin.flops == 2 * cell.M * K * N
        assert cell.marlin.limit_us == report.limits.us(cell.marlin.nbytes, cell.marlin.flops)


def test_weights_rotate_through_more_than_the_cache() -> None:
    machine = Bench()
    b.bench("model", [SHAPE], machine.rig, batch=(4,))
    for what, nbytes in (("fp16", SHAPE.fp16_bytes), ("marlin", SHAPE.packed_bytes)):
        addresses = [
            address
            for address, (kind, M, *_) in zip(machine.read, machine.products, strict=True)
            if (kind, M) == (what, 4)
        ]
        assert len(set(addresses)) == len(addresses)
        assert len(addresses) * nbytes >= results.ROTATE * machine.rig.l2_bytes
    assert b.copies(1 << 30, 50 << 20) == 2
    assert b.copies(1, 50 << 20) == b.MAX_COPIES


def test_weights_are_random() -> None:
    weights = b.random_weights(SHAPE, Bench().rig)
    codes = reference.unpack_marlin(weights.packed[0].weight)
    assert torch.bincount(codes.flatten(), minlength=16).min() > SHAPE.K * SHAPE.N / 16 / 2
    assert all(not torch.equal(weights.packed[0].weight, layer.weight) for layer in weights.packed[1:])
    assert all(x.scales.min() > 0 and torch.isfinite(x.scales).all() for x in weights.packed)
    assert all(W.float().std() > 0.01 for W in weights.plain)


def test_small_weights_are_said_to_be_cached() -> None:
    report = b.bench("model", [SHAPE], Bench(l2_bytes=1 << 30).rig, batch=(1,))
    assert report.notes == {"so small that its weights come from the L2 cache, not from memory": ["qkv 256 x 128"]}


def test_the_gpu_is_busy_while_its_clocks_are_read() -> None:
    machine = Bench()
    queued: list[int] = []

    def describe() -> Machine:
        queued.append(len(machine.products))
        assert machine.synchronized == 0
        return MACHINE

    b.measure_limits(replace(machine.rig, describe=describe))
    assert queued == [1001]  # one was timed, 1000 follow
    assert machine.synchronized == 1


def test_progress_counts_timings() -> None:
    heard = Heard()
    shapes = [SHAPE, Shape("too large", 1 << 20, 1 << 20, 1)]
    b.bench("model", shapes, Bench().rig, batch=(1, 2, 4), progress=heard)
    assert heard.stages == [("measuring", 6, 2)]
    assert (heard.count, heard.done, heard.ended) == (6, 2, True)
    assert "qkv 256 x 128, M = 4" in heard.said


# ---- Memory ----


def test_what_does_not_fit_is_left_out_with_a_note() -> None:
    machine = Bench(free_bytes=lambda: b.SLACK_BYTES + 20_000_000)
    large = Shape("large", 4096, 4096, 32)
    report = b.bench("model", [large, SHAPE], machine.rig, batch=(1, 1 << 16))
    assert [(x.shape.name, [c.M for c in x.cells]) for x in report.layers] == [("qkv", [1])]
    assert [w for where in report.notes.values() for w in where] == [
        "large 4096 x 4096, M = 1", "large 4096 x 4096, M = 65536", "qkv 256 x 128, M = 65536",
    ]  # fmt: skip
    assert all("GB of memory and 0.6 GB are free" in note for note in report.notes)
    with pytest.raises(DeviceError, match=r"nothing could be measured on NVIDIA H100 .*: left out: it needs"):
        b.bench("model", [large], machine.rig, batch=(1,))


def test_a_peer_with_weights_of_its_own_needs_more() -> None:
    rig = Bench().rig
    own = Peer("x", "1", lambda *_: lambda _: [], own_weights=True)
    more = b.bytes_needed(SHAPE, 1, rig, [own]) - b.bytes_needed(SHAPE, 1, rig)
    assert more >= results.ROTATE * rig.l2_bytes
    assert b.bytes_needed(SHAPE, 1, rig, [replace(own, own_weights=False)]) == b.bytes_needed(SHAPE, 1, rig)


def test_memory_that_runs_out_all_the_same() -> None:
    machine = Bench()

    def fp16(a: torch.Tensor, W: torch.Tensor, *, out: torch.Tensor) -> object:
        if a.shape[0] == 2:
            raise torch.OutOfMemoryError("no")
        return machine.fp16(a, W, out=out)

    report = b.bench("model", [SHAPE], replace(machine.rig, fp16=fp16), batch=(1, 2, 4))
    assert [c.M for c in report.layers[0].cells] == [1, 4]
    assert report.notes == {"left out: the GPU's memory ran out": ["qkv 256 x 128, M = 2"]}


def test_memory_is_handed_back_after_every_layer() -> None:
    alive: list[int] = []
    machine = Bench()

    def free() -> int:
        alive.append(sum(tensor() is not None for tensor in machine.tensors))
        return 1 << 30

    b.bench("model", [SHAPE, SHAPE], replace(machine.rig, free_bytes=free), batch=(1, 2))
    assert len(machine.tensors) > 100
    assert alive == [0, 0, 0]  # before the limits are measured and before each layer
    assert machine.released >= 3
