"""Models in formats beside GPTQ, converted, in Transformers: they compute what their sources' weights do."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import marlin_convert.hf
from marlin_convert.conversion.convert import convert
from marlin_convert.engines.transformers_quantizer import load_dequantized
from marlin_convert.errors import SourceError
from marlin_convert.options import Options
from tests.support import source_definitions

DATA = Path(__file__).parents[1] / "data" / "sources"
NAMES = tuple(sorted(path.name for path in DATA.iterdir()))
#: Those that the library that wrote them, or Transformers with it, computes on a CPU; see tools/quantizers/README.md.
COMPUTED = tuple(name for name in NAMES if (DATA / name / "reference_logits.safetensors").exists())
TOKENS = torch.arange(30)[None]


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in name else torch.float16


def fused(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights [N, K] by layer → as the model holds them: experts in one tensor, a gate's rows before an up's."""
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    state: dict[str, torch.Tensor] = {}
    for name, weight in own.items():
        owner, experts, rest = name.partition(".experts.")
        if experts:
            number, part = rest.split(".")
            found.setdefault(f"{owner}.experts", {}).setdefault(int(number), {})[part] = weight
        else:
            state[f"{name}.weight"] = weight
    for owner, experts_ in found.items():
        each = [experts_[number] for number in range(len(experts_))]
        gate, up, down = ("w1", "w3", "w2") if "w1" in each[0] else ("gate_proj", "up_proj", "down_proj")
        state[f"{owner}.gate_up_proj"] = torch.stack([torch.cat([x[gate], x[up]]) for x in each])
        state[f"{owner}.down_proj"] = torch.stack([x[down] for x in each])
    return state


def dequantized(folder: Path) -> PreTrainedModel:
    """The source's model, its weights by the definition of its format, rounded to the type of its scales."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    dtype = dtype_of(folder.name)
    own = {name: torch.from_numpy(weight.T.copy()) for name, weight in source_definitions.read(folder).items()}
    parts = (".qweight", ".qzeros", ".scales", ".g_idx", "_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    plain = load_file(folder / "model.safetensors").items()
    state = {key.replace("router.layer.", "router."): t for key, t in plain if not key.endswith(parts)} | fused(own)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(dtype)
    missing, unexpected = model.load_state_dict({key: t.to(dtype) for key, t in state.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits[0].float()
    return found


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """The logits of a source's conversion, by its name."""

    @functools.cache
    def computed(name: str) -> torch.Tensor:
        out = tmp_path_factory.mktemp(name) / "out"
        convert(DATA / name, out, Options(device="cpu"))
        return logits(marlin_convert.hf.load(out, device="cpu", dtype=dtype_of(name)))

    return computed


@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, converted: Callable[[str], torch.Tensor]) -> None:
    expected = logits(dequantized(DATA / name))
    assert expected.norm() > 1
    limit = 2e-2 if dtype_of(name) is torch.bfloat16 else 2e-3
    assert (converted(name) - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_of_the_source_s_own_library(name: str, converted: Callable[[str], torch.Tensor]) -> None:
    expected = load_file(DATA / name / "reference_logits.safetensors")["logits"]
    assert expected.norm() > 1
    limit = 2e-2 if dtype_of(name) is torch.bfloat16 else 3e-3
    assert (converted(name) - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("name", ["ct-g32-asym", "awq-gemv-g32", "autoround-plain-g32", "ct-stacked-8bit-channel-bf16"])
def test_sources_dequantized(name: str) -> None:
    expected, found = logits(dequantized(DATA / name)), logits(load_dequantized(DATA / name, device="cpu"))
    assert (found - expected).norm() <= (2e-2 if dtype_of(name) is torch.bfloat16 else 1e-3) * expected.norm()


def test_experts_that_the_model_holds_by_another_name_are_refused() -> None:
    """Granite's, of which a source has one tensor for all; the message says of which checkpoint it speaks."""
    with pytest.raises(SourceError, match=r"^\S*ct-stacked-g32-asym: the checkpoint does not fit GraniteMoe"):
        load_dequantized(DATA / "ct-stacked-g32-asym", device="cpu")
