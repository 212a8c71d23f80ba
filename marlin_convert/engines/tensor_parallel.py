"""Pieces of Marlin layers: what one rank of a tensor-parallel engine holds, and layers side by side as one product.

Columns are taken in any order and rows anywhere: whole tiles and groups with no repacking, others through their codes,
exactly. A piece is a copy, so that the whole can be freed, and again a Marlin layer. Scales change their order when a
rank is left with one group (see `layout`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SourceError
from ..formats import cuts, layout
from ..formats.layout import EXT_K, TILE_K, TILE_N
from ..formats.marlin_config import LayerSettings
from ..formats.stored import StoredLayer, tensor_names
from ..native import reference
from ..options import Format

#: Codes unpacked at a time when columns are taken out of their tiles: 128 MiB of int64.
_CODES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Piece:
    """A Marlin layer, or a part of one. K and N are its own rows and columns, the tensors' are padded.

    weight int32 [K'/16, N' bits/2], scales [G, N'], zeros int32 [G, N' bits/32] or None, perm int32 [K] or None; a perm
    [K'] has rows of zeros between others, see `rows`.
    """

    bits: int
    K: int
    N: int
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None

    @property
    def stored_K(self) -> int:
        return self.weight.shape[0] * TILE_K

    @property
    def stored_N(self) -> int:
        return self.scales.shape[1]

    @property
    def G(self) -> int:
        return self.scales.shape[0]


@dataclass(frozen=True)
class _Header:
    """A tensor as the one reader of stored layers looks at it."""

    dtype: str
    shape: tuple[int, ...]


_DTYPES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16"}


def whole(name: str, settings: LayerSettings, tensors: dict[str, Tensor], format: Format = Format.MARLIN_EXT) -> Piece:
    """Return a layer as the checkpoint has it; `tensors` by what they are (the keys of EXTENDED_NAMES).

    Raises ValueError when they do not fit the settings.
    """
    names = tensor_names(format)
    headers = {
        f"{name}.{names.get(what, what)}": _Header(_DTYPES.get(x.dtype, str(x.dtype)), tuple(x.shape))
        for what, x in tensors.items()
    }
    try:
        stored = StoredLayer.from_tensors(name, headers, settings, format)
    except SourceError as error:
        raise ValueError(error.message) from None
    parts = (tensors["weight"], tensors["scales"], tensors.get("zeros"), tensors.get("perm"))
    return Piece(stored.bits, stored.K, stored.N, *parts)


def columns(piece: Piece, order: Tensor) -> Piece:
    """Return the columns of a layer that `order` int64 [N of the result] names, in that order; -1 is a column of zeros.

    Any order is exact: whole tiles are moved as they are, other columns are taken out of their tiles and put into new
    ones. The result is a copy, unless it is all of the layer.
    """
    order, count = order.to(piece.weight.device), order.shape[0]
    if count == piece.N and torch.equal(order, torch.arange(count, device=order.device)):
        return piece
    order = torch.nn.functional.pad(order, (0, -count % TILE_N), value=-1)
    tiles, positions = order.reshape(-1, TILE_N), torch.arange(order.shape[0], device=order.device).reshape(-1, TILE_N)
    first, beyond = tiles[:, :1], positions >= count
    zero = ((tiles < 0) | beyond).all(1)
    moved = (first[:, 0] % TILE_N == 0) & ((tiles == first + positions % TILE_N) | beyond).all(1)
    if bool((zero | moved).all()):
        last = piece.stored_N // TILE_N
        tile = torch.where(zero, last, first[:, 0].clamp(min=0) // TILE_N)
        weight, scales = _take_tiles(piece.weight, last, tile), _take_tiles(piece.scales, last, tile)
        zeros = None if piece.zeros is None else _take_tiles(piece.zeros, last, tile)
        return replace(piece, N=count, weight=weight, scales=scales, zeros=zeros)
    at_once = max(1, _CODES_AT_ONCE // (piece.stored_N * TILE_K))
    weight = torch.cat([
        reference.pack_marlin(_take(reference.unpack_marlin(rows, piece.bits), order), piece.bits)
        for rows in torch.split(piece.weight, at_once)
    ])  # fmt: skip
    scales = reference.permute_scales(_take(reference.unpermute_scales(piece.scales), order))
    zeros = piece.zeros
    if zeros is not None:
        zeros = reference.pack_zeros(_take(reference.unpack_zeros(zeros, piece.bits), order), piece.bits)
    return replace(piece, N=count, weight=weight, scales=scales, zeros=zeros)


def _take(matrix: Tensor, order: Tensor) -> Tensor:
    """Return columns of `matrix`, zeros where `order` is negative."""
    taken = matrix[:, order.clamp(min=0)]
    taken[:, order < 0] = 0
    return taken


def _take_tiles(tensor: Tensor, count: int, order: Tensor) -> Tensor:
    """Return columns of the tiles in `order` of a layer's tensor, which has `count` of them; tile `count` is zeros."""
    tiles = tensor.reshape(tensor.shape[0], count, -1)
    taken = tiles[:, order.clamp(max=count - 1)]
    taken[:, order == count] = 0
    return taken.reshape(tensor.shape[0], -1)


def cuts_whole_groups(piece: Piece, first: int, count: int) -> bool:
    """Tell whether rows first .. first + count are whole groups of a layer, and blocks of rows that kernels take."""
    group = piece.stored_K // piece.G if piece.G > 1 else -1
    return piece.perm is None and cuts.whole_groups(first, count, group)


def rows(piece: Piece, first: int, count: int) -> Piece:
    """Return rows first .. first + count of a layer, in the source's order, as a rank of row parallelism has them.

    Whole groups that lie side by side are taken as they are. Others, those of act-order among them, become groups of
    16 rows each: a group's rows on this rank, filled up with rows of zeros, have its scales. Exact too, for kernels
    that have such groups; the result's `perm` then names a column of activations for each stored row.
    """
    if first == 0 and count == piece.K:
        return piece
    if not cuts_whole_groups(piece, first, count):
        return _regrouped(piece, first, count)
    group = piece.stored_K // piece.G if piece.G > 1 else 0

    def of_groups(tensor: Tensor) -> Tensor:
        return tensor[first // group : (first + count) // group].clone() if group else tensor

    scales = of_groups(piece.scales)
    if piece.G > 1 and scales.shape[0] == 1:
        scales = single_group(scales)
    return replace(
        piece,
        K=count,
        weight=piece.weight[first // TILE_K : (first + count) // TILE_K].clone(),
        scales=scales,
        zeros=None if piece.zeros is None else of_groups(piece.zeros),
    )


def _regrouped(piece: Piece, first: int, count: int) -> Piece:
    device, size = piece.weight.device, piece.stored_K // piece.G
    source = torch.arange(piece.K, device=device) if piece.perm is None else piece.perm.long()
    stored = torch.nonzero((source >= first) & (source < first + count)).flatten()  # by group, as they are stored
    group = stored // size
    sizes = torch.bincount(group, minlength=piece.G)
    filled = -(-sizes // TILE_K) * TILE_K if piece.G > 1 else sizes
    begin, inside = filled.cumsum(0) - filled, sizes.cumsum(0) - sizes
    target = begin[group] + torch.arange(count, device=device) - inside[group]
    K = -(-int(filled.sum()) // EXT_K) * EXT_K
    of_row = torch.repeat_interleave(torch.arange(piece.G, device=device), filled)
    of_row = torch.nn.functional.pad(
        of_row, (0, K - of_row.shape[0])
    )  # rows of zeros follow; their group does not matter
    groups = of_row[::TILE_K] if piece.G > 1 else of_row[:1]

    scales = reference.permute_scales(reference.unpermute_scales(piece.scales)[groups])
    zeros = None if piece.zeros is None else reference.unpack_zeros(piece.zeros, piece.bits)
    words = piece.bits * TILE_N // 2
    weight = piece.weight.new_empty(K // TILE_K, piece.weight.shape[1])
    tiles = max(1, _CODES_AT_ONCE // (max(K, piece.stored_K) * TILE_N))
    for part in range(0, piece.stored_N // TILE_N, tiles):
        n = slice(part * TILE_N, (part + tiles) * TILE_N)
        w = slice(part * words, (part + tiles) * words)
        codes = reference.unpack_marlin(piece.weight[:, w], piece.bits)
        if zeros is None:
            new = codes.new_full((K, codes.shape[1]), layout.zero_point(piece.bits))
        else:
            new = zeros[:, n][of_row]
        new[target] = codes[stored]
        weight[:, w] = reference.pack_marlin(new, piece.bits)
    perm = torch.zeros(K, dtype=torch.int32, device=device)
    perm[target] = (source[stored] - first).int()
    if torch.equal(target, torch.arange(count, device=device)):  # the padding comes after all of them
        perm = perm[:count]
    in_order = torch.equal(perm, torch.arange(count, device=device))
    packed = None if zeros is None else reference.pack_zeros(zeros[groups], piece.bits)
    return Piece(piece.bits, count, piece.N, weight, scales, packed, None if in_order else perm)


def single_group(scales: Tensor) -> Tensor:
    """Turn scales [1, N'] in the order of grouped scales into that of a single group."""
    inverse = tuple(layout.SCALE_PERMUTATION.index(i) for i in range(TILE_N))
    natural = scales.reshape(-1, TILE_N)[:, list(inverse)].reshape(1, -1)
    return reference.permute_scales(natural)


def join(pieces: list[Piece]) -> list[Piece]:
    """Return neighbours that one product can do, joined along N: of the same kind, without padding between them."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and _alike(last, piece):
            joined[-1] = replace(
                last,
                N=last.N + piece.N,
                weight=torch.cat([last.weight, piece.weight], 1),
                scales=torch.cat([last.scales, piece.scales], 1),
                zeros=None if last.zeros is None or piece.zeros is None else torch.cat([last.zeros, piece.zeros], 1),
            )
        else:
            joined.append(piece)
    return joined


def _alike(a: Piece, b: Piece) -> bool:
    same = (a.bits, a.K, a.stored_K, a.G, a.zeros is None) == (b.bits, b.K, b.stored_K, b.G, b.zeros is None)
    same = same and a.scales.dtype == b.scales.dtype and a.stored_N == a.N
    if not same or (a.perm is None) != (b.perm is None):
        return False
    return a.perm is None or b.perm is None or torch.equal(a.perm, b.perm)
