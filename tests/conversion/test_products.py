"""The numeric check alone: it accepts what is right, and finds by itself what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.plan import make_plan
from marlin_convert.conversion.products import CPUProduct, compare
from marlin_convert.conversion.verify import TOLERANCE
from marlin_convert.formats.layout import SCALE_PERMUTATION, SCALE_PERMUTATION_SINGLE
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source
from tests.support.products import groups_of


def errors_of(source: Source, edit: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[float, float]:
    """The product's errors for the only layer of `source`, its B and s passed through `edit` first."""
    out = source.folder.parent / "numeric"
    shutil.rmtree(out, ignore_errors=True)
    convert(source.folder, out, Options(device="cpu"))
    tensors = load_file(out / "model.safetensors")
    with Checkpoint(source.folder) as checkpoint:
        (layer,) = make_plan(checkpoint, "marlin").layers
        qweight, scales = checkpoint.read(layer.source.weight), checkpoint.read(layer.source.scales)
    B, s = edit(tensors["a.B"].numpy(), tensors["a.s"].numpy())
    product = CPUProduct(layer, groups_of(scales, s), None, None)
    product.add_source(0, qweight)
    product.add_stored(0, np.ascontiguousarray(B))
    return product.errors()


@pytest.fixture(params=[128, -1])
def one_layer(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return write_source(tmp_path / "source", {"a": GPTQLayer(K=256, N=256, group_size=request.param)}, {})


def repermuted(permutation: tuple[int, ...], s: Any) -> Any:
    """s with its columns brought to GPTQ's order and permuted anew."""
    right = SCALE_PERMUTATION if s.shape[0] > 1 else SCALE_PERMUTATION_SINGLE
    natural = np.empty_like(s)
    for i, old in enumerate(right):
        natural[:, old :: len(right)] = s[:, i :: len(right)]
    result = np.empty_like(s)
    for i, old in enumerate(permutation):
        result[:, i :: len(permutation)] = natural[:, old :: len(permutation)]
    return result


def test_the_product_accepts_what_is_right(one_layer: Source) -> None:
    assert errors_of(one_layer, lambda B, s: (B, s))[1] < 1e-6
    right = SCALE_PERMUTATION if one_layer.layers["a"].G > 1 else SCALE_PERMUTATION_SINGLE
    assert errors_of(one_layer, lambda B, s: (B, repermuted(right, s)))[1] < 1e-6


def test_the_product_finds_wrong_permutations_by_itself(one_layer: Source) -> None:
    """The other permutation, and none at all: what others shipped (a permutation chosen by the wrong K)."""
    wrong = SCALE_PERMUTATION_SINGLE if one_layer.layers["a"].G > 1 else SCALE_PERMUTATION
    for permutation in (wrong, tuple(range(64))):
        assert errors_of(one_layer, lambda B, s, p=permutation: (B, repermuted(p, s)))[1] > 100 * TOLERANCE  # type: ignore[misc]


def test_the_product_finds_a_wrong_order_of_codes_by_itself(one_layer: Source) -> None:
    def swap_tiles(B: Any, s: Any) -> tuple[Any, Any]:
        return np.concatenate([B[:, 128:256], B[:, :128], B[:, 256:]], axis=1), s

    def swap_nibbles(B: Any, s: Any) -> tuple[Any, Any]:
        words = B.view(np.uint32)
        return ((words >> 4 & 0x0F0F0F0F) | (words & 0x0F0F0F0F) << 4).view(np.int32), s

    def swap_rows(B: Any, s: Any) -> tuple[Any, Any]:
        return B[::-1], s

    for edit in (swap_tiles, swap_nibbles, swap_rows):
        assert errors_of(one_layer, edit)[1] > 100 * TOLERANCE


def test_the_product_is_the_definitions(one_layer: Source) -> None:
    """The reference against activations times weights in float64, computed here from codes and scales."""
    layer = one_layer.layers["a"]
    with Checkpoint(one_layer.folder) as checkpoint:
        (planned,) = make_plan(checkpoint, "marlin").layers
        scales = checkpoint.read(planned.source.scales)
        product = CPUProduct(planned, groups_of(scales, scales), None, None)
        product.add_source(0, checkpoint.read(planned.source.weight))
        product.add_stored(0, np.zeros((16, 512), np.int32))
    assert product.x.shape == (4, 256)
    assert np.array_equal(product.x, product.x.astype(np.float16))
    assert 0.8 < product.x.std() < 1.2
    expected = product.x.astype(np.float64) @ layer.weight.astype(np.float16).astype(np.float64)
    assert compare(product.reference, expected)[1] < 1e-6


def test_compare() -> None:
    assert compare(np.array([[3.0, 4.5]]), np.array([[3.0, 4.0]])) == (0.5, 0.1)
    assert compare(np.zeros((1, 2)), np.zeros((1, 2))) == (0.0, 0.0)
    assert compare(np.ones((1, 2)), np.zeros((1, 2))) == (1.0, pytest.approx(2**0.5))
    assert np.isnan(compare(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]]))[1])
