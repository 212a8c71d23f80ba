"""Small GPTQ checkpoints for the tests, built from the GPTQ definition alone: nothing here uses the code under test.

A layer is made from its codes, scales and zero points, and keeps the float64 weights that they stand for, so that
a test can compare what comes out of a conversion with what must come out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file


def pack_rows(codes: npt.NDArray[Any], bits: int = 4) -> npt.NDArray[np.int32]:
    """codes [K, N] → qweight [K·bits/32, N]: neighbours along K in one word, the first in the lowest bits."""
    K, N = codes.shape
    if 32 % bits:  # 3-bit: a stream of bits; only its shape matters here
        return np.zeros((K * bits // 32, N), np.int32)
    per_word = 32 // bits
    words = np.zeros((K // per_word, N), np.uint32)
    for i in range(per_word):
        words |= codes[i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def pack_columns(zeros: npt.NDArray[Any], bits: int = 4) -> npt.NDArray[np.int32]:
    """stored zero points [G, N] → qzeros [G, ⌈N·bits/32⌉]: neighbours along N in one word."""
    G, N = zeros.shape
    if 32 % bits:
        return np.zeros((G, -(-N * bits // 32)), np.int32)
    per_word = 32 // bits
    padded = np.zeros((G, -(-N // per_word) * per_word), np.uint32)
    padded[:, :N] = zeros
    words = np.zeros((G, padded.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= padded[:, i::per_word] << np.uint32(bits * i)
    return words.view(np.int32)


@dataclass
class GPTQLayer:
    """One quantized linear. `stored_zero` is what stands in qzeros: 7 for symmetric v1, 8 for v2, or [G, N]."""

    K: int = 256
    N: int = 256
    group_size: int = 128  # -1: one group
    bits: int = 4
    seed: int = 0
    scale_dtype: torch.dtype = torch.float16
    stored_zero: int | npt.NDArray[Any] | None = 7  # None: no qzeros
    zero_point: int | None = None  # of the weights below; default: see `zeros`
    v2: bool = False  # whether `stored_zero` is the zero point itself, not one less
    g_idx: npt.NDArray[Any] | str | None = "sequential"  # None: no g_idx
    bias: bool = False
    scales: npt.NDArray[Any] | None = None  # [G, N] float; random when not given
    codes: npt.NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.G = 1 if self.group_size == -1 else -(-self.K // self.group_size)
        self.codes = rng.integers(0, 2**self.bits, (self.K, self.N))
        if self.scales is None:
            self.scales = rng.uniform(0.001, 0.02, (self.G, self.N)) * rng.choice([-1, 1], (self.G, self.N))
        self.scale_tensor = torch.from_numpy(np.asarray(self.scales, np.float64)).to(self.scale_dtype)
        self.bias_tensor = torch.from_numpy(rng.standard_normal(self.N)).to(torch.float16)

    @property
    def rows_per_group(self) -> int:
        return self.K if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> npt.NDArray[Any]:
        """The group of each row, [K]."""
        if isinstance(self.g_idx, np.ndarray):
            return self.g_idx
        return np.arange(self.K) // self.rows_per_group

    @property
    def zeros(self) -> npt.NDArray[Any]:
        """Zero points [G, N]: `zero_point`, or those of qzeros where they are given as [G, N], or the middle."""
        if self.zero_point is None and isinstance(self.stored_zero, np.ndarray):
            return self.stored_zero + (0 if self.v2 else 1)
        return np.full((self.G, self.N), 2 ** (self.bits - 1) if self.zero_point is None else self.zero_point)

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """W [K, N] in float64: (code - zero point) · scale, both of the row's group."""
        steps: npt.NDArray[np.float64] = self.codes - self.zeros[self.groups]
        return steps * self.scale_tensor.double().numpy()[self.groups]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        result = {
            f"{name}.qweight": torch.from_numpy(pack_rows(self.codes, self.bits)),
            f"{name}.scales": self.scale_tensor,
        }
        if self.stored_zero is not None:
            stored = np.broadcast_to(np.asarray(self.stored_zero), (self.G, self.N))
            result[f"{name}.qzeros"] = torch.from_numpy(pack_columns(stored, self.bits))
        if self.g_idx is not None:
            result[f"{name}.g_idx"] = torch.from_numpy(self.groups.astype(np.int32))
        if self.bias:
            result[f"{name}.bias"] = self.bias_tensor
        return result


def shuffled(K: int, group_size: int = 128, seed: int = 0) -> npt.NDArray[Any]:
    """g_idx of act-order: every group has its group_size rows, in no order."""
    return np.random.default_rng(seed).permutation(np.arange(K) // group_size)


def asymmetric(
    K: int, N: int, group_size: int = 128, bits: int = 4, *, low: int = 0, seed: int = 3
) -> npt.NDArray[Any]:
    """Zero points [G, N] as v1 stores them, one less: from `low` up; none of them stands for 0."""
    G = 1 if group_size == -1 else -(-K // group_size)
    return np.random.default_rng(seed).integers(low, 2**bits - 1, (G, N))


def quantization_config(**changes: Any) -> dict[str, Any]:
    """What GPTQModel writes, with `changes`; a value of None removes the key."""
    config = {
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


@dataclass
class Source:
    """A checkpoint folder as written: its layers and plain tensors by name."""

    folder: Path
    layers: dict[str, GPTQLayer]
    plain: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that were written."""
        return {k: v for name, layer in self.layers.items() for k, v in layer.tensors(name).items()} | self.plain


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever file they are in."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


#: The names of `two_layers`.
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def two_layers(**changes: Any) -> dict[str, GPTQLayer]:
    """Two layers of different shapes; `changes` go to both."""
    shapes = zip(LAYERS, ((256, 512), (384, 256)), strict=True)
    return {name: GPTQLayer(**{"K": K, "N": N, "seed": i, **changes}) for i, (name, (K, N)) in enumerate(shapes)}


def plain_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "model.embed_tokens.weight": torch.randn(64, 256, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.randn(256, generator=generator),
        "model.odd.flags": torch.randint(0, 2, (13,), generator=generator, dtype=torch.uint8),
    }


def write_source(
    folder: Path,
    layers: dict[str, GPTQLayer] | None = None,
    plain: dict[str, torch.Tensor] | None = None,
    *,
    config: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    quantize_config: dict[str, Any] | None = None,
    file: str = "model.safetensors",
    shards: int = 1,
    in_order: bool = False,
    extra: dict[str, str] | None = None,
) -> Source:
    """Write a GPTQ checkpoint; the defaults are what most checkpoints on the Hub look like.

    Tensors go to the shards in turn, so that a layer is in several; or `in_order`, as a tool that cuts by size does it.
    """
    layers = two_layers() if layers is None else layers
    plain = plain_tensors() if plain is None else plain
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for name, layer in layers.items() for k, v in layer.tensors(name).items()} | plain
    if shards == 1:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    else:
        weight_map = {}
        for i, name in enumerate(tensors):
            shard = i * shards // len(tensors) if in_order else i % shards
            weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        for part in sorted(set(weight_map.values())):
            save_file(
                {n: t for n, t in tensors.items() if weight_map[n] == part}, folder / part, metadata={"format": "pt"}
            )
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    if quantization is None:
        quantization = quantization_config()
    if config is None:
        config = {**base, **({"quantization_config": quantization} if quantization else {})}
    (folder / "config.json").write_text(json.dumps(config))
    if quantize_config is not None:
        (folder / "quantize_config.json").write_text(json.dumps(quantize_config))
    for name, text in (extra or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Source(folder, layers, plain)
