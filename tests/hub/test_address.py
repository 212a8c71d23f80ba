"""What people paste in place of a Hub id."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_convert.errors import SourceError
from marlin_convert.hub.address import repository


@pytest.mark.parametrize(
    ("pasted", "name", "revision"),
    [
        ("https://huggingface.co/org/name", "org/name", None),
        ("https://huggingface.co/org/name/", "org/name", None),
        ("http://www.huggingface.co/org/name?library=transformers#use", "org/name", None),
        ("huggingface.co/org/name", "org/name", None),
        ("hf.co/org/name", "org/name", None),
        ("https://huggingface.co/gpt2", "gpt2", None),
        ("https://huggingface.co/org/name/tree/main", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1", "org/name", "refs/pr/1"),
        ("https://huggingface.co/org/name/blob/v1.0/config.json", "org/name", "v1.0"),
        ("https://huggingface.co/org/name/resolve/0a1b2c/model.safetensors?download=true", "org/name", "0a1b2c"),
        ("https://huggingface.co/org/name/commit/0a1b2c", "org/name", "0a1b2c"),
        ("https://huggingface.co/org/name/discussions/3", None, "not the address of a model"),
        ("https://huggingface.co/org/name/tree/main/gptq", None, "a folder in a repository"),
        ("https://huggingface.co/datasets/org/name", None, "the address of a dataset, not of a model"),
        ("https://huggingface.co/spaces/org/name", None, "the address of a Space, not of a model"),
        ("https://huggingface.co/", None, "not the address of a model"),
        ("https://github.com/org/name", None, "not an address of the Hugging Face Hub"),
        ("https://[bad/org/name", None, "not an address of the Hugging Face Hub"),
        ("hf://org/name", "org/name", None),
        ("hf://models/org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("hf://datasets/org/name", None, "the address of a dataset"),
        ("hf://", None, "not the address of a model"),
        ("org/name:gptq-4bit-32g", "org/name", "gptq-4bit-32g"),
        ("org/name@main", "org/name", "main"),
        ("org/name", "org/name", None),
        ("./org:name", "./org:name", None),
        ("a/b/c:d", "a/b/c:d", None),
        ("", "", None),
    ],
)  # fmt: skip
def test_addresses(pasted: str, name: str | None, revision: str | None) -> None:
    if name is None:
        with pytest.raises(SourceError, match=str(revision)):
            repository(pasted, None)
    else:
        assert repository(pasted, None) == (name, revision)


def test_a_folder_of_such_a_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name:branch").mkdir(parents=True)
    assert repository("org/name:branch", None) == ("org/name:branch", None)


def test_the_hub_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError):
        repository("https://hub.example:8443/org/name", None)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443")
    assert repository("https://hub.example:8443/org/name/tree/v2", None) == ("org/name", "v2")


def test_two_revisions() -> None:
    assert repository("org/name", "v1") == ("org/name", "v1")
    assert repository("org/name@v1", "v1") == ("org/name", "v1")
    with pytest.raises(SourceError, match="org/name@v2 names the revision v2, and --revision v1; give one of them"):
        repository("org/name@v2", "v1")
