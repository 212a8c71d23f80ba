"""A vLLM plugin: vLLM loads Marlin checkpoints of both formats and computes with its own Marlin kernel.

vLLM finds it by its entry point (group `vllm.general_plugins`) when both packages are installed; nothing is imported by
hand. For vLLM 0.26 to 0.33. Nothing is repacked at load: what the checkpoint holds is what the kernel takes.

Columns and rows are cut for tensor parallelism as `shards` does it, while the layers arrive: a piece is right, or
loading stops and says why. fp16 scales are cast to the activations' dtype, as vLLM does for GPTQ. Experts are stacked
for vLLM's fused product; those that it cannot compute are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
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

from ..formats.layout import EXTENDED_NAMES, ORIGINAL_NAMES
from ..formats.marlin_config import LayerSettings, is_marlin, read_marlin_settings
from . import tensor_parallel as shards
from .tensor_parallel import Piece

NAME = "marlin_convert"
_MIN_CAPABILITY = 80
_SHARDS = {"q": 0, "k": 1, "v": 2}
#: Blocks of the experts' kernel on each multiprocessor: its workspace has a lock for each.
_BLOCKS_OF_EXPERTS = 4
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
        self.biases: set[str] = set()  # layers with a bias, quantized or not

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
        self.biases = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
        if not self.quantized:
            raise ValueError(f"{model_name}: the settings say {self.settings.format}, and no tensor ends in {ending}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as vLLM's model does."""
        self.quantized = set(hf_to_vllm_mapper.apply_list(sorted(self.quantized)))
        self.biases = set(hf_to_vllm_mapper.apply_list(sorted(self.biases)))
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
        if isinstance(layer, RoutedExperts):
            if any(name.startswith(f"{prefix}.") for name in self.quantized):
                return MarlinExpertsMethod(self, prefix, layer)
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
        self.settings = [_supported(name, config.layer(name)) for name in names]

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
        self.widths, self.ranks, self.dtype = widths, ranks, params_dtype
        self.own_K, self.all_K = input_size_per_partition, input_size
        self.arrived = [
            _Arriving(name, settings, partial(self._cut, layer, part))
            for part, (name, settings) in enumerate(zip(self.names, self.settings, strict=True))
        ]

        def load(param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None, *_: Any, **__: Any) -> None:
            part = 0 if loaded_shard_id is None else loaded_shard_id
            if isinstance(part, str):
                part = _SHARDS.get(part, -1)
            if not isinstance(part, int) or not 0 <= part < len(self.arrived):
                raise ValueError(f"a part named {loaded_shard_id!r} of a layer of {len(self.arrived)} parts")
            self.arrived[part].take(param, loaded_weight)

        _stand_ins(layer, self.config, "", load)

    def _cut(self, layer: Any, part: int, piece: Piece) -> Piece:
        """This rank's piece of a layer."""
        name, widths, ranks, own_K, all_K = self.names[part], self.widths, self.ranks, self.own_K, self.all_K
        rank = _rank(layer) if ranks > 1 or own_K != all_K else 0
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
        return _cast(name, piece, self.dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what one call of the kernel can do; nothing is repacked."""
        pieces = [arriving.piece() for arriving in self.arrived]
        self.arrived = []
        _remove_stand_ins(layer, "")
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
                **dict.fromkeys(_EMPTY, self.nothing),
                **_FIXED,
            )
            results.append(y[..., : product.N] if product.stored_N != product.N else y)
        return results[0] if len(results) == 1 else torch.cat(results, -1)


class MarlinExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one block: stacked, and computed by vLLM's fused Marlin product."""

    def __init__(self, config: MarlinCheckpointConfig, prefix: str, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.config, self.prefix = config, prefix
        #: What the checkpoint calls the gate, up and down of an expert, by what vLLM calls them.
        self.parts = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        experts = range(self.moe.num_logical_experts)
        if not self.moe.is_act_and_mul or getattr(layer, "swiglu_limit", None) is not None:
            self._refuse("experts without a gate, or with a limit on it")
        names = {self._name(number, shard) for number in experts for shard in self.parts}
        found = {name for name in config.quantized if name.startswith(f"{prefix}.")}
        if names != found:
            odd = min(names ^ found)
            why = "is not quantized" if odd in names else "is not one of them"
            raise ValueError(f"{prefix}: vLLM computes its experts as one layer, and {odd} {why}")
        if names & config.biases:
            self._refuse(f"experts with biases ({min(names & config.biases)})")
        if self.moe.moe_parallel_config.use_all2all_kernels:
            self._refuse("experts spread over data-parallel ranks")
        kinds = {replace(config.layer(name), source_group_size=None) for name in sorted(names)}
        self.settings = kinds.pop()
        if kinds:
            self._refuse("experts of different settings in one block")
        if self.settings.desc_act:
            self._refuse("experts with act-order")
        if self.settings.in_features is not None or self.settings.out_features is not None:
            self._refuse("experts that are stored padded")
        _supported(prefix, self.settings)

    def _name(self, number: int, shard: str) -> str:
        return f"{self.prefix}.{number}.{self.parts[shard]}"

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"{self.prefix}: this plugin does not run {what}; load the GPTQ checkpoint, which vLLM repacks itself "
            "(`marlin-convert to-gptq` restores it)"
        )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register a stand-in for each kind of tensor; their loaders keep what this rank needs of its experts."""
        self.hidden, self.own, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
        self.arrived: dict[tuple[int, str], _Arriving] = {}
        self.count = num_experts

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = 0,
            return_success: bool = False,
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local >= 0:
                if (local, shard_id) not in self.arrived:
                    name = self._name(expert_id, shard_id)
                    cut = partial(self._cut, layer, name, shard_id)
                    self.arrived[local, shard_id] = _Arriving(name, self.settings, cut)
                self.arrived[local, shard_id].take(param, loaded_weight)
            return local >= 0 if return_success else None

        for prefix in ("w13_", "w2_"):
            _stand_ins(layer, self.config, prefix, load)

    def _cut(self, layer: Any, name: str, shard: str, piece: Piece) -> Piece:
        """This rank's piece of one expert's gate, up or down."""
        ranks, rank = layer.moe_config.tp_size, layer.moe_config.tp_rank
        K, N = (self.own * ranks, self.hidden) if shard == "w2" else (self.hidden, self.own * ranks)
        if (piece.K, piece.N) != (K, N):
            raise ValueError(f"{name}: it is {piece.K} x {piece.N}, the model {K} x {N}")
        way = shards.rows if shard == "w2" else shards.columns
        return _cast(name, way(name, piece, rank * self.own, self.own), self.dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack the experts; nothing is repacked."""
        for number in range(self.count):
            for shard, part in self.parts.items():
                if (number, shard) not in self.arrived:
                    raise ValueError(f"{self.prefix}: the checkpoint has no {part} for one of its experts")
        pieces = {key: arriving.piece() for key, arriving in self.arrived.items()}
        self.arrived = {}
        first = [shards.join([pieces[number, "w1"], pieces[number, "w3"]])[0] for number in range(self.count)]
        second = [pieces[number, "w2"] for number in range(self.count)]
        for prefix, stack in (("w13_", first), ("w2_", second)):
            _remove_stand_ins(layer, prefix)
            for what in ("weight", "scales", "zeros"):
                tensors = [getattr(piece, what) for piece in stack]
                value = None if tensors[0] is None else nn.Parameter(torch.stack(tensors), requires_grad=False)
                layer.register_parameter(f"marlin_{prefix}{what}", value)
        self.workspace = marlin_make_workspace_new(first[0].weight.device, _BLOCKS_OF_EXPERTS)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: `apply` knows its tensors itself."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, H]; topk_weights, topk_ids [T, k] → [T, H], to be summed over tensor-parallel ranks by vLLM."""
        result: Tensor = _multiply_experts(
            hidden_states=x,
            w1=layer.marlin_w13_weight,
            w2=layer.marlin_w2_weight,
            bias1=None,
            bias2=None,
            w1_scale=layer.marlin_w13_scales,
            w2_scale=layer.marlin_w2_scales,
            w1_zeros=layer.marlin_w13_zeros,
            w2_zeros=layer.marlin_w2_zeros,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            quant_type_id=_TYPES[self.settings.bits, not self.settings.sym].id,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            activation=layer.activation,
            expert_map=layer.expert_map,
            workspace=self.workspace,
        )
        return result


# ---- Loading ----


class _Arriving:
    """A layer whose tensors come one by one; this rank's piece of it is cut as soon as all are there."""

    def __init__(self, name: str, settings: LayerSettings, cut: Callable[[Piece], Piece]) -> None:
        self.name, self.settings, self.cut = name, settings, cut
        self.tensors: dict[str, Tensor] = {}
        self.done: Piece | None = None

    def take(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        self.tensors[parameter.what] = loaded.to(parameter.device)  # type: ignore[attr-defined]
        if self.tensors.keys() == shards.needed(self.settings):
            self.done, self.tensors = self.piece(), {}

    def piece(self) -> Piece:
        """Raises ValueError while a tensor is missing."""
        return self.done or self.cut(shards.whole(self.name, self.settings, self.tensors))


def _stand_ins(layer: nn.Module, config: MarlinCheckpointConfig, prefix: str, load: Callable[..., Any]) -> None:
    """Parameters under the names of the checkpoint's tensors, for vLLM's loader to find; `load` takes what comes."""
    for what, name in (EXTENDED_NAMES if config.settings.format == "marlin_ext" else ORIGINAL_NAMES).items():
        parameter = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
        parameter.weight_loader, parameter.what = load, what  # type: ignore[attr-defined]
        layer.register_parameter(prefix + name, parameter)


def _remove_stand_ins(layer: nn.Module, prefix: str) -> None:
    for name in (*ORIGINAL_NAMES.values(), *EXTENDED_NAMES.values()):
        if hasattr(layer, prefix + name):
            delattr(layer, prefix + name)


def _supported(name: str, settings: LayerSettings) -> LayerSettings:
    """Raises ValueError for what vLLM's kernel lacks."""
    if (settings.bits, not settings.sym) not in _TYPES:
        raise ValueError(f"{name}: vLLM's Marlin kernel has no {settings.bits}-bit codes with zero points")
    if settings.group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise ValueError(f"{name}: vLLM's Marlin kernel has no groups of {settings.group_size}")
    return settings


def _cast(name: str, piece: Piece, dtype: torch.dtype) -> Piece:
    scales = piece.scales.to(dtype)
    if not torch.isfinite(scales).all() or ((scales == 0) & (piece.scales != 0)).any():
        raise ValueError(f"{name}: its {piece.scales.dtype} scales do not fit {dtype}; load with --dtype bfloat16")
    return replace(piece, scales=scales)


# ---- Calls of vLLM ----

# The helper's arguments change between vLLM's versions: g_idx and what goes with it are no longer there in 0.33.
_multiply = apply_gptq_marlin_linear
_multiply_experts = fused_marlin_moe
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
