"""What fetching from and publishing on the Hugging Face Hub have in common: names, patience, and errors that help."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from ..errors import HubError, SourceError

T = TypeVar("T")

#: What stopped a transfer, by the name of httpx's error.
_BROKEN = {
    "ConnectError": "no connection to where the files are",
    "ConnectTimeout": "no connection to where the files are",
    "ReadTimeout": "no answer in time",
    "ReadError": "the connection broke",
    "RemoteProtocolError": "the connection broke",
    "TooManyRedirects": "it is redirected without an end",
}

#: Errors of a cache where nothing can be written, however often it is tried.
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)

DOWNLOAD_THREAD = "marlin-convert-download"
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

#: Seconds to wait before each further try, where huggingface_hub itself does not try again.
WAITS = (0.5, 1.0, 2.0, 4.0)
#: Seconds after which nothing is retried: waiting for an answer may have taken that long.
PATIENCE = 15.0
#: HTTP statuses worth a retry: too many requests, and a Hub or a proxy in trouble.
_PASSING = (408, 429, 500, 502, 503, 504)


def is_folder(source: str) -> bool:
    """Tell whether `source` is a folder (True) or may be a Hub id (False); raises SourceError when it is neither."""
    try:
        mode = Path(source).expanduser().stat().st_mode if source else 0
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a loop of links, a name too long, ~nobody
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise SourceError(f"{source}: cannot be read: {reason}.") from None
    if stat.S_ISDIR(mode):
        return True
    if mode:
        raise SourceError(f"{source} is a file; give the folder that holds the checkpoint.")
    if source.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(source) or source.count("/") > 1:
        raise _no_such_folder(source)
    return False


def require_folder(folder: Path) -> None:
    """Raise SourceError where there is no such folder. What one may not look at is left to who reads it."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _no_such_folder(str(folder)) from None
    except OSError:
        return


def _no_such_folder(named: str) -> SourceError:
    meant = _folder_meant(named) if named else None
    return SourceError(f"{named or repr(named)}: no such folder{f'; did you mean {meant}?' if meant else '.'}")


def checked_token(token: str | None) -> str | None:
    token = (token or "").strip() or None
    if token and not (token.isascii() and token.isprintable()):
        raise HubError("the token is not valid: it holds characters that no token has.")
    return token


def with_retries(
    call: Callable[[], T],
    *,
    unreachable: bool = True,
    garbled: bool = False,
    progress: Callable[[], int] | None = None,
) -> T:
    """Return what `call` returns. While the Hub is in trouble, slow, or the connection breaks, it is called again,
    after longer and longer waits: without any connection only if `unreachable`, after an answer that is no JSON if
    `garbled`.

    Its error is raised after the last of WAITS, or after PATIENCE; both begin anew whenever `progress` has moved.
    """
    waits, since, before = iter(WAITS), time.monotonic(), progress() if progress else 0
    while True:
        try:
            return call()
        except Exception as error:
            if not (_may_pass(error, unreachable) or (garbled and isinstance(error, json.JSONDecodeError))):
                raise
            if progress and progress() != before:
                waits, since, before = iter(WAITS), time.monotonic(), progress()
            wait = next(waits, None)
            if wait is None or time.monotonic() + wait > since + PATIENCE:
                raise
        time.sleep(wait)


def _may_pass(error: Exception, unreachable: bool) -> bool:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the httpx that it is built on

    causes = [cause for cause in (error, error.__cause__) if isinstance(cause, HTTPError)]
    for cause in causes:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code in _PASSING
    names = {type(cause).__name__ for cause in causes}
    return bool(names) and (unreachable or not names & {"ConnectError", "ConnectTimeout"})


def _folder_meant(source: str) -> str | None:
    """Return a folder that exists and may have been meant by `source`, which does not."""
    path = Path(source).expanduser()
    if "/" in source and not source.startswith((".", "/", "~")) and Path(path.name).is_dir():
        return f"./{path.name}"
    with contextlib.suppress(OSError):
        folders = {path.name: path for path in path.parent.iterdir() if path.is_dir()}
        for match in difflib.get_close_matches(path.name, folders, 1, 0.8):
            found = folders[match]
            return str(found) if found.is_absolute() or str(found).startswith("..") else f"./{found}"
    return None


def _or_a_folder(repo_id: str) -> str:
    """Return the end of a sentence that the Hub does not give `repo_id`: what folder may have been meant."""
    if meant := _folder_meant(repo_id):
        return f"; did you mean the folder {meant}?"
    return "." if "/" in repo_id else f"; if you mean a folder, there is none named {repo_id} here."


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Silence huggingface_hub's warnings, which name addresses, and with them what the Hub signed them by."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def explaining(repo_id: str, revision: str | None, *, doing: str = "download") -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one sentence that says what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the httpx that it is built on

    try:
        with errors_only():
            yield
    except errors.GatedRepoError:
        where = f"{constants.ENDPOINT}/{repo_id}"
        raise HubError(
            f"{repo_id} is gated: ask for access at {where}, then log in with `hf auth login` or give --token."
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo_id}: no such repository, or it is private and needs a token (`hf auth login` or --token)"
            + (_or_a_folder(repo_id) if doing == "download" else ".")
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
        raise not_a_hub(repo_id) from None
    except (errors.LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise HubError(f"{repo_id}: {_why(error, doing, repo_id)}") from None
    except ValueError as error:  # what create_commit raises for a card that the Hub does not take
        if doing != "upload":
            if not _raised_by_client(error):
                raise
            raise not_a_hub(repo_id) from None
        raise HubError(f"{repo_id}: the Hub does not take it: {' '.join(str(error).split())}") from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if not _raised_by_client(error):
            raise
        raise not_a_hub(repo_id) from None  # its answers have other types than the Hub's


def _raised_by_client(error: BaseException) -> bool:
    """Tell whether an error comes from huggingface_hub, or from what that calls."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0])
        trace = trace.tb_next
    package = __name__.partition(".")[0]
    return "huggingface_hub" in names[max((i for i, name in enumerate(names) if name == package), default=0) :]


def not_a_hub(repo_id: str, what: str | None = None) -> HubError:
    """Return the error that what answers is not a Hub; `what` it answers, if that is clear."""
    from huggingface_hub import constants

    return HubError(
        f"{repo_id}: what answers at {constants.ENDPOINT} is not a Hugging Face Hub{f' ({what})' if what else ''}; "
        "check the proxy settings, and HF_ENDPOINT."
    )


def interruptible(work: Callable[[], T]) -> T:
    """Do `work` on a thread that Ctrl-C leaves behind: huggingface_hub itself ends only when every file has come.

    What has come by then stays in its cache, and the next run goes on from there.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            result.set_exception(error)

    threading.Thread(target=run, name=DOWNLOAD_THREAD, daemon=True).start()
    return result.result()


def downloading() -> bool:
    """Tell whether a download that was interrupted still goes on. Python itself would wait for its end before it
    exits."""
    return any(thread.name == DOWNLOAD_THREAD for thread in threading.enumerate())


def unreachable(*, partly: bool) -> str:
    """Return an error that says that the Hub cannot be asked and the cache has nothing, or only a part."""
    from huggingface_hub import constants

    where = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    part = "holds only a part of it" if partly else "does not hold it"
    return f"{where} and the cache {part}; try again with a network connection."


def _why(error: Exception, doing: str, repo_id: str | None = None) -> str:
    """Return what stopped a download or an upload, from the error that huggingface_hub gave or the one that it came
    from."""
    for cause in (error, error.__cause__):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return f"the Hub refuses access ({status}); log in with `hf auth login`, or give another --token."
        if status == 412:
            return "somebody else has committed to it meanwhile; look at what changed, and push again."
        if status is not None:
            return f"the Hub answered {status}; try again later."
    if isinstance(error, FileNotFoundError):  # huggingface_hub's LocalEntryNotFoundError
        meant = None if repo_id is None else _folder_meant(repo_id)
        hint = f" Did you mean the folder {meant}?" if meant else ""
        return unreachable(partly="Incomplete" in type(error).__name__) + hint
    name = type(error).__name__
    reason = getattr(error, "strerror", None) or _BROKEN.get(name, name)
    if isinstance(error, OSError) and error.errno in _NO_PLACE and isinstance(error.filename, str):
        return f"the {doing} failed: {error.filename}: {reason}; mend that, or choose another --cache-dir."
    return f"the {doing} failed: {reason}; run it again to resume."


def quiet() -> None:
    """Keep huggingface_hub, which must not be imported yet, from drawing bars of its own: they would fight with ours,
    or end up in a log."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
