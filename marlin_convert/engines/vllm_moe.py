"""vLLM's mixtures of experts from Marlin layers: computed by our product, or by vLLM's fused Marlin product.

Ours is chosen as for linear layers, and for all that vLLM's does not compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from .. import engine_support
from ..formats.layout import TILE_N
from ..native import moe
from . import tensor_parallel as shards
from . import vllm_calls as calls
from . import vllm_choice as choice
from .column_marks import Marks
from .serving_experts import ExpertSet, ServedExperts
from .tensor_parallel import Piece
from .vllm_config import CheckpointConfig

#: Thread blocks of the experts' kernel per multiprocessor; its workspace has a lock for each.
_BLOCKS_OF_EXPERTS = 4
#: Our formula for each of vLLM's activations that has one; the suffix `_no_mul` means without up.
_FORMULAS = {
    "silu": moe.Formula("silu"), "gelu": moe.Formula("gelu"), "gelu_tanh": moe.Formula("gelu_tanh"),
    "relu2": moe.Formula("relu_squared"), "swigluoai": moe.Formula("silu", limit=7.0, alpha=1.702, beta=1.0),
    "swigluoai_uninterleave": moe.Formula("silu", limit=7.0, alpha=1.702, beta=1.0),
}  # fmt: skip


class MarlinExpertsMethod(ServedExperts, FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one block: stacked, and computed by our product or vLLM's fused one."""

    def __init__(self, config: CheckpointConfig, prefix: str, layer: Any) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.config, self.prefix, self.gated = config, prefix, bool(self.moe.is_act_and_mul)
        #: The checkpoint's names of an expert's gate, up and down, by vLLM's names.
        self.parts = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        if not self.gated:
            del self.parts["w3"]
        found = {name for name in config.quantized if name.startswith(f"{prefix}.")}
        if {name.rpartition(".")[2] for name in found} == set(self.parts):
            self.parts = {shard: shard for shard in self.parts}  # which some of vLLM's models do not tell the layer
        experts = range(self.moe.num_logical_experts)
        names = {self._name(number, shard) for number in experts for shard in self.parts}
        if names != found:
            wrong = min(names ^ found)
            why = "is not quantized" if wrong in names else "is not one of them"
            raise ValueError(f"{prefix}: vLLM computes its experts as one layer, and {wrong} {why}")
        refused = {
            "experts spread over data-parallel ranks": self.moe.moe_parallel_config.use_all2all_kernels,
            "experts that --enable-eplb moves among ranks": self.moe.moe_parallel_config.enable_eplb,
            "LoRA adapters of experts; name other layers with --lora-target-modules": self._may_have_adapters(),
        }
        for what, applies in refused.items():
            if applies:
                raise ValueError(f"{prefix}: this plugin does not run {what}")
        choice.say()
        self.biases = sorted(names & config.biases)
        lacking = self._what_vllm_lacks(layer, sorted(names))
        if lacking and choice.not_ours():
            raise ValueError(
                f"{prefix}: {lacking}, and marlin-convert's kernels are not used: {choice.not_ours()}; load the GPTQ "
                "checkpoint, which vLLM repacks itself (`marlin-convert to-gptq` restores it)"
            )
        self.ours = choice.kernel().ours or bool(lacking)
        choice.check_invariance(prefix, self.ours)

    def _may_have_adapters(self) -> bool:
        """Tell whether vLLM prepares these experts for LoRA adapters."""
        known = get_current_vllm_config_or_none()
        if known is None or known.lora_config is None:
            return False
        names = {"experts", "gate_up_proj", *self.parts.values()}
        targets = known.lora_config.target_modules
        return targets is None or not names.isdisjoint(name.rpartition(".")[2] for name in targets)

    def _settings(self, name: str) -> Any:
        return replace(self.config.layer(name), source_group_size=None)

    def _what_vllm_lacks(self, layer: Any, names: list[str]) -> str:
        """Return what vLLM's fused Marlin product does not compute of these experts, or nothing."""
        kinds = {self._settings(name) for name in names}
        faults = {
            "experts without a gate, or with a limit on it": not self.gated
            or getattr(layer, "swiglu_limit", None) is not None,
            f"{engine_support.BIASED} ({''.join(self.biases[:1])})": bool(self.biases),
            engine_support.DIFFERENT: len(kinds) > 1,
            engine_support.SORTED: any(kind.desc_act for kind in kinds),
            engine_support.PADDED: any(k.in_features is not None or k.out_features is not None for k in kinds),
        }
        for fault, applies in faults.items():
            if applies:
                return f"vLLM's fused product does not run {fault}"
        kind = next(iter(kinds))
        return choice.vllm_lacks(kind.bits, not kind.sym, kind.group_size)

    def _name(self, number: int, shard: str) -> str:
        return f"{self.prefix}.{number}.{self.parts[shard]}"

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
        self.hidden, self.rank_inner, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
        self.device = torch.get_default_device()
        self.count = num_experts
        self.global_of: dict[int, int] = {}
        for number in range(self.moe.num_logical_experts):
            local = layer._map_global_expert_id_to_local_expert_id(number)
            if local >= 0:
                self.global_of[local] = number
        self.sets = self._make_sets()

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
                if self.config.arriving is None:
                    raise ValueError(f"{name}: its weights are not those of the checkpoint")
                if isinstance(loaded_weight, Marks):
                    self.config.arriving.asked(loaded_weight)
                    pieces = self.config.arriving.pieces(name, loaded_weight, self.device)
                    if len(pieces) != 1:
                        raise ValueError(f"{name}: the engine joins layers of the checkpoint in it")
                    self._set_of(local).put(local, shard_id, self._cut(layer, name, shard_id, pieces[0]))
                elif name in self.biases and loaded_weight.dim() == 1:
                    rank = layer.moe_config.tp_rank
                    self._set_of(local).put_bias(local, shard_id, self.rank_bias(shard_id, loaded_weight, rank))
                else:
                    raise ValueError(f"{name}: its weights are not those of the checkpoint")
            return local >= 0 if return_success else None

        for name in ("w13_weight", "w2_weight", *(("w13_bias", "w2_bias") if self.biases else ())):
            stand_in: Any = nn.Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            stand_in.weight_loader = load
            layer.register_parameter(name, stand_in)

    def _make_sets(self) -> list[ExpertSet]:
        """Return this rank's experts by their settings."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for local in sorted(self.global_of):
            kind = tuple(self._settings(self._name(self.global_of[local], shard)) for shard in self.parts)
            kinds.setdefault(kind, []).append(local)
        sets = []
        for kind, numbers in kinds.items():
            plain = len(set(kind[:-1])) == 1 and not kind[0].desc_act and self.rank_inner % TILE_N == 0
            joined = self.gated and plain and kind[0].out_features is None
            sets.append(ExpertSet(numbers, self.prefix, joined, kind[-1].desc_act))
        if not all(made.joined for made in sets):
            if not self.ours:
                raise ValueError(
                    f"{self.prefix}: vLLM's fused product does not run experts of {self.rank_inner} columns on a rank; "
                    f"start vLLM with {choice.KERNEL}=ours"
                )
            for made in sets:
                made.joined = False
        return sets

    def _set_of(self, local: int) -> ExpertSet:
        return next(made for made in self.sets if local in made.row)

    def _cut(self, layer: Any, name: str, shard: str, piece: Piece) -> Piece:
        """Return this rank's piece of one expert's gate, up or down."""
        ranks, rank = layer.moe_config.tp_size, layer.moe_config.tp_rank
        first = rank * self.rank_inner
        if (
            shard == "w2"
            and not self.ours
            and ranks > 1
            and not shards.cuts_whole_groups(piece, first, self.rank_inner)
        ):
            raise ValueError(
                f"{self.prefix}: vLLM's fused product does not run experts whose rows {first} to "
                f"{first + self.rank_inner}, of this rank, cut through groups; start vLLM with {choice.KERNEL}=ours"
            )
        piece = self.rank_piece(name, shard, piece, rank, ranks)
        return piece if self.ours else choice.cast(name, piece, self.dtype)

    def finish(self, layer: Any) -> None:
        """Raise ValueError for experts that have not come."""
        for made in self.sets:
            for shard, part in self.parts.items():
                if made.missing(shard):
                    raise ValueError(f"{self.prefix}: the checkpoint has no {part} for one of its experts")
        for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias"):
            if name in layer._parameters:
                del layer._parameters[name]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Register the stacks; nothing is repacked."""
        device = self.register(layer)
        if not self.ours:
            self.workspace = calls.make_workspace(device, _BLOCKS_OF_EXPERTS)
            return
        name = str(getattr(layer.activation, "value", layer.activation))
        known = _FORMULAS.get(name.removesuffix("_no_mul"))
        if known is None:
            raise ValueError(f"{self.prefix}: marlin-convert's kernels have no activation {name}")
        limit = getattr(layer, "swiglu_limit", None)
        self.formula = replace(
            known,
            joined=moe.JOINED if self.sets[0].joined else moe.NOT_JOINED,
            limit=known.limit if limit is None else limit,
        )
        local_of = {number: local for local, number in self.global_of.items()}
        self.place(local_of, layer.global_num_experts, device)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: `apply` knows its tensors itself."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Turn x [T, H], with topk_weights and topk_ids [T, k], into [T, H], to be summed over tensor-parallel ranks by
        vLLM."""
        if self.ours:
            on_input = bool(layer.apply_router_weight_on_input)
            fixed = choice.batch_invariant()
            return self.our_product(layer, x, topk_weights, topk_ids, layer.global_num_experts, on_input, fixed)
        kind = next(iter(self.sets[0].kinds.values()))
        result: Tensor = calls.multiply_experts(
            hidden_states=x,
            w1=layer.marlin0_w13_weight,
            w2=layer.marlin0_w2_weight,
            bias1=None,
            bias2=None,
            w1_scale=layer.marlin0_w13_scales,
            w2_scale=layer.marlin0_w2_scales,
            w1_zeros=layer.marlin0_w13_zeros,
            w2_zeros=layer.marlin0_w2_zeros,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            quant_type_id=calls.TYPES[kind.bits, kind.zeros is not None].id,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            activation=layer.activation,
            expert_map=layer.expert_map,
            workspace=self.workspace,
        )
        return result
