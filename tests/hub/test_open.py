"""A source is a folder or a repository on the Hub: which of the two is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert.errors import SourceError
from marlin_convert.hub.open import fetch
from tests.support.cli import Run
from tests.support.gptq_checkpoints import Source, two_layers, write_source
from tests.support.hub_server import Hub

REPO = "someone/model-gptq"


@pytest.mark.parametrize("source", ["./x", "../x", "~/x", "/x/y", "a/b/c", "a b", "x/", "", "someone/x?y", "C:\\x"])
def test_what_is_no_hub_id_is_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as error:
        fetch(source)
    assert error.value.message == f"{source or repr('')}: no such folder."


def test_no_hub_is_asked_for_a_folder(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    for source in ("./x", "a/b/c"):
        result = online(source, tmp_path / "out")
        assert result.code == 3
        assert result.err == f"marlin-convert: {source}: no such folder.\n"
    assert hub.requests == []


@pytest.mark.parametrize("name", ["-x/y", "a/b.git", "a--b/c", "x..y/z"])
def test_names_that_the_hub_does_not_have(name: str) -> None:
    with pytest.raises(SourceError) as error:
        fetch(name)
    assert error.value.message == f"{name}: neither a folder nor a Hub id."


def test_a_folder_comes_before_the_hub(
    hub: Hub, repository: Source, online: Callable[..., Run], tmp_path: Path
) -> None:
    write_source(tmp_path / "someone" / "model-gptq", two_layers(group_size=-1))
    report = online(REPO, tmp_path / "out", "--json").json()
    assert (report["group_size"], report["source"], report["source_commit"]) == (-1, "model-gptq", None)
    assert hub.requests == []
    result = online(REPO, tmp_path / "x", "--revision", "main")
    assert result.code == 3
    assert result.err == f"marlin-convert: {REPO} is a folder; --revision applies to a Hub id only.\n"


def test_a_file_is_no_source(source: Source) -> None:
    with pytest.raises(SourceError, match="is a file; give the folder that holds the checkpoint"):
        fetch(str(source.folder / "model.safetensors"))


def test_a_folders_label_is_its_name(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.folder)
    assert fetch(".").label == fetch("../source/").label == "source"
