"""Which of the two does the work of `native.cpu`."""

import pytest

from marlin_convert.native import cpu


@pytest.fixture
def backend_set(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "twin":
        monkeypatch.setenv(cpu.NO_NATIVE, "1")
