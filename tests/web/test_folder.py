"""The folder that a server of the page works in, and what others may have put beside it. Needs no Gradio."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from marlin_convert.errors import OutputError
from marlin_convert.web.jobs import Jobs


def test_it_goes_away_with_its_server(tmp_path: Path) -> None:
    jobs, others = Jobs(tmp_path / "work"), Jobs(tmp_path / "work")
    assert jobs.folder != others.folder
    (jobs.folder / "job").mkdir()
    jobs.close()
    assert [path for path in (tmp_path / "work").iterdir() if path.is_dir()] == [others.folder]
    others.close()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["starting", "server-x.lock", "server-x", ".server.marlin-convert-x.tmp"])
@pytest.mark.parametrize("kind", ["a link to a file", "a link to a folder", "a file", "a folder"])
def test_what_only_has_such_a_name_stays_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    """A link must not empty what it leads to, and nothing of another's is removed, or keeps the page from starting."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    if kind == "a folder":
        (work / name).mkdir()
        (work / name / "file").write_text("mine")
    elif kind == "a file":
        (work / name).write_text("mine")
    else:
        (work / name).symlink_to(tmp_path / "victim" / ("file" if kind.endswith("file") else ""))
    Jobs(work).close()
    assert [path.name for path in work.iterdir()] == [name]
    for file in (tmp_path / "victim" / "file", *work.rglob("file")):
        assert file.read_text() == "mine"


def test_the_usual_folder_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / f"marlin-convert-web-{os.getuid()}").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="belongs to another user; name another folder with --work-dir"):
        Jobs()
    assert list((tmp_path / "mine").iterdir()) == []
