"""In the place of vLLM, in a process that measures: a clock that goes on by what is generated, a model by its name.

A call of `generate` takes a second, one for each thousand of its prompts' tokens more, and a quarter of one for each
token that it makes of each sequence; half of one as "gptq", a whole one with random weights. What it was asked for goes
to the file that ASKED names, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from marlin_convert.bench import gpu
from marlin_convert.bench.results import Machine

__version__ = "0.99"
_now = 0.0

time.perf_counter = lambda: _now
gpu.described = lambda versions: Machine(
    "cuda:0", "a GPU", "9.0", 132, 50_000_000, 80_000_000_000, "580", versions, None
)


def _write(what: dict[str, Any]) -> None:
    with open(os.environ["ASKED"], "a", encoding="utf-8") as file:  # noqa: PTH123
        print(json.dumps(what), file=file)


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, **settings: Any) -> None:
        global _now
        names = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "VLLM_PLUGINS",
                 "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLOW_INSECURE_SERIALIZATION", "OURS")  # fmt: skip
        settings["hf_overrides"] = settings.get("hf_overrides") and "there"
        _write(
            {"settings": settings, "environment": {name: os.environ.get(name) for name in names}, "pid": os.getpid()}
        )
        model = settings["model"].rpartition("/")[2]
        print("the engine speaks", flush=True)
        if model == "refused":
            raise ValueError("1 validation error\n  act-order is no longer supported")
        if model == "exits":
            print("the last words\n\n", file=sys.stderr, flush=True)
            os._exit(3)
        if model == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if model == "leaves a child":
            os.set_inheritable(int(sys.argv[1]), True)
            child = subprocess.Popen(["sleep", "600"], close_fds=False)
            _write({"child": child.pid})
            os._exit(4)
        _now += {"marlin": 60.0, "gptq": 70.25}.get(model, 80.0)
        self.model, self.random = model, "load_format" in settings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 1000))

    def generate(self, prompts: list[dict[str, list[int]]], settings: SamplingParams, use_tqdm: bool) -> list[Any]:
        global _now
        assert all(0 <= token < 1000 for prompt in prompts for token in prompt["prompt_token_ids"])
        assert (settings.ignore_eos, settings.temperature, use_tqdm) == (True, 0.0, False)
        step = (0.5 if self.model == "gptq" else 0.25) * (4 if self.random else 1)
        _now += 1 + sum(len(prompt["prompt_token_ids"]) for prompt in prompts) / 1000 + step
        times = SimpleNamespace(first_token_ts=_now, last_token_ts=_now + (settings.max_tokens - 1) * step)
        earlier = SimpleNamespace(first_token_ts=_now - 0.5, last_token_ts=_now + 99)
        _now = times.last_token_ts
        made = settings.max_tokens - (self.model == "too few")
        outputs = [SimpleNamespace(token_ids=[7] * made)]
        return [SimpleNamespace(outputs=outputs, metrics=earlier if i else times) for i in range(len(prompts))]

    def apply_model(self, function: Any) -> list[Any]:
        class Machete:
            pass

        products = [SimpleNamespace(ours=True), SimpleNamespace(ours=False)]
        methods = (
            [SimpleNamespace(products=products)] if self.model == "marlin" else [SimpleNamespace(kernel=Machete())]
        )
        layers = [SimpleNamespace(quant_method=method) for method in methods] + [SimpleNamespace()]
        return [function(SimpleNamespace(modules=lambda: layers))]
