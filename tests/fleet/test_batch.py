"""`marlin-convert batch`: every checkpoint comes to an end that is known, once, whatever ends the runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from marlin_convert import child
from marlin_convert.fleet.batch import Plan, Processes, run
from marlin_convert.fleet.job import Job
from marlin_convert.fleet.listing import Line
from marlin_convert.fleet.state import State
from tests.support.cli import PATIENCE, PROGRAM, SECRET, Run, document, running
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, two_layers, write_source
from tests.support.hub_server import Account, Hub
from tests.support.output_folders import NO_OVERRIDE, limited_program

CPU = ("--device", "cpu")


def add(hub: Hub, folder: Path, name: str, **changes: Any) -> None:
    """`org/name`, a checkpoint of its own numbers."""
    write_source(folder / name, two_layers(**changes))
    hub.add(f"org/{name}", folder / name)


def listed(folder: Path, *lines: str, name: str = "list.txt") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def settings(hub: Hub, folder: Path, token: str = "") -> dict[str, str]:
    return {
        **os.environ, "HF_HOME": str(folder / "hf-home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token, "NO_PROXY": "*",
    }  # fmt: skip


def records(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines()]


def wait_until(true: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_every_kind_of_end(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """A refusal is a result; a failure is named, and tried again by the next run, which passes over the others."""
    add(hub, tmp_path, "good")
    write_source(
        tmp_path / "odd", {"a.proj": GPTQLayer(K=256, N=256, bits=3)}, quantization=quantization_config(bits=3)
    )
    hub.add("org/odd", tmp_path / "odd")
    add(hub, tmp_path, "later")
    assert online("org/later", tmp_path / "made").code == 0
    hub.add("org/marlin", tmp_path / "made")
    later = hub.repositories.pop("org/later")
    lines = listed(tmp_path, "org/good", "org/odd", "org/marlin", "org/later ended --verify")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", *CPU, "--json"]
    first = online(*command)
    assert first.code == 1, first.err
    document = first.json()
    assert document["counts"] == {"done": 1, "refused": 1, "nothing": 1, "failed": 1}
    assert document["ok"] is False
    by = {row["source"]: row for row in document["checkpoints"]}
    assert "3" in by["org/odd"]["message"]
    assert by["org/odd"]["exit_code"] == 4
    assert "no such repository" in by["org/later"]["message"]
    assert by["org/good"]["layers"] == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good-marlin"]
    before = (tmp_path / "out" / "good-marlin" / "model.safetensors").stat().st_mtime_ns

    hub.repositories["org/later"] = later
    second = online(*command)
    assert second.code == 0, second.err
    assert second.json()["counts"] == {"before": 3, "done": 1}
    assert [row["settled"] for row in second.json()["checkpoints"]] == ["done", "refused", "nothing", None]
    assert (tmp_path / "out" / "good-marlin" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out" / "ended" / "marlin_convert.json").read_text())["verified"] is True
    assert (
        load_file(tmp_path / "out" / "ended" / "model.safetensors").keys()
        == load_file(tmp_path / "made" / "model.safetensors").keys()
    )


def test_what_people_see(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    add(hub, tmp_path, "good")
    lines = listed(tmp_path, "org/good", "org/none")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", *CPU]
    done = online(*command)
    assert done.code == 1
    assert "2/2" in done.err
    assert done.err.splitlines()[-1] == ("marlin-convert: 1 of 2 checkpoints failed; run it again to try these again.")
    assert [line.split()[:3] for line in done.out.splitlines()[1:3]] == [["1", "org/good", "done"],
                                                                         ["2", "org/none", "failed"]]  # fmt: skip
    assert done.out.splitlines()[-1] == "1 done, 1 failed"


def test_a_folder_that_one_may_not_enter(tmp_path: Path) -> None:
    """Its names can be read, and nothing else: the other checkpoints are converted."""
    write_source(tmp_path / "closed", two_layers())
    write_source(tmp_path / "good", two_layers())
    (tmp_path / "closed").chmod(0o444)
    lines = listed(tmp_path, f"{tmp_path}/closed a", f"{tmp_path}/good b")
    command = ["batch", lines, "--out", "out", "--state", "state", *CPU, "--json"]
    done = limited_program(NO_OVERRIDE, *command, cwd=tmp_path)
    (tmp_path / "closed").chmod(0o755)
    assert done.code == 1, done.err
    first, second = done.json()["checkpoints"]
    assert (first["status"], first["exit_code"], second["status"]) == ("failed", 3, "done")
    assert "Permission denied" in first["message"]


@pytest.mark.parametrize("value", [True, -1, 2**200, float("nan"), "\x1b[2J[red]x", "\ud800", [], {"a": 1}], ids=repr)
def test_a_state_file_that_somebody_wrote(tmp_path: Path, main: Callable[..., Run], value: Any) -> None:
    """Of what it says, values of another type are not told, and nothing that a terminal would obey."""
    write_source(tmp_path / "good", two_layers())
    command = ["batch", listed(tmp_path, "good a"), "--out", "out", "--state", "state", *CPU]
    assert main(*command).code == 0
    *before, last = records(tmp_path / "state")
    for key in ("message", "exit_code", "identity", "format", "layers", "bytes_in", "verified", "found", "seconds"):
        changed = [*before, {**last, key: value}]
        (tmp_path / "state").write_text("".join(json.dumps(record) + "\n" for record in changed))
        (row,) = document(main(*command, "--json"))["checkpoints"]
        assert (row["status"], row["settled"]) == ("before", "done")
        assert row[key] in (None, value)
        people = main(*command)
        assert people.code == 0
        assert "\x1b" not in people.out + people.err


def test_a_process_that_dies_before_it_can_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped or killed, it is no bug; of a crash, that is what it is."""
    job = Job("source", "identity", str(tmp_path / "out"), None, {})
    for number, message, code in (
        (signal.SIGTERM, "interrupted", 143),
        (signal.SIGHUP, "interrupted", 129),
        (signal.SIGKILL, "its process was killed; this computer may be short of memory", 1),
        (signal.SIGSEGV, "its process ended by signal 11", 70),
    ):
        program = tmp_path / f"dies-of-{number}"
        program.write_text(f"#!/bin/sh\nulimit -c 0\nread job\nkill -{int(number)} $$\n")
        program.chmod(0o755)
        monkeypatch.setattr(child, "python", lambda module, program=program: [str(program)])
        with (tmp_path / "lock").open("w") as lock:
            outcome = Processes()(job, lock.fileno(), lambda done, total: None)
        assert outcome == {"status": "failed", "message": message, "exit_code": code}


def test_another_commit_option_or_target_is_another_work(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    add(hub, tmp_path, "good")
    lines = listed(tmp_path, "org/good")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", *CPU, "--json"]
    assert online(*command).json()["counts"] == {"done": 1}
    refused = online(*command, "--format", "marlin-ext")
    assert "exists already" in refused.json()["checkpoints"][0]["message"]
    assert online(*command, "--format", "marlin-ext", "--force").json()["counts"] == {"done": 1}
    assert online(*command, "--format", "marlin-ext", "--force").json()["counts"] == {"before": 1}
    write_source(tmp_path / "new", two_layers(seed=5))
    files = {p.name: p for p in (tmp_path / "new").iterdir()}
    hub.repositories["org/good"].commit(dict(files))
    assert online(*command, "--format", "marlin-ext", "--force").json()["counts"] == {"done": 1}


def test_a_result_that_is_there_is_not_made_again(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """A run that was killed between the result and its line; also where the source is a folder."""
    add(hub, tmp_path, "good")
    lines = listed(tmp_path, "org/good", f"{tmp_path / 'good'} folder")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", *CPU, "--json"]
    assert online(*command).code == 0
    weights = [tmp_path / "out" / name / "model.safetensors" for name in ("good-marlin", "folder")]
    before = [path.stat().st_mtime_ns for path in weights]
    kept = [line for line in (tmp_path / "state").read_text().splitlines() if '"started"' in line]
    (tmp_path / "state").write_text("\n".join(kept) + '\n{"job": "torn')
    again = online(*command).json()
    assert [row["found"] for row in again["checkpoints"]] == [True, True]
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert Counter(r["status"] for r in map(json.loads, kept)) == {"started": 2}


def test_a_dry_run_writes_nothing(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    add(hub, tmp_path, "good")
    lines = listed(tmp_path, "org/good", "org/none")
    done = online("batch", lines, "--state", tmp_path / "state", "--dry-run", *CPU, "--json")
    assert (done.code, done.json()["counts"]) == (1, {"would convert": 1, "failed": 1})
    assert (tmp_path / "state").read_text() == ""
    assert not any("model.safetensors" in r.path and not r.range for r in hub.requests)


def test_parts_of_a_list(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    for number in range(3):
        add(hub, tmp_path, f"m{number}", seed=number)
    lines = listed(tmp_path, *(f"org/m{number}" for number in range(3)))
    for part, expected in (("1/2", ["m0-marlin", "m2-marlin"]), ("2/2", ["m0-marlin", "m1-marlin", "m2-marlin"])):
        command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", "--shard", part, *CPU]
        assert online(*command, "--jobs", "2").code == 0
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == expected


def test_retries(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """What may pass is tried again; what may not is not."""
    add(hub, tmp_path, "good")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x")
    hub.add("org/damaged", tmp_path / "damaged")
    failures = iter([403])
    hub.fault = lambda request: next(failures, None) if request.path.endswith("/config.json") else None
    lines = listed(tmp_path, "org/good", "org/damaged")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", *CPU, "--json"]
    done = online(*command, "--retries", "1")
    assert [row["status"] for row in done.json()["checkpoints"]] == ["done", "failed"]
    said = [(r["source"], r["status"]) for r in records(tmp_path / "state") if r["status"] != "started"]
    assert said == [("org/good", "failed"), ("org/good", "done"), ("org/damaged", "failed")]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_and_started_again(hub: Hub, tmp_path: Path, number: int) -> None:
    """Killed while one checkpoint travels: no half result; the next run does what is left, and that alone."""
    for name in ("m0", "m1", "m2"):
        add(hub, tmp_path, name)
    lines = listed(tmp_path, "org/m0", "org/m1", "org/m2")
    state, out = tmp_path / "state", tmp_path / "out"
    command = [*PROGRAM, "batch", lines, "--out", out, "--state", state, *CPU, "--json"]
    env = settings(hub, tmp_path)
    hub.rate = 20_000
    with running(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any("/resolve/" in r.path and r.path.endswith(".safetensors") for r in hub.requests))
        hub.rate = 400_000
        wait_until(lambda: (out / "m0-marlin").exists())
        wait_until(lambda: sum(r["status"] == "started" for r in records(state)) == 2)
        hub.rate = 20_000
        process.send_signal(number)
        process.wait(PATIENCE)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    hub.rate = None
    again = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=PATIENCE,
                           check=False)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["counts"].get("before", 0) + sum(
        bool(row["found"]) for row in json.loads(again.stdout)["checkpoints"]
    ) in (1, 2)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "m0-marlin",
        "m1-marlin",
        "m2-marlin",
    ]
    for name in ("m0-marlin", "m1-marlin", "m2-marlin"):
        assert (out / name / "marlin_convert.json").is_file()
    done = Counter(r["source"] for r in records(state) if r["status"] == "done")
    assert done == {"org/m0": 1, "org/m1": 1, "org/m2": 1}


@pytest.mark.slow
def test_an_interrupt_while_the_threads_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are ended then, as at any other moment; no job of the list begins afterwards."""
    source, start = write_source(tmp_path / "source"), threading.Thread.start
    lines = [Line(number, str(source.folder), None, f"out{number}", {}) for number in range(1, 21)]
    interrupted, ended = threading.Event(), threading.Event()

    class Jobs:
        done = 0

        def __call__(self, job: Job, lock: int, moved: Callable[[int, int], None]) -> dict[str, Any]:
            assert interrupted.wait(PATIENCE)
            self.done += 1
            ended.wait(PATIENCE)
            return {"status": "done"}

        def end(self) -> None:
            ended.set()

    def interrupting(thread: threading.Thread) -> None:
        start(thread)
        if not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)

    class Nobody:
        def begun(self, line: Line) -> None: ...
        def moved(self, line: Line, done: int, total: int) -> None: ...
        def ended(self, line: Line, outcome: dict[str, Any]) -> None: ...

    jobs, before = Jobs(), set(threading.enumerate())
    monkeypatch.setattr(threading.Thread, "start", interrupting)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run(lines, Plan(tmp_path, None, jobs=2), State(tmp_path / "state"), Nobody(), jobs)
    assert jobs.done <= 2
    assert set(threading.enumerate()) == before


@pytest.mark.slow
def test_two_runs_with_one_state_file(hub: Hub, tmp_path: Path) -> None:
    """Each checkpoint is converted, and published, by one of them; both end when all is done."""
    hub.accounts[SECRET] = Account("me", orgs={"team": "write"})
    for number in range(4):
        add(hub, tmp_path, f"m{number}", seed=number)
    lines = listed(tmp_path, *(f"org/m{number}" for number in range(4)))
    state = tmp_path / "state"
    command = [*PROGRAM, "batch", lines, "--push-to-hub", "team", "--state", state, "--token", SECRET, *CPU, "--json"]
    env = settings(hub, tmp_path)
    options: dict[str, Any] = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with running(command, **options) as one, running(command, **options) as other:
        documents = [json.loads(process.communicate(timeout=PATIENCE)[0]) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0]
    ends = [Counter(row["status"] for row in document["checkpoints"]) for document in documents]
    assert ends[0]["done"] + ends[1]["done"] == 4
    assert ends[0]["before"] + ends[1]["before"] == 4
    for number in range(4):
        assert list(hub.repositories[f"team/m{number}-marlin"].titles.values()) == [
            "Marlin checkpoint, by marlin-convert 0.1.0"
        ]
    assert not any((tmp_path / "state.work").iterdir())
    assert SECRET not in state.read_text()


def test_a_published_result_is_not_published_again(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """The line that said so is lost; and a result whose publishing failed is not converted again."""
    hub.accounts[SECRET] = Account("me")
    add(hub, tmp_path, "good")
    lines, state = listed(tmp_path, "org/good"), tmp_path / "state"
    command = ["batch", lines, "--push-to-hub", "me", "--state", state, *CPU, "--json", "--retries", "0"]
    token = {"HF_TOKEN": SECRET}
    hub.fault = lambda request: 400 if "/commit/" in request.path else None
    failed = online(*command, env=token)
    assert failed.code == 1, failed.out
    kept = tmp_path / "state.work" / "good-marlin" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    hub.fault = lambda _: None
    hub.requests.clear()
    assert online(*command, env=token).json()["checkpoints"][0]["found"] is True
    assert not kept.exists()
    assert before
    assert not any(r.path.endswith("good/resolve/main/model.safetensors") for r in hub.requests)
    state.write_text("")
    again = online(*command, env=token).json()["checkpoints"][0]
    assert (again["status"], again["found"], again["message"]) == ("done", True, "me/good-marlin has it")
    assert len(hub.repositories["me/good-marlin"].titles) == 1


def test_wrong_arguments(main: Callable[..., Run], tmp_path: Path) -> None:
    lines = listed(tmp_path, "org/good")
    state = ("--state", tmp_path / "state")
    for words, said in (
        (("batch", lines, *state), "Give --out DIR or --push-to-hub ORG."),
        (("batch", lines, *state, "--out", "o", "--push-to-hub", "x"), "Give --out DIR or --push-to-hub ORG."),
        (("batch", lines, *state, "--out", "o", "--shard", "3/2"), "is not a part"),
        (("batch", lines, *state, "--out", "o", "--private"), "--private needs --push-to-hub."),
        (("batch", lines, "--out", "o"), "Missing option '--state'"),
        (("batch", listed(tmp_path, "a", "a", name="twice"), *state, "--out", "o"), "has the target a-marlin too"),
    ):
        done = main(*words)
        assert done.code == 2, done.err
        assert said in done.err
