"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cuda.cuda_library import Library


@pytest.fixture(scope="module")
def library() -> Library:
    """The CUDA library, by the tests' own declarations of its functions."""
    from tests.cuda.cuda_library import Library

    return Library()


@pytest.fixture
def fresh_inputs() -> None:
    """Draw other random numbers in each run; the seed is shown where a test fails."""
    import torch

    print(f"torch seed {torch.seed()}")
