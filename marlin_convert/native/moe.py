"""A block of experts on the bundled CUDA kernels: one operator, `torch.ops.marlin_convert.experts`.

    out[t] = Σ_j weights[t, j] · E(x[t]) of expert ids[t, j],    E(x) = (up(x) + beta) · activation(gate(x)) · W_down

Experts of like settings are a `Set`: their tensors, of either format, stacked. Different ones stand in sets of their
own; `position` says where in the row of all sets an expert is. Nothing waits for the device, so CUDA graphs and
torch.compile take the operator. On a CPU it is the loop over experts that `reference` is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch
from torch import library as torch_library
from torch import nn

from . import reference as twin
from ._cuda_checks import check_memory, check_shape, check_tensor, dtype_name, layer_sizes
from .cuda import _fixed, _workspace
from .cuda_library import BATCH_INVARIANT, DTYPES, Weights, device_info, error_text, load_library, run
from .moe_library import CallArguments, Layout, SetArguments, StackArguments

T: TypeAlias = torch.Tensor

# MARLIN_CUDA_* of kernels/marlin_cuda.h; a test compares them.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
#: Where the outputs of up are: in a matrix of its own (or nowhere: experts without a gate), in the second half of the
#: gate's, or in every second column of them.
NOT_JOINED, JOINED, ALTERNATING = 0, 1, 2
MOST_EXPERTS = 1024


@dataclass(frozen=True)
class Stack:
    """One layer of some experts with the same settings: the tensors of a checkpoint, one expert after the other.

    B int32 [E, K/16, N bits/2], s [E, G, N], zeros int32 [E, G, N bits/32], perm int32 [E, in_features], bias
    [E, out_features] of the activations' dtype. K and N are stored sizes, in_features and out_features without padding.
    A perm of `down` may name a column several times, and in_features be more than its inputs: rows of zeros between
    others.
    """

    B: T
    s: T
    bias: T | None
    zeros: T | None
    perm: T | None
    bits: int
    in_features: int
    out_features: int

    @property
    def tensors(self) -> list[T | None]:
        return [self.B, self.s, self.bias, self.zeros, self.perm]

    @property
    def numbers(self) -> list[int]:
        return [self.bits, self.in_features, self.out_features]

    def with_bias(self, dtype: torch.dtype) -> Stack:
        """Return the same, its bias cast."""
        return self if self.bias is None else replace(self, bias=self.bias.to(dtype))

    def check(self, name: str, dtype: torch.dtype) -> None:
        """Raise TypeError or ValueError for tensors that do not fit."""
        for what, tensor, dims in (
            ("B", self.B, 3),
            ("s", self.s, 3),
            ("zeros", self.zeros, 3),
            ("perm", self.perm, 2),
        ):
            if tensor is not None and tensor.dim() != dims:
                raise ValueError(f"{name} {what} has shape {tuple(tensor.shape)}; it should have {dims} dimensions")
        zeros, perm = (None if tensor is None else tensor[0] for tensor in (self.zeros, self.perm))
        layer_sizes(self.B[0], self.s[0], zeros, perm, self.bits, self.in_features, self.out_features)
        count = self.B.shape[0]
        if self.bias is not None:
            check_tensor(f"{name} bias", self.bias, (dtype,))
            check_shape(f"{name} bias", self.bias, (count, self.out_features))
        if any(tensor is not None and tensor.shape[0] != count for tensor in (self.s, self.zeros, self.perm)):
            raise ValueError(f"{name}: its tensors are of different numbers of experts")

    def product(self, number: int, a: T) -> T:
        """Compute a · W + bias of one of them, in a's dtype; weights are rounded to it once."""
        zeros, perm, bias = (
            None if tensor is None else tensor[number] for tensor in (self.zeros, self.perm, self.bias)
        )
        W = twin.dequantize_layer(
            self.B[number], self.s[number], zeros, bits=self.bits, in_features=self.in_features,
            out_features=self.out_features, dtype=a.dtype,
        )  # fmt: skip
        y = (a if perm is None else a[:, perm.long()]).float() @ W.float()
        return (y if bias is None else y + bias.float()).to(a.dtype)


@dataclass(frozen=True)
class Set:
    """Neighbouring experts with the same settings."""

    gate: Stack
    up: Stack | None
    down: Stack

    @property
    def count(self) -> int:
        return self.gate.B.shape[0]


@dataclass(frozen=True)
class Formula:
    """What an expert computes between its products: (up + beta) · activation(gate), gate at most `limit` and up from
    -limit to limit. silu is gate / (1 + exp(-alpha · gate))."""

    activation: str = "silu"
    joined: int = NOT_JOINED
    limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation}; it should be one of {', '.join(ACTIVATIONS)}")


def experts(
    x: T, weights: T, ids: T, sets: Sequence[Set], formula: Formula | None = None, *, count: int | None = None,
    position: T | None = None, weights_on_input: bool = False, variant: int = 0, batch_invariant: bool | None = None,
) -> T:  # fmt: skip
    """Compute x [T, in_features], with weights and ids [T, k], to [T, out_features of down], in x's dtype.

    ids int32 or int64 are numbers of experts, 0 .. count - 1 (the experts of `sets` unless given); any other: none.
    `position` int32 [count] tells where in the row of all sets each is, -1 for one that is not here. With
    `weights_on_input` x is multiplied by the weights, not the result. `batch_invariant` (default: whether
    MARLIN_BATCH_INVARIANT=1): a token has the bits that it has alone, whatever tokens are beside it. `variant`, for
    tests, asks for tiles, and comes before it. Raises TypeError and ValueError for arguments that do not fit,
    DeviceError when the kernels cannot run.
    """
    formula = formula or Formula()
    tensors, numbers = flat(sets)
    result: T = torch.ops.marlin_convert.experts(
        x, weights, ids, position, tensors, numbers, count or sum(s.count for s in sets),
        *(getattr(formula, field.name) for field in fields(formula)), weights_on_input,
        variant or _fixed(batch_invariant),
    )  # fmt: skip
    return result


def flat(sets: Sequence[Set]) -> tuple[list[T | None], list[int]]:
    """Return the tensors and the numbers of `sets`, as the operator takes them."""
    tensors: list[T | None] = []
    numbers: list[int] = []
    for group in sets:
        for stack in (group.gate, group.up, group.down):
            tensors += [None] * 5 if stack is None else stack.tensors
            numbers += [0] * 3 if stack is None else stack.numbers
    return tensors, numbers


def _sets(tensors: Sequence[T | None], numbers: Sequence[int]) -> list[Set]:
    """Undo `flat`."""

    def stack(at: int) -> Stack | None:
        B, s, bias, zeros, perm = tensors[5 * at : 5 * at + 5]
        return None if B is None or s is None else Stack(B, s, bias, zeros, perm, *numbers[3 * at : 3 * at + 3])

    if not tensors or len(tensors) % 15 or len(numbers) * 5 != len(tensors) * 3:
        raise ValueError(f"{len(tensors)} tensors and {len(numbers)} numbers; each set has 15 and 9")
    found = []
    for at in range(0, len(tensors) // 5, 3):
        gate, up, down = stack(at), stack(at + 1), stack(at + 2)
        if gate is None or down is None:
            raise ValueError("a set of experts has no gate, or no down")
        found.append(Set(gate, up, down))
    return found


def _check(x: T, weights: T, ids: T, position: T | None, count: int, sets: Sequence[Set]) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {dtype_name(x.dtype)}; it should be float16 or bfloat16")
    inputs, outputs = sets[0].gate.in_features, sets[0].down.out_features
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [tokens, {inputs}]")
    check_tensor("ids", ids, (torch.int32, torch.int64))
    check_tensor("weights", weights, (torch.float32,))
    check_shape("ids", ids, (x.shape[0], ids.shape[1]))
    check_shape("weights", weights, tuple(ids.shape))
    if position is not None:
        check_tensor("position", position, (torch.int32,), 1)
        check_shape("position", position, (count,))
    for group in sets:
        for name, stack in (("gate", group.gate), ("up", group.up), ("down", group.down)):
            if stack is not None:
                stack.check(name, x.dtype)
                if stack.B.shape[0] != group.count:
                    raise ValueError(f"{name} has {stack.B.shape[0]} experts; its set has {group.count}")
        if (group.gate.in_features, group.down.out_features) != (inputs, outputs):
            raise ValueError("the experts have different numbers of inputs or outputs")


# ---- On a GPU ----


class _Mixture:
    """Sets of experts, checked: what the library takes."""

    def __init__(self, sets: Sequence[Set], x: T, weights: T, ids: T, position: T | None, count: int) -> None:
        _check(x, weights, ids, position, count, sets)
        device = sets[0].gate.B.device
        self.index, self.outputs = device.index, sets[0].down.out_features
        self.sets, at = (SetArguments * len(sets))(), 0
        for target, group in zip(self.sets, sets, strict=True):
            for name, stack in (("gate", group.gate), ("up", group.up), ("down", group.down)):
                if stack is None:
                    continue
                check_memory(device, **{f"{name} {f.name}": getattr(stack, f.name) for f in fields(stack)[:5]})
                rows = stack.B.shape[1]
                _, G, N = stack.s.shape
                B, s, bias, zeros, perm = (None if t is None else t.data_ptr() for t in stack.tensors)
                inner = Weights(
                    B, s, zeros, perm, rows * 16, N, G, stack.in_features, stack.out_features, stack.bits,
                    DTYPES[stack.s.dtype],
                )  # fmt: skip
                setattr(target, name, StackArguments(inner, bias))
            target.first, target.last = at, at + group.count
            at += group.count
        self.positions = at
        device_info(self.index)
        self.kernels = load_library()
        self.scratch: dict[tuple[int, int, int], int] = {}


_mixtures: dict[tuple[object, ...], _Mixture] = {}
_MOST_MIXTURES = 1 << 10


def _experts(
    x: T, weights: T, ids: T, position: T | None, tensors: list[T | None], numbers: list[int], count: int,
    activation: str, joined: int, limit: float, alpha: float, beta: float, weights_on_input: bool = False,
    variant: int = 0,
) -> T:  # fmt: skip
    mixture, call, out = _prepared(
        x, weights, ids, position, tensors, numbers, count, activation, joined, limit, alpha, beta, weights_on_input,
        variant,
    )  # fmt: skip
    if x.shape[0] == 0:
        return out
    if ids.shape[1] == 0:
        return out.zero_()
    scratch = x.new_empty(_scratch_bytes(mixture, call), dtype=torch.uint8)
    _launch(mixture, call, scratch)
    return out


def _prepared(
    x: T, weights: T, ids: T, position: T | None, tensors: list[T | None], numbers: list[int], count: int,
    activation: str, joined: int, limit: float, alpha: float, beta: float, weights_on_input: bool, variant: int,
) -> tuple[_Mixture, CallArguments, T]:  # fmt: skip
    """Return the call, all but its scratch memory, and what it will write to."""
    key: tuple[object, ...] = (
        *((t.data_ptr(), t.shape, t.dtype, t.get_device()) for t in tensors if t is not None),
        *(t is None for t in tensors), *numbers, count, x.dtype, ids.dtype, weights.dtype,
        None if position is None else (position.data_ptr(), position.shape, position.dtype),
    )  # fmt: skip
    mixture = _mixtures.get(key)
    if mixture is None:
        if len(_mixtures) >= _MOST_MIXTURES:
            _mixtures.clear()
        mixture = _mixtures[key] = _Mixture(_sets(tensors, numbers), x, weights, ids, position, count)
    inputs = mixture.sets[0].gate.weights.in_features
    if x.dim() != 2 or x.shape[1] != inputs or ids.shape != weights.shape or ids.shape[:1] != x.shape[:1]:
        _check(x, weights, ids, position, count, _sets(tensors, numbers))
    for name, tensor in (("x", x), ("weights", weights), ("ids", ids), ("position", position)):
        if tensor is not None and tensor.get_device() != mixture.index:
            raise ValueError(f"{name} is on {tensor.device}; it should be on cuda:{mixture.index}, like the experts")
    rows = x if x.stride(1) == 1 and x.stride(0) >= inputs else x.contiguous()
    weights, ids = weights.contiguous(), ids.contiguous()
    out = x.new_empty((x.shape[0], mixture.outputs))
    call = CallArguments(
        x=rows.data_ptr(), ids=ids.data_ptr(), weights=weights.data_ptr(), out=out.data_ptr(),
        position=None if position is None else position.data_ptr(), tokens=x.shape[0], ldx=rows.stride(0),
        top_k=ids.shape[1], experts=count, positions=mixture.positions, wide_ids=ids.dtype == torch.int64,
        dtype=DTYPES[x.dtype], device=mixture.index, variant=variant, weights_on_input=weights_on_input,
        activation=ACTIVATIONS[activation], joined=joined, limit=limit, alpha=alpha, beta=beta,
    )  # fmt: skip
    call.kept = (rows, weights, ids)  # keeps their memory alive until the launch
    return mixture, call, out


def _layout(mixture: _Mixture, call: CallArguments) -> Layout:
    layout = Layout()
    run(
        mixture.kernels,
        "marlin_cuda_moe_layout",
        mixture.sets,
        len(mixture.sets),
        ctypes.byref(call),
        ctypes.byref(layout),
    )
    return layout


def _scratch_bytes(mixture: _Mixture, call: CallArguments) -> int:
    key = (call.tokens, call.top_k, call.variant)
    found = mixture.scratch.get(key)
    if found is None:
        found = mixture.scratch[key] = int(_layout(mixture, call).bytes)
    return found


def _launch(mixture: _Mixture, call: CallArguments, scratch: T) -> None:
    stream = torch._C._cuda_getCurrentRawStream(mixture.index)
    _, workspace, nbytes = _workspace(mixture.index, stream)
    call.scratch, call.scratch_bytes = scratch.data_ptr(), scratch.numel()
    call.workspace, call.workspace_bytes, call.stream = workspace, nbytes, stream
    status = mixture.kernels.marlin_cuda_moe(mixture.sets, len(mixture.sets), ctypes.byref(call))
    if status:
        where = f"{call.tokens} tokens, {call.top_k} of {call.experts} experts"
        raise RuntimeError(f"experts for {where}: {error_text(mixture.kernels, status)} ({status})")


# ---- The reference ----


def _reference(
    x: T, weights: T, ids: T, position: T | None, tensors: list[T | None], numbers: list[int], count: int,
    activation: str, joined: int, limit: float, alpha: float, beta: float, weights_on_input: bool = False,
    variant: int = 0,
) -> T:  # fmt: skip
    """Compute one expert after the other, its weights dequantized at every call: slow, obvious."""
    sets = _sets(tensors, numbers)
    _check(x, weights, ids, position, count, sets)
    places = [(group, number) for group in sets for number in range(group.count)]
    out = torch.zeros(x.shape[0], sets[0].down.out_features, dtype=torch.float32, device=x.device)
    for expert in range(count):
        at = expert if position is None else int(position[expert])
        token, choice = torch.where(ids == expert)
        if token.numel() == 0 or not 0 <= at < len(places):
            continue
        group, number = places[at]
        rows, weight = x[token], weights[token, choice, None]
        if weights_on_input:
            rows, weight = (rows.float() * weight).to(x.dtype), torch.ones_like(weight)
        size = 1 if variant == BATCH_INVARIANT else len(rows)  # on a CPU, sums depend on the number of rows
        apart = [rows[first : first + size] for first in range(0, len(rows), size)]
        y = torch.cat([_expert(group, number, x, Formula(activation, joined, limit, alpha, beta)) for x in apart])
        out.index_add_(0, token, y.float() * weight)
    return out.to(x.dtype)


def _expert(group: Set, number: int, rows: T, formula: Formula) -> T:
    gate: T = group.gate.product(number, rows)
    up: T | None
    if group.up is not None:
        up = group.up.product(number, rows)
    elif formula.joined == JOINED:
        gate, up = gate.chunk(2, -1)
    elif formula.joined == ALTERNATING:
        gate, up = gate[:, ::2], gate[:, 1::2]
    else:
        up = None
    return group.down.product(number, activate(gate, up, formula).to(rows.dtype))


def activate(gate: T, up: T | None, formula: Formula) -> T:
    """Compute (up + beta) · activation(gate), of any floating dtype, computed in fp32 at least."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    gate = gate.to(dtype).clamp(max=formula.limit)
    ways = {
        "silu": lambda: gate * torch.sigmoid(formula.alpha * gate),
        "gelu": lambda: nn.functional.gelu(gate),
        "gelu_tanh": lambda: nn.functional.gelu(gate, approximate="tanh"),
        "relu": lambda: nn.functional.relu(gate),
        "relu_squared": lambda: nn.functional.relu(gate).square(),
    }
    value: T = ways[formula.activation]()
    return value if up is None else value * (up.to(dtype).clamp(-formula.limit, formula.limit) + formula.beta)


# ---- The operator ----

_library = torch_library.Library("marlin_convert", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "experts(Tensor x, Tensor weights, Tensor ids, Tensor? position, Tensor?[] tensors, int[] numbers, int count, "
    "str activation, int joined, float limit, float alpha, float beta, bool weights_on_input=False, int variant=0) "
    "-> Tensor"
)
_library.impl("experts", _experts, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("experts", _reference, "CPU")  # type: ignore[no-untyped-call]


@torch_library.register_fake("marlin_convert::experts", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: T, weights: T, ids: T, position: T | None, tensors: list[T | None], numbers: list[int], count: int,
    activation: str, joined: int, limit: float, alpha: float, beta: float, weights_on_input: bool = False,
    variant: int = 0,
) -> T:  # fmt: skip
    return x.new_empty((x.shape[0], numbers[8]))
