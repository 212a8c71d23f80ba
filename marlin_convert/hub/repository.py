"""A repository on the Hub at one commit: what it holds, looking into its weights without fetching them, and fetching
them file by file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.reader import INDEX_SUFFIX, MAX_HEADER_BYTES, WEIGHT_SUFFIXES, Checkpoint, read_header, weight_files
from .answers import RemoteFile, describe, files_of
from .cache import Cache, Use
from .download import Hear, download, read_range

_FIRST_BYTES = 1 << 18  # of a weight file: most headers are shorter, and one request then is enough
_NEAR = 1 << 16  # bytes between two tensors that are cheaper to read than another request is
_REQUESTS = 16  # at a time
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
        """The repository, or None when the Hub cannot be reached."""
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
        return [n for n in self.files if n in Checkpoint.CONFIG_FILES or (n.endswith(INDEX_SUFFIX) and "/" not in n)]

    def weights_beside(self, weights: Sequence[str]) -> list[str]:
        """Weights that are not the model's own (which `weights` are), and not fetched with the small files."""
        own = {*weights, *self.configs}
        return [name for name in self.files if name.endswith(WEIGHT_SUFFIXES) and name not in own]

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
            path, there = folder / name, self.cache.find(self.files[name], self.commit)
            if there is None or self.cache.passes(self.files[name]):  # another run may remove it
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

        came = 0

        def read(start: int, end: int) -> None:
            nonlocal came
            os.pwrite(fd, read_range(self.repo_id, url, headers, start, end, lambda: came), start)
            came += 1

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

    # ---- fetching

    def to_come(self, name: str) -> int:
        """Bytes of a file that the cache does not have yet."""
        return self.cache.to_come(self.files[name], self.commit)

    def fetch(self, name: str, hear: Hear) -> Path:
        """Fetch a file, unless the cache has it, to stay there; its path. `hear` is told of every byte to come.

        Raises what `explained` explains, or HubError when its content is not what the Hub says.
        """
        file, cache = self.files[name], self.cache
        link = cache.snapshot(self.commit) / name
        if link.exists() and not cache.passes(file):  # also in a cache that cannot be written to
            return link
        use = cache.use(file)
        try:
            cache.keep(file)
            if cache.find(file, self.commit) is None:
                download(self.repo_id, file, self.commit, self.token, cache, hear)
            link = cache.link(file, self.commit)
            cache.keep(file)  # whoever waited for it meanwhile may have noted something else
        finally:
            use.close()
        return link

    def fetch_passing(self, name: str, hear: Hear) -> tuple[Path, bool, Use]:
        """Fetch a file, unless the cache has it, for as long as it is used: its path, whether it goes away then, and
        the use, which `Cache.give_up` ends."""
        file, cache = self.files[name], self.cache
        use = cache.use(file)
        try:
            there = cache.find(file, self.commit)
            if there is None:
                cache.let_pass(file)
                download(self.repo_id, file, self.commit, self.token, cache, hear)
            return there or cache.blob(file), cache.passes(file), use
        except BaseException:
            use.close()
            raise
