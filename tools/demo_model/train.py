"""Token arrays to an fp16 Llama checkpoint: step 2 of the demo model.

    python tools/demo_model/train.py WORK_DIR OUT_DIR [--steps N --dropout P --seconds S --name NAME]

Writes `OUT_DIR/NAME.safetensors`, the weights with the lowest validation loss in fp16, and `OUT_DIR/NAME.json`, the
log of the run. Needs torch, transformers, numpy and safetensors; a GPU makes it three minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 2048
CONTEXT = 512
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Settings:
    steps: int
    dropout: float
    seconds: float  # stop after this long, whatever the step
    batch_size: int
    learning_rate: float
    weight_decay: float
    eval_every: int
    seed: int


def llama_config() -> LlamaConfig:
    """Every linear has K % 128 == 0 and N % 256 == 0, which is what the original Marlin format can hold."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
        dtype="float16",
    )


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Drop parts of the embedding and of what each block adds to the residual stream, while training only.

    Llama has no such dropout. Hooks add it without a trace in the saved model; a million tokens need it.
    """

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, p, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def training_batch(tokens: torch.Tensor, starts: torch.Tensor, size: int) -> torch.Tensor:
    """Return `[size, CONTEXT]` tokens: windows that begin with a verse, `<s>` in front of each."""
    chosen = starts[torch.randint(len(starts), (size, 1), device=tokens.device)]
    offsets = torch.arange(CONTEXT - 1, device=tokens.device)
    return functional.pad(tokens[chosen + offsets], (1, 0), value=BOS_ID)


def windows(tokens: torch.Tensor) -> torch.Tensor:
    """Return all of `tokens` as `[n, CONTEXT]` windows with `<s>` in front, less an incomplete last one."""
    body = CONTEXT - 1
    whole = tokens[: len(tokens) // body * body].view(-1, body)
    return functional.pad(whole, (1, 0), value=BOS_ID)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats a token, of predicting every token from those before it."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(batch).logits[:, :-1]
    return functional.cross_entropy(logits.float().reshape(-1, VOCAB_SIZE), batch[:, 1:].reshape(-1))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> float:
    model.eval()
    losses = [loss_of(model, part).item() * len(part) for part in batch.split(32)]
    model.train()
    return sum(losses) / len(batch)


def learning_rate_scale(progress: float, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.05; `progress` runs from 0 to 1."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_of(model: nn.Module, settings: Settings, device: str) -> torch.optim.AdamW:
    """Weight decay on matrices only, not on the norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=device == "cuda")


def train(work_dir: Path, out_dir: Path, name: str, settings: Settings) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    splits = {
        split: torch.from_numpy(np.load(work_dir / f"{split}.npy").astype(np.int64)).to(device)
        for split in ("train", "valid")
    }
    newline = json.loads((work_dir / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]["Ċ"]
    starts = (splits["train"][:-CONTEXT] == newline).nonzero()[:, 0] + 1
    valid = windows(splits["valid"])

    model = LlamaForCausalLM(llama_config()).float().to(device)
    add_dropout(model, settings.dropout)
    optimizer = optimizer_of(model, settings, device)
    log: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    began = time.monotonic()
    model.train()
    for step in range(settings.steps):
        # Whichever runs out first, the steps or the time, the learning rate reaches its end there.
        progress = max(step / settings.steps, (time.monotonic() - began) / settings.seconds)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_scale(progress, step)
        loss = loss_of(model, training_batch(splits["train"], starts, settings.batch_size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = progress >= 1 or step == settings.steps - 1
        if last or step % settings.eval_every == settings.eval_every - 1:
            entry = {
                "step": step + 1,
                "seconds": round(time.monotonic() - began, 1),
                "train_loss": round(loss.item(), 4),
                "valid_loss": round(validation_loss(model, valid), 4),
            }
            if entry["valid_loss"] < min((e["valid_loss"] for e in log), default=math.inf):
                best = {key: value.detach().half().cpu() for key, value in model.state_dict().items()}
            log.append(entry)
            print(name, entry, flush=True)
        if last:
            break

    best.pop("lm_head.weight", None)  # tied to the embedding
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(best, out_dir / f"{name}.safetensors", metadata={"format": "pt"})
    report = {"settings": asdict(settings), "torch": torch.__version__, "log": log}
    (out_dir / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work_dir", type=Path, help="what prepare.py wrote")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--name", default="model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    train(options.pop("work_dir"), options.pop("out_dir"), options.pop("name"), Settings(**options))


if __name__ == "__main__":
    main()
