"""Marlin checkpoints in Transformers: `import marlin_convert.hf`, and `from_pretrained` reads them.

Both formats, checkpoints of ours and those that AutoGPTQ made. They say quant_method "gptq" (some "marlin"), so this
module stands before Transformers' reader of such configs, takes what is Marlin, and hands every other GPTQ checkpoint
to the stock one untouched. `load` does it in one call.

The checkpoint's tensors decide which modules are Marlin layers: those, and only those, for which it has `B` or
`marlin_qweight`. Keys that are missing, and quantized ones that are left over, are an error: no model is returned with
random weights in it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.import_utils import is_accelerate_available
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.reader import Checkpoint, Tensor, read_header
from ..conversion.layer_reader import LayerReader
from ..conversion.plan import make_plan
from ..device import pick_device
from ..errors import SourceError, UnsupportedError
from ..formats.marlin_config import MarlinSettings, is_marlin, read_marlin_settings
from ..formats.stored import MARLIN_PARTS, StoredLayer, stored_layers
from ..hub.open import fetch
from ..native import cuda
from ..options import Format
from .linear import MarlinLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}

#: Names that a message lists before it only counts.
_SHOWN = 6


# ---- Which checkpoints are ours ----


class MarlinConfig(QuantizationConfigMixin):
    """The `quantization_config` of a Marlin checkpoint; it is saved as it was read."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = "marlin"  # the quantizer below, whatever the checkpoint calls itself
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


def layers_of(where: str, files: Sequence[str | Path], settings: MarlinSettings) -> dict[str, StoredLayer[Tensor]]:
    """The Marlin layers of the safetensors `files`, by name. Raises SourceError where tensors and settings disagree."""
    tensors: dict[str, Tensor] = {}
    for file in map(Path, files):
        fd = os.open(file, os.O_RDONLY)
        try:
            tensors |= {tensor.name: tensor for tensor in read_header(fd, file, file.name)}
        finally:
            os.close(fd)
    return stored_layers(where, tensors, settings)


def empty_module(layer: StoredLayer[Tensor]) -> MarlinLinear:
    """Make the module of a layer, still empty, on the device and of the dtype that are the default."""
    return MarlinLinear(
        layer.K, layer.N, layer.bias is not None, bits=layer.bits, group_size=layer.group_size,
        sym=layer.zeros is None, desc_act=layer.perm is not None, extended=layer.format is Format.MARLIN_EXT,
        scale_dtype=_SCALE_DTYPES[layer.scales.dtype],
    )  # fmt: skip


# ---- The quantizer ----


class MarlinQuantizer(HfQuantizer):
    """Puts `MarlinLinear` where a checkpoint has Marlin layers, and sees to it that every key found its place."""

    requires_calibration = True  # there is nothing to quantize with: only finished checkpoints are read
    quantization_config: MarlinConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse GPUs that the kernels cannot run on before anything is loaded: DeviceError."""
        if isinstance(device_map, dict):
            devices = list(device_map.values())
        else:  # "auto" and its kind: any GPU that torch sees
            devices = [] if device_map is None else list(range(torch.cuda.device_count()))
        for device in devices:
            if isinstance(device, int) or str(device).startswith("cuda"):  # others: cpu, disk
                where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
                cuda.device_info(where.index or 0)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = checkpoint_files or []
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise UnsupportedError(
                f"{model.name_or_path or 'the model'}: a Marlin checkpoint is read from safetensors files, and from "
                "nothing else."
            )
        self._scales: dict[str, torch.dtype] = {}
        self._complete = False
        layers = layers_of(model.name_or_path or "the model", files, self.quantization_config.marlin)
        if not layers:
            raise SourceError(f"{model.name_or_path}: its config says Marlin, but it has no Marlin layer.")
        _put_layers(model, layers)
        self._check_keys(model)

    def _check_keys(self, model: PreTrainedModel) -> None:
        """Look at the list of keys that fit nowhere once Transformers has cleaned it up, before it is forgotten."""
        adjust = model._adjust_missing_and_unexpected_keys

        def checked(loading_info: Any) -> None:
            adjust(loading_info)
            _require_all_keys(
                model, loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys
            )
            self._complete = True

        model.__dict__["_adjust_missing_and_unexpected_keys"] = checked  # before the class's own

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.__dict__.pop("_adjust_missing_and_unexpected_keys", None)
        if not self._complete:
            raise UnsupportedError(
                "this version of Transformers does not say which keys it could not place; marlin-convert returns no "
                "model whose weights may be random. Please report it."
            )
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` does: plain linear layers in place of Marlin's, one after the other."""
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


def _require_all_keys(model: PreTrainedModel, missing: Any, unexpected: Any, mismatched: Any) -> None:
    """Raise SourceError unless every tensor of the model came from the checkpoint, and every quantized layer found its
    place. Of other keys that are left over (buffers of older versions, scales of a cache) no weight becomes random:
    Transformers' own report names them."""
    left = [name for name in unexpected if name.rpartition(".")[2] in _QUANTIZED]
    problems = {
        "missing from the checkpoint": sorted(missing),
        "in the checkpoint and not in the model": sorted(left),
        "of another shape": sorted(str(key[0]) for key in mismatched),
    }
    said = [f"{_some(names)} ({what})" for what, names in problems.items() if names]
    if said:
        raise SourceError(
            f"{model.name_or_path}: the checkpoint does not fit {type(model).__name__}: {'; '.join(said)}."
        )


#: Names of tensors that only quantized layers have.
_QUANTIZED = {*MARLIN_PARTS, "qweight", "qzeros", "g_idx"}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# ---- Modules ----


def _put_layers(model: PreTrainedModel, layers: dict[str, StoredLayer[Tensor]]) -> None:
    """Replace the modules of `model` that `layers` are for. Layers without a module are left to the check of keys."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    modules = dict(model.named_modules())
    experts: dict[str, dict[str, StoredLayer[Tensor]]] = {}
    for layer in layers.values():
        place = _place(model, _renamed(f"{layer.name}.weight", renamings).removesuffix(".weight"), modules)
        if place is None:
            continue
        holder = _experts_above(place, modules)
        if holder is not None:
            experts.setdefault(holder, {})[place.removeprefix(f"{holder}.")] = layer
        else:
            _put_layer(model, place, modules[place], layer)
    for holder, parts in experts.items():
        model.set_submodule(holder, _expert_layers(holder, modules[holder], parts, converters))


def _place(model: PreTrainedModel, name: str, modules: dict[str, nn.Module]) -> str | None:
    """Where in the model a checkpoint's layer belongs: with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules or _experts_above(candidate, modules):
            return candidate
    return None


def _experts_above(name: str, modules: dict[str, nn.Module]) -> str | None:
    """`…experts` for the name of an expert's linear, `…experts.3.up_proj`, if the model holds its experts fused."""
    parts = name.split(".")
    holder = modules.get(".".join(parts[:-2]))
    fused = len(parts) > 2 and parts[-2].isdigit() and isinstance(getattr(holder, "down_proj", None), nn.Parameter)
    return ".".join(parts[:-2]) if fused else None


def _put_layer(model: PreTrainedModel, place: str, module: nn.Module, layer: StoredLayer[Tensor]) -> None:
    if isinstance(module, nn.Linear):
        size = (module.in_features, module.out_features)
    elif isinstance(module, Conv1D):
        size = (module.nx, module.nf)
    else:
        raise UnsupportedError(f"{layer.name}: {type(module).__name__} is no linear layer; Marlin cannot replace it.")
    if size != (layer.K, layer.N):
        raise SourceError(
            f"{layer.name}: the checkpoint has K = {layer.K}, N = {layer.N}, "
            f"{type(model).__name__} has {size[0]} and {size[1]}; config.json and the weights do not belong together."
        )
    if f"{place}.weight" in model.all_tied_weights_keys:  # a quantized lm_head has weights of its own
        del model.all_tied_weights_keys[f"{place}.weight"]
        model.config.tie_word_embeddings = False
    linear = empty_module(layer)
    linear.weight_by_rows = isinstance(module, Conv1D)
    model.set_submodule(place, linear)


class MarlinExpert(nn.Module):
    """One expert, with its layers under the names that the checkpoint has for them."""

    def __init__(self, layers: dict[str, MarlinLinear], gate: str, up: str, down: str) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._parts = (gate, up, down)

    def forward(self, x: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        gate, up, down = (self._modules[name] for name in self._parts)
        result: torch.Tensor = down(activation(gate(x)) * up(x))  # type: ignore[misc]
        return result


class MarlinExperts(nn.ModuleList):
    """A block's experts, one module each, where Transformers holds them fused into two tensors."""

    def __init__(self, experts: list[MarlinExpert], act_fn: nn.Module) -> None:
        super().__init__(experts)
        self.act_fn = act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H]; top_k_index, top_k_weights [T, k] → [T, H]: each token's experts, weighted, summed."""
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            if number >= len(self):  # Transformers' mark for "no expert"
                continue
            tokens, rank = torch.where(top_k_index == number)
            output = self[number](hidden_states[tokens], self.act_fn) * top_k_weights[tokens, rank, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result


def _expert_layers(
    holder: str, module: nn.Module, parts: dict[str, StoredLayer[Tensor]], converters: list[WeightConverter]
) -> MarlinExperts:
    """The module for fused experts `module`, from the checkpoint's layers ("3.up_proj" → layer)."""
    usual = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False,
             "has_post_expert_norm": False}  # fmt: skip
    odd = [name for name, value in usual.items() if getattr(module, name, value) != value]
    if odd or getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        raise UnsupportedError(
            f"{holder}: {type(module).__name__} does not compute its experts as Mixtral and Qwen do; "
            "Marlin cannot replace it."
        )
    names = _expert_names(holder, converters)
    count = int(module.num_experts)  # type: ignore[arg-type]
    wanted = {f"{number}.{name}" for number in range(count) for name in names}
    if parts.keys() != wanted:
        absent = sorted(wanted - parts.keys()) or sorted(parts.keys() - wanted)
        raise UnsupportedError(
            f"{holder}: of {len(wanted)} layers of its experts {len(parts)} are Marlin ({_some(absent)} are not as "
            "expected); it takes all or none."
        )
    _, twice, hidden = module.gate_up_proj.shape  # type: ignore[misc]
    sizes = ((hidden, twice // 2), (hidden, twice // 2), (twice // 2, hidden))
    experts = []
    for number in range(count):
        layers = {name: parts[f"{number}.{name}"] for name in names}
        for layer, size in zip(layers.values(), sizes, strict=True):
            if size != (layer.K, layer.N):
                raise SourceError(
                    f"{layer.name}: the checkpoint has K = {layer.K}, N = {layer.N}, the model "
                    f"has {size[0]} and {size[1]}; config.json and the weights do not belong together."
                )
        experts.append(MarlinExpert({name: empty_module(layer) for name, layer in layers.items()}, *names))
    return MarlinExperts(experts, module.act_fn)  # type: ignore[arg-type]


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    """A checkpoint's name of a tensor as the model calls it."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _expert_names(holder: str, converters: list[WeightConverter]) -> tuple[str, str, str]:
    """What the checkpoint calls an expert's gate, up and down: as Transformers' own conversion reads them."""
    names: list[str] = []
    for target in ("gate_up_proj", "down_proj"):
        for converter in converters:
            if converter._original_target_patterns[0].endswith(f"experts.{target}"):
                names += [source.split(".")[-2] for source in converter._original_source_patterns]
                break
    if len(names) != 3:
        raise UnsupportedError(f"{holder}: how this model's experts are called in a checkpoint is not known.")
    gate, up, down = names
    return gate, up, down


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
    """The model of a Marlin checkpoint, a folder or a Hub id, ready to run.

    `device` is auto (the GPU that suits, else the CPU), cpu, cuda or cuda:N; a `device_map` among `kwargs` takes its
    place. `dtype` is the checkpoint's unless given. `auto_class` is the Transformers class that builds the model;
    `kwargs` go to its `from_pretrained`. Also reads what AutoGPTQ left only in quantize_config.json, and its names of
    weight files. Raises SourceError when it is no Marlin checkpoint or does not fit the model, DeviceError when the
    device does not suit, HubError when the Hub does not give it.
    """
    chosen = None if "device_map" in kwargs else pick_device(device)
    where = torch.device("cpu") if chosen is None or chosen.kind == "cpu" else cuda.torch_device(chosen)
    origin = fetch(str(source), revision=revision, token=token, cache_dir=cache_dir)
    config = AutoConfig.from_pretrained(origin.folder, trust_remote_code=kwargs.get("trust_remote_code"))
    _complete_config(config, origin.folder, origin.label)
    _name_weights(config, origin.folder, origin.label)
    if chosen is not None and where.type == "cuda" and is_accelerate_available():
        kwargs["device_map"] = {"": where}  # straight to the GPU, without a copy in memory
    model = auto_class.from_pretrained(origin.folder, config=config, dtype=dtype, **kwargs)
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights  # it is saved under the usual name
    return model if chosen is None or model.device == where else model.to(where)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Any:
    """The tokenizer of a checkpoint, a folder or a Hub id. Raises SourceError when it has none."""
    origin = fetch(str(source), revision=revision, token=token, cache_dir=cache_dir)
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
    """The model of a GPTQ checkpoint with its weights dequantized to fp16: what the converted one is compared with.

    Takes the memory of an fp16 model. Raises what `plan` and
    `fetch` raise for a source that cannot be converted.
    """
    chosen = pick_device(device)
    where = torch.device("cpu") if chosen.kind == "cpu" else cuda.torch_device(chosen)
    origin = fetch(str(source), revision=revision, token=token, cache_dir=cache_dir)
    tensors: dict[str, torch.Tensor] = {}
    with Checkpoint(origin.folder) as checkpoint:
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
        None, config=config, state_dict=tensors, dtype=torch.float16, output_loading_info=True
    )
    if (origin.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(origin.folder)
    _require_all_keys(model, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
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
