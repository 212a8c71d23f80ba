"""One side of `served`, in a process of its own: `main` with the arguments FD and REQUEST.

Answers go to the file descriptor FD, one JSON array a line: ["step", what is done], in the end ["done", {"side",
"machine"}] or ["failed", why]. vLLM prints what it likes to standard output.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .._version import __version__
from . import gpu
from .served import NEW, PROMPT, TOKENS_OF_A_STEP, Request, Side

OURS = "marlin-convert's kernels"
LONGEST = 400  # characters of an error
TIMES = 3  # of each measurement; the shortest counts


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    os.set_inheritable(answers.fileno(), False)  # vLLM's processes must not keep it open

    def answer(kind: str, value: Any) -> None:
        print(json.dumps([kind, value]), file=answers, flush=True)

    try:
        values = json.loads(sys.argv[2])
        request = Request(
            **{**values, "batch": tuple(values["batch"]), "prefills": tuple(map(tuple, values["prefills"]))}
        )
        side, versions = measure(request, lambda what: answer("step", what))
        answer("done", {"side": side.as_dict(), "machine": asdict(gpu.described(versions))})
    except Exception as error:
        answer("failed", _in_short(error))
        raise


def measure(request: Request, on_step: Callable[[str], object]) -> tuple[Side, dict[str, str]]:
    """Measure one model; the side, and the versions of what it ran on.

    vLLM's engine is a process of its own, as in its server: in ours, preparing a step and taking what another has made
    would wait for each other, and the kernels of a fast model for both.
    """
    # without the second, `_kernels` cannot be sent to that process
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    import torch
    import vllm

    more: dict[str, Any] = {}
    if request.random:
        more = {"load_format": "dummy", "hf_overrides": _unquantized, "dtype": "float16"}
    begin = time.perf_counter()
    llm = vllm.LLM(
        model=request.model, revision=request.revision, skip_tokenizer_init=True, max_model_len=request.length,
        max_num_seqs=max(request.batch), max_num_batched_tokens=TOKENS_OF_A_STEP, seed=0,
        enable_prefix_caching=False, disable_log_stats=False,
        compilation_config={"cudagraph_capture_sizes": list(request.batch)}, **more,
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    on_step("start")
    engine, decode, prefill = _Engine(llm), {}, {}
    for batch in request.batch:
        engine.generate(batch, PROMPT, 4)  # warm
        decode[batch] = batch / min(engine.step_s(batch) for _ in range(TIMES))
        on_step(f"batch {batch}")
    for prompts, length in request.prefills:
        prefill[prompts, length] = prompts * length / min(engine.prefill_s(prompts, length) for _ in range(TIMES))
        on_step(f"prefill {prompts} x {length}")
    kernels = sorted({name for names in llm.apply_model(_kernels) for name in names})
    versions = {
        "vLLM": vllm.__version__, "marlin-convert": __version__, "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda), "python": platform.python_version(),
    }  # fmt: skip
    return Side(start_s, decode, prefill, tuple(kernels)), versions


class _Engine:
    """What is timed of vLLM's `llm`: random prompts, and as many tokens as asked for."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._numbers = llm, random.Random(1)
        self._vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def generate(self, prompts: int, length: int, new: int) -> list[Any]:
        """Return the times at which each sequence was given its first and its last token."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        ids = [[self._numbers.randrange(5, self._vocabulary) for _ in range(length)] for _ in range(prompts)]
        done = self._llm.generate([{"prompt_token_ids": x} for x in ids], settings, use_tqdm=False)
        made = sum(len(x.outputs[0].token_ids) for x in done)
        if made != prompts * new:
            raise RuntimeError(f"it made {made} tokens instead of {prompts * new}")
        return [x.metrics for x in done]

    def step_s(self, batch: int) -> float:
        """Return the seconds of one step of the sequence that begins last: from then on all are decoded together."""
        last = max(self.generate(batch, PROMPT, NEW), key=lambda times: times.first_token_ts)
        return float(last.last_token_ts - last.first_token_ts) / (NEW - 1)

    def prefill_s(self, prompts: int, length: int) -> float:
        """Return the seconds until so many prompts have their first token."""
        begin = time.perf_counter()
        self.generate(prompts, length, 1)
        return time.perf_counter() - begin


def _in_short(error: Exception) -> str:
    """Return an error on one line: vLLM wraps its own in several."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}"


def _unquantized(config: Any) -> Any:
    """Return the model's configuration, as if its weights were plain."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _kernels(model: Any) -> list[str]:
    """Return what computes the quantized linear layers of a model of vLLM."""
    found: set[str] = set()
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        found |= {OURS if product.ours else "vLLM's Marlin kernel" for product in getattr(method, "products", ())}
        kernel = getattr(method, "kernel", None)
        if kernel is not None:
            found.add(type(kernel).__name__)
    return sorted(found)
