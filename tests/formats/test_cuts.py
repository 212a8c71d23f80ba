"""What tensor parallelism means for layers of several kinds."""

from __future__ import annotations

import pytest

from marlin_convert.engine_support import LayerFacts
from marlin_convert.formats import cuts

SPLIT = [
    LayerFacts("l.q_proj", 4, 128, K=512, N=512),
    LayerFacts("l.k_proj", 4, 128, K=512, N=64),
    LayerFacts("l.o_proj", 4, 128, act_order=True, K=512, N=512),
    LayerFacts("l.down_proj", 4, 64, K=1152, N=512),
    LayerFacts("l.up_proj", 4, 64, K=512, N=1152),
    LayerFacts("l.experts.0.down_proj", 4, 128, K=192, N=512),
    LayerFacts("l.out_proj", 4, -1, K=192, N=512),
    LayerFacts("lm_head", 4, 128, K=512, N=1001),
]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, {}),
        (2, {
            "act-order in rows that 2 ranks share out": (["l.o_proj"], False),
            "cuts through groups in rows that 2 ranks share out": (["l.down_proj", "l.experts.0.down_proj"], False),
            "rows of one group in another order": (["l.out_proj"], False),
        }),
        (4, {
            "act-order in rows that 4 ranks share out": (["l.o_proj"], False),
            "cuts through groups in rows that 4 ranks share out": (["l.down_proj", "l.experts.0.down_proj"], False),
            "columns that 4 ranks take out of their tiles": (["l.up_proj"], False),
            "rows of one group in another order": (["l.out_proj"], False),
        }),
        (7, {
            "columns that 7 ranks cannot share out evenly": (["l.q_proj", "l.up_proj"], True),
            "rows that 7 ranks cannot share out evenly": (
                ["l.o_proj", "l.down_proj", "l.experts.0.down_proj", "l.out_proj"], True
            ),
        }),
    ],
)  # fmt: skip
def test_what_tensor_parallelism_cuts(ranks: int, expected: dict[str, tuple[list[str], bool]]) -> None:
    found: dict[str, list[str]] = {}
    for cut in cuts.tensor_parallel_cuts(SPLIT, ranks):
        found.setdefault(cut.what, []).extend(cut.layers)
        refused = expected[cut.what][1]
        assert cut.refused == refused
        assert (cut.effect.partition(":")[0] == "refused") == cut.refused
    assert {what: sorted(names) for what, names in found.items()} == {k: sorted(v[0]) for k, v in expected.items()}
