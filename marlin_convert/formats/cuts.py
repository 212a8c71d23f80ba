"""What tensor parallelism cuts: the rule that the engines' code goes by, and what it means for a result's layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..engine_support import LayerFacts
from .layout import EXT_K, EXT_N

#: Linears whose rows tensor-parallel ranks share out; of all others it is the columns.
_BY_ROWS = re.compile(r"(^|\.)(o_proj|down_proj|out_proj|dense|dense_4h_to_h|fc2|fc_out|c_proj|wo|w2|attn_output)$")
#: A vocabulary is padded, heads of keys and values are repeated.
_NOT_SHARED_EVENLY = ("lm_head", "k_proj", "v_proj")

REFUSED = "refused: use fewer ranks"
REGROUPED = (
    "exact on marlin-convert's CUDA kernels, in groups of 16 with some rows of zeros; refused where they are not built"
)


@dataclass(frozen=True)
class Cut:
    """What tensor parallelism does to some layers, and what comes of it."""

    what: str
    effect: str
    refused: bool
    layers: list[str]


def whole_groups(first: int, count: int, group_size: int) -> bool:
    """Return whether rows first .. first + count of a layer are whole groups, and blocks of rows that kernels take."""
    return not any(row % size for row in (first, count) for size in (max(1, group_size), EXT_K))


def tensor_parallel_cuts(layers: Iterable[LayerFacts], ranks: int) -> list[Cut]:
    """Return what vLLM's cut of the `layers` for so many tensor-parallel ranks means, but for whole tiles and groups.

    Which layers are cut by rows is told from their names, as models of today have them.
    """
    found: dict[tuple[str, str, bool], list[str]] = {}
    for x in layers:
        by_rows = _BY_ROWS.search(x.name) is not None
        size = x.K if by_rows else x.N
        if ranks == 1 or x.name.endswith(_NOT_SHARED_EVENLY):
            continue
        if size % ranks:
            kind = (f"{'rows' if by_rows else 'columns'} that {ranks} ranks cannot share out evenly", REFUSED, True)
        elif by_rows and (x.act_order or not whole_groups(0, size // ranks, x.group_size)):
            if x.group_size == -1:
                kind = ("rows of one group in another order", "exact; they are packed anew while they load", False)
            else:
                why = "act-order" if x.act_order else "cuts through groups"
                kind = (f"{why} in rows that {ranks} ranks share out", REGROUPED, False)
        elif not by_rows and size // ranks % EXT_N:
            kind = (f"columns that {ranks} ranks take out of their tiles", "exact; packed anew while they load", False)
        else:
            continue
        found.setdefault(kind, []).append(x.name)
    return [Cut(what, effect, refused, names) for (what, effect, refused), names in found.items()]
