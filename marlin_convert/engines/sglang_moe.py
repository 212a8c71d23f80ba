"""SGLang's mixtures of experts from Marlin layers, computed by our product over all experts of a block."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.layers.moe import get_moe_a2a_backend, get_moe_runner_backend
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.runtime_context import get_server_args
from torch import Tensor, nn

from .. import engine_support
from ..formats.layout import TILE_N
from ..native import moe
from .column_marks import Marks
from .serving_experts import ExpertSet, ServedExperts
from .serving_linear import LOADING
from .sglang_config import CheckpointConfig, batch_invariant, check_kernels
from .tensor_parallel import Piece


class MarlinExpertsMethod(ServedExperts, FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one block of SGLang, whose tensors come from layers of the checkpoint."""

    def __init__(self, config: CheckpointConfig, prefix: str) -> None:
        """Raise ValueError for what this plugin does not run."""
        self.config, self.prefix = config, prefix
        self.pieces: dict[int, dict[str, Piece]] = {}  # by this rank's number of an expert
        self.sets: list[ExpertSet] = []
        check_kernels(prefix)
        self.fixed = batch_invariant()
        biases = sorted(name for name in config.biases if name.startswith(f"{prefix}."))
        faults = {
            f"{engine_support.BIASED} ({''.join(biases[:1])})": bool(biases),
            "experts that --enable-eplb moves among ranks": bool(get_server_args().enable_eplb),
            "experts with --moe-a2a-backend": not get_moe_a2a_backend().is_none(),
        }
        for fault, applies in faults.items():
            if applies:
                raise ValueError(f"{prefix}: this plugin does not run {fault} in SGLang")

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
        self.hidden, self.rank_inner, self.count = hidden_size, intermediate_size_per_partition, num_experts
        self.device = torch.get_default_device()

        def load(
            param: nn.Parameter, loaded_weight: Tensor, weight_name: str = "", shard_id: str = "",
            expert_id: int | None = None,
        ) -> None:  # fmt: skip
            if expert_id is None or shard_id not in ("w1", "w2", "w3") or not isinstance(loaded_weight, Marks):
                raise ValueError(f"{self.prefix}: its weights are not those of the checkpoint, expert by expert")
            self._check_place(layer, expert_id)
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local >= 0:
                with LOADING:
                    self._load(layer, local, shard_id, loaded_weight)

        for name in ("w13_weight", "w2_weight"):
            stand_in: Any = nn.Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            stand_in.weight_loader = load
            layer.register_parameter(name, stand_in)

    def _check_place(self, layer: Any, expert: int) -> None:
        places = get_global_expert_location_metadata() if layer.uses_expert_location else None
        if places is not None and expert < places.num_logical_experts:
            found = places.logical_to_all_physical(layer.layer_id, expert, False)
            if list(found) != [expert]:
                raise ValueError(f"{self.prefix}: this plugin does not run experts that SGLang moves or repeats")

    def _load(self, layer: Any, local: int, shard: str, marks: Tensor) -> None:
        arriving = self.config.arriving
        if arriving is None:
            raise ValueError(f"{self.prefix}: its weights can be loaded once only; start SGLang again to load others")
        arriving.asked(marks)
        name = "".join(arriving.sources(marks))
        pieces = arriving.pieces(name, marks, self.device)
        mine = self.pieces.setdefault(local, {})
        if len(pieces) != 1 or shard in mine:
            raise ValueError(f"{name}: SGLang joins layers of the checkpoint in one part of an expert")
        mine[shard] = self.rank_piece(name, shard, pieces[0], layer.moe_tp_rank, layer.moe_tp_size)

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """Note what computes the block: not one of SGLang's runners. Raises ValueError for what we do not compute."""
        given = self.settings = moe_runner_config
        backend = get_moe_runner_backend()
        faults = {
            f"experts with the activation {given.activation}": given.activation != "silu",
            "experts without a gate": not given.is_gated,
            "experts with a limit on the gate": any(
                value is not None
                for value in (given.gemm1_alpha, given.gemm1_beta, given.gemm1_clamp_limit, given.swiglu_limit)
            ),
            "experts whose results are not added up": given.no_combine,
            "experts with another --moe-runner-backend than auto, triton or marlin": not (
                backend.is_auto() or backend.is_triton() or backend.is_marlin()
            ),
        }
        for fault, applies in faults.items():
            if applies:
                raise ValueError(f"{self.prefix}: this plugin does not run {fault} in SGLang")

    def finish(self, layer: Any) -> None:
        """Raise ValueError for experts that have not come."""
        for local in range(self.count):
            if missing := {"w1", "w2", "w3"} - self.pieces.get(local, {}).keys():
                raise ValueError(f"{self.prefix}: {', '.join(sorted(missing))} of its expert {local} has not come")
        for name in ("w13_weight", "w2_weight"):
            del layer._parameters[name]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stack experts that are alike; nothing is repacked."""
        if len(self.pieces) != self.count:
            raise ValueError(f"{self.prefix}: its weights have not been loaded")
        kinds: dict[Any, list[int]] = {}
        for local in range(self.count):
            kinds.setdefault(tuple(_kind(self.pieces[local][shard]) for shard in ("w1", "w3", "w2")), []).append(local)
        joined = self.rank_inner % TILE_N == 0 and all(gate == up and not gate[1] for gate, up, _ in kinds)
        for (_, _, down), numbers in kinds.items():
            made = ExpertSet(numbers, self.prefix, joined, down[1])
            for local in numbers:
                parts = self.pieces.pop(local)
                for shard in list(parts):
                    made.put(local, shard, parts.pop(shard))
            self.sets.append(made)
        device = self.register(layer)
        self.formula = moe.Formula("silu", joined=moe.JOINED if joined else moe.NOT_JOINED)
        self.place({number: number for number in range(self.count)}, self.count, device)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """Turn [T, H] and who computes which token into [T, H], to be summed over ranks by SGLang."""
        routes = dispatch_output.topk_output
        if dispatch_output.hidden_states_scale is not None or not TopKOutputChecker.format_is_standard(routes):
            raise ValueError(f"{self.prefix}: this plugin does not run experts with {type(routes).__name__} in SGLang")
        on_input = bool(self.settings.apply_router_weight_on_input)
        y = self.our_product(
            layer, dispatch_output.hidden_states, routes.topk_weights, routes.topk_ids, self.count, on_input,
            self.fixed,
        )  # fmt: skip
        factor = self.settings.routed_scaling_factor
        return StandardCombineInput(hidden_states=y if factor is None else y * factor)


def _kind(piece: Piece) -> tuple[Any, ...]:
    """Return what must be alike for one stack; rows with act-order are made alike (`serving_experts`)."""
    sort = piece.perm is not None
    sizes = (piece.stored_K, piece.G) if not sort else ()
    return (piece.bits, sort, piece.zeros is not None, piece.scales.dtype, piece.N, piece.stored_N, piece.K, *sizes)
