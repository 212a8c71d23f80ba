"""Plans of small checkpoints, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.plan import Plan, make_plan
from marlin_convert.errors import MarlinConvertError, UnsupportedError
from tests.support.gptq_checkpoints import GPTQLayer, pack_columns, quantization_config, write_source

NO_QUANTIZATION: dict[str, Any] = {}


def plan_of(folder: Path) -> Plan:
    with Checkpoint(folder) as checkpoint:
        return make_plan(checkpoint, "marlin")


def planned(
    tmp_path: Path,
    layers: dict[str, GPTQLayer] | GPTQLayer | None = None,
    plain: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Plan:
    """The plan for a checkpoint of these layers; `config` changes its quantization config (None removes a key)."""
    layers = {"layer": layers} if isinstance(layers, GPTQLayer) else layers
    write_source(tmp_path / "m", layers, plain or {}, quantization=quantization_config(**config))
    return plan_of(tmp_path / "m")


def assert_converts(plan: Plan, *names: str, notes: str | None = None) -> None:
    """All of `names` (default: one layer named "layer") are converted; one note contains `notes`, or there is none."""
    assert plan.refusals == {}
    assert [x.name for x in plan.layers] == list(names or ["layer"])
    plan.require_convertible()
    if notes is None:
        assert plan.notes == {}
    else:
        assert len(plan.notes) == 1, plan.notes
        assert notes in next(iter(plan.notes))


def assert_refused(plan: Plan, *reasons: str, name: str = "layer") -> None:
    """Layer `name` is refused for exactly these reasons (a part of each), and not converted."""
    found = [reason for reason, names in plan.refusals.items() if name in names]
    assert len(found) == len(reasons), found
    for reason, part in zip(found, reasons, strict=True):
        assert part in reason
    assert name not in [x.name for x in plan.layers]
    with pytest.raises(UnsupportedError) as caught:
        plan.require_convertible()
    assert all(part in caught.value.message for part in reasons)


def error_of(make: Callable[[], object], kind: type[MarlinConvertError]) -> str:
    with pytest.raises(kind) as caught:
        make()
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def layer_zeros(G: int, N: int, stored: int = 7) -> torch.Tensor:
    return torch.from_numpy(pack_columns(np.full((G, N), stored)))
