"""Sources, opened: a folder, or a repository on the Hub, of which as much is fetched as is needed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.reader import Checkpoint
from ..errors import HubError, MarlinConvertError, SourceError
from .address import repository
from .cache import commit_of_snapshot
from .client import checked_token, explained, interruptible, is_folder, unreachable
from .download import Hear
from .repository import Remote


@dataclass(frozen=True)
class Source:
    """A source on disk. `label` is how the user named it (a folder's own name, or the Hub id). With `remote`, its
    weight files still are on the Hub, and those in `folder` hold no more than a plan needs."""

    folder: Path
    label: str
    commit: str | None = None  # of the Hub repository
    remote: Remote | None = None

    def bring_extra_files(self, checkpoint: Checkpoint, meanwhile: Callable[[str, int], Hear]) -> None:
        """Let `checkpoint`, the one in `folder`, have what lies beside its weights, which a plan does not read."""
        remote = self.remote
        if remote is None:
            return
        others = list(checkpoint.weights_beside)
        with explained(remote.repo_id, remote.revision):
            cached = interruptible(remote.fetch_small)
            hear = meanwhile("downloading other files", sum(map(remote.to_come, others)))
            interruptible(lambda: [remote.fetch(name, hear) for name in others])
        for name in checkpoint.extra_files:
            path = self.folder / name
            path.unlink(missing_ok=True)
            path.symlink_to((cached / name).resolve())
            checkpoint.moved(name, path)

    @property
    def on_hub(self) -> bool:
        """Whether `label` is a Hub id."""
        return self.commit is not None


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


def fetch(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    meanwhile: Callable[[str, int], Hear] = _bar,
    everything: bool = False,
) -> Source:
    """The source's folder: itself, when it is one, else downloaded to (or found in) the shared Hub cache.

    Only the weights that make up the checkpoint are downloaded, and the small files beside them, or `everything`;
    `meanwhile` shows it, as `Progress.meanwhile` does. Raises SourceError when a folder is missing, HubError when the
    Hub does not give the repository.
    """
    source, revision = repository(source, revision)
    if is_folder(source):
        return _folder(source, revision)

    def work() -> Source | None:
        remote = Remote.find(source, revision, checked_token(token), cache_dir)
        if remote is None:
            return None
        with _named(source, folder := remote.fetch_small(remote.configs)):
            weights = remote.weights(folder)
        folder = remote.fetch_small()
        if everything:
            weights += remote.weights_beside(weights)
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
    source, revision = repository(source, revision)
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
    return Source(folder, source, commit_of_snapshot(folder))
