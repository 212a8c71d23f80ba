"""`marlin-convert env`: what a bug report needs, and no secret."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import pytest

from marlin_convert import __version__
from marlin_convert.cli import environment
from marlin_convert.cli.commands import cli
from marlin_convert.cli.params import GROUPS
from marlin_convert.device import Device
from marlin_convert.errors import DeviceError
from tests.support.cli import SECRET, Run


def test_versions_and_the_machine(main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cuda_devices", lambda: [Device("cuda", 0, "NVIDIA H100", (9, 0))])
    monkeypatch.setattr(environment, "driver_version", lambda: "580.82.07")
    found = main("env", "--json").json()
    assert found["marlin_convert"] == __version__
    assert found["python"].startswith(f"{platform.python_version()} (CPython), /")
    assert found["packages"]["rich"] == importlib.metadata.version("rich")
    assert found["gpus"] == [{"name": "NVIDIA H100", "capability": "9.0"}]
    said = main("env").out
    assert "NVIDIA H100 (9.0); driver 580.82.07\n" in said
    assert f"marlin-convert {__version__}, /" in " ".join(said.split())


def test_what_is_not_there_is_said(main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[Device]:
        raise DeviceError("no NVIDIA driver is installed")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "cuda_devices", none)
    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setenv("MARLIN_CONVERT_ISA", "mmx")
    found = main("env", "--json").json()
    assert found["gpus"] == "no NVIDIA driver is installed"
    assert set(found["packages"].values()) == {None}
    assert main("env").code == 0


def test_secrets_stay_secret(main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{SECRET}@hub.example")
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@proxy.example")
    monkeypatch.setenv("MARLIN_BATCH_INVARIANT", "1")
    monkeypatch.setenv("OF_OTHERS", "nothing")
    found = main("env", "--json")
    assert SECRET not in found.out + main("env").out
    variables = found.json()["variables"]
    assert (variables["HF_TOKEN"], variables["HF_ENDPOINT"], variables["https_proxy"]) == ("set",) * 3
    assert variables["MARLIN_BATCH_INVARIANT"] == "1"
    assert "OF_OTHERS" not in variables


def test_options_are_shown_in_groups(main: Callable[..., Run]) -> None:
    said = main("--help").out
    places = [said.index(f"\n{title}:\n") for title in ("The result", "Look first", "Hugging Face Hub", "Publish",
                                                          "Where and how", "Commands", "Examples")]  # fmt: skip
    assert places == sorted(places)
    assert "\nOptions:\n" not in said  # the command has none of its own
    assert said.index("--help") > places[4]
    assert said.index("--dry-run") > places[1]
    assert said.index("--revision") > places[2]
    known = {parameter.name for command in cli.commands.values() for parameter in command.params}
    assert {name for names in GROUPS.values() for name in names} - known == {"version", "help"}
