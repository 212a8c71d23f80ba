"""`bench` on a CPU, with a clock and products of our own: what is timed, what the numbers mean, what is said and drawn.

The timer and the kernels are injected; all else is the code that runs on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert import cli
from marlin_convert.bench import gpu as the_gpu
from marlin_convert.bench import products as b
from marlin_convert.bench import results
from marlin_convert.bench.products import Peer, Weights
from marlin_convert.bench.results import Cell, Limits, Machine, Report, Rig, Speed
from marlin_convert.bench.shapes import DEFAULT_PRESET, PRESETS, Shape, source_shapes
from marlin_convert.cli import commands
from marlin_convert.cli.bench_output import BenchScreen
from marlin_convert.cli.params import OutputOptions
from marlin_convert.cli.plot import Plot
from marlin_convert.cli.progress import Bars, PlainLines
from marlin_convert.conversion.convert import convert
from marlin_convert.device import CPU, Device
from marlin_convert.errors import DeviceError, MarlinConvertError, OutputError, SourceError, UnsupportedError
from marlin_convert.native import reference
from marlin_convert.options import HubAccess, Options
from marlin_convert.progress import Progress
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, two_layers, write_source

MACHINE = Machine(
    "cuda:0", "NVIDIA H100 [80GB]", "9.0", 132, 50 << 20, 80 << 30, "580.1", {"torch": "2.13.0", "python": "3.11"},
    {"sm_mhz": 1755.0, "max_sm_mhz": 1980.0, "memory_mhz": 2619.0, "max_memory_mhz": 2619.0, "power_w": None},
)  # fmt: skip
SHAPE = Shape("qkv", 256, 128, 2, 32)


class Bench:
    """A pretended GPU: products take the time that `cost` says, and are written down."""

    def __init__(self, **changes: Any) -> None:
        self.now = 0.0
        self.products: list[tuple[str, int, int, int]] = []  # (what, M, K, N)
        self.read: list[int] = []  # addresses of the weights
        self.tensors: list[weakref.ref[torch.Tensor]] = []
        self.synchronized = self.released = 0
        self.cost = {"fp16": 8.0, "marlin": 2.0}
        self.rig = replace(
            Rig(
                device=torch.device("cpu"), kernels=self, fp16=self.fp16, time=self.time, describe=lambda: MACHINE,
                free_bytes=lambda: 1 << 30, synchronize=self.synchronize, release=self.release, l2_bytes=100_000,
                copy_bytes=1 << 20, product_size=64,
            ),
            **changes,
        )  # fmt: skip

    def took(self, what: str, a: torch.Tensor, weight: torch.Tensor, K: int, N: int) -> None:
        assert a.dtype == torch.float16
        self.products.append((what, a.shape[0], K, N))
        self.read.append(weight.data_ptr())
        self.tensors += [weakref.ref(a), weakref.ref(weight)]
        self.now += self.cost[what]

    def fp16(self, a: torch.Tensor, W: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        K, N = W.shape
        assert (W.dtype, out.dtype, tuple(out.shape)) == (torch.float16, torch.float16, (a.shape[0], N))
        self.took("fp16", a, W, K, N)
        return out

    def matmul(self, a: torch.Tensor, B: torch.Tensor, s: torch.Tensor, **layer: Any) -> torch.Tensor:
        K, N = reference.marlin_size(B, layer["bits"])
        assert (B.dtype, s.dtype, s.shape[1]) == (torch.int32, torch.float16, N)
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (B, s))  # as the kernels require it
        assert a.shape[1] == layer["in_features"] <= K
        assert (layer["zeros"] is None) or layer["zeros"].shape == (s.shape[0], N * layer["bits"] // 32)
        assert (layer["perm"] is None) or layer["perm"].tolist() != sorted(layer["perm"].tolist())
        self.took("marlin", a, B, K, N)
        return a.new_empty((a.shape[0], layer["out_features"]))

    def dequantizing_pays(self, M: int, N: int, K: int, index: int, **kind: Any) -> bool:
        assert index == 0
        return M >= 256

    def time(self, calls: results.Calls) -> float:
        before = self.now
        for call in calls:
            call()
        # Copies take no time of this clock: 10 µs for each.
        return (self.now - before) / len(calls) or 10.0

    def synchronize(self) -> None:
        self.synchronized += 1

    def release(self) -> None:
        self.released += 1


class Heard(Progress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.count, self.done, self.ended, self.said = 0, 0, False, []  # type: ignore[var-annotated]

    def stage(self, label: str, total_bytes: int, layers: int) -> None:
        self.stages.append((label, total_bytes, layers))

    def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
        self.count, self.done = self.count + nbytes, self.done + done
        self.said.append(layer)

    def end(self) -> None:
        self.ended = True


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
    assert notes == {"left out, Marlin cannot hold it: 2-bit weights; Marlin has 4 and 8 bits": ["few"]}


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
    assert [(c.M, c.way, c.speedup, c.peers) for c in layer.cells] == [
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


# ---- Peers ----


def peer(name: str, machine: Bench, us: float, fails: Callable[[int], bool] = lambda M: False) -> Peer:
    machine.cost[name] = us

    def calls(shape: Shape, weights: Weights, a: torch.Tensor) -> results.Calls:
        print(f"{name} is talkative")
        if fails(a.shape[0]):
            raise ValueError(f"no such tile\nfor {a.shape[0]} rows")
        return [partial(machine.took, name, a, layer.weight, shape.K, shape.N) for layer in weights.packed]

    return Peer(name, "1.2", lambda shape, weights, device: partial(calls, shape, weights))


def test_peers_join_and_fail_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Bench()

    def broken(shape: Shape, weights: Weights, device: torch.device) -> Callable[[torch.Tensor], results.Calls]:
        raise RuntimeError

    peers = [peer("good", machine, 4.0), peer("picky", machine, 1.0, lambda M: M > 1), Peer("broken", "0", broken)]
    report = b.bench("model", [SHAPE], machine.rig, batch=(1, 2, 4), peers=peers)
    assert report.peers == {"good": "1.2", "picky": "1.2", "broken": "0"}
    found = [{name: speed and speed.us for name, speed in c.peers.items()} for c in report.layers[0].cells]
    assert found == [
        {"good": 4.0, "picky": 1.0, "broken": None},
        {"good": 4.0, "picky": None, "broken": None},
        {"good": 4.0, "picky": None, "broken": None},
    ]
    assert report.notes == {
        "broken failed: RuntimeError": ["qkv 256 x 128"],
        "picky failed: ValueError: no such tile": ["qkv 256 x 128, M = 2", "qkv 256 x 128, M = 4"],
    }
    assert [(c.fp16.us, c.marlin.us) for c in report.layers[0].cells] == [(8.0, 2.0)] * 3
    out, err = capsys.readouterr()
    assert out == ""  # --json prints one document
    assert "good is talkative" in err
    cell = report.as_dict()["layers"][0]["cells"][1]
    assert cell["peers"]["good"]["speedup"] == 2.0
    assert cell["peers"]["picky"] is None


def test_a_peer_that_breaks_the_gpu() -> None:
    machine = Bench()
    synchronized = iter([True, False])  # after the limits; after the peer

    def synchronize() -> None:
        if not next(synchronized):
            raise RuntimeError("CUDA error: an illegal instruction was encountered")

    rig = replace(machine.rig, synchronize=synchronize)
    with pytest.raises(DeviceError, match=r"bad left the GPU unusable \(qkv 256 x 128, M = 1: ValueError: no such"):
        b.bench("model", [SHAPE], rig, batch=(1,), peers=[peer("bad", machine, 1.0, lambda M: True)])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Put modules of our own where Python looks for vllm and humming."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def packages(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "packages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield packages
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("vllm", "humming"):
            del sys.modules[name]


def test_peers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_convert.bench.products.util.find_spec", lambda name: None)
    assert b.find_peers() == (
        [], {"vllm is not installed": ["--compare"], "humming-kernels is not installed": ["--compare"]}
    )  # fmt: skip


VLLM = {
    "vllm/__init__.py": "print('INFO: vllm says much')\n",
    "vllm/_custom_ops.py": "",
    "vllm/scalar_type.py": "class scalar_types: uint4b8 = 'uint4b8'\n",
    "vllm/model_executor/layers/quantization/utils/marlin_utils.py": """
import torch

def marlin_make_workspace_new(device):
    return torch.zeros(132, dtype=torch.int32, device=device)

def apply_gptq_marlin_linear(input, weight, weight_scale, weight_zp, g_idx, g_idx_sort_indices, workspace, wtype,
                             output_size_per_partition, input_size_per_partition, is_k_full, bias=None):
    N, K = output_size_per_partition, input_size_per_partition
    assert weight.shape == (K // 16, N * 2) and weight_scale.shape == (K // 128, N) and input.shape[1] == K
    assert weight_zp.numel() == g_idx.numel() == g_idx_sort_indices.numel() == 0 and workspace.numel() == 132
    assert wtype == 'uint4b8' and is_k_full is True
    return input.new_empty((input.shape[0], N))
""",
}
HUMMING = {
    "humming/__init__.py": "",
    "humming/layer.py": """
import torch

class HummingLayer(torch.nn.Module):
    def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
        super().__init__()
        assert weight_config == {"dtype": "uint4", "group_size": 128} and torch_dtype == torch.float16
        self.shape = (shape_n, shape_k)

    def load_from_unquantized(self, weight):
        assert weight.shape == self.shape and weight.dtype == torch.float16
        self.loaded = True

    def transform(self):
        self.ready = self.loaded

    def forward(self, a):
        assert self.ready
        return a.new_empty((a.shape[0], self.shape[0]))
""",
}


def test_the_peers_are_called_as_they_want_it(
    packages: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    packages(VLLM | HUMMING)
    peers, notes = b.find_peers()
    assert [(p.name, p.version, p.own_weights) for p in peers] == [
        ("vLLM Marlin", "unknown", False), ("humming", "unknown", True)
    ]  # fmt: skip
    assert notes == {}
    report = b.bench("model", [SHAPE], Bench().rig, batch=(3,), peers=peers)
    assert report.notes == {}
    assert all(report.layers[0].cells[0].peers.values())
    assert capsys.readouterr().out == ""


def test_peers_that_cannot_be_imported(packages: Callable[[dict[str, str]], None]) -> None:
    packages({"vllm/__init__.py": "raise RuntimeError('CUDA 12 is needed')", "humming/__init__.py": ""})
    peers, notes = b.find_peers()
    assert peers == []
    assert notes == {
        "vllm is installed and cannot be used: RuntimeError: CUDA 12 is needed": ["--compare"],
        "humming-kernels is installed and cannot be used: ModuleNotFoundError: No module named 'humming.layer'": [
            "--compare"
        ],
    }


# ---- The GPU ----


def test_bench_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="bench measures a GPU: give --device cuda or cuda:N"):
        the_gpu.pick_gpu("cpu")

    def none() -> list[Device]:
        raise DeviceError("no NVIDIA driver is installed")

    monkeypatch.setattr(the_gpu, "cuda_devices", none)
    for request in ("auto", "cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"^bench measures a GPU: no NVIDIA driver is installed\.$"):
            the_gpu.pick_gpu(request)


def test_bench_takes_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda", 1, "H100", (9, 0))
    monkeypatch.setattr(the_gpu, "cuda_devices", lambda: [CPU, gpu])
    monkeypatch.setattr(the_gpu, "pick_device", lambda request: {"cuda:1": gpu}[request])
    assert the_gpu.pick_gpu("cuda:1") is gpu


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            'echo "$1" > asked; echo "580.82.07, 1755, 1980, 2619, 2619, 512.10, 700.00, [N/A]"',
            {"driver_version": "580.82.07", "sm_mhz": "1755", "max_sm_mhz": "1980", "memory_mhz": "2619",
             "max_memory_mhz": "2619", "power_w": "512.10", "power_limit_w": "700.00", "temperature_c": "[N/A]"},
        ),
        ("echo 'No devices were found'; exit 6", None),
        ("echo nonsense", None),
        (None, None),
    ],
)  # fmt: skip
def test_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: dict[str, str] | None
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert the_gpu.nvidia_smi("GPU-1") == expected
    if expected:
        assert (tmp_path / "asked").read_text() == "--id=GPU-1\n"
    assert the_gpu.nvidia_smi(None) is None


def test_numbers_of_nvidia_smi() -> None:
    assert the_gpu._number("1755") == 1755.0
    assert the_gpu._number("[N/A]") is None
    assert the_gpu._cuda_version(13010) == "13.1"


# ---- What is shown ----


@pytest.fixture
def report() -> Report:
    machine = Bench()
    peers = [peer("vLLM Marlin", machine, 4.0, lambda M: M > 1)]
    report = b.bench("mistral-7b", [SHAPE, Shape("o", 128, 128, 1)], machine.rig, batch=(1, 256), peers=peers)
    report.limits = Limits(3.01e12, 762e12)
    return report


@pytest.fixture
def main(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cli.main` in this process, with a finished report in place of the measurement; `main.asked` is what it got."""
    monkeypatch.chdir(tmp_path)

    def main(*args: object) -> Run:
        def run(source: str | None, preset: str | None, **settings: Any) -> Report:
            settings["progress"].stage("measuring", 4, 2)
            settings["progress"].advance(1, "qkv", done=True)
            settings["progress"].end()
            asked_of.asked = (source, preset, settings)
            return report

        asked_of: Any = main
        monkeypatch.setattr(b, "run", run)
        capsys.readouterr()
        code = 0
        try:
            cli.main(["bench", *map(str, args)])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Run(subprocess.CompletedProcess([], code, out, err))

    return main


def test_the_table(main: Callable[..., Run]) -> None:
    result = main()
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 200
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == (
        "NVIDIA H100 [80GB] (cuda:0), capability 9.0, 132 multiprocessors, L2 52.4 MB, driver 580.1; "
        "under load SM 1755 of 1980 MHz, memory 2619 of 2619 MHz"
    )
    assert lines[1] == "torch 2.13.0, python 3.11, vLLM Marlin 1.2"
    assert lines[2] == "measured here: copy 3.01 TB/s (read + write), fp16 product 762 TFLOP/s"
    assert "mistral-7b qkv 256 x 128, group 128, 32 layers" in lines
    assert "mistral-7b o 128 x 128, group -1" in lines
    assert lines.count("M fp16 Marlin vLLM Marlin speedup GB/s TFLOP/s of limit") == 2
    rows = [line for line in lines if line.startswith(("1 8.0", "256 8.0"))]
    assert len(rows) == 4
    assert rows[0].startswith("1 8.0 2.0 4.0 4.00x 9 0.0 ")  # 17.7 kB in 2 µs
    assert rows[1].startswith("256 8.0 2.0 - 4.00x ")
    assert rows[1].endswith(" dequantize")
    assert "note vLLM Marlin failed: ValueError: no such tile: qkv 256 x 128, M = 256; o 128 x 128, M = 256" in lines
    assert "measuring: 2 layers, 4 timings" in result.err
    assert " kB" not in result.err


def test_many_places_of_a_note_are_summed_up(main: Callable[..., Run], report: Report) -> None:
    report.notes = {"tiny": [f"layer {i}" for i in range(9)]}
    assert "note tiny: layer 0; layer 1; layer 2; and 6 more\n" in main().out
    assert "layer 8" in main("--verbose").out


def test_the_document(main: Callable[..., Run]) -> None:
    result = main("--json")
    assert (result.code, result.err) == (0, "")
    document = result.json()
    assert document["ok"] is True
    assert document["machine"]["name"] == "NVIDIA H100 [80GB]"
    assert document["machine"]["clocks"]["sm_mhz"] == 1755.0
    assert document["limits"] == {"copy_gb_per_s": 3010.0, "fp16_tflop_per_s": 762.0}
    assert document["peers"] == {"vLLM Marlin": "1.2"}
    first = document["layers"][0]
    assert {k: first[k] for k in ("name", "K", "N", "group_size", "count")} == {
        "name": "qkv", "K": 256, "N": 128, "group_size": 128, "count": 32,
    }  # fmt: skip
    assert [c["M"] for c in first["cells"]] == [1, 256]
    assert first["cells"][1]["marlin"]["way"] == "dequantize"
    assert first["cells"][0]["marlin"].keys() == {
        "us", "gb_per_s", "tflop_per_s", "limit_us", "share_of_limit", "limited_by", "speedup", "way",
    }  # fmt: skip
    assert document["notes"][0]["note"].startswith("vLLM Marlin failed")
    assert document["plot"] is None


def test_quiet(main: Callable[..., Run]) -> None:
    result = main("-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_machine_without_nvidia_smi(main: Callable[..., Run], report: Report) -> None:
    report.machine = replace(MACHINE, clocks=None)
    assert "driver 580.1; clocks unknown (no nvidia-smi)\n" in main().out
    assert main("--json").json()["machine"]["clocks"] is None


def test_the_options_arrive(main: Any) -> None:
    assert main("--preset", "llama-70b", "--batch", "16,1,16", "--compare", "--device", "cuda:3").code == 0
    source, preset, settings = main.asked
    assert (source, preset, settings["batch"], settings["compare"]) == (None, "llama-70b", (1, 16), True)
    assert settings["device"] == "cuda:3"
    assert main("folder", "--revision", "v2", "--token", "t", "--cache-dir", "cache").code == 0
    source, preset, settings = main.asked
    assert (source, preset, settings["batch"], settings["compare"]) == ("folder", None, b.BATCH, False)
    access = settings["access"]
    assert (access.revision, access.token, access.cache_dir) == ("v2", "t", Path("cache"))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--preset", "gpt-5"], "'gpt-5' is not one of 'mistral-7b', 'llama-3-8b', 'llama-70b'."),
        (["folder", "--preset", "llama-70b"], "Give a SOURCE or --preset, not both."),
        (["--device", "gpu"], "'gpu' is not a device"),
        *(
            (["--batch", value], f"{value!r} is not a list of batch sizes")
            for value in ("", "0", "1,", "a", "-4", "9999999")
        ),
    ],
    ids=str,
)
def test_wrong_arguments(main: Callable[..., Run], args: list[str], text: str) -> None:
    result = main(*args)
    assert (result.code, result.out) == (2, "")
    assert text in result.err


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_the_program_without_a_gpu(run: Callable[..., Run], source: Source, tmp_path: Path, device: str) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcuda.so.1").write_bytes(b"not a library")
    result = run("bench", source.folder, "--device", device, env={"LD_LIBRARY_PATH": str(tmp_path / "lib")})
    assert (result.code, result.out) == (5, "")
    assert result.err.startswith("marlin-convert: bench measures a GPU: ")
    assert result.err.count("\n") == 1


def test_bars_and_lines_count_timings(capsys: pytest.CaptureFixture[str]) -> None:
    screen = BenchScreen(OutputOptions())
    with screen.progress(timings=True) as progress:
        assert isinstance(progress, PlainLines)
    bars = Bars(screen.err, timings=True)
    bars.stage("measuring", 4, 2)
    bars.advance(1, "qkv")
    text = "".join(str(column.render(bars._bars.tasks[0])) for column in bars._bars.columns[2:3])
    assert text == "1/4"
    bars.end()


# ---- The plot ----


def test_plotting_without_matplotlib_is_said_before_anything_is_measured(
    main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = main("--plot", "out.png")
    assert (result.code, result.out) == (1, "")
    assert "pip install matplotlib" in result.err
    assert not hasattr(main, "asked")


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, an optional extra, is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize(("name", "magic"), [("out.png", b"\x89PNG"), ("out.SVG", b"<?xml"), ("out.pdf", b"%PDF")])
def test_a_plot(main: Callable[..., Run], tmp_path: Path, name: str, magic: bytes) -> None:
    result = main("--plot", name)
    assert result.code == 0, result.err
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert f"plot:  {name}\n" in result.out
    assert main("--plot", name, "--json").json()["plot"] == name


@needs_matplotlib
def test_what_the_plot_shows(report: Report, tmp_path: Path) -> None:
    plot = Plot(tmp_path / "out.png")
    assert plot.draw(report) is None
    (axes,) = plot._figure.axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines["qkv 256 x 128"].get_xdata()) == [1, 256]
    assert list(lines["qkv 256 x 128"].get_ydata()) == [4.0, 4.0]
    assert "o 128 x 128" in lines
    assert list(lines["ideal 4x"].get_ydata()) == [4, 4]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "256"]
    assert axes.get_ylim()[0] == 0


@needs_matplotlib
def test_plots_that_cannot_be_written(main: Callable[..., Run], report: Report, tmp_path: Path) -> None:
    with pytest.raises(MarlinConvertError, match="matplotlib writes no such file"):
        Plot(tmp_path / "out.docx")
    with pytest.raises(OutputError, match="there is no folder"):
        Plot(tmp_path / "nowhere" / "out.png")
    (tmp_path / "full.png").symlink_to("/dev/full")
    result = main("--plot", "full.png")
    assert result.code == 6
    assert "the plot cannot be written: No space left on device" in result.err
    assert "mistral-7b qkv" in result.out  # the numbers are not lost
    report.notes.clear()
    as_json = main("--plot", "full.png", "--json")
    assert (as_json.code, as_json.err) == (6, "")
    document = as_json.json()
    assert document["plot"] is None
    assert "No space left" in document["notes"][0]["note"]


def test_cells_as_documents_are_strict_json(report: Report) -> None:
    json.dumps(report.as_dict(), allow_nan=False)
    cell = report.layers[0].cells[0]
    assert isinstance(cell, Cell)
    assert cell.as_dict()["fp16"]["limited_by"] in ("memory", "compute")
