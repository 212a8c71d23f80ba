"""How long the Hub is asked again, by a clock of our own."""

from __future__ import annotations

import time

import pytest

from marlin_convert.hub import client


class Clock:
    """Time that passes when somebody sleeps, or when a call takes a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.take)

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("each", "calls", "ends"), [(0.0, 5, 7.5), (1.0, 5, 12.5), (5.0, 3, 16.5), (10.0, 2, 20.5)])
def test_patience_ends(monkeypatch: pytest.MonkeyPatch, each: float, calls: int, ends: float) -> None:
    """Where nothing answers, that is said within 30 s, whatever an answer is waited for."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    clock, made = Clock(monkeypatch), []

    def call() -> None:
        made.append(clock.now)
        clock.take(each)
        raise HTTPError("no connection")

    with pytest.raises(HTTPError):
        client.with_retries(call)
    assert (len(made), clock.now) == (calls, ends)


def test_patience_begins_anew_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks every 20 s, and brings something each time, is no reason to give up."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    clock, came = Clock(monkeypatch), [0]

    def call() -> str:
        clock.take(20)
        came[0] += 1
        if came[0] < 50:
            raise HTTPError("broken")
        return "all"

    assert client.with_retries(call, progress=lambda: came[0]) == "all"
