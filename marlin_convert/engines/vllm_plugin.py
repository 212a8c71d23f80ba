"""A vLLM plugin: vLLM loads Marlin checkpoints of both formats, computes with our kernels or its own Marlin kernel.

vLLM finds it by its entry point (group `vllm.general_plugins`) when both packages are installed; nothing is imported by
hand. For vLLM 0.26 to 0.33. Nothing is repacked at load: what the checkpoint holds is what the kernel takes.

MARLIN_CONVERT_VLLM_KERNEL chooses for linear layers: `ours`, `vllm`, or `auto`, which is ours where it has been
measured to be the faster one and for layers that vLLM's kernel does not have.

vLLM's own loading code says which columns a layer gets (see `column_marks`): a piece is right, or loading stops and
says why. For vLLM's kernel, fp16 scales are cast to the activations' dtype, as vLLM does for GPTQ; ours takes them as
they are. Experts are stacked for vLLM's fused product; those that it cannot compute are refused by name.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
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
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.scalar_type import scalar_types
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.version import __version__ as VLLM_VERSION

from .. import engine_support
from .._version import __version__
from ..errors import DeviceError
from ..formats.marlin_config import LayerSettings, is_marlin, read_marlin_settings
from ..native import cuda
from . import linear as _linear  # noqa: F401 - it defines the operator that computes on our kernels
from . import tensor_parallel as shards
from .column_marks import NOTHING, Arriving, Marks
from .tensor_parallel import Piece

NAME = "marlin_convert"
logger = init_logger(f"vllm.{NAME}")  # only loggers of this name are shown by vLLM
_MIN_CAPABILITY = 80
#: Blocks of the experts' kernel on each multiprocessor: its workspace has a lock for each.
_BLOCKS_OF_EXPERTS = 4
#: What the kernel calls codes of so many bits, by whether they have zero points of their own.
_TYPES = {
    (4, False): scalar_types.uint4b8, (8, False): scalar_types.uint8b128, (4, True): scalar_types.uint4,
}  # fmt: skip


#: The environment variable that chooses the kernel of linear layers, and its values.
KERNEL = "MARLIN_CONVERT_VLLM_KERNEL"
_KERNELS = ("auto", "ours", "vllm")
#: Where ours has been measured to be at least as fast as vLLM's Marlin kernel: capability, major.
_FASTER_ON = (9,)


class Kernel(NamedTuple):
    """What computes linear layers, and why. `missing` says why our kernels cannot run here, if they cannot."""

    ours: bool
    why: str
    missing: str = ""


@cache
def kernel() -> Kernel:
    """The choice for this process. Raises ValueError for one that cannot be."""
    asked = os.environ.get(KERNEL, "").strip().lower() or "auto"
    if asked not in _KERNELS:
        raise ValueError(f"{KERNEL} is {asked!r}; it should be one of {', '.join(_KERNELS)}")
    try:
        cuda.load_library()
        missing = ""
    except DeviceError as error:
        missing = str(error).rstrip(".")
    if asked == "ours" and missing:
        raise ValueError(f"{KERNEL}=ours: {missing}")
    if asked != "auto":
        return Kernel(asked == "ours", f"{KERNEL}={asked}", missing)
    if missing:
        return Kernel(False, missing, missing)
    capability = torch.cuda.get_device_capability()
    where = f"on compute capability {capability[0]}.{capability[1]}"
    if capability[0] in _FASTER_ON:
        return Kernel(True, f"the faster one {where}")
    return Kernel(False, f"ours has not been measured to be faster {where}")


@cache
def _say_kernel() -> None:
    choice = kernel()
    name = "marlin-convert's kernels" if choice.ours else "vLLM's Marlin kernel"
    logger.info("Linear layers of this Marlin checkpoint are computed by %s: %s", name, choice.why)


def _part_of_the_cache_key() -> str:
    """vLLM keys compiled graphs by its environment variables; this is ours among them, as it was decided."""
    return f"{'ours' if kernel().ours else 'vllm'} {cuda.ABI_VERSION} {__version__}"


envs.environment_variables[KERNEL] = _part_of_the_cache_key


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
        self.stored: frozenset[str] = frozenset()  # the quantized layers in the checkpoint's own words
        self.arriving: Arriving | None = None  # while weights are loaded

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
        self.stored = frozenset(self.quantized)
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
            return MarlinCheckpointMethod(self, prefix, names)
        if any(there):
            plain = [name for name, quantized in zip(names, there, strict=True) if not quantized]
            raise ValueError(f"{prefix}: vLLM computes it as one layer, and {', '.join(plain)} of it is not quantized")
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class _Product(NamedTuple):
    """One call of a kernel: the number in its tensors' names, and what the call needs beside them."""

    number: int
    ours: bool
    bits: int
    type: Any  # vLLM's name of the codes
    K: int  # of the activations
    stored_K: int
    N: int
    stored_N: int
    sorted: bool  # act-order
    spread: bool  # rows of zeros between others, see `tensor_parallel.rows`


class MarlinCheckpointMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer of vLLM, whose columns come from layers of the checkpoint."""

    def __init__(self, config: MarlinCheckpointConfig, prefix: str, names: Iterable[str] = ()) -> None:
        """`names` are the layers of the checkpoint that are known to belong to it. Raises ValueError for those that
        no kernel computes."""
        self.config, self.prefix = config, prefix
        self.pieces: list[Piece] = []
        _say_kernel()
        _check_invariance(prefix)
        for name in names:
            settings = config.layer(name)
            _ours(name, settings.bits, not settings.sym, settings.group_size)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        """Register a list of columns, for vLLM's loader to fill with marks as if it were the weight."""
        self.own_K, self.all_K, self.dtype = input_size_per_partition, input_size, params_dtype
        self.device = torch.get_default_device()
        marks = torch.full((sum(output_partition_sizes), 1), NOTHING, dtype=torch.int64, device="cpu")
        parameter: Any = nn.Parameter(marks, requires_grad=False)
        way: Callable[..., Any] = weight_loader or layer.weight_loader
        given: list[Tensor] = []

        def load(param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
            if not isinstance(loaded_weight, Marks):
                raise ValueError(f"{self.prefix}: vLLM computes it as one layer, and a part of it is not quantized")
            self._arriving.asked(loaded_weight)
            given.append(loaded_weight)
            way(param, loaded_weight, *args, **kwargs)
            if bool((param.data >= 0).all()):
                self._cut(layer, param.data, given[-1])

        parameter.output_dim, parameter.weight_loader = 0, load
        layer.register_parameter("weight", parameter)

    @property
    def _arriving(self) -> Arriving:
        if self.config.arriving is None:
            raise ValueError(f"{self.prefix}: its weights can be loaded once only; start vLLM again to load others")
        return self.config.arriving

    def _cut(self, layer: Any, marks: Tensor, given: Tensor | None = None) -> None:
        """Take this rank's columns and rows."""
        pieces = self._arriving.pieces(self.prefix, marks, self.device, given)
        first = _rank(layer) * self.own_K if self.own_K != self.all_K else 0
        self.pieces = []
        for piece in pieces:
            if self.all_K != piece.K:
                raise ValueError(f"{self.prefix}: it has {piece.K} rows, the model {self.all_K}")
            own = piece if self.own_K == self.all_K else self._rows(piece, first)
            self.pieces.append(own if _piece_is_ours(self.prefix, own) else _cast(self.prefix, own, self.dtype))

    def _rows(self, piece: Piece, first: int) -> Piece:
        if _not_ours() and piece.G > 1 and not shards.cuts_whole_groups(piece, first, self.own_K):
            why = "it has act-order" if piece.perm is not None else f"they cut through its {piece.G} groups"
            raise ValueError(
                f"{self.prefix}: rows {first} to {first + self.own_K} of {piece.K}, of this rank, become groups of 16 "
                f"({why}), which vLLM's Marlin kernel does not have; marlin-convert's are not used: {_not_ours()}"
            )
        return shards.rows(piece, first, self.own_K)

    def finish(self, layer: Any) -> None:
        """Cut what a loader of the model's own has filled. Raises ValueError for columns that have not come."""
        if not self.pieces:
            self._cut(layer, layer.weight.data)
        del layer.weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what one call of a kernel can do; nothing is repacked."""
        if not self.pieces:
            raise ValueError(f"{self.prefix}: its weights have not been loaded")
        pieces, self.pieces = self.pieces, []
        bias, products, column = getattr(layer, "bias", None), [], 0
        for number, piece in enumerate(shards.join(pieces)):
            device, ours = piece.weight.device, _piece_is_ours(self.prefix, piece)
            own = None if bias is None else bias.data[column : column + piece.N].clone()
            if own is not None and not ours:
                own = _kernel_bias(own, piece.stored_N)
            zeros = piece.zeros
            if zeros is None and not ours:
                zeros = torch.empty(0, dtype=torch.int32, device=device)
            tensors = {"weight": piece.weight, "scales": piece.scales, "zeros": zeros, "perm": piece.perm, "bias": own}
            for what, tensor in tensors.items():
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"marlin{number}_{what}", value)
            kind = _TYPES.get((piece.bits, piece.zeros is not None))
            sizes = (piece.K, piece.stored_K, piece.N, piece.stored_N)
            sort = piece.perm is not None
            spread = piece.perm is not None and piece.perm.numel() != piece.K
            products.append(_Product(number, ours, piece.bits, kind, *sizes, sort, spread))
            column += piece.N
        self.products = tuple(products)
        layer.qweight = layer.marlin0_weight  # where vLLM looks for a device when it takes a layer's weights apart
        if not all(product.ours for product in products):
            self.workspace = marlin_make_workspace_new(pieces[0].weight.device)
            self.nothing = torch.empty(0, dtype=torch.int32, device=pieces[0].weight.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] of this rank → [..., N of this rank]."""
        results = [
            (self._our_product if product.ours else self._product)(layer, x, product, bias is not None)
            for product in self.products
        ]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def _our_product(self, layer: Any, x: Tensor, product: _Product, add_bias: bool) -> Tensor:
        """Our operator: it takes a layer as stored, and chooses its way by the rows that come when it runs."""
        tensors = [getattr(layer, f"marlin{product.number}_{w}") for w in ("weight", "scales", "bias", "zeros", "perm")]
        weight, scales, bias, zeros, perm = tensors
        K = product.K
        if product.spread:
            x, perm, K = x.index_select(-1, perm), None, product.stored_K
        y: Tensor = torch.ops.marlin_convert.linear(
            x, weight, scales, bias if add_bias else None, zeros, perm, product.bits, K, product.N
        )
        return y

    def _product(self, layer: Any, x: Tensor, product: _Product, add_bias: bool) -> Tensor:
        """vLLM's Marlin kernel: sizes as stored, act-order and padding around it."""
        own = x.index_select(-1, getattr(layer, f"marlin{product.number}_perm")) if product.sorted else x
        if product.stored_K != product.K:
            own = nn.functional.pad(own, (0, product.stored_K - product.K))
        y: Tensor = _multiply(
            input=own,
            weight=getattr(layer, f"marlin{product.number}_weight"),
            weight_scale=getattr(layer, f"marlin{product.number}_scales"),
            weight_zp=getattr(layer, f"marlin{product.number}_zeros"),
            workspace=self.workspace,
            wtype=product.type,
            output_size_per_partition=product.stored_N,
            input_size_per_partition=product.stored_K,
            bias=getattr(layer, f"marlin{product.number}_bias") if add_bias else None,
            **dict.fromkeys(_EMPTY, self.nothing),
            **_FIXED,
        )
        return y[..., : product.N] if product.stored_N != product.N else y


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
            self._refuse(f"{engine_support.BIASED} ({min(names & config.biases)})")
        if self.moe.moe_parallel_config.use_all2all_kernels:
            self._refuse("experts spread over data-parallel ranks")
        kinds = {replace(config.layer(name), source_group_size=None) for name in sorted(names)}
        self.settings = kinds.pop()
        if kinds:
            self._refuse(engine_support.DIFFERENT)
        if self.settings.desc_act:
            self._refuse(engine_support.SORTED)
        if self.settings.in_features is not None or self.settings.out_features is not None:
            self._refuse(engine_support.PADDED)
        _check_invariance(prefix)
        lacking = _vllm_lacks(self.settings.bits, not self.settings.sym, self.settings.group_size)
        if lacking:
            raise ValueError(f"{prefix}: {lacking}")

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
        """Register a stand-in for each weight; its loader keeps what this rank needs of its experts."""
        self.hidden, self.own, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
        self.device = torch.get_default_device()
        self.pieces: dict[tuple[int, str], Piece] = {}
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
                name = self._name(expert_id, shard_id)
                if not isinstance(loaded_weight, Marks) or self.config.arriving is None:
                    raise ValueError(f"{name}: its weights are not those of the checkpoint")
                self.config.arriving.asked(loaded_weight)
                pieces = self.config.arriving.pieces(name, loaded_weight, self.device)
                if len(pieces) != 1:
                    raise ValueError(f"{name}: the engine joins layers of the checkpoint in it")
                self.pieces[local, shard_id] = self._cut(layer, name, shard_id, pieces[0])
            return local >= 0 if return_success else None

        for name in ("w13_weight", "w2_weight"):
            stand_in: Any = nn.Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            stand_in.weight_loader = load
            layer.register_parameter(name, stand_in)

    def _cut(self, layer: Any, name: str, shard: str, piece: Piece) -> Piece:
        """This rank's piece of one expert's gate, up or down."""
        ranks, rank = layer.moe_config.tp_size, layer.moe_config.tp_rank
        K, N = (self.own * ranks, self.hidden) if shard == "w2" else (self.hidden, self.own * ranks)
        if (piece.K, piece.N) != (K, N):
            raise ValueError(f"{name}: it is {piece.K} x {piece.N}, the model {K} x {N}")
        if shard == "w2":
            first = rank * self.own
            if ranks > 1 and not shards.cuts_whole_groups(piece, first, self.own):
                self._refuse(f"experts whose rows {first} to {first + self.own}, of this rank, cut through groups")
            piece = shards.rows(piece, first, self.own)
        else:
            piece = shards.columns(piece, torch.arange(rank * self.own, (rank + 1) * self.own))
        return _cast(name, piece, self.dtype)

    def finish(self, layer: Any) -> None:
        """Raises ValueError for experts that have not come."""
        for number in range(self.count):
            for shard, part in self.parts.items():
                if (number, shard) not in self.pieces:
                    raise ValueError(f"{self.prefix}: the checkpoint has no {part} for one of its experts")
        del layer.w13_weight, layer.w2_weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack the experts; nothing is repacked."""
        pieces, self.pieces = self.pieces, {}
        first = [shards.join([pieces[number, "w1"], pieces[number, "w3"]])[0] for number in range(self.count)]
        second = [pieces[number, "w2"] for number in range(self.count)]
        for prefix, stack in (("w13_", first), ("w2_", second)):
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

_configure = loader_utils.configure_quant_config
_expected: dict[type, MarlinCheckpointConfig] = {}  # classes of models that are about to be built


def _configure_model(quant_config: QuantizationConfig, model_class: Any) -> None:
    """vLLM's own step before it builds a model; a model of a Marlin checkpoint then loads through `_load_model`."""
    _configure(quant_config, model_class)
    _expected.pop(model_class, None)
    if isinstance(quant_config, MarlinCheckpointConfig):
        _expected[model_class] = quant_config
        if not hasattr(model_class.load_weights, "_marlin_convert"):
            load = model_class.load_weights

            @wraps(load)
            def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
                return _load_model(model, partial(load, model), weights, *args, **kwargs)

            load_weights._marlin_convert = True  # type: ignore[attr-defined]
            model_class.load_weights = load_weights


loader_utils.configure_quant_config = _configure_model


def _load_model(model: nn.Module, load: Callable[..., Any], weights: Any, *args: Any, **kwargs: Any) -> Any:
    """`load` the checkpoint's tensors into a model of vLLM, which gets marks for the quantized ones.

    Raises ValueError, with names, for what the model cannot take, and for what it leaves out.
    """
    config = next((_expected[kind] for kind in type(model).__mro__ if kind in _expected), None)
    ours = {id(method.config) for _, method in _methods(model)}
    known = get_current_vllm_config_or_none()
    if config is None or (ours != {id(config)} and (ours or known is None or known.quant_config is not config)):
        return load(weights, *args, **kwargs)
    if config.arriving is not None:  # a model within a model
        return load(weights, *args, **kwargs)
    arriving = config.arriving = Arriving(config.settings, config.stored)
    plain = _watch(model, config)
    try:
        result = load(arriving.stream(weights), *args, **kwargs)
        for layer, method in _methods(model):
            method.finish(layer)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if arriving.now not in config.stored or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{arriving.now}: {type(model).__name__} of vLLM {VLLM_VERSION} does not take it "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        config.arriving = None
        for kind in [kind for kind, its in _expected.items() if its is config]:
            del _expected[kind]
        for watched in plain:
            watched.parameter.weight_loader = watched.way
    left = arriving.unclaimed()
    loaded = result if isinstance(result, set) else set()
    empty = [w.name for w in plain if not w.filled and isinstance(w.layer, LinearBase) and w.name not in loaded]
    if left and empty:
        raise ValueError(
            f"{type(model).__name__} of vLLM {VLLM_VERSION} leaves out {len(left)} quantized layers of the checkpoint "
            f"({_some(left)}), and {len(empty)} layers of its own are without weights ({_some(empty)})"
        )
    if left:
        logger.info("%d quantized layers of the checkpoint are no part of this model: %s", len(left), _some(left))
    return result


@dataclass
class _Watched:
    """A weight of the model that this plugin did not know to be quantized; `way` is its loader."""

    name: str
    layer: Any
    parameter: Any
    way: Callable[..., Any]
    filled: bool = False
    ours: bool = False


def _watch(model: nn.Module, config: MarlinCheckpointConfig) -> list[_Watched]:
    """Let plain layers of the model become this plugin's when marks arrive: vLLM calls some by other names, or says
    nothing of quantization when it builds them."""
    found: dict[int, _Watched] = {}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "quant_method", None), (MarlinCheckpointMethod, MarlinExpertsMethod)):
            continue
        if isinstance(layer, (LinearBase, ParallelLMHead, RoutedExperts)):
            for own, parameter in layer.named_parameters(recurse=False):
                if own.endswith("weight") and id(parameter) not in found:
                    way = getattr(parameter, "weight_loader", default_weight_loader)
                    watched = found[id(parameter)] = _Watched(f"{name}.{own}", layer, parameter, way)
                    parameter.weight_loader = partial(_load_watched, watched, config)
    return list(found.values())


def _load_watched(
    watched: _Watched,
    config: MarlinCheckpointConfig,
    param: nn.Parameter,
    loaded_weight: Tensor,
    *args: Any,
    **more: Any,
) -> Any:
    layer: Any = watched.layer
    name = watched.name.removesuffix(".weight")
    plain = not isinstance(loaded_weight, Marks)
    if (watched.ours and plain) or (watched.filled and not plain and not watched.ours):
        raise ValueError(f"{name}: vLLM computes it as one layer, and a part of it is not quantized")
    watched.filled = True
    if plain:
        return watched.way(param, loaded_weight, *args, **more)
    if isinstance(layer, RoutedExperts):
        raise ValueError(f"{name}: vLLM calls these experts by another name than the checkpoint does")
    if not watched.ours:
        watched.ours = True
        del layer.weight
        own = getattr(watched.way, "__self__", None) is not layer  # a loader of the model's own: it cuts marks as well
        way: Any = watched.way if own else type(layer).weight_loader.__get__(layer)
        with param.device:
            _adopt(layer, MarlinCheckpointMethod(config, name), way, param.dtype)
    marks: Any = layer.get_parameter("weight")
    return marks.weight_loader(marks, loaded_weight, *args, **more)


def _adopt(layer: Any, method: MarlinCheckpointMethod, way: Callable[..., Any], dtype: torch.dtype) -> None:
    """Make `method` that of a layer which vLLM has built for plain weights."""
    layer.quant_method = method
    if isinstance(layer, ParallelLMHead):
        K, widths, N = layer.embedding_dim, [layer.num_embeddings_per_partition], layer.num_embeddings_padded
        method.create_weights(layer, K, widths, K, N, dtype, weight_loader=way)
    else:
        method.create_weights(
            layer, getattr(layer, "input_size_per_partition", layer.input_size), layer.output_partition_sizes,
            layer.input_size, layer.output_size, dtype, weight_loader=way,
        )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _methods(model: nn.Module) -> list[tuple[Any, Any]]:
    """The layers that this plugin computes, with their methods."""
    kinds = (MarlinCheckpointMethod, MarlinExpertsMethod)
    found = [(layer, getattr(layer, "quant_method", None)) for layer in model.modules()]
    return [(layer, method) for layer, method in found if isinstance(method, kinds)]


# ---- Which kernel ----


def _vllm_lacks(bits: int, zeros: bool, group_size: int) -> str:
    """What vLLM's Marlin kernel does not have of such a layer, or nothing."""
    if (bits, zeros) not in _TYPES:
        return f"vLLM's Marlin kernel has no {bits}-bit codes with zero points"
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        return f"vLLM's Marlin kernel has no groups of {group_size}"
    return ""


def _ours(name: str, bits: int, zeros: bool, group_size: int) -> bool:
    """Whether our kernels compute such a layer. Raises ValueError if neither we nor vLLM can."""
    lacking = _vllm_lacks(bits, zeros, group_size)
    if lacking and _not_ours():
        raise ValueError(f"{name}: {lacking}, and marlin-convert's are not used: {_not_ours()}")
    return kernel().ours or bool(lacking)


def _not_ours() -> str:
    """Why our kernels compute nothing here, not even what vLLM's cannot; or nothing."""
    choice = kernel()
    return choice.missing or ("" if choice.ours or not choice.why.startswith(KERNEL) else choice.why)


def _piece_is_ours(name: str, piece: Piece) -> bool:
    return _ours(name, piece.bits, piece.zeros is not None, -1 if piece.G == 1 else piece.stored_K // piece.G)


def _check_invariance(name: str) -> None:
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        raise ValueError(
            f"{name}: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the number of rows; the kernels "
            "for Marlin checkpoints do not give them. Start vLLM without it"
        )


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
