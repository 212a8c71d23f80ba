"""Checkpoints of formats beside GPTQ that somebody changed: refused in a sentence, or converted to what they say."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.convert import convert
from marlin_convert.errors import MarlinConvertError
from marlin_convert.options import Options
from tests.support.awq_checkpoints import AWQLayer, awq_config, write_awq
from tests.support.ct_checkpoints import CTLayer, ct_config, write_ct

ODD: list[Any] = [None, -1, 0, 3, 1 << 40, 1.5, True, "", "gemv", "group", [], [1], {}, {"a": {}}, "\x1b[2J", "x" * 999]
DTYPES = (
    torch.int32,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def changed_config(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """`config` with one value, at any depth, replaced or left out."""
    changed = copy.deepcopy(config)
    holders = [changed]
    for holder in holders:
        holders += [value for value in holder.values() if isinstance(value, dict)]
    holder = chance.choice([h for h in holders if h])
    key = chance.choice(sorted(holder))
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(ODD)
    return changed


def changed_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor | None:
    kind = chance.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return tensor.to(chance.choice(DTYPES))
    if kind == 2:
        return tensor[: chance.randrange(len(tensor) + 1)].contiguous()
    if kind == 3:
        return tensor.flatten() if chance.random() < 0.5 else tensor[None].contiguous()
    if kind == 4 and tensor.ndim == 2:
        return tensor.T.contiguous()
    noise = np.random.default_rng(chance.randrange(1 << 30)).integers(0, 256, tensor.nbytes, dtype=np.uint8)
    return torch.from_numpy(noise).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("format", ["compressed-tensors", "awq gemm", "awq gemv"])
@pytest.mark.parametrize("what", ["config", "tensors"])
def test_changed_by_chance(tmp_path: Path, format: str, what: str) -> None:
    zeros = np.random.default_rng(0).integers(0, 16, (4, 64))
    if format == "compressed-tensors":
        order = np.random.default_rng(1).permutation(128) // 32
        config = ct_config({"symmetric": False, "actorder": "group", "group_size": 32})
        layer = CTLayer(K=128, N=64, group_size=32, zeros=zeros, g_idx=order, bias=True)
        source = write_ct(tmp_path / "source", layer, config)
    else:
        config = awq_config(group_size=32, version=format.split()[1])
        awq = AWQLayer(K=128, N=64, group_size=32, zeros=zeros, layout=format.split()[1], bias=True)
        source = write_awq(tmp_path / "source", awq, config)
    main = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    ends: list[bool] = []
    for seed in range(40):
        chance = random.Random(f"{format} {what} {seed}")
        if what == "config":
            own = {**main, "quantization_config": changed_config(config, chance)}
            (source / "config.json").write_text(json.dumps(own))
        else:
            name = chance.choice(sorted(n for n in tensors if n.startswith("layer.")))
            other = changed_tensor(tensors[name], chance)
            kept = {**tensors, name: other}
            save_file({n: t for n, t in kept.items() if t is not None}, source / "model.safetensors")
        out = tmp_path / f"out {seed}"
        try:
            report = convert(source, out, Options(device="cpu", verify=True))
        except MarlinConvertError:
            assert not out.exists()
            ends.append(False)
        else:
            assert report.verification is not None
            assert report.verification.ok
            ends.append(True)
    assert set(ends) == {False, True}
