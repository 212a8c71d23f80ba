"""Marlin checkpoints in Transformers: `import marlin_convert.hf`, and `from_pretrained` reads them.

Both formats, checkpoints of ours and those that AutoGPTQ made. They say quant_method "gptq" (some "marlin"), so this
module stands before Transformers' reader of such configs, takes what is Marlin, and hands every other GPTQ checkpoint
to the stock one untouched. `load` does it in one call.

The checkpoint's tensors decide which modules are Marlin layers: those, and only those, for which it has `B` or
`marlin_qweight`. Keys that are missing, and quantized ones that are left over, are an error: no model is returned with
random weights in it.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_accelerate_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.weight_file import LocalWeightFile
from ..conversion.layer_reader import LayerReader
from ..conversion.plan import make_plan
from ..device import pick_device
from ..errors import SourceError, UnsupportedError
from ..formats.marlin_config import is_marlin, read_marlin_settings
from ..formats.stored import MARLIN_PARTS, stored_layers
from ..hub.open import Source, fetch
from ..native import cuda
from .linear import MarlinLinear
from .transformers_modules import put_layers, some

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# ---- Which checkpoints are ours ----


class MarlinConfig(QuantizationConfigMixin):
    """The `quantization_config` of a Marlin checkpoint; it is saved as it was read."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = "marlin"  # select the quantizer below, whatever quant_method the checkpoint names
        self.settings = settings
        self.marlin = read_marlin_settings(settings)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.settings)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _register() -> None:
    """Put `MarlinConfig` and `MarlinQuantizer` into Transformers' tables, before what stands there for "gptq"."""
    stock = AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]

    class MarlinOrGPTQConfig(stock):  # type: ignore[misc, valid-type]
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            target: Any = MarlinConfig if is_marlin(config_dict) else stock
            return target.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = MarlinOrGPTQConfig
    AUTO_QUANTIZATION_CONFIG_MAPPING["marlin"] = MarlinConfig
    AUTO_QUANTIZER_MAPPING["marlin"] = MarlinQuantizer


# ---- What the checkpoint holds ----


def tensors_of(files: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return what the safetensors `files` hold, by name."""
    tensors: dict[str, Tensor] = {}
    for file in map(Path, files):
        with contextlib.closing(LocalWeightFile(file, file.name, str(file))) as opened:
            tensors |= {tensor.name: tensor for tensor in opened.header()}
    return tensors


# ---- The quantizer ----

#: What a checkpoint will hold that is loaded before it is there (transformers_trial.py).
TRIED: ContextVar[dict[str, Tensor] | None] = ContextVar("TRIED", default=None)


class MarlinQuantizer(HfQuantizer):
    """Puts `MarlinLinear` where a checkpoint has Marlin layers, and sees to it that every key found its place."""

    requires_calibration = True  # quantizing is not supported: only finished checkpoints are loaded
    quantization_config: MarlinConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse GPUs that the kernels cannot run on before anything is loaded: DeviceError."""
        if isinstance(device_map, dict):
            devices = list(device_map.values())
        else:  # "auto" and the like: any GPU that torch sees
            devices = [] if device_map is None else list(range(torch.cuda.device_count()))
        for device in devices:
            if isinstance(device, int) or str(device).startswith("cuda"):  # others: cpu, disk
                where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
                cuda.device_info(where.index or 0)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = checkpoint_files or []
        headers = TRIED.get()
        if headers is None and (not files or not all(str(file).endswith(".safetensors") for file in files)):
            raise UnsupportedError(
                f"{model.name_or_path or 'the model'}: a Marlin checkpoint is read from safetensors files, and from "
                "nothing else."
            )
        self._scales: dict[str, torch.dtype] = {}
        self._complete = False
        tensors = tensors_of(files) if headers is None else headers
        layers = stored_layers(model.name_or_path or "the model", tensors, self.quantization_config.marlin)
        if not layers:
            raise SourceError(f"{model.name_or_path}: its config says Marlin, but it has no Marlin layer.")
        self._files = {Path(file).name: Path(file) for file in files}
        self._placed = put_layers(model, layers, tensors)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._check_keys(model)

    def _check_keys(self, model: PreTrainedModel) -> None:
        """Look at the list of keys that fit nowhere once Transformers has cleaned it up, before it is forgotten."""
        adjust = model._adjust_missing_and_unexpected_keys

        def checked(loading_info: Any) -> None:
            adjust(loading_info)
            loading_info.missing_keys -= self._placed.plain.keys()  # loaded by `Placed.finish`
            # Older versions of Transformers take any shape where a quantizer is at work.
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            other = {(name,) for name, shape in self._shapes.items() if shapes.get(name, shape) != shape}
            _require_all_keys(
                str(model.name_or_path), model, loading_info.missing_keys, loading_info.unexpected_keys,
                loading_info.mismatched_keys | other,
            )  # fmt: skip
            self._complete = True

        model.__dict__["_adjust_missing_and_unexpected_keys"] = checked  # takes precedence over the class attribute

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.__dict__.pop("_adjust_missing_and_unexpected_keys", None)
        if not self._complete:
            raise UnsupportedError(
                "this version of Transformers does not say which keys it could not place; marlin-convert returns no "
                "model whose weights may be random. Please report it."
            )
        if TRIED.get() is None:
            self._placed.finish(model, self._files)
        return model

    @property
    def dequantized(self) -> list[str]:
        """The layers that take the memory of 16-bit weights, as the model computes them in its own way."""
        return self._placed.dequantized

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Do what `model.dequantize()` asks for: plain linear layers in place of Marlin's, one after the other."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, MarlinLinear):
                continue
            kind = dtype or module.scale_dtype
            bias = module._buffers["bias"]
            plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
            plain.weight = nn.Parameter(module.dequantize(kind).t().contiguous(), requires_grad=False)
            if bias is not None:
                plain.bias = nn.Parameter(bias.to(kind), requires_grad=False)
            model.set_submodule(name, plain)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _require_all_keys(label: str, model: PreTrainedModel, missing: Any, unexpected: Any, mismatched: Any) -> None:
    """Raise SourceError unless every tensor of the model came from the checkpoint, which messages call `label`, and
    every quantized layer found its place. Of other keys that are left over (buffers of older versions, scales of a
    cache) no weight becomes random: Transformers' own report names them."""
    left = [name for name in unexpected if name.rpartition(".")[2] in _QUANTIZED]
    problems = {
        "missing from the checkpoint": sorted(missing),
        "in the checkpoint and not in the model": sorted(left),
        "of another shape": sorted({str(key[0]) for key in mismatched}),
    }
    reasons = [f"{some(names)} ({what})" for what, names in problems.items() if names]
    if reasons:
        raise SourceError(f"{label}: the checkpoint does not fit {type(model).__name__}: {'; '.join(reasons)}.")


#: Suffixes of tensors that only quantized layers have.
_QUANTIZED = {*MARLIN_PARTS, "qweight", "qzeros", "g_idx"}


_register()


# ---- In one call ----


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    auto_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    **kwargs: Any,
) -> Any:
    """Return the model of a Marlin checkpoint, a folder or a Hub id, ready to run.

    `device` is auto (the GPU that suits, else the CPU), cpu, cuda or cuda:N; a `device_map` among `kwargs` takes its
    place. `dtype` is the checkpoint's unless given. `auto_class` is the Transformers class that builds the model;
    `kwargs` go to its `from_pretrained`. Also reads what AutoGPTQ left only in quantize_config.json, and its names of
    weight files. Raises SourceError when it is no Marlin checkpoint or does not fit the model, DeviceError when the
    device does not suit, HubError when the Hub does not give it.
    """
    if "device_map" not in kwargs:
        pick_device(device)  # report a wrong device before anything is downloaded
    origin = fetch(str(source), revision=revision, token=token, cache_dir=cache_dir)
    return load_from(origin, device=device, dtype=dtype, auto_class=auto_class, **kwargs)


def load_from(
    origin: Source, *, device: str = "auto", dtype: torch.dtype | str = "auto",
    auto_class: Any = AutoModelForCausalLM, **kwargs: Any,
) -> Any:  # fmt: skip
    """Do what `load` does, of what is on this disk already."""
    chosen = None if "device_map" in kwargs else pick_device(device)
    where = torch.device("cpu") if chosen is None or chosen.kind == "cpu" else cuda.torch_device(chosen)
    config = AutoConfig.from_pretrained(origin.folder, trust_remote_code=kwargs.get("trust_remote_code"))
    _complete_config(config, origin.folder, origin.label)
    _name_weights(config, origin.folder, origin.label)
    if chosen is not None and where.type == "cuda" and is_accelerate_available():
        kwargs["device_map"] = {"": where}  # straight to the GPU, without a copy in memory
    kwargs.setdefault("ignore_mismatched_sizes", True)  # `_require_all_keys` raises an error that names them
    model = auto_class.from_pretrained(origin.folder, config=config, dtype=dtype, **kwargs)
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights  # so that saving uses the usual file name
    return model if chosen is None or model.device == where else model.to(where)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Any:
    """Return the tokenizer of a checkpoint, a folder or a Hub id. Raises SourceError when it has none."""
    return tokenizer_from(fetch(str(source), revision=revision, token=token, cache_dir=cache_dir))


def tokenizer_from(origin: Source) -> Any:
    """Do what `load_tokenizer` does, of what is on this disk already."""
    try:
        return AutoTokenizer.from_pretrained(origin.folder)
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SourceError(f"{origin.label}: it has no tokenizer that Transformers can read ({why}).") from None


def load_dequantized(
    source: str | Path,
    *,
    device: str = "auto",
    auto_class: Any = AutoModelForCausalLM,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
) -> Any:
    """Return the model of a source with its weights dequantized to fp16: what the converted one is compared
    with.

    Takes the memory of an fp16 model. Raises what `plan` and
    `fetch` raise for a source that cannot be converted.
    """
    chosen = pick_device(device)
    where = torch.device("cpu") if chosen.kind == "cpu" else cuda.torch_device(chosen)
    origin = fetch(str(source), revision=revision, token=token, cache_dir=cache_dir)
    tensors: dict[str, torch.Tensor] = {}
    with Checkpoint(origin.files) as checkpoint:
        plan = make_plan(checkpoint)
        plan.require_convertible()
        for tensor in plan.copies:
            with safe_open(origin.folder / tensor.file, framework="pt") as file:
                tensors[tensor.name] = file.get_tensor(tensor.name)
        for layer in plan.layers:
            W = LayerReader(checkpoint, layer).weight()
            bf16 = W.dtype == np.uint16  # numpy has no bf16
            weight = torch.from_numpy(W.view(np.int16)).view(torch.bfloat16 if bf16 else torch.float16)
            tensors[f"{layer.name}.weight"] = weight.to(torch.float16).t().contiguous()
    config = AutoConfig.from_pretrained(origin.folder)
    del config.quantization_config
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float16, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    if (origin.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(origin.folder)
    _require_all_keys(origin.label, model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model.to(where)


def _complete_config(config: PretrainedConfig, folder: Path, label: str) -> None:
    """Add the settings that other writers of Marlin checkpoints leave outside config.json."""
    settings = getattr(config, "quantization_config", None)
    if settings is None or not is_marlin(settings):
        try:
            settings = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            settings = None
        if not isinstance(settings, dict) or not is_marlin(settings):
            raise SourceError(
                f"{label} is not a Marlin checkpoint; convert it first: marlin-convert {label} ./out, and load ./out."
            )
        config.quantization_config = {"quant_method": "gptq", **settings}


def _name_weights(config: PretrainedConfig, folder: Path, label: str) -> None:
    """Tell Transformers the name of the weights' file, where it is not the usual one."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not {"model.safetensors"} & set(files) and not (folder / "model.safetensors.index.json").exists():
        if len(files) != 1:
            raise SourceError(f"{label}: there should be model.safetensors, or one safetensors file of another name.")
        config.transformers_weights = files[0]
