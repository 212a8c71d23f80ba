"""A repository on the Hub, and the disk that it comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.downloads import REPO, Disk, large
from tests.support.gptq_checkpoints import Source
from tests.support.hub_server import Hub


@pytest.fixture
def repository(hub: Hub, tmp_path: Path) -> Source:
    source = large(tmp_path / "upload")
    hub.add(REPO, source.folder)
    return source


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)
