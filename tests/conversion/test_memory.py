"""Memory does not grow with the model: the largest layer of a 70B model, and an embedding larger than the bound."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.blocks import PANEL_BYTES, WORKERS
from marlin_convert.conversion.plan import make_plan
from tests.support.cli import PATIENCE
from tests.support.gptq_checkpoints import quantization_config
from tests.support.hub_server import Hub, Repository

pytestmark = pytest.mark.slow

MB = 1_000_000

#: What is promised for any number of CPUs, most of it Python and numpy; and with act-order.
HELD, HELD_WITH_ACT_ORDER = 200 * MB, 500 * MB


def header_of(shapes: dict[str, tuple[str, list[int], int]]) -> tuple[dict[str, Any], int]:
    """The header of a file of tensors (dtype, shape, bytes of an element), and the bytes of all of them."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, size) in shapes.items():
        end = position + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return header, position


def write_large_source(
    folder: Path,
    *,
    K: int,
    N: int,
    rows: int,
    hidden: int,
    bits: int = 4,
    act_order: bool = False,
    group: int = 128,
    wide_scales: bool = False,
    zeros: bytes | None = None,
) -> dict[str, tuple[str, list[int]]]:
    """One GPTQ layer of K x N and an embedding of rows x hidden, with holes in the file where the zeros are.

    Written by hand, header and all: no process has to hold the tensors, nor the disk. Codes, scales and the
    embedding are mostly zero; some words of each are not.
    """
    G, scales = K // group, np.float32 if wide_scales else np.float16
    shapes = {
        "model.embed_tokens.weight": ("F16", [rows, hidden], 2),
        "model.layers.0.mlp.up_proj.qweight": ("I32", [K * bits // 32, N], 4),
        "model.layers.0.mlp.up_proj.qzeros": ("I32", [G, N * bits // 32], 4),
        "model.layers.0.mlp.up_proj.g_idx": ("I32", [K], 4),
        "model.layers.0.mlp.up_proj.scales": ("F32" if wide_scales else "F16", [G, N], 4 if wide_scales else 2),
    }
    header, nbytes = header_of(shapes)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        start = file.tell()
        os.truncate(file.fileno(), start + nbytes)
        rng = np.random.default_rng(0)

        def put(name: str, data: bytes, at: int = 0) -> None:
            file.seek(start + header[name]["data_offsets"][0] + at)
            file.write(data)

        g_idx = np.arange(K, dtype=np.int32) // group
        put("model.layers.0.mlp.up_proj.g_idx", (rng.permutation(g_idx) if act_order else g_idx).tobytes())
        middle = b"\x77" if bits == 4 else b"\x7f"
        put("model.layers.0.mlp.up_proj.qzeros", (zeros or middle * 4) * (G * N * bits // 32))
        put(
            "model.layers.0.mlp.up_proj.scales",
            rng.uniform(0.001, 0.02, (G, N)).astype(np.float16).astype(scales).tobytes(),
        )
        for i in range(5):
            put("model.layers.0.mlp.up_proj.qweight", rng.bytes(10_000), i * (K * N * bits // 8 // 5))
            put("model.embed_tokens.weight", rng.bytes(10_000), i * (rows * hidden * 2 // 5))
    quantization = quantization_config(bits=bits, desc_act=act_order, group_size=group, sym=zeros is None)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return {name: (dtype, shape) for name, (dtype, shape, _) in shapes.items()}


# The kernel's own high-water mark of this program's memory. (getrusage would count the process it was forked from.)
MEASURED = """
import os, sys
cpus = int(sys.argv.pop(1)) or os.cpu_count()
os.cpu_count = lambda: cpus
from pathlib import Path
from marlin_convert import cli
cli.main(sys.argv[1:])
print([line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")][0])
"""


def peak_memory(*args: object, cpus: int = 0, **environment: str) -> int:
    """Peak resident bytes of a whole run of the program, files mapped into it included; as if it had so many CPUs."""
    command = [sys.executable, "-c", MEASURED, str(cpus), *map(str, args)]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True, env={**os.environ, **environment}
    )
    return int(process.stdout.splitlines()[-1]) * 1024


def test_scales_are_not_gathered(tmp_path: Path) -> None:
    """Before anything is written, every layer's scales are looked at: one layer at a time, 1 MB each here."""
    layers, K, N = 200, 8192, 8192
    header: dict[str, Any] = {}
    position = 0
    for i in range(layers):
        for part, dtype, shape, size in [("qweight", "I32", [K // 8, N], 4), ("scales", "F16", [K // 128, N], 2)]:
            end = position + math.prod(shape) * size
            header[f"layers.{i}.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        os.truncate(file.fileno(), file.tell() + position)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config()}))
    with Checkpoint(tmp_path) as checkpoint:
        tracemalloc.start()
        plan = make_plan(checkpoint)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(plan.layers) == layers
    assert peak < 20 * MB, f"{peak / MB:.0f} MB"


@pytest.mark.parametrize(("K", "N", "cpus"), [(8192, 28672, 0), (28672, 8192, 0), (28672, 8192, 64)])
def test_peak_memory_with_act_order(tmp_path: Path, K: int, N: int, cpus: int) -> None:
    """At 8 bits a layer has 235 MB; a worker holds two panels of it, which are smaller where there are more workers.
    The way back, three."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_large_source(source, K=K, N=N, rows=1000, hidden=8192, bits=8, act_order=True)
    peak = peak_memory(source, out, "--verify", "--device", "cpu", "--quiet", cpus=cpus)
    assert peak <= HELD_WITH_ACT_ORDER, f"{peak / MB:.0f} MB"
    assert peak <= HELD + 2 * WORKERS * PANEL_BYTES, f"{peak / MB:.0f} MB"
    peak = peak_memory("to-gptq", out, tmp_path / "back", "--quiet", cpus=cpus)
    assert peak <= HELD_WITH_ACT_ORDER, f"{peak / MB:.0f} MB"
    with Checkpoint(source) as before, Checkpoint(tmp_path / "back") as after:
        for name, tensor in before.tensors.items():
            np.testing.assert_array_equal(after.read(after.tensors[name]), before.read(tensor))


def test_peak_memory(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_large_source(source, K=8192, N=28672, rows=32_000, hidden=8192)
    assert (source / "model.safetensors").stat().st_size > 600 * MB
    assert (source / "model.safetensors").stat().st_blocks * 512 < 50 * MB  # the holes take no room
    peak = peak_memory(source, out, "--verify", "--device", "cpu", "--quiet")
    assert peak <= HELD, f"{peak / MB:.0f} MB"
    assert json.loads((out / "verify.json").read_text())["ok"]
    assert (out / "model.safetensors").stat().st_size > 600 * MB


LARGE: dict[str, dict[str, Any]] = {
    "fp32 scales, small groups": {"K": 8192, "N": 16384, "group": 32, "wide_scales": True},
    "zero points, smallest groups": {"K": 8192, "N": 16384, "group": 16, "zeros": b"\x71\x56\x34\x12"},
    "zero points, padded": {"K": 8192 - 64, "N": 4096 + 8, "group": 32, "zeros": b"\x71\x56\x34\x12"},
    "a head of many columns": {"K": 512, "N": 262144, "bits": 8},
}


@pytest.mark.parametrize("kind", LARGE)
def test_peak_memory_of_scales_zero_points_and_wide_layers(tmp_path: Path, kind: str) -> None:
    """With as many workers as there ever are, verified and restored."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_large_source(source, rows=1000, hidden=64, **LARGE[kind])
    peak = peak_memory(source, out, "--verify", "--device", "cpu", "--quiet", cpus=64)
    assert peak <= HELD, f"{peak / MB:.0f} MB"
    assert json.loads((out / "verify.json").read_text())["ok"]
    peak = peak_memory("to-gptq", out, tmp_path / "back", "--quiet", cpus=64)
    assert peak <= HELD, f"{peak / MB:.0f} MB"
    with Checkpoint(source) as before, Checkpoint(tmp_path / "back") as after:
        for name, tensor in before.tensors.items():
            np.testing.assert_array_equal(after.read(after.tensors[name]), before.read(tensor))


@pytest.mark.parametrize(("act_order", "allowed"), [(False, HELD), (True, HELD_WITH_ACT_ORDER)])
def test_peak_memory_of_a_proof_with_the_result_alone(hub: Hub, tmp_path: Path, act_order: bool, allowed: int) -> None:
    """Source and result both on the Hub, with as many workers as there ever are; and the conversion before that."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_large_source(source, K=8192, N=28672, rows=8_000, hidden=8192, bits=8, act_order=act_order)
    hub.repositories["some/source"] = Repository()
    hub.repositories["some/source"].commit({path.name: path for path in source.iterdir()})
    there = hub.settings | {"HF_HOME": str(tmp_path / "home")}
    peak = peak_memory("some/source", out, "--device", "cpu", "--quiet", cpus=64, **there)
    assert peak <= allowed, f"{peak / MB:.0f} MB"
    hub.repositories["some/result"] = Repository()
    hub.repositories["some/result"].commit({path.name: path for path in out.iterdir()})
    peak = peak_memory("verify", "some/result", "--device", "cpu", "--quiet", cpus=64, **there)
    assert peak <= allowed, f"{peak / MB:.0f} MB"
