"""What people paste for a repository on the Hub: its address in a browser, `hf://…`, its name with a branch."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urlsplit

from ..errors import SourceError

_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
#: What follows a repository's name in an address, before a revision.
_VIEWS = {"tree", "blob", "resolve", "raw", "commit", "commits"}
#: What stands before the name of a repository that is no model's.
_OTHERS = {"datasets": "a dataset", "spaces": "a Space", "collections": "a collection", "papers": "a paper",
           "docs": "documentation", "buckets": "a bucket"}  # fmt: skip
_WITH_REVISION = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)[@:](?P<revision>[^\s:@]+)")


def repository(source: str, revision: str | None) -> tuple[str, str | None]:
    """Return the source as the rest of the program takes it, a folder or a Hub id, and the revision that is meant.

    Raises SourceError for an address that is no model's, and where it names another revision than `revision`.
    """
    found = _from_address(source) or _from_scheme(source) or _from_name(source)
    if found is None:
        return source, revision
    name, named = found
    if named and revision and named != revision:
        raise SourceError(f"{source} names the revision {named}, and --revision {revision}; give one of them.")
    return name, named or revision


def _from_address(text: str) -> tuple[str, str | None] | None:
    """Return `https://huggingface.co/org/name/tree/branch`, also without https, and at HF_ENDPOINT."""
    hosts = {*_HOSTS, _host(os.environ.get("HF_ENDPOINT", ""))} - {""}
    plain = text.startswith(("http://", "https://"))
    if _host(text if plain else f"https://{text}") not in hosts:
        if plain:
            raise SourceError(f"{text}: not an address of the Hugging Face Hub; give a folder, or a Hub id.")
        return None
    parts = urlsplit(text if plain else f"https://{text}")
    words = [unquote(word) for word in parts.path.split("/") if word]
    if words and words[0] in _OTHERS:
        raise SourceError(f"{text}: the address of {_OTHERS[words[0]]}, not of a model.")
    at = next((i for i, word in enumerate(words) if word in _VIEWS), len(words))
    name, rest = words[:at], words[at + 1 :]
    if not name or len(name) > 2:
        raise SourceError(f"{text}: not the address of a model; a model's looks like https://huggingface.co/org/name.")
    if len(rest) > 1 and words[at] == "tree":
        raise SourceError(f"{text}: the address of a folder in a repository; only a whole repository can be read.")
    return "/".join(name), rest[0] if rest else None


def _host(address: str) -> str:
    try:
        return urlsplit(address).netloc.lower()
    except ValueError:  # unbalanced brackets
        return ""


def _from_scheme(text: str) -> tuple[str, str | None] | None:
    """Return `hf://org/name@branch`, also `hf://models/org/name`."""
    if not text.startswith("hf://"):
        return None
    name = text.removeprefix("hf://").strip("/").removeprefix("models/")
    kind = name.split("/")[0]
    if kind in _OTHERS:
        raise SourceError(f"{text}: the address of {_OTHERS[kind]}, not of a model.")
    name, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SourceError(f"{text}: not the address of a model; a model's looks like hf://org/name@revision.")
    return name, revision or None


def _from_name(text: str) -> tuple[str, str | None] | None:
    """Return `org/name:branch` and `org/name@branch`, unless a folder is called so."""
    match = _WITH_REVISION.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")) or os.path.lexists(text):
        return None
    return match["name"], match["revision"]
