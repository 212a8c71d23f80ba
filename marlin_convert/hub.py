"""The only door to the network: fetching a source from the Hugging Face Hub, and publishing a result there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import __version__
from .checkpoint import (
    INDEX_SUFFIX,
    MAX_HEADER_BYTES,
    OTHER_WEIGHT_SUFFIXES,
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    Checkpoint,
    read_header,
)
from .errors import HubError, MarlinConvertError, SourceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_DOWNLOAD = "marlin-convert-download"
_FIRST_BYTES = 1 << 18  # of a weight file: most headers are shorter, and one request then is enough
_NEAR = 1 << 16  # bytes between two tensors that are cheaper to read than another request is
_REQUESTS = 16  # at a time
_READ = (".safetensors", INDEX_SUFFIX)  # what engines read of a repository
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A source on disk. `label` is how the user named it (a folder's own name, or the Hub id)."""

    folder: Path
    label: str
    commit: str | None = None  # of the Hub repository

    @property
    def on_hub(self) -> bool:
        """Whether `label` is a Hub id."""
        return self.commit is not None


def fetch(
    source: str, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Source:
    """The source's folder: itself, when it is one, else downloaded to (or found in) the shared Hub cache.

    Weights in formats that are never read (pickles, GGUF, ONNX, …) are not downloaded. Raises SourceError when a
    folder is missing, HubError when the Hub does not give the repository.
    """
    if is_folder(source):
        return _folder(source, revision)
    token = _checked(token)
    unwanted = [f"*{suffix}" for suffix in (*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)]
    with _explained(source, revision):
        from huggingface_hub import snapshot_download

        folder = _interruptible(
            lambda: Path(
                snapshot_download(source, revision=revision, token=token, cache_dir=cache_dir, ignore_patterns=unwanted)
            )
        )
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(folder, source, commit)


@contextlib.contextmanager
def headers_only(
    source: str, *, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Iterator[Source]:
    """The source as far as a plan needs it. For a Hub id: its configs, and weight files that are empty (sparse) but
    for their headers, `g_idx` and `qzeros`, read by Range requests; they are removed at the end.

    Raises what `fetch` raises. Offline, the cache must hold the whole repository, as for `fetch`.
    """
    if is_folder(source):
        yield _folder(source, revision)
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield fetch(source, revision=revision, token=token, cache_dir=cache_dir)
        return
    with tempfile.TemporaryDirectory(prefix="marlin-convert-") as folder:
        with _explained(source, revision):
            mirror = _Mirror(source, Path(folder), revision, _checked(token), cache_dir)
            commit = _interruptible(mirror.fill)
        if commit is None:  # no network: what the cache holds will do, if it holds all
            yield fetch(source, revision=revision, token=token, cache_dir=cache_dir)
            return
        try:
            yield Source(Path(folder), source, commit)
        except MarlinConvertError as error:
            # The folder means nothing to the user.
            raise type(error)(error.message.replace(folder, source)) from None


def is_folder(source: str) -> bool:
    """Whether `source` is a folder (True) or may be a Hub id (False); raises SourceError when it is neither."""
    path = Path(source).expanduser()
    if source and path.is_dir():
        return True
    if source and path.exists():
        raise SourceError(f"{source} is a file; give the folder that holds the checkpoint.")
    if source.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(source) or source.count("/") > 1:
        raise SourceError(f"{source or repr(source)}: no such folder.")
    return False


def _folder(source: str, revision: str | None) -> Source:
    if revision:
        raise SourceError(f"{source} is a folder; --revision applies to a Hub id only.")
    path = Path(source).expanduser()
    name = os.fsencode(path.resolve().name).decode(errors="replace")  # a name on disk may be any bytes
    return Source(path, name)


def _checked(token: str | None) -> str | None:
    token = (token or "").strip() or None
    if token and not (token.isascii() and token.isprintable()):
        raise HubError("the token is none: it holds characters that no token has.")
    return token


# ---------------------------------------------------------------------------------------------------------------
# Publishing


@dataclass(frozen=True)
class Target:
    """Where a result goes on the Hub, and how. A `repo_id` without an owner is the user's own."""

    repo_id: str
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    commit_message: str | None = None


def default_name(label: str) -> str:
    """The name of the repository for what was made from the source `label`."""
    name = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", label.split("/")[-1]).strip("-.") or "model"
    return f"{name[:80].rstrip('-.')}-marlin"


def check_target(target: Target, *, token: str | None, force: bool) -> Target:
    """The target with its owner's name, if this user may write there; changes nothing on the Hub.

    Raises HubError when the user may not, or, without `force`, when weights that are there would be overwritten.
    """
    token = _checked(token)
    with _explained(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(target.repo_id)
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{target.repo_id}: offline mode is on (HF_HUB_OFFLINE); nothing can be uploaded.")
        if not (token or get_token()):
            raise HubError(f"{target.repo_id}: publishing needs a token; log in with `hf auth login` or give --token.")
        api = HfApi(token=token)
        target = _own(api, target)
        there = _weights_there(api, target) if _exists(api, target) and not target.create_pr else {}
        if there and not force:
            raise HubError(_other_weights(target))
    return target


def create_repository(target: Target, *, token: str | None) -> None:
    """Create the repository, unless it is there."""
    with _explained(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import HfApi

        HfApi(token=_checked(token)).create_repo(target.repo_id, private=target.private or None, exist_ok=True)


def push(folder: Path, target: Target, *, token: str | None, force: bool) -> str:
    """Upload every file of `folder` in one commit; the address of the commit or pull request.

    What an earlier try has uploaded is not uploaded again. Raises HubError; the repository then is as it was.
    """
    token = _checked(token)
    target = check_target(target, token=token, force=True)
    create_repository(target, token=token)
    with _explained(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.utils.logging import set_verbosity_error

        set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns when nothing has changed
        api = HfApi(token=token)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        visible = [(p, n) for p, n in zip(files, names, strict=True) if not n.startswith(".") and "/." not in n]
        added = {name: CommitOperationAdd(name, str(path)) for path, name in visible}
        if not force and not target.create_pr:
            for name, sha in _weights_there(api, target).items():
                if sha and (name not in added or added[name].upload_info.sha256.hex() != sha):
                    raise HubError(_other_weights(target))
        if target.branch and not target.create_pr:
            api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
        # Weights of another result beside these would be read with them.
        stale = [n for n in _weights_there(api, target) if n not in added and n.endswith(_READ) and "/" not in n]
        message = target.commit_message or f"Marlin checkpoint, by marlin-convert {__version__}"
        done = _interruptible(
            lambda: api.create_commit(
                target.repo_id,
                [*added.values(), *map(CommitOperationDelete, stale)],
                commit_message=message, revision=target.branch, create_pr=target.create_pr,
            )
        )  # fmt: skip
    return str(done.pr_url or done.commit_url)


def _own(api: HfApi, target: Target) -> Target:
    """The target with its owner's name; raises HubError when whose token it is may not write there."""
    who = api.whoami()
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"{target.repo_id}: the token may only read; give one that may write.")
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{who['name']}/{target.repo_id}")
    owner = target.repo_id.split("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if owner != who["name"] and not target.create_pr and roles.get(owner, "read") == "read":
        raise HubError(
            f"{target.repo_id}: {who['name']} may not write there; choose a repository of your own, or --create-pr."
        )
    return target


def _exists(api: HfApi, target: Target) -> bool:
    """Whether the repository is there; raises when it is and may not be written to."""
    from huggingface_hub import CommitOperationAdd, errors

    try:
        private = api.model_info(target.repo_id).private
    except errors.RepositoryNotFoundError:
        return False
    if target.private and not private:
        raise HubError(f"{target.repo_id}: it exists and is public; make it private first, or leave --private out.")
    # Asks how a file would be uploaded, which only who may write is told; a small one is not uploaded by it.
    api.preupload_lfs_files(target.repo_id, [CommitOperationAdd("README.md", b"-")], create_pr=target.create_pr)
    return True


def _weights_there(api: HfApi, target: Target) -> dict[str, str]:
    """Names and SHA-256 (of LFS files, as weights are) of the weights and indexes on the target's branch, if any."""
    from huggingface_hub import errors
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(api.list_repo_tree(target.repo_id, revision=target.branch, recursive=True))
    except errors.RevisionNotFoundError:
        return {}
    files = [e for e in entries if isinstance(e, RepoFile) and e.path.endswith(WEIGHT_SUFFIXES)]
    return {file.path: file.lfs.sha256 if file.lfs else "" for file in files}


def _other_weights(target: Target) -> str:
    where = f", branch {target.branch}," if target.branch else ""
    return f"{target.repo_id}{where} holds other weights; choose another repository, or overwrite them with --force."


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None, *, doing: str = "download") -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one sentence that says what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the httpx that it is built on

    try:
        yield
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
        if doing == "upload":
            raise HubError(f"{repo_id}: the Hub has no such names; write it like your-name/model-marlin.") from None
        raise SourceError(f"{repo_id}: neither a folder nor a Hub id.") from None
    except (json.JSONDecodeError, errors.FileMetadataError):
        raise HubError(
            f"{repo_id}: what answers at {constants.ENDPOINT} is no Hub; check the proxy settings, and HF_ENDPOINT."
        ) from None
    except (errors.LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise HubError(f"{repo_id}: {_why(error, constants.HF_HUB_OFFLINE, doing)}") from None
    except ValueError as error:  # what create_commit raises for a card that the Hub does not take
        if doing != "upload":
            raise
        raise HubError(f"{repo_id}: the Hub does not take it: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class _Mirror:
    """Fills `folder` with as much of a Hub repository as a plan looks at; see `headers_only`."""

    repo_id: str
    folder: Path
    revision: str | None
    token: str | None
    cache_dir: Path | None

    def fill(self) -> str | None:
        """Read what is needed; the commit that it is from, or None when the Hub cannot be reached."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(token=self.token)
        try:
            commit = api.model_info(self.repo_id, revision=self.revision).sha
        except HTTPError as error:
            if getattr(error, "response", None) is not None:
                raise
            return None
        files = [e for e in api.list_repo_tree(self.repo_id, revision=commit) if isinstance(e, RepoFile)]
        sizes = {file.path: file.size for file in files if "/" not in file.path}
        small = [name for name in sizes if name in Checkpoint.CONFIG_FILES or name.endswith(INDEX_SUFFIX)]
        if small:
            at = {"revision": commit, "token": self.token, "cache_dir": self.cache_dir}
            cached = Path(snapshot_download(self.repo_id, allow_patterns=small, **at))  # type: ignore[call-overload]
            for name in small:
                (self.folder / name).symlink_to((cached / name).resolve())
        for name in sizes.keys() - small:
            if name.endswith(WEIGHT_SUFFIXES):
                (self.folder / name).touch()  # pickles and the like count by their names only
                if name.endswith(".safetensors"):
                    os.truncate(self.folder / name, sizes[name])
                    self._look_into(self.folder / name, sizes[name], commit)
        return commit

    def _look_into(self, path: Path, size: int, commit: str | None) -> None:
        """Read into the sparse file at `path` what a plan looks at: the header, every `g_idx`, every `qzeros`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url, headers = hf_hub_url(self.repo_id, path.name, revision=commit), build_hf_headers(token=self.token)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

        def read(start: int, end: int) -> None:
            os.pwrite(fd, _read_range(url, headers, start, end), start)

        try:
            read(0, min(size, _FIRST_BYTES))
            length = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
            if _FIRST_BYTES < length <= min(size, MAX_HEADER_BYTES):
                read(_FIRST_BYTES, length)
            ranges: list[list[int]] = []
            for tensor in read_header(fd, Path(self.repo_id, path.name), path.name):  # in the order of their bytes
                end = tensor.offset + tensor.nbytes
                if tensor.name.endswith((".g_idx", ".qzeros")) and end > _FIRST_BYTES:
                    if ranges and tensor.offset - ranges[-1][1] <= _NEAR:
                        ranges[-1][1] = end
                    else:
                        ranges.append([tensor.offset, end])
            with ThreadPoolExecutor(_REQUESTS) as pool:
                for done in [pool.submit(read, *r) for r in ranges]:
                    done.result()
        finally:
            os.close(fd)


def _read_range(url: str, headers: dict[str, str], start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file on the Hub; huggingface_hub tries again when the network or the Hub fails."""
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

    if start == end:
        return b""
    asked = {**headers, "range": f"bytes={start}-{end - 1}"}
    response = http_backoff("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True)
    hf_raise_for_status(response)
    content: bytes = response.content
    if len(content) != end - start:
        raise OSError(0, "the Hub does not answer Range requests")
    return content


def _interruptible(work: Callable[[], T]) -> T:
    """Do `work` on a thread that Ctrl-C leaves behind: huggingface_hub itself ends only when every file has come.

    What has come by then stays in its cache, and the next run goes on from there.
    """
    result: Future[T] = Future()

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


def _why(error: Exception, offline: bool, doing: str) -> str:
    """What stopped a download or an upload, from the error that huggingface_hub gave or the one that it came from."""
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
    return f"the {doing} failed: {reason}; run it again to resume."


def quiet() -> None:
    """Keep huggingface_hub from drawing bars of its own (they would fight with ours, or end up in a log)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
