"""What all quantizers get, and what is kept of their results beside the checkpoint: a tiny Llama, and references."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
VOCAB_SIZE = 32
CONTEXT = 128
WINDOWS = 32
COLUMNS_KEPT = 8  # of each layer's reference weight


def model() -> LlamaForCausalLM:
    """A random Llama of one block: q, o 128 x 128, k, v 128 x 32, gate, up 128 x 256, down 256 x 128, with biases.

    Input channels differ in size, so that act-order has an order to find. Every 37th output of a linear has positive
    weights alone, and every 37th from the sixth on negative ones: their asymmetric zero points are 0 and the largest
    code, which is where the conventions of GPTQ files part.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    result = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for module in result.modules():
            if isinstance(module, torch.nn.Linear) and module is not result.lm_head:
                module.weight.normal_(0, 0.05).mul_(torch.rand(module.in_features) * 2 + 0.2)
                module.weight[::37].abs_()
                module.weight[5::37].abs_().neg_()
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
        result.model.embed_tokens.weight.normal_().mul_(torch.rand(128) + 0.1)
    return result.half()


def save_model(folder: Path) -> None:
    """Write the fp16 checkpoint, with a tokenizer because some quantizers insist on one; its words are numbers."""
    model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB_SIZE)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", pad_token="1").save_pretrained(folder)


def calibration_tokens() -> torch.Tensor:
    """`[WINDOWS, CONTEXT]` random tokens."""
    return torch.randint(0, VOCAB_SIZE, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(SEED))


def save_reference(folder: Path, weights: dict[str, torch.Tensor], about: dict[str, object]) -> None:
    """Write what the quantizer says the weights are; `weights` are `[K, N]`, kept in bf16 if they are, else in fp16.

    `reference.json` has the SHA-256 of each whole weight, its values row by row in little-endian order and every
    zero positive; `reference.safetensors` the first COLUMNS_KEPT columns, to look at when a hash differs.
    """
    layers, kept = {}, {}
    for name, weight in weights.items():
        half = weight.detach() if weight.dtype == torch.bfloat16 else weight.detach().half()
        half = half.contiguous() + 0.0  # -0 + 0 is 0
        digest = hashlib.sha256(half.view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
        layers[name] = {"shape": list(half.shape), "sha256": digest}
        kept[name] = half[:, :COLUMNS_KEPT].contiguous()
    save_file(kept, folder / "reference.safetensors")
    text = json.dumps({**about, "columns_kept": COLUMNS_KEPT, "layers": layers}, indent=1)
    (folder / "reference.json").write_text(text + "\n", encoding="utf-8")


def keep_only(folder: Path) -> None:
    """Leave config and weights; nothing of a tokenizer, a log or a generation config is tested."""
    for path in folder.iterdir():
        if path.name not in {"config.json", "quantize_config.json", "model.safetensors"}:
            path.unlink()


def main(
    about: str | None,
    names: Iterable[str],
    make: Callable[[Path, Path, str], tuple[dict[str, torch.Tensor], dict[str, object]]],
) -> None:
    """Read the command line of a quantizer, and make checkpoints with it, all of `names` or those that are asked for.

    `make` gets the fp16 checkpoint, the folder to write and the name; it returns the weights as the quantizer itself
    has them and what to note of it, as `save_reference` takes them.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", help="which; default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        save_model(source)
        for name in options.names or names:
            folder = options.out_dir / name
            shutil.rmtree(folder, ignore_errors=True)
            weights, noted = make(source, folder, name)
            keep_only(folder)
            save_reference(folder, weights, noted)
