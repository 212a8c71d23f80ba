"""What a Hub answers about a repository, as values that were checked.

An answer may come from anything: a mirror, a proxy, whatever HF_ENDPOINT names. What becomes a part of a path, of a
request, or of a buffer's size passes through here: commits, names, sizes and hashes. What does not pass ends the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from ..errors import HubError
from ..text import shortened
from .client import not_a_hub, with_retries

#: Bounds of what is read: bytes of one answer; files of a repository (the Hub advises at most 100 000); bytes of a
#: file (the largest that common file systems hold); and of a name and its parts, as file systems have them.
MAX_ANSWER_BYTES = 16 << 20
MAX_FILES = 200_000
MAX_FILE_BYTES = 1 << 44
MAX_NAME_BYTES, MAX_PART_BYTES = 1024, 255

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `oid` is its content's SHA-256 (64 digits; the Hub's LFS files, as weights are) or git's
    name for it (40 digits). `xet`: the hash by which Xet can fetch it."""

    name: str
    size: int
    oid: str
    xet: str | None = None


@dataclass(frozen=True)
class Described:
    """A repository as it is now: the `commit` that the revision asked for is, and whether it is private."""

    commit: str
    private: bool


@dataclass(frozen=True)
class Account:
    """Whose token it is. `role` is what the token may do, `orgs` what its owner may do in organizations: "read",
    "write" or others, None where nothing is said."""

    name: str
    role: str | None
    orgs: dict[str, str | None]


def describe(repo_id: str, revision: str | None, token: str | None, *, unreachable: bool = True) -> Described:
    """Return a repository at a revision (a branch, a tag, a commit; None: the default branch). Without a connection, it
    is tried again only if `unreachable`."""
    address = f"{_api(repo_id)}/revision/{quote(revision, safe='')}" if revision else _api(repo_id)
    answer, _ = _ask(repo_id, address, token, unreachable=unreachable)
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise not_a_hub(repo_id, f"it names the commit {shortened(commit)}")
    return Described(commit, answer.get("private") is True)


def account_of(who: object) -> Account:
    """Return what `HfApi.whoami` returned; raises TypeError or LookupError when it is nothing like it."""

    def text(value: object) -> str | None:
        if value is not None and not isinstance(value, str):
            raise TypeError(value)
        return value

    if not isinstance(who, dict) or not isinstance(who["name"], str) or not _NAME.fullmatch(who["name"]):
        raise TypeError(who)
    orgs = {str(text(org["name"])): text(org.get("roleInOrg")) for org in who.get("orgs") or []}
    access = (who.get("auth") or {}).get("accessToken") or {}
    return Account(who["name"], text(access.get("role")), orgs)


def files_of(repo_id: str, commit: str, token: str | None) -> dict[str, RemoteFile]:
    """Return all files of a repository at a commit, by their names."""
    files: dict[str, RemoteFile] = {}
    for entry in _entries(repo_id, commit, token):
        if not isinstance(entry, dict) or entry.get("type") not in ("file", "directory"):
            raise not_a_hub(repo_id, f"it lists {shortened(entry)}")
        if entry["type"] == "directory":
            continue
        file = _file(repo_id, entry)
        if file.name in files:
            raise not_a_hub(repo_id, f"it lists {file.name} twice")
        if len(files) == MAX_FILES:
            raise HubError(f"{repo_id}: it has more than {MAX_FILES} files, which no checkpoint has.")
        files[file.name] = file
    for name in files:
        parts = name.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts))]
        if taken := next((folder for folder in above if folder in files), None):
            raise not_a_hub(repo_id, f"it lists {taken} as a file and as a folder")
    return files


def _file(repo_id: str, entry: dict[str, Any]) -> RemoteFile:
    name, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
    if not isinstance(name, str) or not _is_inside(name):
        raise not_a_hub(repo_id, f"it lists a file {shortened(name)}")
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
        raise not_a_hub(repo_id, f"it gives {name} a size of {shortened(size)}")
    if lfs is None:
        oid, pattern = entry.get("oid"), _COMMIT  # git names blobs as it names commits
    else:
        oid, pattern = lfs.get("oid") if isinstance(lfs, dict) else None, _SHA256
    if not isinstance(oid, str) or not pattern.fullmatch(oid):
        raise not_a_hub(repo_id, f"it gives {name} a hash of {shortened(oid)}")
    xet = entry.get("xetHash")
    if xet is not None and (not isinstance(xet, str) or not _SHA256.fullmatch(xet)):
        raise not_a_hub(repo_id, f"it gives {name} a Xet hash of {shortened(xet)}")
    return RemoteFile(name, size, oid, xet)


def _is_inside(name: str) -> bool:
    """Tell whether a name is one of a file below a folder, on any file system, and can be shown."""
    parts = name.split("/")
    return (
        name.isprintable()  # neither control characters nor halves of UTF-16 pairs
        and "\\" not in name
        and len(name.encode()) <= MAX_NAME_BYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= MAX_PART_BYTES for part in parts)
    )


# ---------------------------------------------------------------------------------------------------------------
# Asking


def _api(repo_id: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo_id)
    return f"{constants.ENDPOINT}/api/models/{repo_id}"


def _entries(repo_id: str, commit: str, token: str | None) -> Iterator[Any]:
    address: str | None = f"{_api(repo_id)}/tree/{commit}?recursive=true&expand=false"
    while address is not None:
        answer, address = _ask(repo_id, address, token)
        if not isinstance(answer, list):
            raise not_a_hub(repo_id, f"it lists {shortened(answer)}")
        if address is not None and not answer:
            raise not_a_hub(repo_id, "its list goes on without an end")
        yield from answer


def _ask(repo_id: str, address: str, token: str | None, *, unreachable: bool = True) -> tuple[Any, str | None]:
    """Return the JSON that an address answers, and the address of its next part if it has one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    is_hub = urlsplit(address)[:2] == urlsplit(constants.ENDPOINT)[:2]  # no other server is told the token
    headers = build_hf_headers(token=token if is_hub else False)

    def ask() -> tuple[bytes, str | None]:
        with http_stream_backoff(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(), retry_on_status_codes=(),
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            content = b""
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    raise not_a_hub(repo_id, f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
            return content, response.links.get("next", {}).get("url")

    content, following = with_retries(ask, unreachable=unreachable)
    try:
        return json.loads(content), following
    except (ValueError, RecursionError):
        raise not_a_hub(repo_id) from None
