"""Writing the output so that it appears complete or not at all.

    with new_folder(out) as folder:      # inside a hidden sibling of `out`, locked by this process
        with Shards(...) as shards: ...  # headers first, then every byte range at its planned offset
    # here: all files fsynced, and `out` is there, by one rename

    .out.marlin-convert-x1y2z3.tmp/      the hidden sibling, as long as the run lasts
        .lock                            held by the run; free when the run was killed
        new/                             what becomes `out`; with --force, then what was there before

A run that fails or is interrupted removes its hidden folder; one that is killed leaves it behind, unlocked, and
the next run to the same place clears it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError
from ..interrupts import postponed
from ..options import REPORT_FILE

_LOCK_FILE = ".lock"
_libc = ctypes.CDLL(None, use_errno=True)
_ATTEMPTS = 100  # attempts to create or rename what other runs are changing at the same time
_NEW = "new"
_REPLACED = "replaced"  # where an earlier result waits while the new one takes its place


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, it is synced to disk and becomes `out`.

    With `force`, an earlier result at `out` is replaced (only a folder that this tool made, or an empty one). Folders
    above `out` are made, and removed again if it does not come to be. An interrupt that comes when `out` is complete
    changes nothing any more. Raises OutputError when `out` is taken or its parent is not writable.
    """
    check_free(out, force=force)
    inode = -1

    def complete() -> bool:
        with contextlib.suppress(OSError):
            return out.lstat().st_ino == inode
        return False

    try:
        with contextlib.ExitStack() as cleaning:
            try:
                cleaning.enter_context(_parents_of(out))
                folder = cleaning.enter_context(locked_folder(out)) / _NEW
                folder.mkdir()
                inode = folder.stat().st_ino
            except OSError as error:
                raise OutputError(
                    f"{out.parent}: cannot be written to: {error.strerror}; choose another place."
                ) from None
            try:
                yield folder
                sync_tree(folder)
                check_free(out, force=force)  # it may have appeared during the work
                _swap_in(folder, out, force=force)
            except BrokenPipeError:  # an error of the progress display, not of the disk
                raise
            except OSError as error:
                raise OutputError(
                    f"{error.filename or out}: writing failed: {error.strerror or error}; nothing was left behind."
                ) from None
    except KeyboardInterrupt:
        if not complete():
            raise


@contextlib.contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    """Make the folders above `out`; those that were not there before are removed again, if nothing is in them."""
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """Make a hidden folder beside `out`, locked by this process, removed at the end; what killed runs to the same place
    left is removed first. Raises OSError."""
    clear_leftovers(out)
    for _ in range(_ATTEMPTS):
        try:
            hidden = Path(tempfile.mkdtemp(prefix=_prefix(out), suffix=".tmp", dir=out.parent))
        except FileNotFoundError:  # another run that had created the parent folders has ended and removed them
            out.parent.mkdir(parents=True, exist_ok=True)
            continue
        with contextlib.ExitStack() as cleaning:
            try:
                lock = os.open(hidden / _LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except BaseException:
                hidden.rmdir()
                raise
            cleaning.callback(os.close, lock)
            cleaning.callback(_remove, hidden)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another run may have found the lock before it was held, and removed the folder.
            if (hidden / _LOCK_FILE).exists():
                yield hidden
                return
    raise OutputError(f"{out.parent}: other programs keep removing it; choose another place.")


def check_free(out: Path, *, force: bool) -> None:
    """Raise OutputError unless `out` does not exist, is an empty folder, or may be replaced."""
    if out.name in ("", ".."):
        raise OutputError(f"{out}: give the new folder a name of its own.")
    if not os.path.lexists(out):
        return
    if out.is_symlink():
        raise OutputError(f"{out}: it is a symbolic link; choose another name.")
    if not out.is_dir():
        raise OutputError(f"{out}: it exists and is not a folder; choose another name.")
    if os.path.ismount(out):
        raise OutputError(f"{out}: nothing can be renamed to a mount point; choose a folder inside it.")
    try:
        empty, ours = not any(out.iterdir()), (out / REPORT_FILE).is_file()
    except OSError as error:
        raise OutputError(f"{out}: it exists and cannot be read: {error.strerror}; choose another name.") from None
    if empty:
        return
    if not ours:
        raise OutputError(
            f"{out}: it exists already, and marlin-convert did not make it (it has no {REPORT_FILE}); "
            + ("remove it yourself, or choose another name." if force else "choose another name.")
        )
    if not force:
        raise OutputError(f"{out}: it exists already; choose another name, or replace it with --force.")


def clear_leftovers(out: Path) -> list[Path]:
    """Remove the hidden folders that killed runs to `out` left behind.

    Ours are real folders of this user that hold our lock, and nobody has it. Whatever else has such a name (a link, a
    file, what another user left) is none of our business, and no reason to fail.
    """
    try:
        found = [f for f in out.parent.iterdir() if f.name.startswith(_prefix(out)) and f.suffix == ".tmp"]
    except OSError:  # the folder may be writable but not readable, or another run has just removed it
        return []
    return [hidden for hidden in found if _clear(hidden, out)]


def _clear(hidden: Path, out: Path) -> bool:
    """Remove one hidden folder, if it is what a killed run left behind; whether it was."""
    try:
        folder = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            return False
        try:
            lock = os.open(_LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:  # its run is about to take the lock, or was killed just before: it is empty
            if time.time() - os.fstat(folder).st_mtime > 60:
                hidden.rmdir()
                return True
            return False
        try:
            is_ours = stat.S_ISREG(os.fstat(lock).st_mode) and os.path.samestat(os.fstat(folder), hidden.lstat())
            if not is_ours:
                return False
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its run is alive
            replaced = hidden / _REPLACED
            if replaced.is_dir() and not replaced.is_symlink() and not os.path.lexists(out):
                replaced.rename(out)  # killed between the two renames of `_exchange`
            _remove(hidden)
            return not hidden.exists()
        finally:
            os.close(lock)
    except OSError:
        return False
    finally:
        os.close(folder)


def _remove(hidden: Path) -> None:
    """Remove a hidden folder, its lock last: if this is killed too, the next run still knows what it finds."""
    try:
        _remove_once(hidden)
    except KeyboardInterrupt:
        _remove_once(hidden)
        raise


def _remove_once(hidden: Path) -> None:
    for folder in (hidden / _NEW, hidden / _REPLACED, hidden):
        shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, needed: int, what: str = "the result takes", advice: str = "") -> None:
    """Raise OutputError unless the file system that holds `folder` (or will) has `needed` bytes to spare."""
    folder = existing(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: {what} {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            f"make room or choose another disk{advice}."
        )


def existing(folder: Path) -> Path:
    """Return `folder`, or the nearest one above it that is there and may be seen."""
    places = (folder, *folder.parents)
    there = (place for place in places if os.path.exists(place))  # noqa: PTH110 - no error where it may not be seen
    return next(there, places[-1])


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, f) for f in files), Path(parent)):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def json_bytes(value: object) -> bytes:
    """Return `value` as the Hub's tools write it: two spaces, UTF-8, one newline at the end; half of a surrogate pair,
    which UTF-8 has not, is escaped."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Write `value` into a new file."""
    write_file(path, json_bytes(value))


def write_file(path: Path, content: bytes) -> None:
    """Write a new file. Raises FileExistsError when it is there, also under a name that its disk takes for the same."""
    with path.open("xb") as file:
        file.write(content)


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Put new contents in place of files of `folder`, or where none are: each is the old one or the new one, and never
    a part.

    Raises OSError when there is no room for all of them, or for what is no regular file; then the old ones stay.
    """
    ready: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            path, temporary = folder / name, folder / f".{os.urandom(6).hex()}.tmp"
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):  # a device would be gone for good
                raise OSError(errno.EEXIST, "it is not a regular file", str(path))
            ready[temporary] = path
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                if path.is_file():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                os.fsync(file.fileno())
        with postponed():  # they belong together
            for temporary, path in ready.items():
                temporary.rename(path)
    finally:
        for temporary in ready:
            temporary.unlink(missing_ok=True)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prefix(out: Path) -> str:
    return f".{out.name}.marlin-convert-"


def _swap_in(folder: Path, out: Path, *, force: bool) -> None:
    """Rename `folder` to `out`. With `force`, a folder at `out` is exchanged in one step, and the caller then removes
    it; without, only an empty one gives way."""
    for _ in range(_ATTEMPTS):
        if force and out.is_dir() and any(out.iterdir()):
            _exchange(folder, out)
            break
        try:
            folder.rename(out)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            check_free(out, force=force)  # another run was faster; with `force`, its result is replaced like any other
    else:
        raise OutputError(f"{out}: other programs keep changing it; choose another name.")
    _sync_folder(out.parent)


def _exchange(folder: Path, out: Path) -> None:
    """Swap two folders, so that `out` is there at every moment (renameat2 with RENAME_EXCHANGE, Linux ≥ 3.15)."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(_libc, "renameat2", None)
    if renameat2 and renameat2(at_fdcwd, os.fsencode(folder), at_fdcwd, os.fsencode(out), rename_exchange) == 0:
        return
    # A file system without it (some network and FUSE mounts): two renames, the old result kept until the new is there.
    replaced = folder.with_name(_REPLACED)
    out.rename(replaced)
    try:
        folder.rename(out)
    except BaseException:
        replaced.rename(out)
        raise
