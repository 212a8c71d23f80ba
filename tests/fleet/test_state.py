"""The state file: what it says survives whatever ends a run, and several runs share it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marlin_convert.errors import OutputError, SourceError
from marlin_convert.fleet.state import State
from tests.support.cli import PATIENCE, running


def test_lines_are_added_and_found(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    assert state.records() == []
    state.append({"job": "a", "status": "started"})
    assert (state.started("a"), state.settled("a")) == (True, None)
    state.append({"job": "a", "status": "failed"})
    assert state.settled("a") is None
    state.append({"job": "a", "status": "done", "message": "out"})
    found = State(tmp_path / "state").settled("a")
    assert found
    assert (found["status"], found["message"], set(found)) == (
        "done",
        "out",
        {"job", "status", "message", "at", "host"},
    )
    assert not state.started("b")


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_is_passed_over(tmp_path: Path, cut: int) -> None:
    """As a machine leaves it that lost its power: the next line begins anew."""
    path = tmp_path / "state"
    state = State(path)
    for job in ("a", "b"):
        state.append({"job": job, "status": "done"})
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["job"] for record in state.records()] == (["a", "b"] if cut == 1 else ["a"])
    state.append({"job": "c", "status": "done"})
    assert [record["job"] for record in state.records()] == (["a", "b", "c"] if cut == 1 else ["a", "c"])
    assert state.torn == (cut != 1)


KILLED = """
import sys
from pathlib import Path
from marlin_convert.fleet.state import State
state = State(Path(sys.argv[1]))
for number in range(100000):
    state.append({"job": str(number), "status": "done", "message": "x" * 200})
    print(number, flush=True)
"""


@pytest.mark.slow
def test_every_line_that_was_said_to_be_there_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with running([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        said = [int(process.stdout.readline()) for _ in range(20)][-1]
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    said = max([said, *(int(number) for number in rest[:-1])])
    jobs = [int(record["job"]) for record in State(path).records()]
    assert jobs == list(range(len(jobs)))
    assert len(jobs) > said


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        state = State(tmp_path / "state")
        for number in range(first, first + 20):
            state.append({"job": str(number), "status": "done"})

    threads = [threading.Thread(target=write, args=(100 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {record["job"] for record in State(tmp_path / "state").records()}
    assert found == {str(100 * i + j) for i in range(6) for j in range(20)}


@pytest.mark.slow
def test_a_lock_is_held_by_one_and_by_the_processes_that_it_is_given_to(tmp_path: Path) -> None:
    one, other = State(tmp_path / "state"), State(tmp_path / "state")
    with one.locked("target") as held, other.locked("target") as not_held, other.locked("another") as free:
        assert isinstance(held, int)
        assert not_held is None
        assert isinstance(free, int)
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held,))
    with process:
        with other.locked("target") as still:
            assert still is None
        process.communicate(b"\n", timeout=PATIENCE)
    with other.locked("target") as now:
        assert now is not None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for content in ('{"a": 1}\n', "[]\n", "a text\nof lines\n"):
        path = tmp_path / "other"
        path.write_text(content)
        with pytest.raises(SourceError, match="is not a state file"):
            State(path).records()
        assert path.read_text() == content


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        State(tmp_path / "state")


def test_a_folder_is_no_state_file(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(OutputError, match="it is not a regular file; give another name for the state file"):
        State(tmp_path / "state")


def test_lines_are_json(tmp_path: Path) -> None:
    State(tmp_path / "state").append({"job": "a", "message": "ä\nb"})
    (line,) = (tmp_path / "state").read_text().splitlines()
    assert json.loads(line)["message"] == "ä\nb"


def test_a_state_file_that_is_no_file(tmp_path: Path) -> None:
    """A pipe would be waited for, and some devices have no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OutputError, match="state file"):
            State(path)


@pytest.mark.parametrize(
    "content",
    [
        "org/name-gptq",
        "org/name-gptq\n",
        "a list\nof words\n",
        '{"source": "org/name-gptq"}\n',
        "\0\0",
        "{",
        '{"jab": "x',
    ],
    ids=["a list of one", "a line", "two lines", "a list of JSON", "zeros", "another object", "another torn object"],
)
def test_nothing_is_added_to_another_file(tmp_path: Path, content: str) -> None:
    """The list itself, say, given as the state file by mistake."""
    (tmp_path / "file").write_text(content)
    if content == "{":  # all that is left of our own first line
        assert State(tmp_path / "file").records() == []
        return
    with pytest.raises(SourceError, match="it is not a state file of `batch`; give another name"):
        State(tmp_path / "file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", content)]


@pytest.mark.slow
def test_a_state_file_without_an_end(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(SourceError, match="it has more than 1073741824 bytes, which no such file has"):
        State(tmp_path / "file")
