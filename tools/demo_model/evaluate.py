"""Perplexity and samples of the fp16 model and of its GPTQ checkpoint: step 4 of the demo model.

    python tools/demo_model/evaluate.py WORK_DIR GPTQ_DIR

Both models run as a plain Llama in float32 on the CPU. The GPTQ weights are dequantized here from their definition, not
by a GPTQ library: `W[k, n] = (code[k, n] - 8) * scales[k // group_size, n]`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional
from train import llama_config, windows
from transformers import AutoTokenizer, LlamaForCausalLM

PROMPTS = (
    "In the beginning",
    "And the king said unto the woman,",
    "Blessed are they that",
    "And Jesus answered and said",
)
NEW_TOKENS = 64


def dequantize(qweight: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    """Return the `[N, K]` float32 weight of a linear from `[K/8, N]` words, `[G, N]` scales and `[K]` group indices."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & 0xF  # [K/8, 8, N], lowest nibble first
    codes = codes.reshape(-1, qweight.shape[1])
    return ((codes - 8).float() * scales.float()[g_idx.long()]).T.contiguous()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return plain float32 weights of an fp16 or a symmetric 4-bit GPTQ checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qweight":
            weights[f"{layer}.weight"] = dequantize(tensor, tensors[f"{layer}.scales"], tensors[f"{layer}.g_idx"])
        elif kind == "qzeros":
            # Format v1 stores z - 1, so 7 in every nibble says that the zero point is 8.
            if not bool((tensor == 0x77777777).all()):
                raise ValueError(f"{name}: not symmetric")
        elif kind not in ("scales", "g_idx"):
            weights[name] = tensor.float()
    return weights


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Perplexity a token over windows of 512 that begin with `<s>`; `<s>` itself is not scored."""
    losses = []
    for batch in windows(tokens).split(8):
        logits = model(batch).logits[:, :-1]
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work_dir", type=Path, help="what prepare.py and quantize.py wrote")
    parser.add_argument("gptq_dir", type=Path)
    options = parser.parse_args()

    for folder in (options.work_dir / "fp16", options.gptq_dir):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = LlamaForCausalLM(llama_config()).float().eval()
        missing, unexpected = model.load_state_dict(weights_of(folder), strict=False)
        if set(missing) != {"lm_head.weight"} or unexpected:
            raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}")
        print(f"== {folder}")
        for split in ("valid", "test"):
            text = (options.work_dir / f"{split}.txt").read_text(encoding="utf-8")
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            print(f"{split} perplexity: {perplexity(model, tokens):.4f}")
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            print(f"-- {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
