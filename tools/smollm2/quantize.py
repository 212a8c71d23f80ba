"""The fp16 checkpoint to a 4-bit GPTQ one with GPTQModel on the CPU: step 2.

    python tools/smollm2/quantize.py FP16_DIR OUT_DIR [--group-size 64] [--desc-act]

Calibrates on the topics of Python's own `pydoc`. tools/demo_model/README.md says how to install GPTQModel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer

CONTEXT = 512
SEED = 0


def calibration_set(folder: Path, windows: int) -> list[dict[str, torch.Tensor]]:
    """Return `windows` windows of CONTEXT tokens, spread evenly over the topics in alphabetical order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(tokens) - CONTEXT, windows).long().tolist()
    rows = [tokens[start : start + CONTEXT][None] for start in starts]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("fp16_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(SEED)
    # Without offload_to_disk=False the saved config names a folder of this machine; without dtype the CPU gets bf16.
    settings = QuantizeConfig(
        bits=4, group_size=options.group_size, sym=True, desc_act=options.desc_act, offload_to_disk=False
    )
    model = GPTQModel.load(str(options.fp16_dir), settings, device="cpu", dtype=torch.float16)
    model.quantize(calibration_set(options.fp16_dir, options.windows), batch_size=4)
    model.save(str(options.out_dir))
    (options.out_dir / "quant_log.csv").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
