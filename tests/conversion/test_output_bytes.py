"""The bytes of an output stay what they were, whatever is rebuilt around them.

`tests/data/output_bytes.json` holds, for each source here, the SHA-256 of the weight files and of the configs that
commit 0bb044a made of it, run as it stood. To hash what another commit makes, run this module on that commit's package:

    git worktree add /tmp/other COMMIT && cd /tmp/other && python setup.py build_ext --inplace
    PYTHONPATH=/path/to/this/tree python -m tests.conversion.test_output_bytes > hashes.json

The sources are those that real quantizers made, and one of each kind written here from whole numbers that no library's
random generator has a say in.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, write_source

DATA = Path(__file__).parents[1] / "data"
HASHES = DATA / "output_bytes.json"
NAME = "model.layers.0.mlp.down_proj"


def numbers(seed: int, shape: tuple[int, ...], below: int) -> npt.NDArray[np.int64]:
    """Whole numbers in [0, below) without a pattern: splitmix64 of seed and place."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed << 32)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((x ^ x >> np.uint64(31)) >> np.uint64(33)).astype(np.int64).reshape(shape) % below


def layer(K: int, N: int, *, asym: bool = False, order: bool = False, low: int = 1, **settings: Any) -> GPTQLayer:
    """A layer of these numbers. `low` is the least zero point of an asymmetric one (as stored: one less)."""
    bits, size, seed = settings.get("bits", 4), settings.get("group_size", 128), settings.get("seed", 0)
    G = 1 if size == -1 else -(-K // size)
    scales = (256 + numbers(seed + 1, (G, N), 3840)) * (1 - 2 * numbers(seed + 2, (G, N), 2)) * 2.0**-18
    stored: Any = 2 ** (bits - 1) - 1
    if asym:
        stored = (low + numbers(seed + 3, (G, N), 2**bits - low) - 1) % 2**bits
    if order:
        settings["g_idx"] = np.argsort(numbers(seed + 4, (K,), 1 << 30), kind="stable") // size
    made = GPTQLayer(**{"K": K, "N": N, "scales": scales, "stored_zero": stored, **settings})
    made.codes = numbers(seed + 5, (K, N), 2**bits)
    made.bias_tensor = torch.from_numpy((numbers(seed + 6, (N,), 2048) - 1024) * 2.0**-9).half()
    return made


def plain() -> dict[str, torch.Tensor]:
    words = torch.from_numpy(numbers(99, (64, 256), 1 << 15).astype(np.int16))
    return {
        "model.embed_tokens.weight": words.view(torch.bfloat16),
        "model.norm.weight": words[0].float(),
        "model.odd.flags": words[1, :13].to(torch.uint8),
    }


@dataclass
class Case:
    """A source to be written, or one that is there, and the options that it is converted with."""

    layers: dict[str, GPTQLayer] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    folder: Path | None = None

    def source(self, folder: Path) -> Path:
        if self.folder is None:
            settings = quantization_config(**self.quantization)
            write_source(folder, self.layers, plain(), quantization=settings, **self.written)
        return self.folder or folder


KINDS: dict[str, dict[str, Any]] = {
    "groups of 128": {"K": 256, "N": 256},
    "per-channel": {"K": 256, "N": 256, "group_size": -1},
    "groups of 32": {"K": 256, "N": 128, "group_size": 32},
    "groups of 64": {"K": 256, "N": 128, "group_size": 64},
    "groups of 16": {"K": 128, "N": 64, "group_size": 16},
    "groups of 256": {"K": 512, "N": 64, "group_size": 256},
    "groups of 96": {"K": 288, "N": 64, "group_size": 96},
    "8 bits": {"K": 256, "N": 256, "bits": 8},
    "8 bits, groups of 32": {"K": 256, "N": 64, "bits": 8, "group_size": 32},
    "8 bits, per-channel": {"K": 256, "N": 64, "bits": 8, "group_size": -1},
    "a short last group": {"K": 1000, "N": 64},
    "a short last group, 8 bits": {"K": 600, "N": 96, "group_size": 256, "bits": 8},
    "odd sizes": {"K": 72, "N": 40, "group_size": 16},
    "hidden size 576": {"K": 576, "N": 576, "group_size": 64},
}


def several() -> dict[str, GPTQLayer]:
    return {
        "model.layers.0.self_attn.q_proj": layer(256, 256, seed=10, bias=True),
        "model.layers.0.self_attn.o_proj": layer(256, 256, seed=20, order=True),
        "model.layers.0.mlp.experts.0.w1": layer(256, 128, bits=8, group_size=64, seed=30),
        "model.layers.0.mlp.experts.1.w1": layer(256, 128, group_size=-1, seed=40),
        "lm_head": layer(256, 200, seed=50),
    }


def one(made: GPTQLayer, *options: str, **quantization: Any) -> Case:
    settings = {"bits": made.bits, "group_size": made.group_size, **quantization}
    return Case({NAME: made}, settings, options=options)


def cases() -> Iterator[tuple[str, Case]]:
    for folder in sorted((DATA / "quantizers").iterdir()):
        yield folder.name, Case(folder=folder)
    for kind, asym, order in product(KINDS, (False, True), (False, True)):
        settings = KINDS[kind]
        if not (order and settings.get("group_size") == -1):
            name = kind + ", asymmetric" * asym + ", act-order" * order
            yield name, one(layer(**settings, asym=asym, order=order, bias=asym), sym=not asym, desc_act=order)
    yield "the original as extended", one(layer(256, 256), "--format", "marlin-ext")
    yield "quant_method marlin", one(layer(256, 256), "--quant-method", "marlin")
    yield "fp32 scales that fit fp16", one(layer(256, 256, scale_dtype=torch.float32))
    yield "bf16 scales that fit fp16", one(layer(256, 256, scale_dtype=torch.bfloat16))
    huge = np.full((2, 256), 2.0**-7)
    huge[1, 200] = 2.0**17
    yield "bf16 scales beyond fp16", one(layer(256, 256, scales=huge, scale_dtype=torch.bfloat16))
    yield "no g_idx", one(layer(256, 256, g_idx=None))
    yield "no qzeros", one(layer(256, 256, stored_zero=None))
    yield "symmetric, v2", one(layer(256, 256, stored_zero=8), checkpoint_format="gptq_v2")
    for bits in (4, 8):
        stored = numbers(77, (2, 256), 2**bits)
        made = layer(256, 256, bits=bits, stored_zero=stored)
        yield f"asymmetric, v2, {bits} bits", one(made, sym=False, checkpoint_format="gptq_v2")
    for reading in ("nibble", "word"):
        yield (
            f"zero points of 0, by {reading}",
            one(layer(256, 256, asym=True, low=0), "--zero-points", reading, sym=False),
        )
    dynamic = {r"+:.*experts\.0": {"bits": 8, "group_size": 64}, r"+:.*experts\.1": {"group_size": -1}}
    # With a quantized head: said not to be tied to the embeddings, which a result otherwise adds.
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
              "quantization_config": quantization_config(dynamic=dynamic)}  # fmt: skip
    yield "side by side", Case(several(), {}, {"config": config})
    small = ("--max-shard-size", "40KB")
    yield "in shards", Case(several(), {}, {"config": config, "shards": 3}, small)
    yield "in shards, in order", Case(several(), {}, {"config": config, "shards": 3, "in_order": True}, small)


CASES = dict(cases())


def hashes(name: str, folder: Path, run: Callable[[list[str]], object]) -> dict[str, str]:
    """What `run`, given the command line's arguments, makes of a source: hashed by kind of file, names included."""
    source, out = CASES[name].source(folder / "source"), folder / "out"
    run([str(source), str(out), "--device", "cpu", "--quiet", *CASES[name].options])
    kinds = {"weights": "model*.safetensors*", "configs": "*config.json"}
    found: dict[str, str] = {}
    for kind, pattern in kinds.items():
        digest = hashlib.sha256()
        for file in sorted(out.glob(pattern)):
            content = file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
        found[kind] = digest.hexdigest()
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_before(name: str, tmp_path: Path, main: Callable[..., Run]) -> None:
    def run(arguments: list[str]) -> None:
        result = main(*arguments)
        assert result.code == 0, result.err

    assert hashes(name, tmp_path, run) == json.loads(HASHES.read_text())[name]


def test_every_source_is_hashed_and_says_something_else() -> None:
    """Equal weights only where sources differ in nothing that the result has: in how the same numbers are stored."""
    known = json.loads(HASHES.read_text())
    assert known.keys() == CASES.keys()
    by_weights: dict[str, list[str]] = {}
    for name, found in known.items():
        by_weights.setdefault(found["weights"], []).append(name)
    assert [names for names in by_weights.values() if len(names) > 1] == [
        ["gptqmodel-g128", "gptqmodel-g128-v2"],
        ["gptqmodel-g64-asym", "gptqmodel-g64-asym-v2"],
        ["groups of 128", "quant_method marlin", "fp32 scales that fit fp16", "no g_idx", "no qzeros", "symmetric, v2"],
    ]


if __name__ == "__main__":
    import marlin_convert
    from marlin_convert.cli import main as convert

    print(f"the package is {marlin_convert.__file__}", file=sys.stderr)
    made = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as room:
            made[case] = hashes(case, Path(room), convert)
    print(json.dumps(made, indent=1))
