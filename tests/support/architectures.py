"""Every architecture of Transformers, built small from its own config, quantized, converted, loaded and compared.

Every linear that GPTQ can hold is quantized, but for heads whose weights the model shares; experts that Transformers
holds fused are taken apart, as GPTQModel 7 does; routers are quantized too. The reference is the very model with the
dequantized weights put in, in float32.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import marlin_convert
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.configs import result_config
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.plan import make_plan
from marlin_convert.engines.transformers_trial import Trial, try_loading
from marlin_convert.options import Options, QuantMethod
from tests.support.gptq_checkpoints import quantization_config, write_source
from tests.support.quantized_models import GROUP, Quantized, quantize
from tests.support.small_models import computed, outputs, small_model

TOLERANCE = 1e-3


@dataclass
class Outcome:
    """What came of one architecture."""

    model_type: str
    model: str = ""  # the class
    layers: int = 0
    #: built, nothing to quantize, loads, or the stage at which it failed.
    state: str = ""
    compared: str = ""  # "outputs", "layers"
    error: float | None = None
    why: str = ""
    dequantized: int = 0
    trial: Trial = field(default_factory=Trial)  # what a dry run says of it

    @property
    def failed(self) -> bool:
        """Whether marlin-convert is at fault."""
        return self.state in ("not converted", "not loaded", "not computed", "differs")


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of ‖found - expected‖ / ‖expected‖ of tensors that belong together."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(
        (
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in zip(found, expected, strict=True)
        ),
        default=float("nan"),
    )


def tried(model_type: str) -> Outcome:
    """Build, quantize, convert, load and compare one architecture."""
    outcome = Outcome(model_type)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, kind = small_model(model_type)
        except Exception as error:  # noqa: BLE001
            return _failed(outcome, "not built", error)
        outcome.model = type(model).__name__
        quantized = quantize(model)
        outcome.layers = len(quantized.layers)
        if not quantized.layers:
            outcome.state = "nothing to quantize"
            return outcome
        source, out = Path(name) / "source", Path(name) / "out"
        config = json.loads(json.dumps({**model.config.to_dict(), "dtype": "float32"}, default=str))
        config |= {"architectures": [outcome.model], "quantization_config": quantization_config(group_size=GROUP)}
        try:
            write_source(source, quantized.layers, quantized.plain, config=config)
            convert(source, out, Options(device="cpu"))
        except Exception as error:  # noqa: BLE001
            return _failed(outcome, "not converted", error)
        with Checkpoint(source) as checkpoint:
            plan = make_plan(checkpoint)
        outcome.trial = try_loading(result_config(plan, QuantMethod.GPTQ), plan.out_tensors)
        try:
            loaded = marlin_convert.load(out, device="cpu", dtype=torch.float32, auto_class=kind).eval()
        except Exception as error:  # noqa: BLE001
            state = "not loaded" if _loads_plain(model, kind, Path(name) / "plain") else "nor plain"
            return _failed(outcome, state, error)
        held = sum(type(module).__name__ == "MarlinLinear" for module in loaded.modules())
        outcome.dequantized = outcome.layers - held
        try:
            _compare(outcome, model, loaded, quantized)
        except Exception as error:  # noqa: BLE001
            return _failed(outcome, "not computed", error)
    return outcome


def _loads_plain(model: Any, kind: Any, folder: Path) -> bool:
    """Whether Transformers itself loads what it saves of this model."""
    try:
        model.save_pretrained(folder)
        _, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception:  # noqa: BLE001
        return False
    return not info["missing_keys"] and not info["mismatched_keys"]


def _compare(outcome: Outcome, model: Any, loaded: Any, quantized: Quantized) -> None:
    found = None
    try:
        found = computed(model)
    except Exception as error:  # noqa: BLE001
        outcome.why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if found:
        inputs, expected = found
        outcome.compared, outcome.error = "outputs", relative(outputs(loaded, inputs), expected)
    else:
        outcome.compared, outcome.error = "layers", _layers_apart(quantized, loaded)
    outcome.state = "loads" if outcome.error < TOLERANCE else "differs"


def _layers_apart(quantized: Quantized, loaded: Any) -> float:
    """The worst of all layers by themselves: what each makes of some activations, or its weight where it is plain."""
    worst = 0.0
    for name, layer in quantized.layers.items():
        W = torch.from_numpy(layer.weight).float()
        try:
            module = loaded.get_submodule(name)
        except AttributeError:  # an expert, dequantized into the tensor of its block
            owner, number, part = name.rsplit(".", 2)
            worst = max(worst, relative([getattr(loaded.get_submodule(owner), part)[int(number)]], [W.t()]))
            continue
        if type(module).__name__ == "MarlinLinear":
            x = torch.randn(3, layer.K)
            bias: Any = layer.bias_tensor.float() if layer.bias else quantized.plain.get(f"{name}.bias", 0)
            worst = max(worst, relative([module(x)], [x @ W + bias]))
        else:
            worst = max(worst, relative([module.weight], [W.t()]))
    return worst


def _failed(outcome: Outcome, state: str, error: Exception) -> Outcome:
    outcome.state, outcome.why = state, " ".join(f"{type(error).__name__}: {error}".split())[:900]
    return outcome


@contextmanager
def quietly() -> Iterator[None]:
    """Let Transformers say nothing meanwhile, and torch use one thread: these models are too small for more."""
    ours, hf = logging.getLogger("marlin_convert"), transformers.utils.logging
    before = torch.get_num_threads(), hf.get_verbosity(), hf.is_progress_bar_enabled(), ours.level
    torch.set_num_threads(1)
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        hf.set_verbosity(before[1])
        if before[2]:
            hf.enable_progress_bar()
        ours.setLevel(before[3])
