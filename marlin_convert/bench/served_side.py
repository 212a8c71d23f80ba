"""One side of `served`, in a process of its own: `python -m marlin_convert.bench.served_side FD REQUEST`.

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


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    os.set_inheritable(answers.fileno(), False)  # processes of vLLM are not to keep it open

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
    """Measure one model in this process; the side, and the versions of what it ran on."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    import torch
    import vllm

    more: dict[str, Any] = {}
    if request.random:
        more = {"load_format": "dummy", "hf_overrides": _unquantized, "dtype": "float16"}
    begin = time.perf_counter()
    llm = vllm.LLM(
        model=request.model, revision=request.revision, skip_tokenizer_init=True, max_model_len=request.length,
        max_num_seqs=max(request.batch), max_num_batched_tokens=TOKENS_OF_A_STEP, seed=0,
        enable_prefix_caching=False, compilation_config={"cudagraph_capture_sizes": list(request.batch)}, **more,
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    on_step("start")
    numbers = random.Random(1)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: int, length: int, new: int, times: int) -> float:
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        taken = []
        for _ in range(times):
            ids = [[numbers.randrange(5, vocabulary) for _ in range(length)] for _ in range(prompts)]
            begin = time.perf_counter()
            done = llm.generate([{"prompt_token_ids": x} for x in ids], settings, use_tqdm=False)
            taken.append(time.perf_counter() - begin)
            made = sum(len(x.outputs[0].token_ids) for x in done)
            if made != prompts * new:
                raise RuntimeError(f"it made {made} tokens instead of {prompts * new}")
        return min(taken)

    decode, prefill = {}, {}
    for batch in request.batch:
        seconds(batch, PROMPT, 4, 1)  # warm
        step = seconds(batch, PROMPT, NEW, 2) - seconds(batch, PROMPT, 1, 2)
        decode[batch] = batch * (NEW - 1) / step
        on_step(f"batch {batch}")
    for prompts, length in request.prefills:
        prefill[prompts, length] = prompts * length / seconds(prompts, length, 1, 3)
        on_step(f"prefill {prompts} x {length}")
    kernels = sorted({name for names in llm.apply_model(_kernels) for name in names})
    versions = {
        "vLLM": vllm.__version__, "marlin-convert": __version__, "torch": torch.__version__,
        "CUDA of torch": str(torch.version.cuda), "python": platform.python_version(),
    }  # fmt: skip
    return Side(start_s, decode, prefill, tuple(kernels)), versions


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


if __name__ == "__main__":
    main()
