"""Several runs, and other programs, on one cache: nobody loses what they need, and what only passed goes."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.errors import HubError
from marlin_convert.hub.answers import RemoteFile
from marlin_convert.hub.cache import Cache
from marlin_convert.hub.download import download
from tests.support.cli import PATIENCE

REPO = "someone/large-gptq"
COMMIT = "c" * 40
CONTENT = b"weights"
FILE = RemoteFile("model.safetensors", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache that holds a file, brought by a run that will remove it."""
    cache = Cache(REPO, tmp_path)
    cache.mark_temporary(FILE)
    cache.blob(FILE).write_bytes(CONTENT)
    return cache


def test_the_last_who_uses_it_removes_it(cache: Cache, tmp_path: Path) -> None:
    first, second = cache.use(FILE), Cache(REPO, tmp_path).use(FILE)
    cache.give_up(FILE, first)
    assert cache.blob(FILE).read_bytes() == CONTENT
    cache.give_up(FILE, second)
    assert not list((cache.folder / "blobs").iterdir())


def test_what_was_there_before_stays(cache: Cache) -> None:
    cache.keep(FILE)
    cache.give_up(FILE, cache.use(FILE))
    assert cache.blob(FILE).read_bytes() == CONTENT


def test_what_somebody_linked_to_stays(cache: Cache) -> None:
    """As huggingface_hub does that finds a content which it wants."""
    use = cache.use(FILE)
    link = cache.folder / "snapshots" / ("d" * 40) / "sub" / "other-name.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"../../../blobs/{FILE.oid}")
    cache.give_up(FILE, use)
    assert link.read_bytes() == CONTENT
    assert not cache.is_temporary(FILE)


@pytest.mark.slow
def test_what_another_program_is_linking_to_stays(cache: Cache, tmp_path: Path) -> None:
    """It holds huggingface_hub's lock meanwhile, in a process of its own."""
    code = (
        "import sys, time\nfrom huggingface_hub.utils import WeakFileLock\n"
        "with WeakFileLock(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    lock = tmp_path / ".locks" / cache.folder.name / f"{FILE.oid}.lock"
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        cache.give_up(FILE, cache.use(FILE))
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert cache.blob(FILE).read_bytes() == CONTENT
    cache.give_up(FILE, cache.use(FILE))  # the next who passes takes it along
    assert not cache.blob(FILE).exists()


def test_where_no_lock_is_possible_nothing_is_removed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    cache.give_up(FILE, cache.use(FILE))
    assert cache.blob(FILE).read_bytes() == CONTENT


def test_a_file_system_without_links(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def symlink_to(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    link = cache.link(FILE, COMMIT)
    assert (link.read_bytes(), link.is_symlink()) == (CONTENT, False)
    assert cache.find(FILE, COMMIT) == link.resolve()


@pytest.mark.parametrize("revision", ["../../x", "/x", "a//b", "a/../b"])
def test_a_revision_is_no_way_out(cache: Cache, tmp_path: Path, revision: str) -> None:
    before = set(tmp_path.rglob("*"))
    cache.name(revision, COMMIT)
    assert set(tmp_path.rglob("*")) == before
    cache.name("feature/x", COMMIT)
    assert (cache.folder / "refs" / "feature" / "x").read_text() == COMMIT


@pytest.mark.parametrize("came", [CONTENT, CONTENT[:-1]], ids=["whole", "short"])
def test_through_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came: bytes) -> None:
    """Xet's own client writes where it is told to, and tells what it receives and what it writes apart."""
    from huggingface_hub import file_download

    real = inspect.signature(file_download.xet_get)

    def xet_get(**arguments: Any) -> None:
        real.bind(**arguments)
        assert arguments["xet_file_data"].file_hash == "b" * 64
        bar = arguments["tqdm_class"](total=arguments["expected_size"], name="a bar")
        bar.update_transfer(2)
        bar.update(len(came))
        arguments["incomplete_path"].write_bytes(came)

    monkeypatch.setattr(file_download, "xet_get", xet_get)
    monkeypatch.setattr("marlin_convert.hub.download._xet", lambda: True)
    file, cache, heard = replace(FILE, xet="b" * 64), Cache(REPO, tmp_path), list[int]()
    if came == CONTENT:
        download(REPO, file, COMMIT, None, cache, heard.append)
        assert (cache.blob(file).read_bytes(), heard) == (CONTENT, [len(CONTENT)])
    else:
        with pytest.raises(HubError, match=r"6 bytes come of model\.safetensors through Xet, not 7"):
            download(REPO, file, COMMIT, None, cache, heard.append)
        assert not list((cache.folder / "blobs").iterdir())
