"""vLLM on a machine without a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute vLLM's products by a reference; layers say themselves which rank they are of."""
    from tests.support.vllm_layers import run_on_a_cpu

    run_on_a_cpu(monkeypatch)
