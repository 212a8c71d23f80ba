"""Which kernel computes the layers in vLLM, what it is keyed by, and what is refused without ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.pieces import random_layer

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config.utils import hash_factors  # noqa: E402

from tests.support.vllm_layers import (  # noqa: E402
    Linear,
    choice,
    choose,
    config_of,
    load,
    plugin,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("on_a_cpu")]


@pytest.mark.parametrize(
    ("kernel", "missing", "capability", "ours", "why"),
    [
        ("auto", "", (9, 0), True, "the faster one on compute capability 9.0"),
        ("", "", (9, 0), True, "the faster one on compute capability 9.0"),
        ("auto", "", (8, 0), False, "ours has not been measured to be faster on compute capability 8.0"),
        ("auto", "", (12, 0), False, "ours has not been measured to be faster on compute capability 12.0"),
        ("auto", "not built.", (9, 0), False, "not built"),
        ("vllm", "", (9, 0), False, "MARLIN_CONVERT_VLLM_KERNEL=vllm"),
        ("Ours", "", (8, 0), True, "MARLIN_CONVERT_VLLM_KERNEL=ours"),
    ],
)
def test_which_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: str, missing: str, capability: tuple[int, int], ours: bool, why: str
) -> None:
    choose(monkeypatch, kernel, missing, capability)
    assert choice.kernel()[:2] == (ours, why)


@pytest.mark.parametrize(
    ("kernel", "missing", "message"),
    [
        ("ours", "not built.", "MARLIN_CONVERT_VLLM_KERNEL=ours: not built"),
        ("marlin", "", "MARLIN_CONVERT_VLLM_KERNEL is 'marlin'; it should be one of auto, ours, vllm"),
    ],
)
def test_kernels_that_cannot_be(monkeypatch: pytest.MonkeyPatch, kernel: str, missing: str, message: str) -> None:
    choose(monkeypatch, kernel, missing)
    with pytest.raises(ValueError, match=message):
        choice.kernel()


def test_one_line_says_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a logger that vLLM shows."""
    choose(monkeypatch, "auto")
    lines = []
    monkeypatch.setattr(choice.logger, "info", lambda message, *arguments: lines.append(message % arguments))
    choice.say.cache_clear()
    for name in ("a", "b"):
        plugin.MarlinCheckpointMethod(config_of({}, False), name)
    why = "the faster one on compute capability 9.0"
    assert lines == [f"Quantized layers of this Marlin checkpoint are computed by marlin-convert's kernels: {why}"]
    assert choice.logger.name.startswith("vllm.")


def test_compiled_graphs_are_keyed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM itself takes for the key of its cache."""
    keys = []
    for kernel in ("ours", "vllm", "ours"):
        choose(monkeypatch, kernel)
        keys.append(hash_factors(vllm.envs.compile_factors()))
    assert keys[0] == keys[2] != keys[1]


def test_batch_invariance_is_refused_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "vllm")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(
        ValueError, match=r"^x: VLLM_BATCH_INVARIANT=1 asks for results that do not depend on the number"
    ):
        plugin.MarlinCheckpointMethod(config_of({}, False), "x")


@pytest.mark.parametrize("asked", ["1", "0"])
def test_our_kernels_are_batch_invariant_when_vllm_promises_it(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    choose(monkeypatch, "ours")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", asked)
    pieces: dict[str, Any] = {"a": (*random_layer(256, 64), {})}
    linear = Linear(0)
    method = load(config_of(pieces, False), ["a"], pieces, linear, (256, [64], 256, 64), [None], False)
    passed: list[bool | None] = []

    def product(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        passed.append(rest[8])
        return x.new_zeros(*x.shape[:-1], rest[7])

    monkeypatch.setattr(torch.ops.marlin_convert, "linear", product)
    method.apply(linear, torch.randn(3, 256).half())
    assert passed == [True if asked == "1" else None]


def test_what_the_kernel_lacks_is_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"group": 16}, "no groups of 16"), ({"bits": 8, "asym": True}, "no 8-bit codes with zero")
    ]  # fmt: skip
    for kind, message in cases:
        pieces = {"a": (*random_layer(256, 64, **kind), kind)}
        with pytest.raises(ValueError, match=f"a: vLLM's Marlin kernel has {message}"):
            plugin.MarlinCheckpointMethod(config_of(pieces, True), "a", ["a"])
