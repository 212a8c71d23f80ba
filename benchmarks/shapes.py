"""Checkpoints of real models' shapes, in GPTQ and other formats, random contents, written as a stream: for benchmarks
and memory tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GROUP_SIZE = 128
CHUNK = 8 << 20  # bytes written at a time


@dataclass(frozen=True)
class Shape:
    """A model: hidden and intermediate size, columns of k and v, layers, vocabulary, safetensors files."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocabulary: int
    files: int = 1
    bits: int = 4
    act_order: bool = False  # rows in groups of equal size, in random order
    format: str = (
        "gptq"  # or "awq" (gemm, asymmetric), or "compressed-tensors" (symmetric), of 4 bits without act-order
    )


SHAPES = {
    "mistral-7b": Shape(4096, 14336, 1024, 32, 32000),
    "mistral-7b-8-layers": Shape(4096, 14336, 1024, 8, 32000),
    "llama-70b-2-layers": Shape(8192, 28672, 1024, 2, 128256, files=2),
    "tiny": Shape(256, 512, 256, 2, 1024),
}


def linears(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, K, N) of every quantized linear."""
    h, i, kv = shape.hidden, shape.intermediate, shape.kv
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, n in (("q", h), ("k", kv), ("v", kv), ("o", h)):
            yield f"{at}.self_attn.{name}_proj", h, n
        for name, k, n in (("gate", h, i), ("up", h, i), ("down", i, h)):
            yield f"{at}.mlp.{name}_proj", k, n


def tensors(shape: Shape) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of the checkpoint."""
    result: list[tuple[str, str, tuple[int, ...]]] = []
    for name, k, n in linears(shape):
        g = k // GROUP_SIZE
        codes = 32 // shape.bits  # in a word
        if shape.format == "awq":
            result += [(f"{name}.qweight", "I32", (k, n // 8)), (f"{name}.qzeros", "I32", (g, n // 8)),
                       (f"{name}.scales", "F16", (g, n))]  # fmt: skip
            continue
        if shape.format == "compressed-tensors":
            result += [(f"{name}.weight_packed", "I32", (n, k // 8)), (f"{name}.weight_scale", "F16", (n, g)),
                       (f"{name}.weight_shape", "I32", (2,))]  # fmt: skip
            continue
        result += [(f"{name}.qweight", "I32", (k // codes, n)), (f"{name}.qzeros", "I32", (g, n // codes)),
                   (f"{name}.g_idx", "I32", (k,)), (f"{name}.scales", "F16", (g, n))]  # fmt: skip
    for layer in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result.append((f"model.layers.{layer}.{norm}.weight", "F16", (shape.hidden,)))
    result += [("model.norm.weight", "F16", (shape.hidden,))]
    result += [
        (f"{name}.weight", "F16", (shape.vocabulary, shape.hidden)) for name in ("model.embed_tokens", "lm_head")
    ]
    return result


def make(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint into `folder`, which is created. Codes are random; scales are those of random weights."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    everything = tensors(shape)
    per_file = -(-len(everything) // shape.files)
    weight_map: dict[str, str] = {}
    for number in range(shape.files):
        suffix = f"-{number + 1:05d}-of-{shape.files:05d}" if shape.files > 1 else ""
        file = f"model{suffix}.safetensors"
        part = sorted(everything[number * per_file : (number + 1) * per_file], key=lambda t: t[1] != "I32")
        weight_map.update({name: file for name, _, _ in part})
        write(folder / file, part, shape, rng)
    if shape.files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization: dict[str, object] = {
        "bits": shape.bits,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": shape.act_order,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    if shape.format == "awq":
        quantization = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "version": "gemm",
        }
    if shape.format == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
        quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "vocab_size": shape.vocabulary,
        "num_attention_heads": shape.hidden // 128,
        "num_key_value_heads": shape.kv // 128, "torch_dtype": "float16", "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shape.format == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2))


def write(path: Path, part: list[tuple[str, str, tuple[int, ...]]], shape: Shape, rng: np.random.Generator) -> None:
    header, begin = {}, 0
    sizes = {name.removesuffix(".weight_packed"): dims for name, _, dims in part if name.endswith("weight_packed")}
    for name, dtype, dims in part:
        nbytes = int(np.prod(dims, dtype=np.int64)) * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, dtype, dims in part:
            begin, end = header[name]["data_offsets"]
            if name.endswith("g_idx"):
                g_idx = np.arange(dims[0], dtype=np.int32) // GROUP_SIZE
                file.write((rng.permutation(g_idx) if shape.act_order else g_idx).tobytes())
            elif name.endswith("weight_shape"):
                n, words = sizes[name.removesuffix(".weight_shape")]
                file.write(np.array([n, words * 8], np.int32).tobytes())
            elif name.endswith("qzeros") and shape.format == "gptq":
                file.write(np.full(dims, 0x77777777 if shape.bits == 4 else 0x7F7F7F7F, np.int32).tobytes())
            else:
                for start in range(begin, end, CHUNK):
                    words = rng.integers(0, 2**32, (min(CHUNK, end - start) + 3) // 4, dtype=np.uint32)
                    if dtype == "F16":  # keep finite: small positive numbers, 2^-14 ..  2^-6
                        words = (words & 0x1FFF1FFF) + 0x04000400
                    file.write(words.tobytes()[: min(CHUNK, end - start)])
