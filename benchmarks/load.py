"""How long does Transformers take to load a Marlin checkpoint, beside plain safetensors of the same size?

    python benchmarks/load.py [--shape mistral-7b] [--runs 5] [--folder DIR] [--device cpu|cuda]

Makes a GPTQ checkpoint of the shape with random contents, converts it, and writes an fp16 checkpoint of the same
architecture with as many layers and bytes: each half as wide and as high (both kept in DIR for the next time). Then
loads them in pairs, every time in a new process: `marlin_convert.load` and `AutoModelForCausalLM.from_pretrained`, now
the one first, now the other. Imports do not count, files are in the page cache. On a CPU every page of every tensor is
touched before the clock stops: tensors that are only mapped would cost nothing. Prints medians, and the ratio of the
seconds per byte, pair by pair. As a third, `safetensors.torch.load_file` of the Marlin weights, without a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shapes import SHAPES, Shape, linears, make, tensors, write

BOUND = 1.2

LOAD = """
import sys, time, torch
kind, folder, device = sys.argv[1:]
import marlin_convert.hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_accelerate_available, logging
logging.set_verbosity_error(); logging.disable_progress_bar()
if device == "cuda":
    torch.zeros(1, device=device)
    from marlin_convert.native import cuda
    cuda.device_info(0)
print("ready", flush=True)
sys.stdin.readline()
started = time.perf_counter()
if kind == "marlin":
    state = marlin_convert.hf.load(folder, device=device).state_dict()
elif kind == "plain":
    straight = device != "cpu" and is_accelerate_available()  # as marlin_convert.load does it
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device} if straight else None)
    state = model.to(device).state_dict()
else:
    state = load_file(folder + "/model.safetensors", device=device)
if device == "cuda":
    torch.cuda.synchronize()
total = sum(int(t.contiguous().view(torch.uint8).flatten()[::4096].sum()) for t in state.values() if t.dim())
print(time.perf_counter() - started)
"""


def halved(shape: Shape) -> Shape:
    """The shape whose fp16 weights take the bytes of `shape`'s 4-bit ones: half as wide and half as high."""
    return dataclasses.replace(
        shape, hidden=shape.hidden // 2, intermediate=shape.intermediate // 2, kv=shape.kv // 2,
        vocabulary=2 * shape.vocabulary,
    )  # fmt: skip


def plain_checkpoint(folder: Path, config: dict[str, Any], shape: Shape) -> None:
    """A checkpoint of `shape` in fp16, random contents; `config` is the GPTQ one's."""
    import numpy as np

    folder.mkdir(parents=True)
    weights = [(f"{name}.weight", "F16", (n, k)) for name, k, n in linears(shape)]
    others = [t for t in tensors(shape) if t[0].endswith(".weight")]
    write(folder / "model.safetensors", [*weights, *others], shape, np.random.default_rng(0))
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary,
             "num_attention_heads": shape.hidden // 128, "num_key_value_heads": shape.kv // 128}  # fmt: skip
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps({**rest, **sizes}))


def load_each(folders: dict[str, Path], device: str, *, backwards: bool) -> dict[str, float]:
    """Seconds of one load of each kind, in processes that have imported everything before the first one loads."""
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-c", LOAD, kind, str(folder), device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for kind, folder in folders.items()
    }  # fmt: skip
    for process in processes.values():
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a process could not start")
    seconds = {}
    for kind in reversed(folders) if backwards else folders:
        output, _ = processes[kind].communicate("go\n")
        if processes[kind].returncode:
            raise SystemExit(f"{kind} could not be loaded")
        seconds[kind] = float(output)
    return {kind: seconds[kind] for kind in folders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if SHAPES[name].files == 1], default="mistral-7b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "marlin-convert-bench-load")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()

    base, shape = options.folder / options.shape, SHAPES[options.shape]
    if not (base / "marlin").exists():
        shutil.rmtree(base, ignore_errors=True)
        print(f"making {base} …", flush=True)
        make(base / "gptq", shape)
        command = [sys.executable, "-m", "marlin_convert.cli", str(base / "gptq"), str(base / "marlin"), "--quiet"]
        subprocess.run([*command, "--device", "cpu"], check=True)
        (base / "gptq" / "model.safetensors").unlink()
    if not (base / "plain").exists():
        config = json.loads((base / "gptq" / "config.json").read_text())
        plain_checkpoint(base / "plain", config, halved(shape))
    folders = {"marlin": base / "marlin", "plain": base / "plain", "load_file": base / "marlin"}
    nbytes = {kind: (folder / "model.safetensors").stat().st_size for kind, folder in folders.items()}

    times: dict[str, list[float]] = {kind: [] for kind in folders}
    for run in range(options.runs + 1):  # the first one warms the page cache and does not count
        seconds = load_each(folders, options.device, backwards=run % 2 == 1)
        if run:
            print(f"run {run}: " + ", ".join(f"{kind} {t:.2f} s" for kind, t in seconds.items()), flush=True)
            for kind, t in seconds.items():
                times[kind].append(t)

    print(f"{options.shape} on {options.device}, median of {options.runs}, {os.cpu_count()} cores")
    for kind, values in times.items():
        seconds = statistics.median(values)
        print(f"  {kind:10} {nbytes[kind] / 1e9:5.2f} GB  {seconds:6.2f} s  {nbytes[kind] / 1e9 / seconds:5.2f} GB/s")
    pairs = zip(times["marlin"], times["plain"], strict=True)
    ratio = statistics.median(m / nbytes["marlin"] / (p / nbytes["plain"]) for m, p in pairs)
    print(f"  Marlin takes {ratio:.2f} x the time of plain safetensors for each byte (bound {BOUND})")


if __name__ == "__main__":
    main()
