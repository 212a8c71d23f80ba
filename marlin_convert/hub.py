"""The only door to the network: fetching a source from the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import OTHER_WEIGHT_SUFFIXES, PICKLE_SUFFIXES
from .errors import HubError, SourceError

_DOWNLOAD = "marlin-convert-download"
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A source on disk. `label` is how the user named it (a folder's own name, or the Hub id)."""

    folder: Path
    label: str
    commit: str | None = None  # of the Hub repository


def fetch(
    source: str, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Source:
    """The source's folder: itself, when it is one, else downloaded to (or found in) the shared Hub cache.

    Weights in formats that are never read (pickles, GGUF, ONNX, …) are not downloaded. Raises SourceError when a
    folder is missing, HubError when the Hub does not give the repository.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        if revision:
            raise SourceError(f"{source} is a folder; --revision applies to a Hub id only.")
        name = os.fsencode(path.resolve().name).decode(errors="replace")  # a name on disk may be any bytes
        return Source(path, name)
    if source and path.exists():
        raise SourceError(f"{source} is a file; give the folder that holds the checkpoint.")
    looks_local = source.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(source) or source.count("/") > 1
    if looks_local:
        raise SourceError(f"{source or repr(source)}: no such folder.")
    return _download(source, revision, token, cache_dir)


def _download(repo_id: str, revision: str | None, token: str | None, cache_dir: Path | None) -> Source:
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the httpx that it is built on

    token = (token or "").strip() or None
    if token and not (token.isascii() and token.isprintable()):
        raise HubError("the token is none: it holds characters that no token has.")
    unwanted = [f"*{suffix}" for suffix in (*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)]
    try:
        folder = _interruptible(
            lambda: Path(
                snapshot_download(
                    repo_id, revision=revision, token=token, cache_dir=cache_dir, ignore_patterns=unwanted
                )
            )
        )
    except errors.GatedRepoError:
        where = f"{constants.ENDPOINT}/{repo_id}"
        raise HubError(
            f"{repo_id} is gated: ask for access at {where}, then log in with `hf auth login` or give --token."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo_id}: no such repository, or it is private and needs a token (`hf auth login` or --token)"
            + ("." if "/" in repo_id else f"; if you mean a folder, there is none named {repo_id} here.")
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit that it has."
        ) from None
    except errors.HFValidationError:
        raise SourceError(f"{repo_id}: neither a folder nor a Hub id.") from None
    except (json.JSONDecodeError, errors.FileMetadataError):
        raise HubError(
            f"{repo_id}: what answers at {constants.ENDPOINT} is no Hub; check the proxy settings, and HF_ENDPOINT."
        ) from None
    except (errors.LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise HubError(f"{repo_id}: {_why(error, constants.HF_HUB_OFFLINE)}") from None
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(folder, repo_id, commit)


def _interruptible(work: Callable[[], Path]) -> Path:
    """Do `work` on a thread that Ctrl-C leaves behind: huggingface_hub itself ends only when every file has come.

    What has come by then stays in its cache, and the next run goes on from there.
    """
    result: Future[Path] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            result.set_exception(error)

    threading.Thread(target=run, name=_DOWNLOAD, daemon=True).start()
    return result.result()


def downloading() -> bool:
    """Whether a download that was interrupted still goes on. Python itself would wait for its end before it exits."""
    return any(thread.name == _DOWNLOAD for thread in threading.enumerate())


def _why(error: Exception, offline: bool) -> str:
    """What stopped a download, from the error that huggingface_hub gave or the one that it came from."""
    for cause in (error, error.__cause__):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return f"the Hub refuses access ({status}); log in with `hf auth login`, or give another --token."
        if status is not None:
            return f"the Hub answered {status}; try again later."
    if isinstance(error, FileNotFoundError):  # huggingface_hub's LocalEntryNotFoundError
        where = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
        part = "holds only a part of it" if "Incomplete" in type(error).__name__ else "does not hold it"
        return f"{where} and the cache {part}; try again with a network connection."
    reason = getattr(error, "strerror", None) or type(error).__name__
    return f"the download failed: {reason}; run it again to resume."


def quiet() -> None:
    """Keep huggingface_hub from drawing bars of its own (they would fight with ours, or end up in a log)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
