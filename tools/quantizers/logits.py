"""What a checkpoint's own library computes with it on a CPU, beside the checkpoint: reference_logits.safetensors.

python tools/quantizers/logits.py CHECKPOINT ...
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel compiles its kernels otherwise

import tiny
import torch
from safetensors.torch import save_file

TOKENS = torch.arange(tiny.VOCAB_SIZE - 2)[None]


def loaded(folder: Path) -> tuple[Any, str]:
    """The model by the library that wrote it, and that library's name: GPTQModel for AWQ's and GPTQModel's packings, by
    its kernels in torch, else Transformers with what it hands the config's method to."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    method = config["quant_method"]
    if method in ("gptq", "awq"):
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
        with tempfile.TemporaryDirectory() as temporary:
            tiny.save_model(Path(temporary))  # for its tokenizer, on which GPTQModel insists
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
            model = GPTQModel.load(temporary, backend=backend, device="cpu", dtype=torch.float16).model
        return model, "gptqmodel"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", torch_dtype="auto")
    return model, method.replace("intel/", "")


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        model, library = loaded(folder)
        with torch.no_grad():
            logits = model.eval()(TOKENS).logits[0].float()
        about = {"library": library, "version": version(library), "torch": torch.__version__}
        save_file({"logits": logits}, folder / "reference_logits.safetensors", metadata=about)


if __name__ == "__main__":
    main()
