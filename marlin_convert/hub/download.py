"""Sources on the Hugging Face Hub: looking into one without fetching it, and fetching its weights file by file.

Everything lands in the shared cache of huggingface_hub, where it finds it the next time:

    models--org--name/snapshots/<commit>/<file>                 a link to the file's content
    models--org--name/blobs/<sha256>                            the content of a weight file
    models--org--name/blobs/<sha256>.marlin-convert.incomplete  what has come of it; the next run goes on from there
    models--org--name/blobs/<sha256>.marlin-convert.passing     says that it is there only until it is converted

huggingface_hub begins a file anew when a run was interrupted, and does not compare what came with the file's hash. So
weights are streamed into the cache here, by its own routine for a piece of a file, and enter it only with the right
hash. What Xet stores is left to huggingface_hub: Xet checks every chunk, and is faster.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.reader import INDEX_SUFFIX, MAX_HEADER_BYTES, WEIGHT_SUFFIXES, Checkpoint, read_header, weight_files
from ..errors import HubError, MarlinConvertError, SourceError
from .client import (
    DOWNLOAD_THREAD,
    checked_token,
    errors_only,
    explained,
    interruptible,
    is_folder,
    patiently,
    unreachable,
)

_FIRST_BYTES = 1 << 18  # of a weight file: most headers are shorter, and one request then is enough
_NEAR = 1 << 16  # bytes between two tensors that are cheaper to read than another request is
_REQUESTS = 16  # at a time
_PARTIAL, _PASSING = ".marlin-convert.incomplete", ".marlin-convert.passing"

#: Hears of bytes that have come: how many more (fewer, where some must come again).
Hear = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """A source on disk. `label` is how the user named it (a folder's own name, or the Hub id). With `remote`, its
    weight files still are on the Hub, and those in `folder` hold no more than a plan needs."""

    folder: Path
    label: str
    commit: str | None = None  # of the Hub repository
    remote: Remote | None = None

    def bring_small_files(self) -> None:
        """Let `folder` have what lies beside the weights, which a plan does not read."""
        remote = self.remote
        if remote is None:
            return
        with explained(remote.repo_id, remote.revision):
            cached = interruptible(remote.fetch_small)
        for name in remote.small_files:
            path = self.folder / name
            path.unlink(missing_ok=True)
            path.symlink_to((cached / name).resolve())

    @property
    def on_hub(self) -> bool:
        """Whether `label` is a Hub id."""
        return self.commit is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is known for weights (the Hub's LFS files); `xet`: Xet can fetch it."""

    size: int
    sha256: str | None
    xet: bool


@dataclass(frozen=True)
class Remote:
    """A Hub repository at one commit: its `files`, and where they go."""

    repo_id: str
    revision: str | None  # as the user named it
    commit: str
    token: str | None
    cache_dir: Path | None
    files: dict[str, RemoteFile]

    @staticmethod
    def find(repo_id: str, revision: str | None, token: str | None, cache_dir: Path | None) -> Remote | None:
        """The repository, or None when the Hub cannot be reached."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
        from huggingface_hub.hf_api import RepoFile

        if constants.HF_HUB_OFFLINE:
            return None
        api = HfApi(token=token)
        try:
            commit = patiently(lambda: api.model_info(repo_id, revision=revision).sha, unreachable=False)
        except HTTPError as error:
            if getattr(error, "response", None) is not None:
                raise
            return None
        entries = patiently(lambda: list(api.list_repo_tree(repo_id, revision=commit, recursive=True)))
        files = {
            e.path: RemoteFile(e.size, e.lfs.sha256 if e.lfs else None, getattr(e, "xet_hash", None) is not None)
            for e in entries
            if isinstance(e, RepoFile) and not any(part.startswith(".") for part in e.path.split("/"))
        }
        return Remote(repo_id, revision, str(commit), token, cache_dir, files)

    @property
    def small_files(self) -> list[str]:
        """What is no weights: configs, tokenizer, licence, code."""
        return [name for name in self.files if not name.endswith(WEIGHT_SUFFIXES)]

    @property
    def configs(self) -> list[str]:
        return [n for n in self.files if n in Checkpoint.CONFIG_FILES or (n.endswith(INDEX_SUFFIX) and "/" not in n)]

    def fetch_small(self, names: list[str] | None = None) -> Path:
        """Fetch small files (by default all of them, and the index); the folder in the cache that holds them."""
        from huggingface_hub import snapshot_download

        wanted = [glob.escape(n) for n in (sorted({*self.small_files, *self.configs}) if names is None else names)]

        def snapshot(revision: str | None) -> Path:
            return Path(
                snapshot_download(
                    self.repo_id, revision=revision, token=self.token, cache_dir=self.cache_dir,
                    allow_patterns=wanted or ["none"],
                )
            )  # fmt: skip

        folder = patiently(lambda: snapshot(self.revision))  # by name, so that the cache knows it offline
        return folder if folder.name == self.commit else patiently(lambda: snapshot(self.commit))

    def mirror(self, folder: Path, *, scales: bool) -> None:
        """Fill `folder` with what a plan needs: configs; in place of all other files, empty (sparse) ones of their
        size; and in the safetensors that make up the checkpoint, headers, `g_idx`, `qzeros` and, with `scales`, those
        scales that are not in fp16, and so decide about the format.
        """
        cached = self.fetch_small(self.configs)
        for name in self.configs:
            (folder / name).symlink_to((cached / name).resolve())
        for name in self.files.keys() - set(self.configs):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, self.files[name].size)
        for name in self.weights(folder):
            path, there = folder / name, self._cached_path(name)
            if there is None:
                self._look_into(path, name, scales)
            else:
                path.unlink()
                path.symlink_to(there)

    def weights(self, folder: Path) -> list[str]:
        """The weight files that make up the checkpoint; raises what `Checkpoint` raises when there are none."""
        configs = Checkpoint.read_configs(folder, self.files)
        return weight_files(folder, sorted(self.files), configs)[0]

    def _look_into(self, path: Path, name: str, scales: bool) -> None:
        """Read into the sparse file at `path` what a plan looks at."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url, headers = hf_hub_url(self.repo_id, name, revision=self.commit), build_hf_headers(token=self.token)
        size, fd = self.files[name].size, os.open(path, os.O_RDWR | os.O_CLOEXEC)

        def read(start: int, end: int) -> None:
            os.pwrite(fd, _read_range(self.repo_id, url, headers, start, end), start)

        try:
            read(0, min(size, _FIRST_BYTES))
            length = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
            if _FIRST_BYTES < length <= min(size, MAX_HEADER_BYTES):
                read(_FIRST_BYTES, length)
            ranges: list[list[int]] = []
            for tensor in read_header(fd, Path(self.repo_id, name), name):  # in the order of their bytes
                end = tensor.offset + tensor.nbytes
                wanted = tensor.name.endswith((".g_idx", ".qzeros"))
                wanted = wanted or (scales and tensor.name.endswith(".scales") and tensor.dtype != "F16")
                if wanted and end > _FIRST_BYTES:
                    if ranges and tensor.offset - ranges[-1][1] <= _NEAR:
                        ranges[-1][1] = end
                    else:
                        ranges.append([tensor.offset, end])
            with ThreadPoolExecutor(_REQUESTS) as pool:
                for done in [pool.submit(read, *r) for r in ranges]:
                    done.result()
        finally:
            os.close(fd)

    # ---- weights

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = self.cache_dir or Path(constants.HF_HUB_CACHE)
        return Path(cache).expanduser() / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    def cached(self, name: str) -> bool:
        """Whether the cache has the content of a file."""
        return self._cached_path(name) is not None

    def _cached_path(self, name: str) -> Path | None:
        sha256 = self.files[name].sha256
        places = [self.storage / "snapshots" / self.commit / name]
        places += [self.storage / "blobs" / sha256] if sha256 else []
        return next((place.resolve() for place in places if place.exists()), None)

    def to_come(self, name: str) -> int:
        """Bytes of a file that the cache does not have yet."""
        if self.cached(name):
            return 0
        file = self.files[name]
        partial = self.storage / "blobs" / f"{file.sha256}{_PARTIAL}"
        return file.size - (min(file.size, partial.stat().st_size) if partial.exists() else 0)

    def fetch(self, name: str, hear: Hear) -> Path:
        """Fetch a weight file, unless the cache has it; its path there. `hear` is told of every byte to come.

        Raises what `explained` explains, or HubError when its content is not what the Hub says.
        """
        from huggingface_hub import hf_hub_download

        file = self.files[name]
        if not self.cached(name) and file.sha256 and not (file.xet and _xet()):
            patiently(lambda: self._stream(name, file, hear))
        arguments: dict[str, Any] = {"revision": self.commit, "token": self.token, "cache_dir": self.cache_dir}
        if not self.cached(name):
            arguments["tqdm_class"] = _hearing(hear)
        try:
            # A link to what has been streamed; or all of it.
            return Path(patiently(lambda: hf_hub_download(self.repo_id, name, **arguments)))
        except RuntimeError as error:  # of Xet's own client; its text may hold addresses with signatures
            raise HubError(
                f"{self.repo_id}: fetching {name} through Xet failed ({type(error).__name__}); run it again, or do "
                "without Xet by HF_HUB_DISABLE_XET=1."
            ) from None

    def _stream(self, name: str, file: RemoteFile, hear: Hear) -> None:
        """Fetch the content of a file into the cache, going on where an earlier run ended."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            WeakFileLock,
            build_hf_headers,
        )

        blob = self.storage / "blobs" / str(file.sha256)
        lock = self.storage.parent / ".locks" / self.storage.name / f"{file.sha256}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(f"{blob.name}{_PARTIAL}")
        url, headers = hf_hub_url(self.repo_id, name, revision=self.commit), build_hf_headers(token=self.token)
        with WeakFileLock(lock):  # huggingface_hub's own for this file: another process may be fetching it
            for last in (False, True):
                if blob.exists():
                    return
                with _Hashed(partial, file.size, hear) as stream:
                    http_get(
                        url, stream, resume_size=stream.tell(), headers=headers, expected_size=file.size,  # type: ignore[arg-type]
                        tqdm_class=_hearing(lambda _: None),
                    )  # fmt: skip
                if stream.sha256 == file.sha256:
                    partial.rename(blob)
                    return
                partial.unlink()
                if not last:
                    hear(-file.size)
        raise HubError(
            f"{self.repo_id}: what comes as {name} is not what the Hub describes (its SHA-256 is another), twice; "
            "nothing of it was kept. Try again later, or without a proxy in between."
        )

    def remove(self, name: str) -> None:
        """Take a file out of the cache again."""
        pointer = self.storage / "snapshots" / self.commit / name
        blob = pointer.resolve()
        pointer.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        self._note(name).unlink(missing_ok=True)

    def passing(self, name: str) -> bool:
        """Whether a file is in the cache, or half of it, only because it was to be converted and removed: a run that
        was interrupted left it."""
        return self._note(name).exists()

    def set_passing(self, name: str, passing: bool) -> None:
        note = self._note(name)
        if passing:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        else:
            note.unlink(missing_ok=True)

    def _note(self, name: str) -> Path:
        return self.storage / "blobs" / f"{self.files[name].sha256 or name.replace('/', '--')}{_PASSING}"


class _Hashed:
    """A file that is written from where it ends, in order, and its SHA-256; for `http_get`.

    The hash is computed on a thread of its own, while the next piece comes.
    """

    def __init__(self, path: Path, size: int, hear: Hear) -> None:
        self._file, self._hear, self._digest = path.open("a+b"), hear, hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None
        self._file.seek(0)
        if os.fstat(self._file.fileno()).st_size > size:
            self._file.truncate(0)
        while block := self._file.read(1 << 20):
            self._digest.update(block)

    @property
    def sha256(self) -> str:
        self._wait()
        return self._digest.hexdigest()

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._wait()
        self._hashed = self._hasher.submit(self._digest.update, data)
        self._hear(len(data))
        return len(data)

    def _wait(self) -> None:
        if self._hashed is not None:
            self._hashed.result()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def truncate(self) -> int:
        """`http_get` goes back to the beginning when the server does not know where to go on."""
        self._wait()
        position = self._file.tell()
        self._hear(position - os.fstat(self._file.fileno()).st_size)
        self._file.truncate(position)
        self._file.seek(0)
        self._digest = hashlib.sha256(self._file.read())
        return position

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._file.close()


def _bar(label: str, total_bytes: int) -> Hear:
    """A bar as huggingface_hub draws them, where it would; for whoever has no other way to show progress."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    if not total_bytes:
        return lambda nbytes: None
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label)  # type: ignore[no-untyped-call]

    def hear(nbytes: int) -> None:
        bar.update(nbytes)
        if bar.n >= total_bytes:
            bar.close()

    return hear


def _xet() -> bool:
    from huggingface_hub.utils import is_xet_available

    return bool(is_xet_available())


def _hearing(hear: Hear) -> type[Any]:
    """A progress bar for huggingface_hub that draws nothing and passes on what it is told."""
    from tqdm import tqdm

    class Hearing(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            hear(int(n or 0))
            return None

    return Hearing


def _read_range(repo_id: str, url: str, headers: dict[str, str], start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file on the Hub. Raises HubError where Range requests are not answered."""
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    if start == end:
        return b""
    asked = {**headers, "range": f"bytes={start}-{end - 1}"}

    def read() -> bytes:
        with http_stream_backoff("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # all of the file would come
                raise HubError(
                    f"{repo_id}: {constants.ENDPOINT} does not answer Range requests, by which its headers are read; "
                    "download the repository first (`hf download`) and give its folder."
                )
            content: bytes = response.read()
            return content

    return patiently(read)


# ---------------------------------------------------------------------------------------------------------------
# Sources


def fetch(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    meanwhile: Callable[[str, int], Hear] = _bar,
) -> Source:
    """The source's folder: itself, when it is one, else downloaded to (or found in) the shared Hub cache.

    Only the weights that make up the checkpoint are downloaded, and the small files beside them; `meanwhile` shows it,
    as `Progress.meanwhile` does. Raises SourceError
    when a folder is missing, HubError when the Hub does not give the repository.
    """
    if is_folder(source):
        return _folder(source, revision)

    def work() -> Source | None:
        remote = Remote.find(source, revision, checked_token(token), cache_dir)
        if remote is None:
            return None
        with _named(source, folder := remote.fetch_small(remote.configs)):
            weights = remote.weights(folder)
        folder = remote.fetch_small()
        hear = meanwhile("downloading", sum(map(remote.to_come, weights)))
        for name in weights:
            remote.fetch(name, hear)
        return Source(folder, source, remote.commit)

    with explained(source, revision):
        return interruptible(work) or _cached(source, revision, cache_dir)


@contextlib.contextmanager
def looked_into(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    scales: bool = False,
) -> Iterator[Source]:
    """The source as far as a plan needs it. For a Hub id: its configs, and weight files that are empty (sparse) but
    for their headers, `g_idx` and `qzeros`, read by Range requests (see `Remote.mirror`); removed at the end.

    Raises what `fetch` raises. Offline, the cache must hold what `fetch` fetches.
    """
    if is_folder(source):
        yield _folder(source, revision)
        return
    with tempfile.TemporaryDirectory(prefix="marlin-convert-") as name:
        folder = Path(name)

        def work() -> Remote | None:
            remote = Remote.find(source, revision, checked_token(token), cache_dir)
            if remote is not None:
                remote.mirror(folder, scales=scales)
            return remote

        with explained(source, revision), _named(source, folder):
            remote = interruptible(work)
        if remote is None:  # no network: what the cache holds will do, if it holds all
            with explained(source, revision):
                found = _cached(source, revision, cache_dir)
            yield found
            return
        with _named(source, folder):
            yield Source(folder, source, remote.commit, remote)


@contextlib.contextmanager
def _named(source: str, folder: Path) -> Iterator[None]:
    """Errors name the source as the user does, not the folder that stands for it."""
    try:
        yield
    except MarlinConvertError as error:
        raise type(error)(error.message.replace(str(folder), source)) from None


def _folder(source: str, revision: str | None) -> Source:
    if revision:
        raise SourceError(f"{source} is a folder; --revision applies to a Hub id only.")
    path = Path(source).expanduser()
    name = os.fsencode(path.resolve().name).decode(errors="replace")  # a name on disk may be any bytes
    return Source(path, name)


def _cached(source: str, revision: str | None, cache_dir: Path | None) -> Source:
    """The source from the cache alone; raises what huggingface_hub raises where it holds only a part."""
    from huggingface_hub import snapshot_download

    configs = list(Checkpoint.CONFIG_FILES)
    folder = Path(
        snapshot_download(source, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=configs)
    )
    try:
        Checkpoint(folder).close()
    except SourceError:
        raise HubError(f"{source}: {unreachable(partly=True)}") from None
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(folder, source, commit)


# ---------------------------------------------------------------------------------------------------------------
# Weights that arrive while others are converted


class Arrivals:
    """The weight files of a repository, fetched in order, while those that came before are used.

        with Arrivals(remote, files, together, hear) as arrivals:
            for file, path in arrivals:   # waits for the next one
                ...

    With `room`, they are removed from the cache as soon as they are given back (`release`), if they were fetched here,
    or by a run like this that was interrupted. A file is then fetched only when `room(nbytes)` says that so many more
    bytes have room beside those `held`; or when nothing can be given back without it, as the sets of files that are
    needed at once (`together`) tell.
    """

    def __init__(
        self, remote: Remote, files: list[str], together: Iterable[set[str]], hear: Hear,
        room: Callable[[int], bool] | None = None,
    ) -> None:  # fmt: skip
        self._remote, self._files, self._hear, self._room = remote, files, hear, room
        order = {file: i for i, file in enumerate(files)}
        #: The number of the last file that must be there before a file can be given back.
        self._until = dict(order)
        for group in together:
            last = max(order[file] for file in group)
            for file in group:
                self._until[file] = max(self._until[file], last)
        self._held: dict[str, int] = {}  # by file, on its way or arrived: its bytes, if it is to be removed
        self._ready: list[tuple[str, Path]] = []
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fetch_all, name=DOWNLOAD_THREAD, daemon=True)

    @property
    def held(self) -> int:
        """Bytes in the cache that will be removed."""
        with self._changed:
            return sum(self._held.values())

    def _fetch_all(self) -> None:
        try:
            for number, file in enumerate(self._files):
                while not (self._stopped or self._has_room(number)):
                    time.sleep(0.02)
                if self._stopped:
                    return
                passing = self._room is not None and (self._remote.passing(file) or not self._remote.cached(file))
                self._remote.set_passing(file, passing)
                with self._changed:
                    self._held[file] = self._remote.files[file].size if passing else 0
                with errors_only():
                    path = self._remote.fetch(file, self._heard)
                with self._changed:
                    self._ready.append((file, path))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is raised where the files are waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _heard(self, nbytes: int) -> None:
        if self._stopped:
            raise HubError("the download was stopped.")  # nobody waits for it any more
        self._hear(nbytes)

    def _has_room(self, number: int) -> bool:
        if self._room is None or self._room(self._remote.to_come(self._files[number])):
            return True
        with self._changed:
            return all(self._until[file] >= number for file in self._held)

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        for _ in self._files:
            with self._changed:
                while not self._ready:
                    if self._stopped:
                        return
                    if self._error is not None:
                        with explained(self._remote.repo_id, self._remote.revision):
                            raise self._error
                    self._changed.wait()
                arrived = self._ready.pop(0)
            yield arrived

    def release(self, file: str) -> None:
        """Nothing more is needed of a file that has arrived."""
        with self._changed:
            passing = self._held.pop(file)
        if passing:
            self._remote.remove(file)

    def stop(self) -> None:
        """Let whoever waits for a file go on; no further one is fetched."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
