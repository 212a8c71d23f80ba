"""Publishing a finished result on the Hub."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..checkpoint.files import Folder
from ..errors import HubError, SourceError
from ..hub.client import is_folder, require_folder
from ..hub.upload import check_target, default_name, push
from ..options import REPORT_FILE, Options, PublishTarget
from .digests import complete_report


class Publish(Protocol):
    """What takes a finished result to the Hub, and returns the address of the commit there."""

    def __call__(self, out: Path, target: PublishTarget, *, force: bool, token: str | None) -> str: ...


class UploadError(HubError):
    """The result is complete, and could not be published: `out` may go to `target` when what stopped it is mended."""

    def __init__(self, message: str, out: Path, target: PublishTarget) -> None:
        super().__init__(message)
        self.out, self.target = out, target


def push_result(out: Path, target: PublishTarget, *, force: bool = False, token: str | None = None) -> str:
    """Publish the finished result `out` and return the address of the commit.

    Raises SourceError for what is no result, or holds a link out of it; UploadError for whatever stops it on the Hub.
    `out` stays as it is.
    """
    _require_result(out, target)
    files = Folder(out)
    files.require_fit()  # what a link leads to would be published
    files.require_readable(files.names)
    complete_report(out)
    try:
        return push(out, target, token=token, force=force)
    except HubError as error:
        raise UploadError(f"{error.message.rstrip('.')}. The result in {out} is kept.", out, target) from None


def _require_result(out: Path, target: PublishTarget) -> None:
    """Raise SourceError unless `out` is a finished result."""
    try:
        if not os.path.lexists(out) and (Path(target.repo_id) / REPORT_FILE).is_file():
            command = shlex.join(["marlin-convert", "push", target.repo_id, str(out)])
            raise SourceError(
                f"{out}: no such folder, and {target.repo_id} is one: the result comes first. Run `{command}`."
            )
        require_folder(out)
        if not (out / REPORT_FILE).is_file():
            raise SourceError(f"{out}: not a finished result of marlin-convert (it has no {REPORT_FILE}).")
    except OSError as error:
        raise SourceError(f"{out}: cannot be read: {error.strerror}.") from None


def checked_target(source: str, options: Options, token: str | None) -> PublishTarget | None:
    """Return where the result will go, with its full name, once it is clear that it may."""
    target = options.target
    if target is None:
        return None
    if not target.repo_id:
        name = source if not is_folder(source) else Path(source).expanduser().resolve().name
        target = replace(target, repo_id=default_name(name))
    return check_target(target, token=token, force=options.force)
