"""What Transformers will do with a result that is not there yet: its loading, with tensors that take no memory.

`load` itself is run on the result's config and headers: the same classes, conversions and checks of keys. Each tensor
is one number, seen as often as its shape says.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint.reader import Tensor
from ..checkpoint.writer import OutTensor
from ..errors import MarlinConvertError
from .transformers_quantizer import TRIED

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
#: A model of more layers than its checkpoint has tensors is none, and would take long to build.
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class Trial:
    """The result of a trial. `dequantized` layers take the memory of 16-bit weights; `why_not` is None if the model
    loads; `auto_class` is what `load` needs to build it, None for its default."""

    model: str | None = None
    dequantized: list[str] = field(default_factory=list)
    auto_class: str | None = None
    why_not: str | None = None


def try_loading(config: dict[str, Any] | None, tensors: Iterable[OutTensor]) -> Trial:
    """Load a result that has this config.json and these tensors."""
    headers = {x.name: Tensor(x.name, x.dtype, tuple(x.shape), "", 0, x.nbytes) for x in tensors}
    if config is None:
        return Trial(why_not="there is no config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        remote_code = "; its code is its own, which marlin-convert does not run here" if "auto_map" in config else ""
        return Trial(why_not=f"Transformers {transformers.__version__} has no models of type {kind!r}{remote_code}")
    most = max(_MOST_LAYERS, len(headers))
    for key, value in config.items():
        if isinstance(value, int) and value > most and (key.endswith("layers") or key == "n_layer"):
            return Trial(why_not=f"config.json says {key} {value}, and the checkpoint has {len(headers)} tensors")
    if unknown := sorted({x.dtype for x in headers.values()} - _DTYPES.keys()):
        return Trial(why_not=f"tensors of {', '.join(unknown)} cannot be tried here")
    with _quietly():
        try:
            return _load(config, headers)
        except MarlinConvertError as error:
            return Trial(
                why_not=error.message.removeprefix("None: ").rstrip(".")
            )  # the folder, as Transformers calls it
        except Exception as error:  # noqa: BLE001 - whatever Transformers makes of a config that it cannot use
            message = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            return Trial(why_not=f"{type(error).__name__}: {message}")


def _load(values: dict[str, Any], headers: dict[str, Tensor]) -> Trial:
    config: Any = AutoConfig.for_model(**values)
    model_class, auto_class = _class_of(config, values)
    state = {x.name: torch.zeros((), dtype=_DTYPES[x.dtype]).expand(x.shape) for x in headers.values()}
    token = TRIED.set(headers)
    try:
        model = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype="auto", ignore_mismatched_sizes=True
        )
    finally:
        TRIED.reset(token)
    return Trial(type(model).__name__, model.hf_quantizer.dequantized, auto_class)


def _class_of(config: Any, values: dict[str, Any]) -> tuple[Any, str | None]:
    """Return the model's class, and what `load` has to be told to build it."""
    auto: Any = AutoModelForCausalLM
    if type(config) in auto._model_mapping:
        with torch.device("meta"):
            return type(auto.from_config(config)), None
    for name in values.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found, f"transformers.{name}"
    raise ValueError(f"config.json names no architecture that Transformers {transformers.__version__} has")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Let neither Transformers nor the quantizer say what is said better here."""
    hf: Any = transformers.utils.logging
    ours = logging.getLogger("marlin_convert")
    before = hf.get_verbosity(), hf.is_progress_bar_enabled(), ours.level
    hf.set_verbosity(logging.CRITICAL)
    hf.disable_progress_bar()
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf.set_verbosity(before[0])
        if before[1]:
            hf.enable_progress_bar()
        ours.setLevel(before[2])
