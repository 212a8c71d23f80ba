"""`MarlinLinear`: a quantized linear layer as a torch module, with the tensors of a checkpoint as its state.

    y [..., N] = x [..., K] · W + bias    W as `docs/concepts/format.md` defines it, in either format

On a GPU the bundled kernels compute it (`cuda.matmul`); anywhere else a reference does, which dequantizes the weights
in blocks of columns at every call, keeping none: exact, and slow, which it says once. Under torch.compile the layer is
one operator, `torch.ops.marlin_convert.linear`; CUDA graphs take it as it is. Inference only: a backward pass through
it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import library as torch_library
from torch.utils._pytree import tree_map_only

from ..formats.layout import (
    EXT_BITS,
    EXT_GROUP_SIZES,
    EXT_K,
    EXT_N,
    EXTENDED_NAMES,
    GROUP_SIZES,
    ORIGINAL_NAMES,
    TILE_K,
    padded_size,
    stored_groups,
    unpack_zeros,
)
from ..native import cpu, cpu_weights, cuda, reference

log = logging.getLogger(__name__)

#: Columns that the reference dequantizes at a time: a few dozen MB for the largest layers.
BLOCK_COLUMNS = 1024


class MarlinLinear(nn.Module):
    """A linear layer whose weight stays as Marlin stores it. `state_dict()` holds the checkpoint's tensors, no more.

    in_features (K) and out_features (N) are the layer's own, without padding. `group_size` is the rows that share a
    scale as stored, -1 for one group. `sym=False` adds zero points, `desc_act=True` the permutation of act-order.
    `extended` chooses the names: `marlin_qweight`, `marlin_scales`, …, or the original `B` and `s`, which hold only
    4-bit symmetric layers without act-order and padding. Scales keep `scale_dtype` (float16 or bfloat16) whatever the
    module is cast to; `bias` has `dtype`. The activations decide the dtype of the product: float16 or bfloat16 on a
    GPU, any floating point elsewhere. `batch_invariant=True` gives each row the bits that it has alone, whatever rows
    are beside it (`cuda.gemm`); None: as MARLIN_BATCH_INVARIANT in the environment says. Raises ValueError for settings
    that the format does not have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = True,
        desc_act: bool = False,
        extended: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_invariant: bool | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        #: Whether `weight` is [K, N], as in Transformers' Conv1D, instead of [N, K].
        self.weight_by_rows = False
        self._dtype = dtype or torch.get_default_dtype()
        self.bits, self.group_size, self.sym, self.desc_act, self.extended = bits, group_size, sym, desc_act, extended
        self.scale_dtype = scale_dtype
        self.batch_invariant = batch_invariant
        self._check(scale_dtype)
        K, N, G = self._stored()
        words: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((K // TILE_K, N * bits // 2), torch.int32),
            "scales": ((G, N), scale_dtype),
        }
        if not sym:
            words["zeros"] = ((G, N * bits // 32), torch.int32)
        if desc_act:
            words["perm"] = ((in_features,), torch.int32)
        self._names = EXTENDED_NAMES if extended else ORIGINAL_NAMES
        for what, (shape, kind) in words.items():
            self.register_buffer(self._names[what], torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)

    def _check(self, scale_dtype: torch.dtype) -> None:
        if self.bits not in EXT_BITS:
            raise ValueError(f"bits is {self.bits}; Marlin has 4 and 8")
        if self.group_size not in (*EXT_GROUP_SIZES, -1):
            raise ValueError(f"group_size is {self.group_size}; it should be 16, 32, 64, 128 or -1")
        if scale_dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"scale_dtype is {scale_dtype}; it should be torch.float16 or torch.bfloat16")
        if self.extended:
            return
        plain = (self.bits, self.sym, self.desc_act, scale_dtype) == (4, True, False, torch.float16)
        if not plain or self.group_size not in GROUP_SIZES or self.in_features % EXT_K or self.out_features % EXT_N:
            raise ValueError(
                f"the original format holds 4-bit symmetric layers with groups of 128 or -1, without act-order, with "
                f"fp16 scales, K a multiple of {EXT_K} and N of {EXT_N}; give extended=True for this one "
                f"({self.extra_repr()})"
            )

    def _stored(self) -> tuple[int, int, int]:
        """Return (K, N, G) as stored, padding included."""
        K, N = padded_size(self.in_features, self.out_features)
        return K, N, stored_groups(self.in_features, self.group_size)

    def _tensor(self, what: str) -> Tensor | None:
        return self._buffers.get(self._names.get(what, ""))

    def forward(self, x: Tensor) -> Tensor:
        """Turn x [..., K] of any floating dtype into [..., N] in the same dtype."""
        bias: Tensor | None = self._buffers["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        layer = (
            self._tensor("weight"), self._tensor("scales"), bias, self._tensor("zeros"), self._tensor("perm"),
            self.bits, self.in_features, self.out_features, self.batch_invariant,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.marlin_convert.linear(x, *layer)
            return result
        if x.requires_grad and torch.is_grad_enabled():
            result = _Forward.apply(x, *layer)  # type: ignore[no-untyped-call]
            return result  # noqa: RET504 - named for its type
        return _linear(x, *layer)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight of a plain linear layer with the same values, [N, K], in the module's dtype, for code that looks
        at it. Its dtype, shape and device cost nothing; whatever computes with it gets it dequantized, every time."""
        return DequantizedWeight(self, self._dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W [K, N] in the source's order of rows, rounded once to `dtype` (that of the scales if None)."""
        B, s = self._buffers[self._names["weight"]], self._buffers[self._names["scales"]]
        assert B is not None
        assert s is not None
        size = {"bits": self.bits, "in_features": self.in_features, "out_features": self.out_features}
        dequantize: Any = cuda.dequantize if B.device.type == "cuda" else reference.dequantize_layer
        W: Tensor = dequantize(
            B, s, zeros=self._tensor("zeros"), perm=self._tensor("perm"), dtype=dtype or self.scale_dtype, **size
        )
        return W

    def extra_repr(self) -> str:
        parts = [f"K={self.in_features}, N={self.out_features}, group={self.group_size}, bits={self.bits}"]
        parts += ["asymmetric"] * (not self.sym) + ["act-order"] * self.desc_act
        return ", ".join(parts + ["bias"] * (self._buffers.get("bias") is not None))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MarlinLinear:
        """Do as any module does, but scales keep their dtype: `.to(torch.bfloat16)` must not round them.

        Raises DeviceError when the layer moves to a GPU that its kernels cannot run on.
        """
        scales = self._tensor("scales")

        def keep(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor is scales and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=None if scales is None else scales.device)).dtype
        moved = self._tensor("scales")
        if moved is not None and moved.device.type == "cuda":
            cuda.device_info(moved.device.index)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load as any module does; scales of another dtype than this layer's are an error, not rounded."""
        name, current = prefix + self._names["scales"], self._tensor("scales")
        given = state_dict.get(name)
        if given is not None and current is not None and given.dtype != current.dtype:
            error_msgs.append(f"{name} is {given.dtype}; this layer was made for {current.dtype} (scale_dtype)")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class DequantizedWeight(Tensor):
    """A tensor that is made when something is computed with it: a layer's weights. Nothing can be written into it."""

    #: Tells Transformers' random initialization that there is nothing to initialize.
    _is_hf_initialized = True
    _layer: MarlinLinear

    @staticmethod
    def __new__(cls, layer: MarlinLinear, dtype: torch.dtype) -> DequantizedWeight:
        scales = layer._tensor("scales")
        assert scales is not None
        N, K = layer.out_features, layer.in_features
        weight: DequantizedWeight = Tensor._make_wrapper_subclass(
            cls, (K, N) if layer.weight_by_rows else (N, K), dtype=dtype, device=scales.device
        )
        weight._layer = layer
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls._made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _made(self) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        W = self._layer.dequantize().to(self.dtype)
        return W if self._layer.weight_by_rows else W.t()


# ---- The product ----


def _linear(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, zeros: Tensor | None, perm: Tensor | None,
    bits: int, in_features: int, out_features: int, batch_invariant: bool | None = None,
) -> Tensor:  # fmt: skip
    if x.device.type == "cuda":
        whole = (in_features, out_features) == (B.shape[0] * TILE_K, s.shape[1])  # no padding
        if zeros is None and perm is None and bits == 4 and whole:
            return cuda.matmul(x, B, s, bias, batch_invariant=batch_invariant)
        product: Any = cuda.matmul
        result: Tensor = product(
            x, B, s, bias, zeros, perm, bits=bits, in_features=in_features, out_features=out_features,
            batch_invariant=batch_invariant,
        )  # fmt: skip
        return result
    fixed = cuda.INVARIANT if batch_invariant is None else batch_invariant
    return _reference(x, B, s, bias, zeros, perm, bits, in_features, out_features, fixed)


def _reference(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, zeros: Tensor | None, perm: Tensor | None,
    bits: int, in_features: int, out_features: int, row_by_row: bool = False,
) -> Tensor:  # fmt: skip
    """Compute x · W + bias with W dequantized in x's dtype, rounded once, BLOCK_COLUMNS of it at a time.

    W goes back to the source's order of rows, not x to the stored one: fp16 sums depend on the order of their terms,
    and these are to be the sums of a plain linear layer with the same weights.
    """
    _warn_slow(str(x.device.type))
    natural = None if perm is None else torch.argsort(perm)  # natural[k]: the stored row that is the source's row k
    blocks = []
    for n0 in range(0, out_features, BLOCK_COLUMNS):
        n1, end = min(n0 + BLOCK_COLUMNS, s.shape[1]), min(n0 + BLOCK_COLUMNS, out_features)
        block_zeros = None if zeros is None else zeros[:, n0 * bits // 32 : n1 * bits // 32]
        W = _weight(B[:, n0 * bits // 2 : n1 * bits // 2], s[:, n0:n1], block_zeros, bits, x.dtype)
        W = W[:in_features, : end - n0]
        W = (
            (W if natural is None else W[natural]).t().contiguous()
        )  # the layout of nn.Linear, so that sums are in the same order
        bias_block = None if bias is None else bias[n0:end]
        if row_by_row:
            rows = [nn.functional.linear(row, W, bias_block) for row in x.reshape(-1, 1, x.shape[-1])]
            blocks.append(torch.cat(rows or [x.new_empty(0, end - n0)]).view(*x.shape[:-1], end - n0))
        else:
            blocks.append(nn.functional.linear(x, W, bias_block))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def _weight(B: Tensor, s: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return W [K', columns] of a block of columns, rows as stored: from the native library where it has that, else
    from the twin, which is the same bits."""
    if B.device.type != "cpu" or dtype != s.dtype or not cpu.native_available():
        return reference.dequantize_layer(B, s, zeros, bits=bits, dtype=dtype)
    words, numbers = B.contiguous().numpy(), s.contiguous().view(torch.uint16).numpy()  # numpy has no bfloat16
    points = None if zeros is None else unpack_zeros(zeros.contiguous().numpy(), bits)
    scales = numbers if dtype == torch.bfloat16 else numbers.view(np.float16)
    W = cpu_weights.dequantize_marlin(words, scales, bits=bits, zeros=points, threads=torch.get_num_threads())
    return torch.from_numpy(W.view(np.uint16)).view(dtype)


@cache
def _warn_slow(device: str) -> None:
    log.warning(
        "Marlin layers on %s are computed by a reference that dequantizes their weights at every call: exact, and "
        "slow. The kernels need an NVIDIA GPU of compute capability 8.0 or newer.",
        device,
    )


class _Forward(torch.autograd.Function):
    """The product inside a graph of gradients, of which it is the end: nobody gets a wrong gradient from it."""

    @staticmethod
    def forward(context: Any, x: Tensor, *layer: Any) -> Tensor:
        return _linear(x, *layer)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        raise NotImplementedError("MarlinLinear is for inference: it has no gradient. Train the unquantized model.")


_library = torch_library.Library("marlin_convert", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor B, Tensor s, Tensor? bias, Tensor? zeros, Tensor? perm, int bits, int in_features, "
    "int out_features, bool? batch_invariant=None) -> Tensor"
)
_library.impl("linear", _linear, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]


@torch_library.register_fake("marlin_convert::linear", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, B: Tensor, s: Tensor, bias: Tensor | None, zeros: Tensor | None, perm: Tensor | None,
    bits: int, in_features: int, out_features: int, batch_invariant: bool | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))
