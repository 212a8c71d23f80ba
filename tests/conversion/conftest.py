"""A converted checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_convert.conversion.convert import convert
from tests.support.gptq_checkpoints import Source
from tests.support.results import CPU


@pytest.fixture
def out(source: Source, tmp_path: Path) -> Path:
    """`source`, converted."""
    convert(source.folder, tmp_path / "out", CPU)
    return tmp_path / "out"
