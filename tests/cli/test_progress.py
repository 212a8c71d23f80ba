"""What tells that work goes on."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from rich.console import Console

from marlin_convert.cli.progress import PlainLines, waiting


def test_what_cannot_be_counted_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_convert.cli.progress.PLAIN_INTERVAL", 0.01)
    text = io.StringIO()
    with waiting(Console(file=text), "loading"):
        while text.getvalue().count("\n") < 3:
            time.sleep(0.01)
    lines = text.getvalue().splitlines()
    assert lines[0] == "loading"
    assert all(re.fullmatch(r"… for \d+ s", line) for line in lines[1:])


def test_a_log_hears_only_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    with PlainLines(Console(file=text)).waiting("uploading"):
        pass
    assert text.getvalue() == ""
    monkeypatch.setattr("marlin_convert.cli.progress.PLAIN_INTERVAL", 0.01)
    with PlainLines(Console(file=text)).waiting("uploading"):
        while not text.getvalue():
            time.sleep(0.01)
    assert re.fullmatch(r"uploading … for \d+ s", text.getvalue().splitlines()[0])


def test_what_fails_is_no_longer_waited_for() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="it"), waiting(Console(file=io.StringIO()), "loading"):
        raise ValueError("it")
    assert threading.active_count() == before
