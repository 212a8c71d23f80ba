"""A repository on the Hub at one commit: what it holds, and fetching it file by file."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.index import INDEX_SUFFIX, WEIGHT_SUFFIXES
from ..checkpoint.reader import CONFIG_FILES
from ..progress import OnBytes
from .answers import RemoteFile, describe, files_of
from .cache import Cache, Use
from .download import download

_SMALL_FILES = 8  # at a time


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
        """Return the repository, or None when the Hub cannot be reached."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        if constants.HF_HUB_OFFLINE:
            return None
        try:
            commit = describe(repo_id, revision, token, unreachable=False).commit
        except HTTPError as error:
            if getattr(error, "response", None) is not None:
                raise
            return None
        files = files_of(repo_id, commit, token)
        visible = {name: f for name, f in files.items() if not any(part.startswith(".") for part in name.split("/"))}
        return Remote(repo_id, revision, commit, token, cache_dir, visible)

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.repo_id, self.cache_dir)

    @property
    def small_files(self) -> list[str]:
        """What is no weights: configs, tokenizer, licence, code."""
        return [name for name in self.files if not name.endswith(WEIGHT_SUFFIXES)]

    @property
    def configs(self) -> list[str]:
        return [n for n in self.files if n in CONFIG_FILES or (n.endswith(INDEX_SUFFIX) and "/" not in n)]

    def weights_beside(self, weights: Sequence[str]) -> list[str]:
        """Return weights that are not the model's own (which `weights` are), and not fetched with the small files."""
        planned = {*weights, *self.configs}
        return [name for name in self.files if name.endswith(WEIGHT_SUFFIXES) and name not in planned]

    def fetch_small(self, names: Sequence[str] | None = None) -> Path:
        """Fetch small files (by default all of them, and the index); the folder in the cache that holds them."""
        wanted = sorted({*self.small_files, *self.configs}) if names is None else names
        with ThreadPoolExecutor(_SMALL_FILES) as pool:
            try:
                for done in [pool.submit(self.fetch, name, lambda _: None) for name in wanted]:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.cache.name(self.revision, self.commit)
        return self.cache.snapshot(self.commit)

    def missing_bytes(self, name: str) -> int:
        """Return bytes of a file that the cache does not have yet."""
        return self.cache.missing_bytes(self.files[name], self.commit)

    def fetch(self, name: str, on_bytes: OnBytes) -> Path:
        """Fetch a file, unless the cache has it, to stay there; its path. `on_bytes` is told of every byte to come.

        Raises what `explaining` explains, or HubError when its content is not what the Hub says.
        """
        file, cache = self.files[name], self.cache
        link = cache.snapshot(self.commit) / name
        if link.exists() and not cache.is_temporary(file):  # this works in a read-only cache too
            return link
        use = cache.use(file)
        try:
            cache.keep(file)
            if cache.find(file, self.commit) is None:
                download(self.repo_id, file, self.commit, self.token, cache, on_bytes)
            link = cache.link(file, self.commit)
            cache.keep(file)  # another run that waited for it may have marked it otherwise
        finally:
            use.close()
        return link

    def fetch_temporarily(self, name: str, on_bytes: OnBytes) -> tuple[Path, bool, Use]:
        """Fetch a file, unless the cache has it, for as long as it is used: its path, whether it goes away then, and
        the use, which `Cache.give_up` ends."""
        file, cache = self.files[name], self.cache
        use = cache.use(file)
        try:
            there = cache.find(file, self.commit)
            if there is None:
                cache.mark_temporary(file)
                download(self.repo_id, file, self.commit, self.token, cache, on_bytes)
            return there or cache.blob(file), cache.is_temporary(file), use
        except BaseException:
            use.close()
            raise
