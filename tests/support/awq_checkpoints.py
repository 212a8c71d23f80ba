"""Small AWQ checkpoints for the tests, built from AWQ's definition alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from tests.support.ct_checkpoints import stream

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def interleaved(numbers: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Rows of numbers of 4 bits → words of eight, in AWQ's order."""
    rows = numbers.reshape(len(numbers), -1, 8)[:, :, ORDER]
    return stream(rows.reshape(numbers.shape), 4)


@dataclass
class AWQLayer:
    """One quantized linear. `zeros` [G, N]; None: all 8."""

    K: int = 256
    N: int = 256
    group_size: int = 128  # -1: one group
    seed: int = 0
    scale_dtype: torch.dtype = torch.float16
    zeros: npt.NDArray[Any] | None = None
    layout: str = "gemm"
    width: int = 1  # of gemv's qzeros
    bias: bool = False
    codes: npt.NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.G = 1 if self.group_size == -1 else -(-self.K // self.group_size)
        self.codes = rng.integers(0, 16, (self.K, self.N))
        self.scales = torch.from_numpy(rng.uniform(0.001, 0.02, (self.G, self.N))).to(self.scale_dtype)

    @property
    def zero_points(self) -> npt.NDArray[Any]:
        return np.full((self.G, self.N), 8) if self.zeros is None else self.zeros

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """W [K, N] in float64."""
        groups = np.arange(self.K) // (self.K if self.group_size == -1 else self.group_size)
        steps: npt.NDArray[np.float64] = self.codes - self.zero_points[groups]
        return steps * self.scales.double().numpy()[groups]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        if self.layout == "gemv":
            padded = np.zeros((self.N, 8 * self.width), np.int64)
            padded[:, : self.G] = self.zero_points.T
            scales = torch.zeros(self.N, 8 * self.width, dtype=self.scale_dtype)
            scales[:, : self.G] = self.scales.T
            found = {"qweight": torch.from_numpy(stream(self.codes.T, 4)), "scales": scales,
                     "qzeros": torch.from_numpy(stream(padded, 4))}  # fmt: skip
        else:
            found = {"qweight": torch.from_numpy(interleaved(self.codes)), "scales": self.scales,
                     "qzeros": torch.from_numpy(interleaved(self.zero_points))}  # fmt: skip
        if self.bias:
            found["bias"] = torch.linspace(-1, 1, self.N).half()
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in found.items()}


def awq_config(**changes: Any) -> dict[str, Any]:
    """What AutoAWQ writes, with `changes`; a value of None removes the key."""
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": ["lm_head"], **changes}  # fmt: skip
    return {key: value for key, value in config.items() if value is not None}


def write_awq(
    folder: Path,
    layers: dict[str, AWQLayer] | AWQLayer,
    config: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor | None] | None = None,
    *,
    old: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; `extra` adds and replaces tensors, or (None) leaves them out. With `old`, that is in
    quant_config.json, and config.json says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {"layer": layers} if isinstance(layers, AWQLayer) else layers
    tensors: dict[str, Any] = {"model.norm.weight": torch.arange(16.0)}
    tensors |= {k: v for name, layer in layers.items() for k, v in layer.tensors(name).items()} | (extra or {})
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    main: dict[str, Any] = {"model_type": "llama", "dtype": "float16"}
    if old is None:
        main["quantization_config"] = awq_config() if config is None else config
    else:
        (folder / "quant_config.json").write_text(json.dumps(old))
    (folder / "config.json").write_text(json.dumps(main))
    return folder
