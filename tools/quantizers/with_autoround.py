"""Small GPTQ checkpoints made by AutoRound, with its own fake-quantized weights as references.

python tools/quantizers/with_autoround.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from auto_round import AutoRound
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "autoround-g128": {"bits": 4, "group_size": 128, "sym": True},
    "autoround-g32-asym": {"bits": 4, "group_size": 32, "sym": False},
}
ITERATIONS = 20


def quantize(source: Path, folder: Path, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Write the checkpoint; return the weights, `[K, N]`, that AutoRound's own kernel reads from it.

    The number is how many of them differ from the rounded weights that AutoRound tuned: its packing stores a zero
    point of 0 as that of 1.
    """
    autoround = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        **settings,
        dataset=list(tiny.calibration_tokens().split(8)),
        seqlen=tiny.CONTEXT,
        nsamples=tiny.WINDOWS,
        batch_size=8,
        iters=ITERATIONS,
        seed=tiny.SEED,
        device_map="cpu",
        amp=False,
    )
    model, _ = autoround.quantize()
    tuned = {name: m.weight.detach().T.half() for name, m in model.named_modules() if hasattr(m, "zp")}
    autoround.save_quantized(str(folder), format="auto_gptq", inplace=True)
    weights = {name: read_by_kernel(folder, name, settings) for name in tuned}
    return weights, sum(int((weights[name] != tuned[name]).sum()) for name in tuned)


def read_by_kernel(folder: Path, name: str, settings: dict[str, Any]) -> torch.Tensor:
    """AutoRound's QuantLinear applied to the identity matrix, without its bias."""
    tensors = load_file(folder / "model.safetensors")
    state = {kind: tensors[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")}
    K, N = state["qweight"].shape[0] * 32 // settings["bits"], state["scales"].shape[1]
    # Without g_idx, which says nothing new here: with it, the kernel cuts K columns where there are N.
    linear = QuantLinear(settings["bits"], settings["group_size"], K, N, bias=False, g_idx=False)
    linear.load_state_dict(state)
    return linear(torch.eye(K))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", help="which; default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        tiny.save_model(source)
        for name in options.names or SETTINGS:
            folder = options.out_dir / name
            shutil.rmtree(folder, ignore_errors=True)
            weights, changed = quantize(source, folder, SETTINGS[name])
            tiny.keep_only(folder)
            about = {
                "tool": "AutoRound",
                "version": version("auto-round"),
                "settings": SETTINGS[name],
                "weights_changed_by_packing": changed,
            }
            tiny.save_reference(folder, weights, about)


if __name__ == "__main__":
    main()
