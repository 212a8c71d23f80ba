"""What a visitor may name as a source; what a page shows of addresses. Needs no Gradio and no browser."""

from __future__ import annotations

import pytest

from marlin_convert.errors import SourceError
from marlin_convert.web.source import hub_source


@pytest.mark.parametrize(
    ("text", "revision", "found"),
    [
        ("org/name", None, ("org/name", None)),
        ("  org/name\n", "v2", ("org/name", "v2")),
        ("https://huggingface.co/org/name/tree/v1", None, ("org/name", "v1")),
        ("hf://org/name@v1", None, ("org/name", "v1")),
    ],
)
def test_what_may_be_named(text: str, revision: str | None, found: tuple[str, str | None]) -> None:
    assert hub_source(text, revision) == found


@pytest.mark.parametrize(
    ("text", "revision", "said"),
    [
        ("/etc", None, "'/etc' is not a repository on the Hub; write it like owner/name."),
        ("", None, "'' is not a repository on the Hub; write it like owner/name."),
        ("~root", None, "'~root' is not a repository on the Hub; write it like owner/name."),
        ("<b>x</b>", None, "'<b>x</b>' is not a repository on the Hub; write it like owner/name."),
        ("a" * 501, None, f"'{'a' * 59}… is too long for a repository's name; write it like owner/name."),
        ("org/name", "r" * 501, f"'{'r' * 59}… is not a revision; give a branch, a tag or a commit."),
        ("org/name", "a\0b", "'a\\x00b' is not a revision; give a branch, a tag or a commit."),
        ("org/name:a\x1b[2J", None, "'a\\x1b[2J' is not a revision; give a branch, a tag or a commit."),
    ],
    ids=["folder", "nothing", "home", "markup", "long", "long revision", "NUL", "escape"],
)
def test_what_may_not(text: str, revision: str | None, said: str) -> None:
    with pytest.raises(SourceError) as error:
        hub_source(text, revision)
    assert error.value.message == said
