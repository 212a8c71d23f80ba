"""Models in formats beside GPTQ, converted, in Transformers: they compute what their sources' weights do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import marlin_convert.hf
from marlin_convert.conversion.convert import convert
from marlin_convert.engines.transformers_quantizer import load_dequantized
from marlin_convert.options import Options
from tests.support import source_definitions

DATA = Path(__file__).parents[1] / "data" / "sources"
NAMES = ("ct-g32-asym", "ct-8bit-g64-asym-act-order", "awq-g128", "autoround-plain-g32")


def dequantized(folder: Path) -> LlamaForCausalLM:
    """The source's model, its weights by the definition of its format, rounded to fp16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    own = source_definitions.read(folder)
    names = tuple(f"{name}." for name in own)
    plain = load_file(folder / "model.safetensors").items()
    state = {key: t for key, t in plain if not key.startswith(names) or key.endswith(".bias")}
    state |= {f"{name}.weight": torch.from_numpy(weight.T.copy()) for name, weight in own.items()}
    model = LlamaForCausalLM(LlamaConfig(**config)).half()
    missing, unexpected = model.load_state_dict({key: t.half() for key, t in state.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, tmp_path: Path) -> None:
    convert(DATA / name, tmp_path / "out", Options(device="cpu"))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        expected = dequantized(DATA / name)(tokens).logits.float()
        found = marlin_convert.hf.load(tmp_path / "out", device="cpu", dtype=torch.float16)(tokens).logits.float()
        again = load_dequantized(DATA / name, device="cpu")(tokens).logits.float()
    assert expected.norm() > 1
    assert (found - expected).norm() <= 2e-3 * expected.norm()
    assert (again - expected).norm() <= 1e-3 * expected.norm()
