"""Does a converted model compute what its source does? Logits, perplexity and a continuation, side by side.

    python benchmarks/proof.py GPTQ MARLIN TEXT [--device cuda]

GPTQ is the source folder, MARLIN what `marlin-convert` made of it, TEXT a file to measure the perplexity on. The
reference is the ordinary Transformers model, its weights dequantized here from the GPTQ tensors by their definition and
rounded once to fp16; no code of the converter takes part in it. Three things must hold, or the program ends with 1:

- logits: relative error (Frobenius norm over the whole text) at most 2e-3,
- perplexity: equal to three digits, that is, to 0.05 %,
- greedy continuation of the prompt: the same tokens.

Long texts take long on a CPU: `--tokens` takes only the beginning. `--context` is the tokens in a window, the rows of
each product: on a GPU, many rows are left to cuBLAS after dequantizing, few are computed by Marlin's own kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import marlin_convert

LOGITS_BOUND = 2e-3
PERPLEXITY_BOUND = 5e-4


def numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C] → int64 [R, 32/bits, C], from the lowest bits up."""
    shifts = torch.arange(0, 32, bits)[None, :, None]
    return (words.long()[:, None] & 0xFFFFFFFF) >> shifts & 2**bits - 1


def dequantize(layer: dict[str, torch.Tensor], K: int, *, v2: bool) -> torch.Tensor:
    """Return [N, K] fp16: (code - zero point) · scale of the row's group, computed in float64.

    Format v1 stores zero points less 1, subtracted from each word as a whole.
    """
    qweight, qzeros, scales = layer["qweight"], layer["qzeros"], layer["scales"].double()
    bits, N = qweight.shape[0] * 32 // K, scales.shape[1]
    codes = numbers(qweight, bits).reshape(K, N)
    ones = 0 if v2 else sum(1 << shift for shift in range(0, 32, bits))
    zeros = numbers(qzeros.long() + ones, bits).transpose(1, 2).reshape(scales.shape[0], -1)[:, :N]
    groups = layer["g_idx"].long() if "g_idx" in layer else torch.arange(K) // -(-K // scales.shape[0])
    return ((codes - zeros[groups]) * scales[groups]).T.half().contiguous()


def reference_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the source's model as plain linears."""
    config = AutoConfig.from_pretrained(folder)
    v2 = config.quantization_config.get("checkpoint_format") == "gptq_v2"
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            layer, _, kind = name.rpartition(".")
            if kind in ("qweight", "qzeros", "scales", "g_idx"):
                layers.setdefault(layer, {})[kind] = tensor
            else:
                weights[name] = tensor
    for layer, parts in layers.items():
        weights[f"{layer}.weight"] = dequantize(parts, model.get_submodule(layer).in_features, v2=v2)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if set(missing) - tied or unexpected:
        sys.exit(f"{folder}: missing {sorted(set(missing) - tied)}, unexpected {unexpected}")
    model.tie_weights()
    return model


def compare(
    reference: PreTrainedModel, model: PreTrainedModel, windows: list[torch.Tensor]
) -> Iterator[tuple[float, float, float, float, int]]:
    """For each window: squared norm of the difference, of the reference; both losses, summed; tokens scored."""
    for window in windows:
        expected, found = (m(window).logits[0].float() for m in (reference, model))
        losses = [functional.cross_entropy(x[:-1], window[0, 1:], reduction="sum").item() for x in (expected, found)]
        difference = torch.linalg.vector_norm(found - expected, dtype=torch.float64).item()
        size = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
        yield difference**2, size**2, losses[0], losses[1], window.shape[1] - 1


@torch.inference_mode()
def prove(options: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(options.gptq)
    text = options.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : options.tokens]
    windows = [w for w in tokens.to(options.device).split(options.context, dim=1) if w.shape[1] > 1]

    reference = reference_model(options.gptq, dtype).to(options.device).eval()
    model = marlin_convert.load(options.marlin, dtype=dtype, device=options.device).eval()
    rows = []
    for row in compare(reference, model, windows):
        rows.append(row)
        print(f"\r{len(rows)} of {len(windows)} windows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    difference, size, reference_loss, loss, scored = (sum(column) for column in zip(*rows, strict=True))

    prompt = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(options.device)
    greedy = {"do_sample": False, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    start = prompt["input_ids"].shape[1]
    continuations = [m.generate(**prompt, **greedy)[0, start:].tolist() for m in (reference, model)]
    same = 0
    while same < options.new_tokens and continuations[0][same] == continuations[1][same]:
        same += 1
    perplexities = [math.exp(x / scored) for x in (reference_loss, loss)]
    return {
        "device": device_name(options.device),
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": scored,
        "context": options.context,
        "logits_relative_error": math.sqrt(difference / size),
        "perplexity_reference": perplexities[0],
        "perplexity_marlin": perplexities[1],
        "new_tokens": options.new_tokens,
        "new_tokens_equal": same,
        "prompt": options.prompt,
        "continuation_reference": tokenizer.decode(continuations[0]),
        "continuation_marlin": tokenizer.decode(continuations[1]),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return f"{found[0].partition(': ')[2] if found else platform.machine()}, {os.cpu_count()} cores"


def failures(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    expected, found = result["perplexity_reference"], result["perplexity_marlin"]
    held = {
        f"logits: {LOGITS_BOUND:g} is allowed": result["logits_relative_error"] <= LOGITS_BOUND,
        f"perplexity: a relative difference of {PERPLEXITY_BOUND:g} is allowed": (
            abs(found - expected) <= PERPLEXITY_BOUND * expected
        ),
        "continuation: the tokens differ": result["new_tokens_equal"] == result["new_tokens"],
    }
    return [what for what, holds in held.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gptq", type=Path, help="the source's folder")
    parser.add_argument("marlin", type=Path, help="the converted folder")
    parser.add_argument("text", type=Path, help="text to measure on, UTF-8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--tokens", type=int, default=None, help="use only so many tokens of the text")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (default: 512)")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    started = time.monotonic()
    result = prove(options)
    table = Table(title=f"{result['device']}, {result['dtype']}, torch {result['torch']}", title_justify="left")
    for column in ("", "source, dequantized", "Marlin"):
        table.add_column(column)
    table.add_row(
        f"perplexity, {result['tokens']} tokens in windows of {result['context']}",
        f"{result['perplexity_reference']:.4f}",
        f"{result['perplexity_marlin']:.4f}",
    )
    table.add_row("logits, relative error", "", f"{result['logits_relative_error']:.2e}")
    table.add_row("greedy tokens equal", "", f"{result['new_tokens_equal']} of {result['new_tokens']}")
    console = Console(width=100)
    console.print(table)
    for name in ("reference", "marlin"):
        console.print(f"{name}: {result['prompt']}{result[f'continuation_{name}']}", markup=False, highlight=False)
    console.print(f"{time.monotonic() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    wrong = failures(result)
    if wrong:
        sys.exit("Not proved. " + "; ".join(wrong))


if __name__ == "__main__":
    main()
