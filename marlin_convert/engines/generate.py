"""A prompt through a Marlin checkpoint, as text that arrives while it is made; Transformers does the work.

Without sampling options the continuation is greedy: the most likely token each time, the same on every run.
`compare` continues one prompt twice, with a converted model and with its source's weights dequantized to fp16.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import INSTALL_RUN, DeviceError, MissingPackageError, SourceError, UnsupportedError, require
from ..hub.open import fetch
from ..options import HubAccess
from ..progress import Progress

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Any of temperature, top_p and top_k turns sampling on; temperature 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        chosen = (self.temperature, self.top_p, self.top_k)
        return self.temperature == 0 or all(value is None for value in chosen)


@dataclass(frozen=True)
class Generated:
    """A continuation. `seconds` is for its tokens, prompt included, not for loading; `note` for the user, or None."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    load_seconds: float
    device: str
    dtype: str
    sampling: Sampling
    note: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for `--json`."""
        times = {"seconds": round(self.seconds, 3), "load_seconds": round(self.load_seconds, 3),
                 "tokens_per_second": round(self.tokens_per_second, 2)}  # fmt: skip
        return {"ok": True, **asdict(self), **times, "greedy": self.sampling.greedy}


@dataclass(frozen=True)
class Comparison:
    """One greedy continuation twice: by the source, dequantized to fp16, and by the converted model."""

    prompt: str
    source: str
    result: str

    @property
    def equal(self) -> bool:
        return self.source == self.result

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "equal": self.equal}


def generate(
    source: str | Path,
    prompt: str,
    sampling: Sampling | None = None,
    device: str = "auto",
    on_text: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
) -> Generated:
    """Continue `prompt` with the Marlin checkpoint `source`, a folder or a Hub id.

    `device` is where to compute; `on_text` gets each piece of text as soon as it is final; `progress` hears of what
    comes before. Raises MarlinConvertError when torch or Transformers is missing, and what `load` raises.
    """
    sampling, access = sampling or Sampling(), access or HubAccess()
    progress, started = progress or Progress(), time.monotonic()
    with contextlib.ExitStack() as stack:
        with progress.waiting("loading the model"):
            hf = stack.enter_context(transformers_quietly())
            stack.enter_context(_explained(str(source)))
            origin = fetch(
                str(source), revision=access.revision, token=access.token, cache_dir=access.cache_dir,
                transfer=progress.transfer,
            )  # fmt: skip
            model = hf.load_from(origin, device=device)
            tokenizer = hf.tokenizer_from(origin)
        loaded = time.monotonic()
        return _continue(model, tokenizer, prompt, sampling, on_text, loaded - started)


def compare(source: Path, result: Path, prompt: str, max_new_tokens: int, device: str) -> Comparison:
    """Continue `prompt` greedily with `source`, dequantized, and with `result`, made from it."""
    sampling = Sampling(max_new_tokens=max_new_tokens)
    with transformers_quietly() as hf, _explained(str(result)):
        tokenizer = hf.load_tokenizer(result)
        texts = [
            _continue(model, tokenizer, prompt, sampling).text
            for model in (hf.load_dequantized(source, device=device), hf.load(result, device=device))
        ]
    return Comparison(prompt, *texts)


def _continue(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
    load_seconds: float = 0.0,
) -> Generated:
    import torch
    from transformers import GenerationConfig, TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text and text:
                on_text(text)

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    prompt_tokens = int(inputs["input_ids"].shape[1])
    if prompt_tokens == 0:
        raise UnsupportedError("the prompt is empty, and this tokenizer adds nothing to it; write something.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new, note = sampling.max_new_tokens, None
    if limit is not None and prompt_tokens + new > limit:
        new = limit - prompt_tokens
        if new < 1:
            raise UnsupportedError(
                f"the prompt has {prompt_tokens} tokens; this model takes {limit}, the answer included."
            )
        note = f"only {new} new tokens: the model takes {limit}, {prompt_tokens} of them are the prompt"
    settings = {"max_new_tokens": new, "max_length": None, "do_sample": not sampling.greedy}
    for name in ("temperature", "top_p", "top_k"):
        settings[name] = None if sampling.greedy else getattr(sampling, name)
    rules = GenerationConfig(**{**model.generation_config.to_dict(), **settings})  # type: ignore[no-untyped-call]
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    started = time.monotonic()
    tokens = model.generate(
        **inputs,
        generation_config=rules,
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    seconds = time.monotonic() - started
    answer = tokens[0, prompt_tokens:]
    return Generated(
        prompt, tokenizer.decode(answer, skip_special_tokens=True), prompt_tokens, len(answer), seconds, load_seconds,
        str(model.device), str(model.dtype).removeprefix("torch."), sampling, note,
    )  # fmt: skip


@contextlib.contextmanager
def transformers_quietly() -> Iterator[ModuleType]:
    """Give `hf`, with Transformers quiet: what it would print of its own is not for the user of a command."""
    require("torch", "transformers")
    try:
        from transformers.utils import logging

        from . import transformers_quantizer as hf
    except ImportError as error:
        raise MissingPackageError(f"running a model needs Transformers 5 or newer ({error}): {INSTALL_RUN}.") from None
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield hf
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Raise what Transformers and torch say about a model or a device as this program's errors."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{source}: the GPU's memory ran out ({str(error).splitlines()[0]}).") from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SourceError(f"{source}: Transformers cannot run it: {text}.") from None
