"""A vLLM plugin: vLLM loads Marlin checkpoints of both formats and computes with its own Marlin kernel.

vLLM finds it by its entry point (group `vllm.general_plugins`) when both packages are installed; nothing is imported by
hand. For vLLM 0.26 to 0.33. Nothing is repacked at load: what the checkpoint holds is what the kernel takes.

Columns and rows are cut for tensor parallelism as `shards` does it: a piece is right, or loading stops and says why.
fp16 scales are cast to the activations' dtype, as vLLM does for GPTQ. Mixtures of experts are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    MARLIN_SUPPORTED_GROUP_SIZES,
    apply_gptq_marlin_linear,
    marlin_make_workspace_new,
    marlin_permute_bias,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.scalar_type import scalar_types
from vllm.transformers_utils.config import get_safetensors_params_metadata

from . import shards
from .config import LayerSettings, is_marlin, read_marlin_settings
from .layout import EXTENDED_NAMES, ORIGINAL_NAMES
from .shards import Piece

NAME = "marlin_convert"
_MIN_CAPABILITY = 80
#: Classes of vLLM that hold a mixture's experts.
_EXPERTS = {"RoutedExperts", "FusedMoE"}
_SHARDS = {"q": 0, "k": 1, "v": 2}
#: What the kernel calls codes of so many bits, by whether they have zero points of their own.
_TYPES = {
    (4, False): scalar_types.uint4b8, (8, False): scalar_types.uint8b128, (4, True): scalar_types.uint4,
}  # fmt: skip


def register() -> None:
    """What vLLM calls in each of its processes. Importing this module has registered the configuration."""


@register_quantization_config(NAME)
class MarlinCheckpointConfig(QuantizationConfig):  # type: ignore[misc]
    """What a Marlin checkpoint says, for vLLM. `quantized` has the names of its quantized layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.settings = read_marlin_settings(config)
        self.layers = dict(self.settings.layers)
        self.quantized: set[str] = set()

    def __repr__(self) -> str:
        return f"MarlinCheckpointConfig({self.settings.format}, {self.settings.default}, {len(self.layers)} exceptions)"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return _MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MarlinCheckpointConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """This plugin's name for Marlin checkpoints, None for all others."""
        asked = user_quant in (None, NAME, "gptq", "marlin", "gptq_marlin", "auto_gptq")
        return NAME if asked and is_marlin(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, *_: Any, revision: str | None = None, **__: Any) -> None:
        """Find the quantized layers: those whose tensors are there."""
        names = set(get_safetensors_params_metadata(model_name, revision=revision))
        ending = ".marlin_qweight" if self.settings.format == "marlin_ext" else ".B"
        self.quantized = {name.removesuffix(ending) for name in names if name.endswith(ending)}
        if not self.quantized:
            raise ValueError(f"{model_name}: the settings say {self.settings.format}, and no tensor ends in {ending}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as vLLM's model does."""
        self.quantized = set(hf_to_vllm_mapper.apply_list(sorted(self.quantized)))
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def parts(self, prefix: str) -> list[str]:
        """The checkpoint's names of what vLLM fuses in `prefix`: q_proj, k_proj and v_proj of a qkv_proj, say."""
        parent, dot, last = prefix.rpartition(".")
        if prefix in self.quantized:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def layer(self, name: str) -> LayerSettings:
        return self.layers.get(name, self.settings.default)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if _EXPERTS & {c.__name__ for c in type(layer).__mro__}:
            if any(name.startswith(f"{prefix}.") for name in self.quantized):
                raise ValueError(
                    f"{prefix}: this plugin does not read quantized mixtures of experts yet; load the GPTQ checkpoint, "
                    "which vLLM repacks itself (`marlin-convert to-gptq` restores it)"
                )
            return None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        names = self.parts(prefix)
        there = [name in self.quantized for name in names]
        if all(there):
            return MarlinCheckpointMethod(self, names)
        if any(there):
            plain = [name for name, quantized in zip(names, there, strict=True) if not quantized]
            raise ValueError(f"{prefix}: vLLM computes it as one layer, and {', '.join(plain)} of it is not quantized")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class _Product(NamedTuple):
    """One call of the kernel: the number in its tensors' names, and what the call needs beside them."""

    number: int
    type: Any
    K: int  # of the activations
    stored_K: int
    N: int
    stored_N: int
    sorted: bool  # act-order


class MarlinCheckpointMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer of vLLM: `names` are the checkpoint's layers in it."""

    def __init__(self, config: MarlinCheckpointConfig, names: list[str]) -> None:
        self.config, self.names = config, names
        self.settings = [config.layer(name) for name in names]
        for name, settings in zip(names, self.settings, strict=True):
            if (settings.bits, not settings.sym) not in _TYPES:
                raise ValueError(f"{name}: vLLM's Marlin kernel has no {settings.bits}-bit codes with zero points")
            if settings.group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
                raise ValueError(f"{name}: vLLM's Marlin kernel has no groups of {settings.group_size}")

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register a stand-in for each of the checkpoint's tensors; their loaders keep what this rank needs."""
        widths = list(output_partition_sizes)
        ranks = output_size // sum(widths)
        if len(self.names) != len(widths):  # fused in the checkpoint already
            if len(self.names) != 1 or ranks > 1:
                raise ValueError(
                    f"{self.names[0]}: fused in the checkpoint, it cannot be split over tensor-parallel ranks; use one"
                )
            widths = [sum(widths)]
        self.pieces: list[dict[str, Tensor]] = [{} for _ in widths]
        self.widths, self.ranks, self.dtype = widths, ranks, params_dtype
        self.own_K, self.all_K = input_size_per_partition, input_size
        for what, name in (EXTENDED_NAMES if self.config.settings.format == "marlin_ext" else ORIGINAL_NAMES).items():
            dtype = params_dtype if what == "scales" else torch.int32
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._loader(what)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _loader(self, what: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, loaded: Tensor, shard: Any = None, *_: Any, **__: Any) -> None:
            part = 0 if shard is None else shard
            if isinstance(part, str):
                part = _SHARDS.get(part, -1)
            if not isinstance(part, int) or not 0 <= part < len(self.pieces):
                raise ValueError(f"a part named {shard!r} of a layer of {len(self.pieces)} parts")
            self.pieces[part][what] = loaded.to(parameter.device)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cut this rank's pieces and join what one call of the kernel can do; nothing is repacked."""
        widths, ranks, own_K, all_K = self.widths, self.ranks, self.own_K, self.all_K
        rank = _rank(layer) if ranks > 1 or own_K != all_K else 0
        pieces = []
        for part, (name, settings) in enumerate(zip(self.names, self.settings, strict=True)):
            piece = shards.whole(name, settings, self.pieces[part])
            if own_K != all_K:
                piece = shards.rows(name, piece, rank * own_K, own_K)
            elif own_K != piece.K:
                raise ValueError(f"{name}: it has {piece.K} rows, the model {own_K}")
            replicas = getattr(layer, "num_kv_head_replicas", 1) if part else 1  # of the heads of k and v
            if ranks > 1:
                piece = shards.columns(name, piece, rank // replicas * widths[part], widths[part])
            elif isinstance(layer, ParallelLMHead):
                piece = shards.columns(name, piece, 0, widths[part])  # the vocabulary, as vLLM pads it
            elif widths[part] != piece.N:
                raise ValueError(f"{name}: it has {piece.N} columns, the model {widths[part]}")
            pieces.append(self._cast(name, piece, self.dtype))
        for name in (*ORIGINAL_NAMES.values(), *EXTENDED_NAMES.values()):
            if hasattr(layer, name):
                delattr(layer, name)
        self.pieces = []
        bias, products, column = getattr(layer, "bias", None), [], 0
        for number, piece in enumerate(shards.join(pieces)):
            device = piece.weight.device
            tensors = {
                "weight": piece.weight,
                "scales": piece.scales,
                "zeros": piece.zeros if piece.zeros is not None else torch.empty(0, dtype=torch.int32, device=device),
                "perm": piece.perm,
                "bias": None if bias is None else _kernel_bias(bias[column : column + piece.N], piece.stored_N),
            }
            for what, tensor in tensors.items():
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"marlin{number}_{what}", value)
            kind = _TYPES[piece.bits, piece.zeros is not None]
            sizes = (piece.K, piece.stored_K, piece.N, piece.stored_N)
            products.append(_Product(number, kind, *sizes, piece.perm is not None))
            column += piece.N
        self.products = tuple(products)
        self.workspace = marlin_make_workspace_new(pieces[0].weight.device)
        self.nothing = torch.empty(0, dtype=torch.int32, device=pieces[0].weight.device)

    @staticmethod
    def _cast(name: str, piece: Piece, dtype: torch.dtype) -> Piece:
        scales = piece.scales.to(dtype)
        if not torch.isfinite(scales).all() or ((scales == 0) & (piece.scales != 0)).any():
            raise ValueError(f"{name}: its {piece.scales.dtype} scales do not fit {dtype}; load with --dtype bfloat16")
        return replace(piece, scales=scales)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] of this rank → [..., N of this rank]."""
        results = []
        for product in self.products:
            own = x.index_select(-1, getattr(layer, f"marlin{product.number}_perm")) if product.sorted else x
            if product.stored_K != product.K:
                own = nn.functional.pad(own, (0, product.stored_K - product.K))
            y = _multiply(
                input=own,
                weight=getattr(layer, f"marlin{product.number}_weight"),
                weight_scale=getattr(layer, f"marlin{product.number}_scales"),
                weight_zp=getattr(layer, f"marlin{product.number}_zeros"),
                workspace=self.workspace,
                wtype=product.type,
                output_size_per_partition=product.stored_N,
                input_size_per_partition=product.stored_K,
                bias=None if bias is None else getattr(layer, f"marlin{product.number}_bias"),
                **(dict.fromkeys(_EMPTY, self.nothing)),
                **_FIXED,
            )
            results.append(y[..., : product.N] if product.stored_N != product.N else y)
        return results[0] if len(results) == 1 else torch.cat(results, -1)


# The helper's arguments change between vLLM's versions: g_idx and what goes with it are no longer there in 0.33.
_multiply = apply_gptq_marlin_linear
_parameters = inspect.signature(apply_gptq_marlin_linear).parameters
_EMPTY = tuple(name for name in ("g_idx", "g_idx_sort_indices") if name in _parameters)
_FIXED = {"is_k_full": True} if "is_k_full" in _parameters else {}
_GIVEN = {
    "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
    "input_size_per_partition", "bias", *_EMPTY, *_FIXED,
}  # fmt: skip
_unknown = [n for n, p in _parameters.items() if p.default is inspect.Parameter.empty and n not in _GIVEN]
if _unknown or not set(_parameters) >= _GIVEN:
    raise ImportError(f"this version of vLLM calls its Marlin kernel in a new way ({_unknown}); update marlin-convert")


def _rank(layer: Any) -> int:
    """This process's rank in the layer's tensor parallelism."""
    known = getattr(layer, "tp_rank", None)
    if known is not None:
        return int(known)
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _kernel_bias(bias: Tensor, stored_N: int) -> Tensor:
    """A bias [N], padded, in the order of columns that the kernel adds it in."""
    padded: Tensor = marlin_permute_bias(nn.functional.pad(bias.data, (0, stored_N - bias.shape[0])))
    return padded
