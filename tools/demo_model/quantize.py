"""fp16 weights to a 4-bit GPTQ checkpoint with GPTQModel on the CPU: step 3 of the demo model.

    python tools/demo_model/quantize.py WORK_DIR WEIGHTS OUT_DIR

Puts the weights that `train.py` wrote together with their config and tokenizer as `WORK_DIR/fp16`, quantizes that,
and leaves in OUT_DIR what GPTQModel saved, less its log. README.md here says how to install GPTQModel.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from train import BOS_ID, CONTEXT, llama_config
from transformers import LlamaForCausalLM

CALIBRATION_WINDOWS = 256
SEED = 0


def assemble(work_dir: Path, weights: Path) -> Path:
    """Write config, weights and tokenizer as an ordinary fp16 checkpoint and return its folder."""
    folder = work_dir / "fp16"
    model = LlamaForCausalLM(llama_config()).half()
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if set(missing) != {"lm_head.weight"} or unexpected:  # the head is the embedding
        raise ValueError(f"{weights}: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)
    shutil.copytree(work_dir / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def calibration_set(work_dir: Path) -> list[dict[str, torch.Tensor]]:
    """Return windows of the training text, `<s>` in front of each, spread over all of it."""
    tokens = np.load(work_dir / "train.npy").astype(np.int64)
    spread = np.linspace(0, len(tokens) - CONTEXT, CALIBRATION_WINDOWS).astype(np.int64)
    rows = [torch.tensor([[BOS_ID, *tokens[start : start + CONTEXT - 1]]]) for start in spread]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work_dir", type=Path, help="what prepare.py wrote")
    parser.add_argument("weights", type=Path, help="the .safetensors file that train.py wrote")
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args()

    torch.manual_seed(SEED)
    # Without offload_to_disk=False the saved config names a folder of this machine; without dtype the CPU gets bf16.
    settings = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, offload_to_disk=False)
    folder = assemble(options.work_dir, options.weights)
    model = GPTQModel.load(str(folder), settings, device="cpu", dtype=torch.float16)
    model.quantize(calibration_set(options.work_dir), batch_size=8)
    model.save(str(options.out_dir))
    (options.out_dir / "quant_log.csv").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
