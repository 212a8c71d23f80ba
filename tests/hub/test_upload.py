"""Results published on the Hub, by the real huggingface_hub to a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.convert import convert
from marlin_convert.hub.upload import default_name
from marlin_convert.options import Options
from tests.support.cli import PATIENCE, SECRET, Run, one_line, refusal
from tests.support.gptq_checkpoints import Source, two_layers, write_source
from tests.support.hub_server import Account, Hub, Request, at_first

REPO = "me/model-marlin"
TOKEN = ("--token", SECRET)


@pytest.fixture(autouse=True)
def me(hub: Hub) -> None:
    hub.accounts[SECRET] = Account("me", orgs={"team": "write", "readers": "read"})


@pytest.fixture
def out(source: Source, tmp_path: Path) -> Path:
    """A finished result."""
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pushed(hub: Hub, repo_id: str = REPO, ref: str = "main") -> dict[str, bytes]:
    """What the repository holds, without the file that every repository is created with."""
    repository = hub.repositories[repo_id]
    files = repository.commits[repository.refs[ref]]
    return {name: data for name, data in files.items() if name != ".gitattributes" and isinstance(data, bytes)}


def writes(hub: Hub) -> list[str]:
    """Requests that change something on the Hub."""
    changing = ("/repos/create", "/commit/", "/lfs/", "/branch/")
    return [r.path for r in hub.requests if r.method in ("POST", "PUT") and any(c in r.path for c in changing)]


def test_a_new_repository(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    result = online("push", out, REPO, *TOKEN)
    assert result.code == 0, result.err
    assert f"published {hub.url}/{REPO}/commit/" in result.out
    assert pushed(hub) == contents(out)
    assert not hub.repositories[REPO].private
    assert len([r for r in hub.requests if "/commit/" in r.path and r.method == "POST"]) == 1


def test_converted_and_pushed(hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    result = online(source.folder, tmp_path / "out", "--push-to-hub", REPO, "--json", *TOKEN)
    assert (result.code, result.err) == (0, "")
    assert result.json()["pushed"].startswith(f"{hub.url}/{REPO}/commit/")
    assert pushed(hub) == contents(tmp_path / "out")
    assert f"vllm serve {REPO} --dtype float16".encode() in pushed(hub)["README.md"]


def test_the_default_name(hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    hub.add("someone/model-gptq", source.folder)
    result = online("someone/model-gptq", tmp_path / "out", *TOKEN, "--push-to-hub")
    assert result.code == 0, result.err
    card = pushed(hub, "me/model-gptq-marlin")["README.md"].decode()
    assert "\nbase_model: someone/model-gptq\n" in card
    assert "\nbase_model_relation: quantized\n" in card
    assert f"--revision {hub.repositories['someone/model-gptq'].refs['main']}" in card


@pytest.mark.parametrize(
    ("label", "name"),
    [("a/b", "b-marlin"), ("My model!", "My-model-marlin"), ("..", "model-marlin"), ("a--b", "a-b-marlin")],
)
def test_default_names_are_names(label: str, name: str) -> None:
    assert default_name(label) == name


def test_the_same_again(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    assert online("push", out, REPO, *TOKEN).code == 0
    before = dict(hub.repositories[REPO].refs)
    again = online("push", out, REPO, "--quiet", *TOKEN)
    assert (again.code, again.err) == (0, "")
    assert hub.repositories[REPO].refs == before


def test_other_weights(hub: Hub, out: Path, online: Callable[..., Run], tmp_path: Path) -> None:
    """They are refused without --force, before converting too; with it, none of the old ones stay."""
    old = write_source(tmp_path / "old", two_layers(group_size=-1), shards=2)
    hub.add(REPO, old.folder)
    before = pushed(hub)
    words = f"{REPO} holds other weights; choose another repository, or overwrite them with --force"
    assert words in refusal(online("push", out, REPO, "--quiet", *TOKEN))
    assert words in refusal(online(old.folder, tmp_path / "x", "--push-to-hub", REPO, *TOKEN))
    assert not (tmp_path / "x").exists()
    assert pushed(hub) == before
    assert online("push", out, REPO, "--force", *TOKEN).code == 0
    assert pushed(hub) == contents(out)


def test_a_private_repository(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    assert online("push", out, REPO, "--private", *TOKEN).code == 0
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    assert "it exists and is public" in refusal(online("push", out, REPO, "--quiet", "--private", *TOKEN))


def test_a_branch(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    options = ("--branch", "marlin", "--commit-message", "Marlin at last")
    assert online("push", out, REPO, *options, *TOKEN).code == 0
    assert pushed(hub) == {}
    assert pushed(hub, ref="marlin") == contents(out)
    assert hub.repositories[REPO].titles[hub.repositories[REPO].refs["marlin"]] == "Marlin at last"


def test_a_pull_request(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    """To somebody else's repository too, where one may not write."""
    hub.add("someone/model", write_source(out.parent / "old").folder)
    result = online("push", out, "someone/model", "--create-pr", *TOKEN)
    assert result.code == 0, result.err
    assert f"{hub.url}/someone/model/discussions/1" in result.out
    assert contents(out).items() <= pushed(hub, "someone/model", "refs/pr/1").items()
    assert "marlin_convert.json" not in pushed(hub, "someone/model")


@pytest.mark.parametrize("address", ["javascript:alert(1)//discussions/1", "https://evil.example/a/b/discussions/1"])
def test_an_address_that_is_not_the_hubs(hub: Hub, out: Path, online: Callable[..., Run], address: str) -> None:
    """It would be a link on a page: huggingface_hub takes it from the answer as it is."""
    hub.add("someone/model", write_source(out.parent / "old").folder)
    hub.say = lambda request, said: {**said, "pullRequestUrl": address} if "/commit/" in request.path else said
    result = online("push", out, "someone/model", "--create-pr", *TOKEN)
    assert (result.code, result.out) == (0, f"published {hub.url}/someone/model\n"), result.err


def test_no_rights(hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path) -> None:
    """They are found missing before anything is converted or created."""
    hub.add("me/locked", source.folder)
    hub.accounts["hf_reader"] = Account("me", role="read")

    def refused(repo_id: str, *token: str) -> str:
        return refusal(online(source.folder, tmp_path / "out", "--push-to-hub", repo_id, *token))

    assert "may not write there" in refused("someone/model", *TOKEN)
    assert "may not write there" in refused("readers/model", *TOKEN)
    assert "the token may only read" in refused(REPO, "--token", "hf_reader")
    assert "the Hub refuses access (401)" in refused(REPO, "--token", "hf_unknown")
    assert "publishing needs a token" in refused(REPO)
    assert "the Hub has no such names" in refused("a/b/c", *TOKEN)
    hub.fault = lambda request: 403 if "/preupload/" in request.path else None
    assert "the Hub refuses access (403)" in refused("me/locked", *TOKEN)
    assert not (tmp_path / "out").exists()
    assert not writes(hub)


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_a_failed_upload_is_taken_up_again(
    hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path, where: str
) -> None:
    def fault(request: Request) -> int | None:
        return 501 if where in request.path and request.method in ("PUT", "POST") else None

    hub.fault = fault
    out = tmp_path / "out"
    message = refusal(online(source.folder, out, "--quiet", "--push-to-hub", REPO, *TOKEN))
    assert message == (
        f"{REPO}: the Hub answered 501; try again later. "
        f"The result in {out} is kept; go on with `marlin-convert push {out} {REPO}`."
    )
    assert pushed(hub) == {}
    hub.fault = lambda _: None
    hub.requests.clear()
    assert online("push", out, REPO, *TOKEN).code == 0
    assert pushed(hub) == contents(out)
    assert bool([r for r in hub.requests if r.method == "PUT"]) == (where == "/lfs/")  # not sent twice


def test_somebody_else_commits_transfer(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    """Between the look at what is there and the commit: refused by the Hub, and said."""
    assert online("push", out, REPO, *TOKEN).code == 0

    def commit_something(request: Request) -> None:
        if "/commit/" in request.path and "notes.txt" not in pushed(hub):
            hub.repositories[REPO].commit({**pushed(hub), "notes.txt": b"theirs"})

    hub.fault = commit_something
    (out / "README.md").write_text("A new card.")
    assert refusal(online("push", out, REPO, "--quiet", *TOKEN)).startswith(
        f"{REPO}: somebody else has committed to it meanwhile; look at what changed, and push again. "
    )
    assert pushed(hub)["notes.txt"] == b"theirs"
    assert pushed(hub)["README.md"] != b"A new card."
    assert online("push", out, REPO, *TOKEN).code == 0
    assert (pushed(hub)["notes.txt"], pushed(hub)["README.md"]) == (b"theirs", b"A new card.")


def test_a_hub_in_trouble(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    """Every address answers 503 the first time."""
    hub.fault = at_first(503)
    result = online("push", out, REPO, *TOKEN)
    assert result.code == 0, result.err
    assert pushed(hub) == contents(out)


def test_only_a_finished_result_is_pushed(hub: Hub, source: Source, online: Callable[..., Run]) -> None:
    result = online("push", source.folder, REPO, *TOKEN)
    assert result.code == 3
    assert "not a finished result of marlin-convert (it has no marlin_convert.json)" in result.err
    assert hub.requests == []


def test_offline(hub: Hub, out: Path, online: Callable[..., Run]) -> None:
    message = refusal(online("push", out, REPO, "--quiet", *TOKEN, env={"HF_HUB_OFFLINE": "1"}))
    assert "offline mode is on" in message
    assert hub.requests == []


def test_a_refused_source_leaves_no_repository(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    bad = write_source(tmp_path / "bad", two_layers(group_size=24))
    assert online(bad.folder, tmp_path / "out", "--push-to-hub", REPO, *TOKEN).code == 4
    assert not writes(hub)


@pytest.mark.parametrize("options", [["--private"], ["--branch", "x"], ["--dry-run", "--push-to-hub"]])
def test_options_that_do_not_fit(source: Source, online: Callable[..., Run], options: list[str]) -> None:
    assert online(source.folder, "out", *options).code == 2


READ_BACK = """
import json, sys
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("And the king said")["input_ids"]
print(json.dumps([config.quantization_config, tokens]))
"""


def test_transformers_reads_it_back(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    assert online(DEMO_FOLDER, tmp_path / "out", "--push-to-hub", REPO, "--quiet", *TOKEN).code == 0
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": SECRET, "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    read = [
        json.loads(subprocess.run(
            [sys.executable, "-c", READ_BACK, where], env={**os.environ, **settings}, cwd=tmp_path,
            capture_output=True, text=True, check=True, timeout=PATIENCE,
        ).stdout)
        for where in (REPO, str(tmp_path / "out"))
    ]  # fmt: skip
    assert read[0] == read[1]
    assert read[0][0]["checkpoint_format"] == "marlin"
    assert len(read[0][1]) > 3


@pytest.mark.parametrize("kind", ["a link out", "a link to a folder", "a pipe", "a link to nowhere"])
def test_what_is_no_file_of_the_result_is_not_published(
    hub: Hub, out: Path, online: Callable[..., Run], tmp_path: Path, kind: str
) -> None:
    """What a link leads to is somebody else's, perhaps a secret: refused by name, before anything is sent."""
    (tmp_path / "secret").write_text("mine")
    target = {"a link out": tmp_path / "secret", "a link to a folder": tmp_path, "a link to nowhere": tmp_path / "no"}
    if kind == "a pipe":
        os.mkfifo(out / "extra.json")
    else:
        (out / "extra.json").symlink_to(target[kind])
    before = len(hub.requests)
    result = online("push", out, REPO, *TOKEN)
    assert result.code == 3
    assert one_line(result).startswith(f"{out}/extra.json: it ")
    assert len(hub.requests) == before
    assert REPO not in hub.repositories
