"""`marlin-convert batch --ray`, on a cluster of several nodes on this machine; skipped where Ray is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.errors import HubError, MissingPackageError, OptionError
from marlin_convert.fleet.cluster import Cluster, resources
from tests.fleet.test_batch import CPU, add, listed, records, settings, wait_until
from tests.support.cli import PATIENCE, PROGRAM, SECRET, Run, running
from tests.support.hub_server import Account, Hub


def test_what_a_checkpoint_takes() -> None:
    assert resources("CPU=2,disk=0.5") == {"CPU": 2.0, "disk": 0.5}
    assert resources("") == {}
    for text in ("CPU", "CPU=", "=1", "CPU=x", "CPU=-1", "CPU=nan"):
        with pytest.raises(OptionError, match="are not resources"):
            resources(text)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "ray>=2.40"'):
        Cluster("auto", retries=0, resources={})


SERVE = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, resources={f"n{i}": 1}) for i in range(int(sys.argv[1]))]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    cluster.add_node(num_cpus=1)
    print("removed", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster in a process of its own: its head, and nodes of one CPU each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        self._process = process
        self.address = process.stdout.readline().strip()

    def kill_one(self) -> None:
        """End a node at once, and its workers with it; a new one takes its place."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "removed\n"


@pytest.fixture
def nodes(hub: Hub, tmp_path: Path) -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="Ray is not installed")
    env = {**settings(hub, tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with running([sys.executable, "-c", SERVE, 2], env=env, **pipes) as process:
        yield Nodes(process)
        assert process.stdin
        process.stdin.close()
        process.wait(PATIENCE)


def started(hub: Hub) -> bool:
    """Whether weights travel."""
    return any(r.path.endswith("model.safetensors") and not r.range for r in hub.requests)


def finished(document: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(document)
    return found


def complete(out: Path, names: list[str], online: Callable[..., Run]) -> None:
    """All results are there, whole, and nothing else."""
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert there == sorted(names)
    for name in names:
        assert online("verify", out / name, *CPU).code == 0


@pytest.mark.slow
def test_a_node_is_killed_in_the_middle(hub: Hub, nodes: Nodes, online: Callable[..., Run], tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(4)]
    for number, name in enumerate(names):
        add(hub, tmp_path, name, seed=number)
    lines = listed(tmp_path, *(f"org/{name}" for name in names))
    command = [*PROGRAM, "batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", "--ray",
               nodes.address, "--retries", "3", *CPU, "--json"]  # fmt: skip
    hub.rate = 20_000
    with running(command, env=settings(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: started(hub) or process.poll() is not None)
        nodes.kill_one()
        hub.rate = None
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err + out
    assert finished(out)["counts"] == {"done": 4}
    complete(tmp_path / "out", [f"{name}-marlin" for name in names], online)


@pytest.mark.slow
def test_a_driver_is_killed_and_started_again(
    hub: Hub, nodes: Nodes, online: Callable[..., Run], tmp_path: Path
) -> None:
    """And two drivers with one state file: nothing is lost, nothing is published twice."""
    hub.accounts[SECRET] = Account("me", orgs={"team": "write"})
    names = [f"m{number}" for number in range(4)]
    for number, name in enumerate(names):
        add(hub, tmp_path, name, seed=number)
    lines = listed(tmp_path, *(f"org/{name}" for name in names))
    command = [*PROGRAM, "batch", lines, "--push-to-hub", "team", "--state", tmp_path / "state", "--ray",
               nodes.address, "--token", SECRET, *CPU, "--json"]  # fmt: skip
    options: dict[str, Any] = {"env": settings(hub, tmp_path), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    hub.rate = 20_000
    with running(command, **options) as process:
        wait_until(lambda: started(hub) or process.poll() is not None)
        process.kill()
        process.wait(PATIENCE)
    hub.rate = None
    with running(command, **options) as one, running(command, **options) as other:
        said = [process.communicate(timeout=PATIENCE) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0], said
    ends = [Counter(row["status"] for row in finished(out)["checkpoints"]) for out, _ in said]
    assert ends[0]["done"] + ends[1]["done"] == 4
    done = Counter(r["source"] for r in records(tmp_path / "state") if r["status"] == "done")
    assert done == {f"org/{name}": 1 for name in names}
    for name in names:
        repository = hub.repositories[f"team/{name}-marlin"]
        assert len(repository.titles) == 1
        assert online("verify", f"team/{name}-marlin", *CPU).code == 0
    assert SECRET not in (tmp_path / "state").read_text()


@pytest.mark.slow
def test_outcomes_of_tasks(hub: Hub, nodes: Nodes, online: Callable[..., Run], tmp_path: Path) -> None:
    """Failures that may pass are tried again by Ray; those that may not are not."""
    add(hub, tmp_path, "good")
    failures = iter([403])
    hub.fault = lambda request: next(failures, None) if request.path.endswith("/config.json") else None
    lines = listed(tmp_path, "org/good", "org/none")
    command = ["batch", lines, "--out", tmp_path / "out", "--state", tmp_path / "state", "--ray", nodes.address,
               "--ray-resources", "CPU=1,n0=1", "--retries", "1", *CPU, "--json"]  # fmt: skip
    done = online(*command)
    assert done.code == 1, done.err
    rows = done.json()["checkpoints"]
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "no such repository" in rows[1]["message"]
    assert online(*command[:-1]).out.splitlines()[-1] == "1 before, 1 failed"


def test_nothing_listens_at_the_address() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(HubError, match=r"127.0.0.1:1: no Ray cluster answers"):
        Cluster("127.0.0.1:1", retries=0, resources={})
