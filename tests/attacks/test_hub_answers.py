"""A Hub that lies: nothing that it says becomes a path, a size or a hash before it was looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.errors import HubError
from marlin_convert.hub import answers
from tests.support import hub_server
from tests.support.cli import SECRET, Run, refusal
from tests.support.gptq_checkpoints import Source
from tests.support.hub_server import Account, Hub, Request

REPO = "someone/model-gptq"


@pytest.fixture
def repository(hub: Hub, source: Source) -> None:
    hub.add(REPO, source.folder)


def listing(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Request, Any], Any]:
    """A `say` that changes what a repository lists."""
    return lambda request, answer: change(answer) if "/tree/" in request.path else answer


def entry(**changes: Any) -> dict[str, Any]:
    return {"type": "file", "path": "more.txt", "size": 0, "oid": "0" * 40, **changes}


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


NAMES = (
    "/victim.txt", "../victim.txt", "a/../../victim.txt", "/", "//a", "", ".", "..", "a//b", "a/", "./a", "a/./b",
    "..\\victim.txt", "C:\\victim.txt", "a\x00b", "a\nb", "\x1b[2J", "a\x7f", "\x9b2J", "\u202egnp.txt", "\ud800",
    "n" * 256, "n/" * 600 + "n", 5, None, True, ["a"], {"a": 1},
)  # fmt: skip


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("arguments", [["--dry-run"], ["{out}"], ["{out}", "--low-disk"]], ids=" ".join)
def test_a_listed_name_that_leads_outside(
    hub: Hub, online: Callable[..., Run], tmp_path: Path, arguments: list[str]
) -> None:
    """The whole way, for the kinds that did harm: nothing outside the cache changes, nothing is created."""
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    before = everything(tmp_path)
    given = [a.format(out=tmp_path / "out") for a in arguments]
    for name in (str(victim), str(tmp_path / "new.safetensors"), "../victim.txt"):
        hub.say = listing(lambda entries, name=name: [*entries, entry(path=name)])  # type: ignore[misc]
        message = refusal(online(REPO, *given))
        assert message == (
            f"{REPO}: what answers at {hub.url} is not a Hugging Face Hub (it lists a file {shown(name)}); "
            "check the proxy settings, and HF_ENDPOINT."
        )
    assert everything(tmp_path) == before


def shown(name: str) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:60]}…"


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("arguments", [[], ["--low-disk"]], ids=" ".join)
def test_a_commit_or_a_hash_that_leads_outside(
    hub: Hub, online: Callable[..., Run], tmp_path: Path, arguments: list[str]
) -> None:
    def commit(value: str) -> Callable[[Request, Any], Any]:
        return lambda request, answer: {**answer, "sha": value} if isinstance(answer, dict) else answer

    def hashes(value: str) -> Callable[[Request, Any], Any]:
        return listing(lambda entries: [e | {"lfs": {**e["lfs"], "oid": value}} if "lfs" in e else e for e in entries])

    before = everything(tmp_path)
    for wrong in (str(tmp_path / "pwn"), "../../../../pwn"):
        for say in (commit(wrong), hashes(wrong)):
            hub.say = say
            assert "is not a Hugging Face Hub" in refusal(online(REPO, tmp_path / "out", *arguments))
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("repository")
def test_headers_of_an_answer_are_no_paths(
    hub: Hub, online: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names that the Hub's own client gives to files in the cache come from ETag and X-Repo-Commit."""
    send = hub_server.Handler.send

    def lie(self: Any, status: int, body: bytes, headers: dict[str, str], request: Request | None = None) -> None:
        lies = {"ETag": f'"{tmp_path / "pwn"}"', "X-Linked-ETag": f'"{tmp_path / "pwn"}"', "X-Repo-Commit": "../../pwn"}
        send(self, status, body, {**headers, **lies}, request)

    monkeypatch.setattr(hub_server.Handler, "send", lie)
    assert online(REPO, tmp_path / "out", "--quiet").code == 0
    assert not list(tmp_path.rglob("pwn*"))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, answers.RemoteFile]]:
    """What becomes of a listing that has these entries."""

    def listed(*entries: Any) -> dict[str, answers.RemoteFile]:
        monkeypatch.setattr(answers, "_ask", lambda *_, **__: (list(entries), None))
        return answers.files_of(REPO, "1" * 40, None)

    return listed


def test_what_a_hub_lists(listed: Callable[..., dict[str, answers.RemoteFile]]) -> None:
    lfs = {"oid": "a" * 64, "size": 7, "pointerSize": 130}
    found = listed(
        {"type": "directory", "path": "sub", "oid": "2" * 40, "size": 0},
        entry(path="sub/größe 1.txt", size=3),
        entry(path=".gitattributes"),
        entry(path="model.safetensors", size=7, lfs=lfs, xetHash="b" * 64),
    )
    assert found == {
        "sub/größe 1.txt": answers.RemoteFile("sub/größe 1.txt", 3, "0" * 40),
        ".gitattributes": answers.RemoteFile(".gitattributes", 0, "0" * 40),
        "model.safetensors": answers.RemoteFile("model.safetensors", 7, "a" * 64, "b" * 64),
    }


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_no_file_of_a_repository_has(listed: Callable[..., object], name: object) -> None:
    with pytest.raises(HubError, match="is not a Hugging Face Hub"):
        listed(entry(), entry(path=name))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -1}, {"size": "1"}, {"size": None}, {"size": True}, {"size": 1.0}, {"size": 2**44 + 1},
        {"size": 2**63}, {"size": [1]}, {"oid": None}, {"oid": 5}, {"oid": "0" * 39}, {"oid": "0" * 64},
        {"oid": "/" + "0" * 39}, {"oid": "G" * 40}, {"oid": "0" * 40 + "\n"}, {"lfs": []}, {"lfs": {}}, {"lfs": "x"},
        {"lfs": {"oid": "0" * 40}}, {"lfs": {"oid": "../" + "0" * 61}}, {"lfs": {"oid": "A" * 64}},
        {"lfs": {"oid": None}}, {"xetHash": 5}, {"xetHash": "../x"}, {"type": "link"}, {"type": None}, {"type": []},
    ],
    ids=ascii,
)  # fmt: skip
def test_sizes_hashes_and_types_that_no_hub_gives(listed: Callable[..., object], wrong: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="is not a Hugging Face Hub"):
        listed(entry(**wrong))


@pytest.mark.parametrize("wrong", [5, None, "more.txt", [], [entry()], {}], ids=ascii)
def test_entries_that_are_none(listed: Callable[..., object], wrong: object) -> None:
    with pytest.raises(HubError, match="is not a Hugging Face Hub"):
        listed(wrong)


def test_names_that_exclude_each_other(listed: Callable[..., object]) -> None:
    for names in (("a", "a"), ("a", "a/b"), ("a/b/c/d", "a/b")):
        with pytest.raises(HubError, match="is not a Hugging Face Hub"):
            listed(*(entry(path=name) for name in names))


def test_a_list_without_an_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_FILES", 10)
    count = iter(range(100))
    monkeypatch.setattr(answers, "_ask", lambda *_, **__: ([entry(path=f"{next(count)}")], "next"))
    with pytest.raises(HubError, match="more than 10 files"):
        answers.files_of(REPO, "1" * 40, None)
    assert next(count) == 11
    monkeypatch.setattr(answers, "_ask", lambda *_, **__: ([], "next"))
    with pytest.raises(HubError, match="without an end"):
        answers.files_of(REPO, "1" * 40, None)


GARBAGE = (b"[]", b"5", b"null", b"{}", b"<html>", b'[{"type":"fi', b"\xff\xfe", b"[" * 100_000, b"1" * 5000)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("where", ["/api/models/someone/model-gptq", "/tree/"])
def test_answers_of_other_kinds(hub: Hub, online: Callable[..., Run], where: str) -> None:
    for said in GARBAGE:
        hub.say = lambda request, answer, said=said: (  # type: ignore[misc]
            said if (where in request.path if where == "/tree/" else request.path == where) else answer
        )
        if (where, said) == ("/tree/", b"[]"):  # a repository of no files
            assert online(REPO, "--dry-run").code == 3
        else:
            assert "is not a Hugging Face Hub" in refusal(online(REPO, "--dry-run"))


@pytest.mark.usefixtures("repository")
def test_an_answer_that_is_too_long(hub: Hub, online: Callable[..., Run]) -> None:
    hub.say = lambda request, answer: b" " * ((16 << 20) + 1) if "/tree/" in request.path else answer
    assert f"its answer is longer than {16 << 20} bytes" in refusal(online(REPO, "--dry-run"))


@pytest.mark.parametrize("token", [None, SECRET])
def test_a_list_that_goes_on_elsewhere(
    hub: Hub, source: Source, online: Callable[..., Run], token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half comes from another server, which is told no token."""
    hub.add(REPO, source.folder)
    with Hub() as other:
        other.repositories = hub.repositories
        send = hub_server.Handler.send

        def half(self: Any, status: int, body: bytes, headers: dict[str, str], request: Request | None = None) -> None:
            if self.hub is hub and "/tree/" in self.path and status == 200:
                headers = {**headers, "Link": f'<{other.url}{self.path.replace("?", "?next=1&")}>; rel="next"'}
            send(self, status, body, headers, request)

        monkeypatch.setattr(hub_server.Handler, "send", half)
        hub.say = lambda request, answer: answer[:2] if "/tree/" in request.path else answer
        other.say = lambda request, answer: answer[2:] if "/tree/" in request.path else answer
        result = online(REPO, "--dry-run", "--json", *(["--token", token] if token else []))
        assert result.json()["convertible"], result.err
        assert {r.token for r in hub.requests if "/tree/" in r.path} == {token}
        assert [r.token for r in other.requests] == [None]


@pytest.mark.parametrize(
    "who",
    [[], 5, {}, {"name": 5}, {"name": "../x"}, {"name": "me", "orgs": 5}, {"name": "me", "orgs": [5]},
     {"name": "me", "auth": 5}, {"name": "me", "auth": {"accessToken": {"role": {}}}}],
    ids=ascii,
)  # fmt: skip
def test_an_account_that_is_none(
    hub: Hub, source: Source, online: Callable[..., Run], tmp_path: Path, who: object
) -> None:
    hub.accounts[SECRET] = Account("me")
    hub.say = lambda request, answer: who if "whoami" in request.path else answer
    result = online(source.folder, tmp_path / "out", "--push-to-hub", "me/x", "--token", SECRET)
    assert "is not a Hugging Face Hub" in refusal(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("repository")
def test_more_than_was_listed_comes(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """It is not written to the disk, however much it is."""
    hub.say = listing(lambda entries: [e | {"size": 1} if e["path"] == "config.json" else e for e in entries])
    message = refusal(online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache"))
    assert message == "more comes of config.json than the 1 bytes that the Hub describes."
    assert all(p.stat().st_size <= 1 for p in (tmp_path / "cache").rglob("*") if p.is_file())


@pytest.mark.usefixtures("repository")
def test_small_files_have_their_hash(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    hub.alter = lambda request, content: (
        content.replace(b"{", b"[", 1) if request.path.endswith("/config.json") else content
    )
    assert refusal(online(REPO, tmp_path / "out")).startswith(
        f"{REPO}: what comes as config.json is not what the Hub describes (its hash is another), twice"
    )
