"""One repository's folder in the shared cache of huggingface_hub, where it finds everything the next time:

    refs/<revision>                               the commit that a branch or a tag was
    snapshots/<commit>/<file>                     a link to the file's content
    blobs/<oid>                                   the content
    blobs/<oid>.marlin-convert.incomplete         what has come of it; the next run goes on from there
    blobs/<oid>.marlin-convert.passing            says that it is there only until it is converted

Several runs, and other programs, may use one cache at the same time. What is only passing is removed by whoever needs
it last: a run holds a lock on what it needs (`Use`), and removes it only if nobody else does, and if nobody has linked
to it meanwhile, as every program does that wants to keep it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from .answers import RemoteFile

_PARTIAL, _TEMPORARY, _IN_USE = ".marlin-convert.incomplete", ".marlin-convert.passing", ".marlin-convert.lock"

#: Seconds that a blob is kept at least.
_GRACE = 0.5


class Cache:
    """The folder of the repository `repo_id` in the cache at `cache_dir` (None: the standard one)."""

    def __init__(self, repo_id: str, cache_dir: Path | None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.folder = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
        self._locks = cache / ".locks" / self.folder.name

    def snapshot(self, commit: str) -> Path:
        """Return the folder that holds the links to a commit's files."""
        return self.folder / "snapshots" / commit

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.oid

    def partial(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / f"{file.oid}{_PARTIAL}"

    def _note(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / f"{file.oid}{_TEMPORARY}"

    def find(self, file: RemoteFile, commit: str) -> Path | None:
        """Return where the content of a commit's file is, if it is there."""
        places = (self.snapshot(commit) / file.name, self.blob(file))
        return next((place.resolve() for place in places if place.exists()), None)

    def missing_bytes(self, file: RemoteFile, commit: str) -> int:
        """Return bytes of a file that are not there yet."""
        if self.find(file, commit) is not None:
            return 0
        with contextlib.suppress(OSError):
            return file.size - min(file.size, self.partial(file).stat().st_size)
        return file.size

    def link(self, file: RemoteFile, commit: str) -> Path:
        """Let a commit's file be its content, which is there; the link."""
        link, blob = self.snapshot(commit) / file.name, self.blob(file)
        if link.exists():
            return link
        link.parent.mkdir(parents=True, exist_ok=True)
        new = link.with_name(f".{uuid.uuid4().hex}")  # atomically: other processes may be doing the same
        try:
            new.symlink_to(os.path.relpath(blob, link.parent))
            new.replace(link)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            blob.replace(link)  # a file system without links: the file itself, as huggingface_hub does it
        return link

    def name(self, revision: str | None, commit: str) -> None:
        """Note that a revision is `commit` now, for those that are offline later; not where nothing can be written."""
        revision = revision or "main"
        if revision == commit or any(part in ("", ".", "..") for part in revision.split("/")):
            return
        ref = self.folder / "refs" / revision
        with contextlib.suppress(OSError, ValueError):
            if ref.is_file() and ref.read_text() == commit:
                return
            ref.parent.mkdir(parents=True, exist_ok=True)
            new = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
            new.write_text(commit)
            new.replace(ref)

    @contextlib.contextmanager
    def fetching(self, file: RemoteFile) -> Iterator[None]:
        """Hold a lock, alone among those that fetch a file's content, huggingface_hub in other programs included."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        for folder in (self.folder / "blobs", self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self._fetching(file)):
            yield

    def _fetching(self, file: RemoteFile) -> Path:
        return self._locks / f"{file.oid}.lock"

    # ---- what is there only for a while

    def use(self, file: RemoteFile) -> Use:
        """Announce that a file is needed; it is not removed before this has ended."""
        return Use(self._locks / f"{file.oid}{_IN_USE}")

    def is_temporary(self, file: RemoteFile) -> bool:
        """Tell whether a file's content, or half of it, is there only to be converted and removed."""
        return self._note(file).exists()

    def mark_temporary(self, file: RemoteFile) -> None:
        """Note that a file, which is not there yet, will come only to be converted and removed."""
        note = self._note(file)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()

    def keep(self, file: RemoteFile) -> None:
        """Note that a file is to stay."""
        self._note(file).unlink(missing_ok=True)

    def give_up(self, file: RemoteFile, use: Use) -> None:
        """End the `use` of a file, and remove what only passes, unless somebody else uses it or has linked to it."""
        from filelock import FileLock, Timeout

        with contextlib.closing(use):
            if not (use.only_one() and self.is_temporary(file)):
                return
            # Another program that waits for the content tries its lock several times a second.
            with contextlib.suppress(OSError):
                time.sleep(min(_GRACE, max(0.0, self.blob(file).stat().st_mtime + _GRACE - time.time())))
            with contextlib.suppress(Timeout, OSError), FileLock(self._fetching(file), timeout=0, mode=0o664):
                if not self._linked(file):
                    self.blob(file).unlink(missing_ok=True)
                self.keep(file)

    def _linked(self, file: RemoteFile) -> bool:
        """Tell whether any commit's files have a link to a content."""
        for parent, _, names in os.walk(self.folder / "snapshots"):
            for path in (Path(parent, name) for name in names):
                with contextlib.suppress(OSError):
                    if path.is_symlink() and path.readlink().name == file.oid:
                        return True
        return False


class Use:
    """A lock that many may share, on a file of its own. Where there can be none, `only_one` is never true."""

    def __init__(self, path: Path) -> None:
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o664)
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def only_one(self) -> bool:
        """Tell whether nobody else uses it; nobody then can before this is closed."""
        if self._fd is None:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def commit_of_snapshot(folder: Path) -> str | None:
    """Return the commit whose files a folder of the cache holds."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
