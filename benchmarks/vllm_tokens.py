"""Tokens per second of whole models in vLLM as users run it: a GPTQ checkpoint on vLLM's default beside its result.

    python benchmarks/vllm_tokens.py GPTQ MARLIN [--batches 1,8,64] [--json FILE]

Each model runs in a process of its own, with torch.compile and CUDA graphs, and a cache of compiled graphs of its own.
Decoding: 128 tokens behind prompts of 128 random ones, without the time of the first (that of a run that stops there);
the best of two runs. Prefill: prompts of one step, the best of three. What MARLIN computes on is
MARLIN_CONVERT_VLLM_KERNEL's to say; GPTQ is loaded without the plugin.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PREFILLS = ((1, 512), (1, 2000), (4, 2000))
PROMPT = NEW = 128


def measure(model: str, batches: list[int]) -> dict[str, Any]:
    """{"start_s", "decode": {batch: tokens/s}, "prefill": {"prompts x tokens": tokens/s}} of one model."""
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype="float16", max_model_len=2048, gpu_memory_utilization=0.6,
        max_num_seqs=max(batches), max_num_batched_tokens=8192, seed=0, enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": batches},
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    numbers = random.Random(1)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: int, length: int, new: int, times: int) -> float:
        settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        taken = []
        for _ in range(times):
            ids = [[numbers.randrange(5, vocabulary) for _ in range(length)] for _ in range(prompts)]
            begin = time.perf_counter()
            done = llm.generate([{"prompt_token_ids": x} for x in ids], settings, use_tqdm=False)
            taken.append(time.perf_counter() - begin)
            assert sum(len(x.outputs[0].token_ids) for x in done) == prompts * new
        return min(taken)

    seconds(4, 32, 16, 1)  # warm
    decode, prefill = {}, {}
    for batch in batches:
        seconds(batch, PROMPT, 4, 1)
        step = seconds(batch, PROMPT, NEW, 2) - seconds(batch, PROMPT, 1, 2)
        decode[str(batch)] = round(batch * (NEW - 1) / step, 1)
    for prompts, length in PREFILLS:
        prefill[f"{prompts} x {length}"] = round(prompts * length / seconds(prompts, length, 1, 3), 1)
    return {"start_s": round(start_s, 1), "decode": decode, "prefill": prefill}


def in_a_process(model: str, batches: list[int], plugin: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        changes = {"VLLM_CACHE_ROOT": folder, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if not plugin:
            changes["VLLM_PLUGINS"] = ""
        command = [sys.executable, __file__, "--one", model, "--batches", ",".join(map(str, batches)), "--json", result]
        subprocess.run(command, check=True, env={**os.environ, **changes}, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gptq", nargs="?")
    parser.add_argument("marlin", nargs="?")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.one:
        arguments.json.write_text(json.dumps(measure(arguments.one, batches)))
        return
    if arguments.gptq is None or arguments.marlin is None:
        parser.error("GPTQ and MARLIN are needed: two folders")
    gptq, marlin = (in_a_process(arguments.gptq, batches, False), in_a_process(arguments.marlin, batches, True))
    print("| tokens/s | GPTQ | Marlin | Marlin / GPTQ |\n| --- | --- | --- | --- |")
    for what in ("decode", "prefill"):
        for case, one in gptq[what].items():
            other = marlin[what][case]
            print(f"| {what} {case} | {one:.0f} | {other:.0f} | {other / one:.2f} |")
    print(f"| start, s | {gptq['start_s']:.1f} | {marlin['start_s']:.1f} | |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"gptq": gptq, "marlin": marlin}, indent=2) + "\n")


if __name__ == "__main__":
    main()
