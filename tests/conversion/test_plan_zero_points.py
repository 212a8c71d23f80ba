"""Zero points of a plan: symmetric or not, in both formats of GPTQ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import SourceError
from marlin_convert.options import Options
from tests.support import format_reader, source_definitions
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, tensors_of, write_source
from tests.support.plans import assert_converts, assert_refused, error_of, plan_of, planned

#: (stored, checkpoint_format, sym) → what the layer is: v1 stores z - 1 and v2 stores z; with sym, labels of the
#: layout are known to lie, and both 7 and 8 mean 8; without sym, the label is all there is.
ZERO_POINTS = [
    (7, "gptq", True, "plain"), (7, "gptq", None, "plain"), (7, "gptq", False, "noted"),
    (8, "gptq", True, "noted"), (8, "gptq", None, "noted"), (8, "gptq", False, "which is 9 in checkpoint_format gptq"),
    (7, "gptq_v2", True, "noted"), (7, "gptq_v2", None, "noted"),
    (7, "gptq_v2", False, "which is 7 in checkpoint_format gptq_v2"),
    (8, "gptq_v2", True, "plain"), (8, "gptq_v2", None, "plain"), (8, "gptq_v2", False, "noted"),
    (7, None, True, "plain"), (7, None, None, "plain"), (7, None, False, "noted"),
    (8, None, True, "noted"), (8, None, None, "noted"), (8, None, False, "which is 9 in checkpoint_format gptq"),
    (7, "marlin", True, "plain"),
    *((z, f, sym, "asymmetric (zero points are not all 8")
      for z in (0, 6, 9, 15) for f in ("gptq", "gptq_v2") for sym in (True, False, None)),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "layout", "sym", "outcome"), ZERO_POINTS)
def test_zero_points(tmp_path: Path, stored: int, layout: str | None, sym: bool | None, outcome: str) -> None:
    plan = planned(tmp_path, GPTQLayer(stored_zero=stored), checkpoint_format=layout, sym=sym)
    if outcome == "plain":
        assert_converts(plan)
    elif outcome == "noted":
        assert_converts(plan, notes="symmetric")
    else:
        assert_refused(plan, outcome)


@pytest.mark.parametrize("sym", [True, False, None])
@pytest.mark.parametrize("stored", [7, 8])
@pytest.mark.parametrize("at", [(0, 0), (1, 255), (1, 100)])
@pytest.mark.parametrize("deviation", [-1, 1])
def test_one_deviating_zero_point(
    tmp_path: Path, sym: bool | None, stored: int, at: tuple[int, int], deviation: int
) -> None:
    zeros = np.full((2, 256), stored)
    zeros[at] += deviation
    plan = planned(tmp_path, GPTQLayer(stored_zero=zeros), sym=sym)
    claim = ", although the config says sym" if sym else ""
    assert_refused(plan, f"asymmetric (zero points are not all 8{claim})")


def test_sevens_and_eights_mixed_are_asymmetric(tmp_path: Path) -> None:
    zeros = np.full((2, 256), 7)
    zeros[1] = 8
    assert_refused(planned(tmp_path, GPTQLayer(stored_zero=zeros)), "asymmetric")


def test_layers_may_differ_in_the_stored_zero_point(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"a": GPTQLayer(stored_zero=7), "b": GPTQLayer(stored_zero=8)})
    assert_converts(plan, "a", "b", notes="read as symmetric")
    assert list(plan.notes.values()) == [["b"]]


@pytest.mark.parametrize(
    ("stored", "sym", "outcome"), [(7, True, None), (8, True, None), (7, False, "disagree"), (8, False, "disagree")]
)
def test_configs_disagree_on_the_layout(tmp_path: Path, stored: int, sym: bool, outcome: str | None) -> None:
    """With sym it does not matter; without it, nothing tells what a stored number means."""
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=stored)}, {}, quantization=quantization_config(sym=sym),
        quantize_config=quantization_config(sym=sym, checkpoint_format="gptq_v2"),
    )  # fmt: skip
    plan = plan_of(tmp_path / "m")
    if outcome:
        assert_refused(plan, outcome)
    else:
        assert plan.refusals == {}
        assert any("disagree on checkpoint_format" in note for note in plan.notes)


@pytest.mark.parametrize(("stored", "layout"), [(7, "gptq"), (8, "gptq_v2"), (8, "gptq"), (7, "gptq_v2")])
def test_configs_disagree_on_sym(tmp_path: Path, stored: int, layout: str) -> None:
    """The label of the layout decides: where the stored number means 8 by it, the layer is symmetric."""
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=stored)}, {},
        quantization=quantization_config(sym=True, checkpoint_format=layout),
        quantize_config=quantization_config(sym=False, checkpoint_format=layout),
    )  # fmt: skip
    plan = plan_of(tmp_path / "m")
    if (stored, layout) in ((7, "gptq"), (8, "gptq_v2")):
        assert_converts(plan, notes="disagree on sym")
    else:
        assert_refused(plan, f"asymmetric (every zero point is stored as {stored}")


@pytest.mark.parametrize(
    ("sym", "reason"),
    [(True, None), (False, "no qzeros, and the config says sym false"),
     (None, "no qzeros, and no config says whether it is symmetric")],
)  # fmt: skip
def test_qzeros_missing(tmp_path: Path, sym: bool | None, reason: str | None) -> None:
    plan = planned(tmp_path, GPTQLayer(stored_zero=None), sym=sym)
    if reason:
        assert_refused(plan, reason)
    else:
        assert_converts(plan)


def test_qzeros_missing_and_configs_disagree(tmp_path: Path) -> None:
    write_source(
        tmp_path / "m", {"layer": GPTQLayer(stored_zero=None)}, {}, quantization=quantization_config(sym=True),
        quantize_config=quantization_config(sym=False),
    )  # fmt: skip
    assert_refused(plan_of(tmp_path / "m"), "no qzeros, and the configs disagree on sym")


def test_nibbles_behind_the_last_column_are_not_zero_points(tmp_path: Path) -> None:
    """N = 260 takes 32.5 words: half a word is padding, and is zero here."""
    assert_refused(planned(tmp_path, GPTQLayer(N=260)), "N = 260 is not a multiple of 256")
    zeros = np.full((2, 260), 7)
    zeros[1, 259] = 6
    plan = planned(tmp_path / "x", GPTQLayer(N=260, stored_zero=zeros))
    assert_refused(plan, "N = 260 is not a multiple of 256", "asymmetric")


@pytest.mark.parametrize(
    "qzeros",
    [torch.zeros(3, 32, dtype=torch.int32), torch.zeros(2, 33, dtype=torch.int32), torch.zeros(64, dtype=torch.int32),
     torch.zeros(2, 0).int()],
    ids=["groups", "columns", "1-D", "empty"],
)  # fmt: skip
def test_qzeros_of_another_kind(tmp_path: Path, qzeros: torch.Tensor) -> None:
    tensors = {**GPTQLayer().tensors("the.layer"), "the.layer.qzeros": qzeros}
    message = error_of(lambda: planned(tmp_path, {}, tensors), SourceError)
    assert message.startswith("the.layer: ")
    assert "qzeros" in message


@pytest.mark.parametrize("bits", [4, 8])
def test_planar_gptq_stores_them_as_v2_does(tmp_path: Path, bits: int) -> None:
    """GPTQModel's gptq_p: with 4 and 8 bits, the same words under another name, which restoring gives back."""
    stored = np.random.default_rng(1).integers(0, 2**bits, (2, 256))
    layer = GPTQLayer(bits=bits, stored_zero=stored, v2=True)
    write_source(tmp_path / "p", {"layer": layer}, {}, quantization=quantization_config(
        sym=False, bits=bits, checkpoint_format="gptq_p"))  # fmt: skip
    convert(tmp_path / "p", tmp_path / "out", Options(device="cpu", verify=True))
    np.testing.assert_array_equal(format_reader.read(tmp_path / "out")["layer"], layer.weight)
    restore(tmp_path / "out", tmp_path / "again", original=True)
    assert source_definitions.config(tmp_path / "again") == source_definitions.config(tmp_path / "p")
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "p")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
