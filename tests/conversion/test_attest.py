"""The in-toto statement about a result and its source: what it says, and where it is written."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert._version import __version__
from tests.support.cli import Run, one_line
from tests.support.gptq_checkpoints import write_source
from tests.support.hub_server import Hub
from tests.support.hub_sources import add_source, sha256


def test_the_statement(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """of a conversion, and of a proof: the same; every file by its SHA-256."""
    add_source(hub, tmp_path / "gptq")
    out, first, second = tmp_path / "out", tmp_path / "first.json", tmp_path / "second.json"
    assert online("org/gptq", out, "--device", "cpu", "--attest", first).code == 0
    assert online("verify", out, "--device", "cpu", "--attest", second).code == 0
    said = json.loads(first.read_text())
    assert said == json.loads(second.read_text())
    assert set(said) == {"_type", "subject", "predicateType", "predicate"}
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {s["name"]: s["digest"] for s in said["subject"]} == {
        path.relative_to(out).as_posix(): {"sha256": sha256(path.read_bytes())}
        for path in out.rglob("*")
        if path.is_file()
    }
    made = said["predicate"]["buildDefinition"]
    commit = hub.repositories["org/gptq"].refs["main"]
    assert made["externalParameters"]["revision"] == commit
    assert {d["name"]: d["digest"]["sha256"] for d in made["resolvedDependencies"]} == {
        path.relative_to(tmp_path / "gptq").as_posix(): sha256(path.read_bytes())
        for path in (tmp_path / "gptq").rglob("*")
        if path.is_file()
    }
    assert made["resolvedDependencies"][0]["uri"] == f"pkg:huggingface/org/gptq@{commit}#LICENSE"
    assert said["predicate"]["runDetails"]["builder"]["version"] == {"marlin-convert": __version__}


def test_in_totos_own_library_reads_the_statement(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """With no field that it does not know, neither in the statement nor in SLSA's predicate."""
    library = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1 import statement_pb2

    add_source(hub, tmp_path / "gptq")
    file = tmp_path / "statement.json"
    assert online("org/gptq", tmp_path / "out", "--device", "cpu", "--attest", file).code == 0
    said = json.loads(file.read_text())
    library.Statement.copy_from_pb(ParseDict(said, statement_pb2.Statement())).validate()
    assert ParseDict(said["predicate"], Provenance()).build_definition.build_type == "urn:marlin-convert:conversion:v1"


def test_a_statement_about_a_folder(tmp_path: Path, main: Callable[..., Run]) -> None:
    gptq, out, file = tmp_path / "gptq", tmp_path / "out", tmp_path / "statement.json"
    write_source(gptq)
    assert main(gptq, out, "--device", "cpu", "--attest", file).code == 0
    said = json.loads(file.read_text())
    names = {s["name"] for s in said["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert names == {"config.json", "model.safetensors"}
    noted = json.loads((out / "marlin_convert.json").read_text())
    assert noted["result_files"]["model.safetensors"] == sha256((out / "model.safetensors").read_bytes())
    assert main(gptq, tmp_path / "again", "--device", "cpu", "--attest", file).code == 0  # replaces an older one
    assert len(json.loads(file.read_text())["subject"]) == len(said["subject"])


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("no/such/file", "there is no folder {parent}; create it first"),
        ("file/inside", "there is no folder {parent}; create it first"),
        ("file", "it exists and is no statement; choose another name"),
        ("json", "it exists and is no statement; choose another name"),
        ("pipe", "it exists and is no statement; choose another name"),
        ("link", "it exists and is no statement; choose another name"),
        ("/dev/full", "it exists and is no statement; choose another name"),
        ("out/statement", "a statement is no file of {tmp}/out; choose a place outside it"),
        ("out/model.safetensors", "a statement is no file of {tmp}/out; choose a place outside it"),
        ("gptq/statement", "a statement is no file of {tmp}/gptq; choose a place outside it"),
    ],
)
def test_where_no_statement_is_written(tmp_path: Path, main: Callable[..., Run], where: str, why: str) -> None:
    """Said before any work; a device, a file of the user's, and source and result stay what they are."""
    write_source(tmp_path / "gptq")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "json").write_text('{"_type": "mine"}')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    names = sorted(path.name for path in tmp_path.iterdir())
    file = tmp_path / where
    result = main(tmp_path / "gptq", tmp_path / "out", "--device", "cpu", "--attest", file)
    assert result.code == 6
    assert one_line(result) == f"{file}: {why.format(parent=file.parent, tmp=tmp_path)}."
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert ((tmp_path / "file").read_text(), (tmp_path / "json").read_text()) == ("mine", '{"_type": "mine"}')
    assert sorted(path.name for path in (tmp_path / "gptq").iterdir()) == ["config.json", "model.safetensors"]
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    alone = main("verify", tmp_path / "gptq", "--attest", file)  # says where it cannot go first, too
    assert alone.code == 6


def test_a_statement_that_cannot_be_written_after_all(
    tmp_path: Path, main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "gptq")
    older = '{"_type": "https://in-toto.io/Statement/v1"}'
    (tmp_path / "file").write_text(older)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("marlin_convert.conversion.attest.replace_files", full)
    result = main(tmp_path / "gptq", tmp_path / "out", "--device", "cpu", "--attest", tmp_path / "file")
    assert result.code == 6
    assert "file: the statement cannot be written: No space left on device; the result is complete." in result.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "file").read_text() == older
