"""vLLM's mixtures of experts from Marlin layers: the experts of a block stacked as they arrive, for one product.

Ours (`native/moe.py`) takes experts as the checkpoint has them, with whatever settings; it is chosen as for linear
layers, and for all that vLLM's fused Marlin product does not compute.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from .. import engine_support
from ..formats.layout import TILE_K, TILE_N
from ..native import moe
from . import tensor_parallel as shards
from . import vllm_calls as calls
from . import vllm_choice as choice
from .column_marks import Marks
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
_PARTS = ("weight", "scales", "zeros", "perm")


class MarlinExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one block: stacked, and computed by our product or vLLM's fused one."""

    def __init__(self, config: CheckpointConfig, prefix: str, layer: Any) -> None:
        super().__init__(layer.moe_config)
        self.config, self.prefix, self.gated = config, prefix, bool(self.moe.is_act_and_mul)
        #: The checkpoint's names of an expert's gate, up and down, by vLLM's names.
        self.parts = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        if not self.gated:
            del self.parts["w3"]
        experts = range(self.moe.num_logical_experts)
        names = {self._name(number, shard) for number in experts for shard in self.parts}
        found = {name for name in config.quantized if name.startswith(f"{prefix}.")}
        if names != found:
            odd = min(names ^ found)
            why = "is not quantized" if odd in names else "is not one of them"
            raise ValueError(f"{prefix}: vLLM computes its experts as one layer, and {odd} {why}")
        if self.moe.moe_parallel_config.use_all2all_kernels:
            raise ValueError(f"{prefix}: this plugin does not run experts spread over data-parallel ranks")
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
        self.hidden, self.own, self.dtype = hidden_size, intermediate_size_per_partition, params_dtype
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
                    self._set_of(local).put_bias(local, shard_id, self._cut_bias(layer, shard_id, loaded_weight))
                else:
                    raise ValueError(f"{name}: its weights are not those of the checkpoint")
            return local >= 0 if return_success else None

        for name in ("w13_weight", "w2_weight", *(("w13_bias", "w2_bias") if self.biases else ())):
            stand_in: Any = nn.Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            stand_in.weight_loader = load
            layer.register_parameter(name, stand_in)

    def _make_sets(self) -> list[_Set]:
        """Return this rank's experts by their settings."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for local in sorted(self.global_of):
            kind = tuple(self._settings(self._name(self.global_of[local], shard)) for shard in self.parts)
            kinds.setdefault(kind, []).append(local)
        sets = []
        for kind, numbers in kinds.items():
            plain = len(set(kind[:-1])) == 1 and not kind[0].desc_act and self.own % TILE_N == 0
            joined = self.gated and plain and kind[0].out_features is None
            sets.append(_Set(numbers, self.prefix, joined, kind[-1].desc_act))
        if not all(made.joined for made in sets):
            if not self.ours:
                raise ValueError(
                    f"{self.prefix}: vLLM's fused product does not run experts of {self.own} columns on a rank; start "
                    f"vLLM with {choice.KERNEL}=ours"
                )
            for made in sets:
                made.joined = False
        return sets

    def _set_of(self, local: int) -> _Set:
        return next(made for made in self.sets if local in made.row)

    def _cut(self, layer: Any, name: str, shard: str, piece: Piece) -> Piece:
        """Return this rank's piece of one expert's gate, up or down."""
        ranks, rank = layer.moe_config.tp_size, layer.moe_config.tp_rank
        K, N = (self.own * ranks, self.hidden) if shard == "w2" else (self.hidden, self.own * ranks)
        if (piece.K, piece.N) != (K, N):
            raise ValueError(f"{name}: it is {piece.K} x {piece.N}, the model {K} x {N}")
        if shard == "w2":
            first = rank * self.own
            if not self.ours and ranks > 1 and not shards.cuts_whole_groups(piece, first, self.own):
                raise ValueError(
                    f"{self.prefix}: vLLM's fused product does not run experts whose rows {first} to "
                    f"{first + self.own}, of this rank, cut through groups; start vLLM with {choice.KERNEL}=ours"
                )
            piece = shards.rows(piece, first, self.own)
        else:
            piece = shards.columns(piece, torch.arange(rank * self.own, (rank + 1) * self.own))
        return piece if self.ours else choice.cast(name, piece, self.dtype)

    def _cut_bias(self, layer: Any, shard: str, bias: Tensor) -> Tensor:
        """Return this rank's bias: of a sum over ranks, the first one adds it."""
        rank = layer.moe_config.tp_rank
        if shard != "w2":
            return bias[rank * self.own : (rank + 1) * self.own]
        return bias if rank == 0 else torch.zeros_like(bias)

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
        for number, made in enumerate(self.sets):
            for shard, tensors in made.stacks().items():
                for what, tensor in tensors.items():
                    value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                    layer.register_parameter(f"marlin{number}_{shard}_{what}", value)
        device = getattr(layer, f"marlin0_{self.sets[0].shards()[0]}_weight").device
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
        places = {local: place for place, local in enumerate(n for made in self.sets for n in made.row)}
        experts = layer.global_num_experts
        local_of = {number: local for local, number in self.global_of.items()}
        position = [places.get(local_of.get(number, -1), -1) for number in range(experts)]
        own_order = position == list(range(experts))
        self.position = None if own_order else torch.tensor(position, dtype=torch.int32, device=device)

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
            return self._our_product(layer, x, topk_weights, topk_ids)
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

    def _our_product(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        sets = []
        for number, made in enumerate(self.sets):
            found: dict[str, moe.Stack] = {}
            for shard in made.shards():
                parts = {w: getattr(layer, f"marlin{number}_{shard}_{w}") for w in (*_PARTS, "bias")}
                kind = made.kinds[shard]
                bias = None if parts["bias"] is None else parts["bias"].to(x.dtype)
                rows = kind.K if parts["perm"] is None else parts["perm"].shape[1]
                found[shard] = moe.Stack(
                    parts["weight"], parts["scales"], bias, parts["zeros"], parts["perm"], kind.bits, rows, kind.N
                )
            sets.append(moe.Set(found.get("w13") or found["w1"], found.get("w3"), found["w2"]))
        return moe.experts(
            x, topk_weights.float(), topk_ids, sets, self.formula, count=layer.global_num_experts,
            position=self.position, weights_on_input=bool(layer.apply_router_weight_on_input),
            batch_invariant=choice.batch_invariant() or None,
        )  # fmt: skip


class _Set:
    """Experts with the same settings. What arrives is put into a stack that is made for all of them at once."""

    def __init__(self, numbers: list[int], prefix: str, joined: bool, sorted_down: bool) -> None:
        self.row = {number: row for row, number in enumerate(numbers)}
        self.prefix, self.joined, self._sorted_down = prefix, joined, sorted_down
        self.kinds: dict[str, Piece] = {}  # by shard of the stacks: sizes, without tensors
        self._stacks: dict[str, dict[str, Tensor | None]] = {}
        self._there: dict[str, set[int]] = {}
        self._loose: dict[int, Piece] = {}  # act-order of down: a rank's rows of it are as many as groups make them
        self._biases: dict[str, dict[int, Tensor]] = {}

    def shards(self) -> list[str]:
        return sorted(self.kinds)

    def missing(self, shard: str) -> bool:
        return len(self._there.get(shard, ())) < len(self.row)

    def put(self, number: int, shard: str, piece: Piece) -> None:
        self._there.setdefault(shard, set()).add(number)
        if shard == "w2" and self._sorted_down:
            self._loose[number] = piece
            return
        half = {"w1": 0, "w3": 1}.get(shard) if self.joined else None
        stack, times = (shard, 1) if half is None else ("w13", 2)
        tensors = {what: getattr(piece, what) for what in _PARTS}
        if stack not in self._stacks:
            self._stacks[stack] = {
                what: None if t is None else t.new_empty((len(self.row), *t.shape[:-1], t.shape[-1] * times))
                for what, t in tensors.items()
            }
            self.kinds[stack] = replace(piece, N=piece.N * times)
        for what, tensor in tensors.items():
            whole = self._stacks[stack][what]
            if (whole is None) != (tensor is None):
                raise ValueError(f"{self.prefix}: experts of one kind are stored in different ways")
            if whole is None or tensor is None:
                continue
            target = whole[self.row[number]]
            if half is not None:
                target = target.chunk(2, -1)[half]
            if target.shape != tensor.shape:
                raise ValueError(f"{self.prefix}: experts of one kind are stored in different sizes")
            target.copy_(tensor)

    def put_bias(self, number: int, shard: str, bias: Tensor) -> None:
        self._biases.setdefault(shard, {})[number] = bias

    def stacks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return, by shard its tensors; once."""
        if self._loose:
            ready = _alike([self._loose.pop(number) for number in self.row])
            self.kinds["w2"] = ready[0]
            self._stacks["w2"] = {
                what: None if getattr(ready[0], what) is None else torch.stack([getattr(p, what) for p in ready])
                for what in _PARTS
            }
        found, self._stacks = self._stacks, {}
        for shard, tensors in found.items():
            tensors["bias"] = self._bias_of(shard)
            weight = tensors["weight"]
            assert weight is not None
            kind = self.kinds[shard]
            none = {what: None if tensors[what] is None else tensors[what][:0] for what in _PARTS}  # type: ignore[index]
            self.kinds[shard] = replace(kind, **none)  # type: ignore[arg-type]
        return found

    def _bias_of(self, shard: str) -> Tensor | None:
        parts = [self._biases.get(part) for part in (("w1", "w3") if shard == "w13" else (shard,))]
        if all(part is None for part in parts):
            return None
        if any(part is None or part.keys() != self.row.keys() for part in parts):
            raise ValueError(f"{self.prefix}: some of its experts have a bias, others have none")
        device = self.kinds[shard].weight.device
        return torch.stack([torch.cat([part[number] for part in parts]) for number in self.row]).to(device)  # type: ignore[index]


def _alike(pieces: list[Piece]) -> list[Piece]:
    """Return pieces with act-order, brought to the same number of stored rows: by rows of zeros, in groups of their
    own."""
    natural = [
        torch.arange(p.K, dtype=torch.int32, device=p.weight.device) if p.perm is None else p.perm for p in pieces
    ]
    if len({(piece.stored_K, perm.numel()) for piece, perm in zip(pieces, natural, strict=True)}) == 1:
        return [replace(piece, perm=perm) for piece, perm in zip(pieces, natural, strict=True)]
    rows = max(piece.stored_K for piece in pieces)

    def longer(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else nn.functional.pad(tensor, (0, 0, 0, count))

    alike = []
    for piece, perm in zip(pieces, natural, strict=True):
        more, size = rows - piece.stored_K, piece.stored_K // piece.G
        if more and piece.G == 1:
            raise ValueError("experts with act-order and one group are stored in different sizes")
        groups = more // size if more else 0
        weight, scales, zeros = (
            longer(tensor, count)
            for tensor, count in ((piece.weight, more // TILE_K), (piece.scales, groups), (piece.zeros, groups))
        )
        assert weight is not None
        assert scales is not None
        perm = nn.functional.pad(perm, (0, rows - perm.numel()))
        alike.append(replace(piece, weight=weight, scales=scales, zeros=zeros, perm=perm))
    return alike
