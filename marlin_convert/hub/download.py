"""Bytes from the Hub: the content of a file into the cache, checked against its hash; a part of a file piece by piece.

huggingface_hub begins a file anew when a run was interrupted, does not compare what came with the file's hash, and
names a file in the cache by whatever hash the server says. So contents are streamed into the cache here, by its own
routines for a piece of a file, and enter it only with the right hash. What Xet stores is fetched by Xet's own client,
which checks every chunk and is faster.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import HubError
from ..progress import OnBytes
from .answers import RemoteFile
from .cache import Cache
from .client import with_retries

#: Takes a piece of a file: where in the file it begins, and its bytes.
OnPiece: TypeAlias = Callable[[int, bytes], None]


def download(repo_id: str, file: RemoteFile, commit: str, token: str | None, cache: Cache, on_bytes: OnBytes) -> None:
    """Bring the content of a file into the cache, unless it is there, going on where an earlier run ended.

    Raises what `client.explaining` explains, or HubError when the content is not what the Hub says.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    blob, partial = cache.blob(file), cache.partial(file)
    url, headers = hf_hub_url(repo_id, file.name, revision=commit), build_hf_headers(token=token)

    def stream() -> bool:
        with _Hashed(partial, file, on_bytes) as into:
            with_retries(
                lambda: http_get(
                    url, into, resume_size=into.tell(), headers=headers, expected_size=file.size,  # type: ignore[arg-type]
                    tqdm_class=_passing_bar(lambda _: None), _nb_retries=0,
                ),
                progress=into.tell,
            )  # fmt: skip
            return into.oid == file.oid

    with cache.fetching(file):
        for last in (False, True):
            if blob.exists():
                return
            if file.xet and _xet():
                _through_xet(repo_id, file, commit, headers, blob, on_bytes)
                return
            if stream():
                partial.replace(blob)
                return
            partial.unlink()
            if not last:
                on_bytes(-file.size)
    raise HubError(
        f"{repo_id}: what comes as {file.name} is not what the Hub describes (its hash is another), twice; "
        "nothing of it was kept. Try again later, or without a proxy in between."
    )


def _through_xet(
    repo_id: str, file: RemoteFile, commit: str, headers: dict[str, str], blob: Path, on_bytes: OnBytes
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import xet_get
    from huggingface_hub.utils import XetFileData  # type: ignore[attr-defined]

    data = XetFileData(str(file.xet), f"{constants.ENDPOINT}/api/models/{repo_id}/xet-read-token/{commit}")
    new = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        new.touch()
        with_retries(
            lambda: xet_get(
                incomplete_path=new, xet_file_data=data, headers=headers, expected_size=file.size,
                displayed_filename=file.name, tqdm_class=_passing_bar(on_bytes),
            )
        )  # fmt: skip
        if new.stat().st_size != file.size:
            raise HubError(
                f"{repo_id}: {new.stat().st_size} bytes come of {file.name} through Xet, not {file.size}; run it "
                "again, or do without Xet by HF_HUB_DISABLE_XET=1."
            )
        new.replace(blob)
    except RuntimeError as error:  # of Xet's client; its text may hold addresses with signatures
        raise HubError(
            f"{repo_id}: fetching {file.name} through Xet failed ({type(error).__name__}); run it again, or do "
            "without Xet by HF_HUB_DISABLE_XET=1."
        ) from None
    finally:
        new.unlink(missing_ok=True)


def read_range(
    repo_id: str, url: str, headers: dict[str, str], start: int, end: int, write: OnPiece, progress: Callable[[], int]
) -> None:
    """Read bytes `start` to `end` of a file on the Hub, and `write` them as they come: memory holds only a piece.

    Where the Hub is in trouble, it goes on from there, tried again for as long as `progress`, of this request and those
    beside it, moves. Raises HubError where Range requests are not answered.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    position = start

    def read() -> None:
        nonlocal position
        if position == end:
            return
        asked = {**headers, "range": f"bytes={position}-{end - 1}", "accept-encoding": "identity"}
        with http_stream_backoff(
            "GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(), retry_on_status_codes=(),
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            fits = response.status_code == 206  # otherwise, all of the file would come
            for piece in response.iter_bytes() if fits else ():
                fits = position + len(piece) <= end
                if not fits:
                    break
                write(position, piece)
                position += len(piece)
            if not fits or position != end:
                raise HubError(
                    f"{repo_id}: {constants.ENDPOINT} does not answer Range requests, by which its headers are read; "
                    "download the repository first (`hf download`) and give its folder."
                )

    with_retries(read, progress=lambda: progress() + position)


class _Hashed:
    """A file that is written from where it ends, in order, and the hash that the Hub names it by; for `http_get`.

    The hash is computed on a thread of its own, while the next piece comes.
    """

    def __init__(self, path: Path, file: RemoteFile, on_bytes: OnBytes) -> None:
        self._of, self._on_bytes = file, on_bytes
        self._file, self._digest = path.open("a+b"), self._begun()
        self._hasher = ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None
        self._file.seek(0)
        if os.fstat(self._file.fileno()).st_size > file.size:
            self._file.truncate(0)
        while block := self._file.read(1 << 20):
            self._digest.update(block)

    def _begun(self) -> Any:
        """Return a digest that nothing of the file has gone into."""
        return hashlib.sha256() if len(self._of.oid) == 64 else hashlib.sha1(b"blob %d\0" % self._of.size)

    @property
    def oid(self) -> str:
        self._wait()
        return str(self._digest.hexdigest())

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._of.size:
            raise HubError(f"more comes of {self._of.name} than the {self._of.size} bytes that the Hub describes.")
        self._file.write(data)
        self._wait()
        self._hashed = self._hasher.submit(self._digest.update, data)
        self._on_bytes(len(data))
        return len(data)

    def _wait(self) -> None:
        if self._hashed is not None:
            self._hashed.result()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def truncate(self) -> int:
        """Begin anew: `http_get` goes back to the beginning when the server does not know where to go on."""
        self._wait()
        position = self._file.tell()
        self._on_bytes(position - os.fstat(self._file.fileno()).st_size)
        self._file.truncate(position)
        self._file.seek(0)
        self._digest = self._begun()
        while block := self._file.read(1 << 20):
            self._digest.update(block)
        return position

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._file.close()


def _xet() -> bool:
    from huggingface_hub.utils import is_xet_available

    return bool(is_xet_available())


def _passing_bar(on_bytes: OnBytes) -> type[Any]:
    """Return a progress bar for huggingface_hub that draws nothing and passes on what it is told."""
    from tqdm import tqdm

    class PassingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore what Xet has received and not yet written; those bytes come again to `update`."""

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
            """Draw nothing."""

    return PassingBar
