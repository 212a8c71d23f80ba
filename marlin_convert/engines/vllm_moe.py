"""vLLM's mixtures of experts from Marlin layers: the experts of a block stacked, for vLLM's fused Marlin product.

Those that it cannot compute are refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from .. import engine_support
from . import tensor_parallel as shards
from . import vllm_calls as calls
from . import vllm_choice as choice
from .column_marks import Marks
from .tensor_parallel import Piece
from .vllm_config import CheckpointConfig

#: Blocks of the experts' kernel on each multiprocessor: its workspace has a lock for each.
_BLOCKS_OF_EXPERTS = 4


class MarlinExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one block: stacked, and computed by vLLM's fused Marlin product."""

    def __init__(self, config: CheckpointConfig, prefix: str, layer: Any) -> None:
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
        choice.check_invariance(prefix)
        lacking = choice.vllm_lacks(self.settings.bits, not self.settings.sym, self.settings.group_size)
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
        return choice.cast(name, piece, self.dtype)

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
        self.workspace = calls.make_workspace(first[0].weight.device, _BLOCKS_OF_EXPERTS)

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
        result: Tensor = calls.multiply_experts(
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
            quant_type_id=calls.TYPES[self.settings.bits, not self.settings.sym].id,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            activation=layer.activation,
            expert_map=layer.expert_map,
            workspace=self.workspace,
        )
        return result
