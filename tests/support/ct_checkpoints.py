"""Small pack-quantized checkpoints for the tests, built from compressed-tensors' definition alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file


def stream(numbers: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int32]:
    """Rows of numbers → rows of int32 words: number i at bit i·bits of its row, the lowest of a word first; then 0."""
    rows, count = numbers.shape
    single = (numbers[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    padded = np.zeros((rows, -(-count * bits // 32) * 32), np.int64)
    padded[:, : count * bits] = single.reshape(rows, -1)
    words: npt.NDArray[np.int64] = (padded.reshape(rows, -1, 32) << np.arange(32)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


@dataclass
class CTLayer:
    """One packed linear. `zeros` [G, N] are zero points as Marlin's codes have them, from 0 up; None: symmetric."""

    K: int = 256
    N: int = 256
    group_size: int = 128  # -1: one group
    bits: int = 4
    seed: int = 0
    scale_dtype: torch.dtype = torch.float16
    zeros: npt.NDArray[Any] | None = None
    int8_zeros: bool = False  # as compressed-tensors had them before 0.9.4
    g_idx: npt.NDArray[Any] | None = None
    bias: bool = False
    codes: npt.NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.G = 1 if self.group_size == -1 else -(-self.K // self.group_size)
        self.codes = rng.integers(0, 2**self.bits, (self.K, self.N))
        signs = rng.choice([-1, 1], (self.G, self.N))
        self.scales = torch.from_numpy(rng.uniform(0.001, 0.02, (self.G, self.N)) * signs).to(self.scale_dtype)

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """W [K, N] in float64."""
        rows = self.K if self.group_size == -1 else self.group_size
        groups = np.arange(self.K) // rows if self.g_idx is None else self.g_idx
        zeros = np.full((self.G, self.N), 2 ** (self.bits - 1)) if self.zeros is None else self.zeros
        steps: npt.NDArray[np.float64] = self.codes - zeros[groups]
        return steps * self.scales.double().numpy()[groups]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        found = {
            "weight_packed": torch.from_numpy(stream(self.codes.T, self.bits)),
            "weight_scale": self.scales.T.contiguous(),
            "weight_shape": torch.tensor([self.N, self.K]),
        }
        if self.zeros is not None and self.int8_zeros:
            found["weight_zero_point"] = torch.from_numpy((self.zeros.T - 2 ** (self.bits - 1)).astype(np.int8))
        elif self.zeros is not None:
            found["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(stream(self.zeros, self.bits).T))
        if self.g_idx is not None:
            found["weight_g_idx"] = torch.from_numpy(self.g_idx.astype(np.int32))
        if self.bias:
            found["bias"] = torch.linspace(-1, 1, self.N).half()
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in found.items()}


def ct_config(weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **changes: Any) -> Any:
    """What llm-compressor writes, with `changes`, those of the only group and of its weights."""
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None,
            "dynamic": False, **(weights or {})}  # fmt: skip
    own = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None,
           "format": "pack-quantized", **(group or {})}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": own}, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
            "transform_config": {}, "version": "0.19.0", **changes}  # fmt: skip


def write_ct(
    folder: Path,
    layers: dict[str, CTLayer] | CTLayer,
    config: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor | None] | None = None,
    *,
    shards: int = 1,
) -> Path:
    """Write a checkpoint; `extra` adds and replaces tensors, or (None) leaves them out."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"layer": layers} if isinstance(layers, CTLayer) else layers
    tensors: dict[str, Any] = {"model.norm.weight": torch.arange(16.0)}
    tensors |= {k: v for name, layer in layers.items() for k, v in layer.tensors(name).items()} | (extra or {})
    tensors = {k: v for k, v in tensors.items() if v is not None}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({k: t for k, t in tensors.items() if files[k] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    main = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization_config": ct_config() if config is None else config,
    }
    (folder / "config.json").write_text(json.dumps(main))
    return folder
