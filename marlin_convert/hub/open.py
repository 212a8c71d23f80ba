"""Sources, opened: a folder, or a repository on the Hub, of which as much is fetched as is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.files import CheckpointFiles, Folder
from ..checkpoint.index import weight_files
from ..checkpoint.reader import CONFIG_FILES, Checkpoint, read_configs
from ..errors import HubError, SourceError
from ..options import HubAccess
from ..progress import OnBytes, StartTransfer
from .address import repository
from .cache import commit_of_snapshot
from .client import checked_token, explaining, interruptible, is_folder, unreachable
from .repository import Remote
from .weights import HubFiles

#: What a plan notes offline.
NOT_REACHED = "the Hub was not reached: of what lies beside the weights, what the cache holds"


@dataclass(frozen=True)
class Source:
    """A source on disk. `label` is how the user named it (a folder's own name, or the Hub id). With `hub`, its weight
    files still are on the Hub, and `folder` holds no more than a plan needs."""

    folder: Path
    label: str
    commit: str | None = None  # of the Hub repository
    hub: HubFiles | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `label` is a Hub id."""
        return self.commit is not None

    @property
    def files(self) -> CheckpointFiles:
        """Its files, for `Checkpoint`: those of a Hub repository are called by its id."""
        return self.hub or Folder(self.folder, self.label if self.on_hub else None)


def _bar(label: str, total_bytes: int) -> OnBytes:
    """Return a bar as huggingface_hub draws them, where it would; for whoever has no other way to show progress."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    if not total_bytes:
        return lambda nbytes: None
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label)  # type: ignore[no-untyped-call]

    def on_bytes(nbytes: int) -> None:
        bar.update(nbytes)
        if bar.n >= total_bytes:
            bar.close()

    return on_bytes


def fetch(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    transfer: StartTransfer = _bar,
    everything: bool = False,
) -> Source:
    """Return the source's folder: itself, when it is one, else downloaded to (or found in) the shared Hub cache.

    Only the weights that make up the checkpoint are downloaded, and the small files beside them, or `everything`;
    `transfer` shows it, as `Progress.transfer` does. Raises SourceError when a folder is missing, HubError when the
    Hub does not give the repository.
    """
    source, revision = repository(source, revision)
    if is_folder(source):
        return _folder(source, revision)

    def work() -> Source | None:
        remote = Remote.find(source, revision, checked_token(token), cache_dir)
        if remote is None:
            return None
        with contextlib.closing(HubFiles(remote, transfer)) as files:
            weights = weight_files(files, read_configs(files))[0]
        folder = remote.fetch_small()
        if everything:
            weights += remote.weights_beside(weights)
        on_bytes = transfer("downloading", sum(map(remote.missing_bytes, weights)))
        for name in weights:
            remote.fetch(name, on_bytes)
        return Source(folder, source, remote.commit)

    with explaining(source, revision):
        return interruptible(work) or _cached(source, revision, cache_dir)


@contextlib.contextmanager
def opened_for_planning(
    source: str, access: HubAccess, transfer: StartTransfer = _bar
) -> Iterator[tuple[Source, Checkpoint]]:
    """Open the source as far as a plan needs it: no weight file of a Hub id is fetched, only the parts that are read,
    by Range requests.

    Raises what `fetch` raises. Offline, the cache must hold what `fetch` fetches.
    """
    source, revision = repository(source, access.revision)
    access = replace(access, revision=revision)
    origin = _folder(source, revision) if is_folder(source) else _looked_into(source, access, transfer)
    with Checkpoint(origin.files) as checkpoint:
        if origin.on_hub and origin.hub is None:  # offline, nobody can be asked what else the repository has
            checkpoint.notes.append(NOT_REACHED)
        yield origin, checkpoint


@contextlib.contextmanager
def opened_whole(
    source: str, access: HubAccess, transfer: StartTransfer = _bar, *, everything: bool = False
) -> Iterator[tuple[Source, Checkpoint]]:
    """Open the source with all its weights, as `fetch` brings them."""
    origin = fetch(
        source, revision=access.revision, token=access.token, cache_dir=access.cache_dir, transfer=transfer,
        everything=everything,
    )  # fmt: skip
    with Checkpoint(origin.files) as checkpoint:
        yield origin, checkpoint


def _looked_into(source: str, access: HubAccess, transfer: StartTransfer) -> Source:
    with explaining(source, access.revision):
        remote = interruptible(
            lambda: Remote.find(source, access.revision, checked_token(access.token), access.cache_dir)
        )
        if remote is None:  # offline: the cache is enough if it is complete
            return _cached(source, access.revision, access.cache_dir)
    return Source(remote.cache.snapshot(remote.commit), source, remote.commit, HubFiles(remote, transfer))


def _folder(source: str, revision: str | None) -> Source:
    if revision:
        raise SourceError(f"{source} is a folder; --revision applies to a Hub id only.")
    path = Path(source).expanduser()
    name = os.fsencode(path.resolve().name).decode(errors="replace")  # a file name may be any bytes
    return Source(path, name)


def _cached(source: str, revision: str | None, cache_dir: Path | None) -> Source:
    """Return the source from the cache alone; raises what huggingface_hub raises where it holds only a part."""
    from huggingface_hub import snapshot_download

    configs = list(CONFIG_FILES)
    folder = Path(
        snapshot_download(source, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=configs)
    )
    try:
        Checkpoint(folder).close()
    except SourceError:
        raise HubError(f"{source}: {unreachable(partly=True)}") from None
    return Source(folder, source, commit_of_snapshot(folder))
