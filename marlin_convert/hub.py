"""The only door to the network: fetching a source from the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import OTHER_WEIGHT_SUFFIXES, PICKLE_SUFFIXES
from .errors import HubError, SourceError

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
    if path.is_dir():
        if revision:
            raise SourceError(f"{source} is a folder; --revision applies to a Hub id only.")
        return Source(path, path.resolve().name)
    if path.exists():
        raise SourceError(f"{source} is a file; give the folder that holds the checkpoint.")
    looks_local = source.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(source) or source.count("/") > 1
    if looks_local:
        raise SourceError(f"{source}: no such folder.")
    return _download(source, revision, token, cache_dir)


def _download(repo_id: str, revision: str | None, token: str | None, cache_dir: Path | None) -> Source:
    from huggingface_hub import constants, errors, snapshot_download

    unwanted = [f"*{suffix}" for suffix in (*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)]
    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, token=token, cache_dir=cache_dir, ignore_patterns=unwanted)
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
    except errors.LocalEntryNotFoundError:
        offline = constants.HF_HUB_OFFLINE
        raise HubError(
            f"{repo_id}: "
            + (
                "offline mode is on (HF_HUB_OFFLINE) and the cache does not hold it"
                if offline
                else "the Hub cannot be reached and the cache does not hold it"
            )
            + "; try again with a network connection."
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        raise HubError(f"{repo_id}: the Hub answered {status}; try again later.") from None
    except errors.HFValidationError:
        raise SourceError(f"{repo_id}: neither a folder nor a Hub id.") from None
    except OSError as error:
        raise HubError(
            f"{repo_id}: the download failed: {error.strerror or type(error).__name__}; run it again to resume."
        ) from None
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(folder, repo_id, commit)


def quiet() -> None:
    """Keep huggingface_hub from drawing bars of its own (they would fight with ours, or end up in a log)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
