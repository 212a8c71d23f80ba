"""What lies beside the model's own weights: it travels, both ways, or is refused by name; what leads out of the source,
and what changes while it is read, is never copied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion import convert as conversion
from marlin_convert.conversion import pair
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.files import copy_files
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import OutputError, SourceError
from marlin_convert.options import Options
from tests.support.cli import Run
from tests.support.gptq_checkpoints import Source, two_layers, write_source

CPU = Options(device="cpu")


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WAYS: dict[str, Callable[[Path, Path, Options], object]] = {
    "convert": convert,
    "dry run": lambda folder, out, options: conversion.plan_only(folder, options),
    "restore": lambda folder, out, options: restore(folder, out, max_shard_size=options.max_shard_size),
}


def refusal(how: str, folder: Path, out: Path, options: Options = CPU) -> str:
    """What the SourceError says by which `folder` is refused; nothing is left at `out`."""
    with pytest.raises(SourceError) as error:
        WAYS[how](folder, out, options)
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# Weights that are not the model's own


def with_others(folder: Path, *, shards: int) -> dict[str, bytes]:
    """A source, and beside its weights: a draft model's layer, a pipeline's module, an adapter, and others' kinds."""
    write_source(folder, shards=shards)
    names = ["mtp.safetensors", "2_Dense/model.safetensors", "adapter_model.safetensors", "deep/er/x.safetensors"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"mtp.fc.weight": torch.randn(4, 4)}, folder / name, {"format": "pt"})
    for name in ("training_args.bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx", "x.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")
        names.append(name)
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("size", ["5GB", "120KB"])
def test_weights_of_something_else(tmp_path: Path, run: Callable[..., Run], shards: int, size: str) -> None:
    others = with_others(tmp_path / "source", shards=shards)
    plan = run(tmp_path / "source", "--dry-run")
    beside = run(tmp_path / "source", "--dry-run", "--json").json()["weights_beside"]
    assert {entry["name"]: entry["bytes"] for entry in beside} == {name: len(data) for name, data in others.items()}
    for name in others:
        assert f"beside the model's weights, copied as it is: {name} (" in plan.out
    report = convert(tmp_path / "source", tmp_path / "out", Options(device="cpu", verify=True, max_shard_size=size))
    assert report.verification is not None
    assert json.loads((tmp_path / "out" / "marlin_convert.json").read_text())["weights_beside"] == sorted(others)
    restore(tmp_path / "out", tmp_path / "back", max_shard_size=size)
    for folder in (tmp_path / "out", tmp_path / "back"):
        found = files(folder)
        assert {name: found.get(name) for name in others} == others
        # Engines that find no index read all safetensors files: only a source that had none is read so.
        assert ("model.safetensors.index.json" in found) == (shards > 1 or size != "5GB")
        with Checkpoint(folder) as checkpoint:
            assert set(checkpoint.weights_beside) == set(others)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", "model.safetensors"),  # engines would take it for the model
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors/notes.txt", "model.safetensors/notes.txt"),
        ("README.md/notes.txt", "README.md/notes.txt"),
        ("marlin_convert.json/x", "marlin_convert.json/x"),
    ],
)
@pytest.mark.parametrize("how", WAYS)
def test_names_that_the_result_needs(tmp_path: Path, name: str, wanted: str, how: str) -> None:
    """The model's own weights have another name here, by an index."""
    folder = tmp_path / "source"
    if how == "restore":
        write_source(tmp_path / "gptq")
        convert(tmp_path / "gptq", folder, CPU)
        (folder / "README.md").unlink()
        (folder / "marlin_convert.json").unlink()
    else:
        write_source(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "own.safetensors")})
    )
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("somebody's")
    options = Options(device="cpu", max_shard_size="120KB" if "00001" in name else "5GB")
    assert refusal(how, folder, tmp_path / "out", options) == (
        f"{folder / wanted}: it is not one of the model's own files, and would take the place of one in the result; "
        "give it another name, or remove it."
    )


def test_a_disk_that_does_not_tell_two_names_apart(source: Source, tmp_path: Path) -> None:
    (source.folder / "Config.json").write_text("somebody's")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "Config.json").write_text("ours")  # as such a disk answers for config.json
    with Checkpoint(source.folder) as checkpoint, pytest.raises(OutputError, match="this disk does not tell it from"):
        copy_files(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "Config.json").read_text() == "ours"


# ---------------------------------------------------------------------------------------------------------------
# Links, and what is no file


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "sub/notes.txt", "README.md", "model.safetensors", "a.bin"])
@pytest.mark.parametrize("target", ["absolute", "relative", "through another link"])
def test_links_out_of_the_source_are_refused(source: Source, tmp_path: Path, how: str, name: str, target: str) -> None:
    folder, path, secret = source.folder, source.folder / name, tmp_path / "secret"
    if how == "restore":
        convert(folder, tmp_path / "marlin", CPU)
        folder, path = tmp_path / "marlin", tmp_path / "marlin" / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(secret)
    else:
        secret.write_text("{}")
    (tmp_path / "other").symlink_to(secret)
    leads = {
        "absolute": secret,
        "relative": Path(os.path.relpath(secret, path.parent)),
        "through another link": tmp_path / "other",
    }
    path.symlink_to(leads[target])
    assert refusal(how, folder, tmp_path / "out") == (
        f"{path}: it is a link to {secret}, outside the folder; put the file there, or remove it."
    )


def test_links_within_the_source_are_files(source: Source, tmp_path: Path) -> None:
    (source.folder / "tokenizer.json").write_text("{}")
    (source.folder / "sub").mkdir()
    (source.folder / "sub" / "link.json").symlink_to("../tokenizer.json")
    (tmp_path / "elsewhere").symlink_to(source.folder)  # where the source lies is the user's own business
    convert(tmp_path / "elsewhere", tmp_path / "out", CPU)
    copied = tmp_path / "out" / "sub" / "link.json"
    assert (copied.read_text(), copied.is_symlink()) == ("{}", False)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder_link(path: Path) -> None:
    (path.parent / "real").mkdir()
    (path.parent / "real" / "file").write_text("would be lost")
    path.symlink_to("real")


@pytest.mark.parametrize("make", [make_pipe, make_loop, make_broken_link, make_device_link, make_folder_link])
@pytest.mark.parametrize("name", ["tokenizer.json", "sub/2_Dense", "a.bin", "config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["convert", "dry run"])
def test_only_regular_files_are_read(
    source: Source, tmp_path: Path, make: Callable[[Path], None], name: str, how: str
) -> None:
    path = source.folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    message = refusal(how, source.folder, tmp_path / "out")
    if not (make is make_folder_link and name == "model.safetensors"):  # there, no weights are found
        assert message.startswith(f"{path}: ")


# ---------------------------------------------------------------------------------------------------------------
# Sources that change while they are read


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def write_again(path: Path) -> None:
    """The same bytes; a writer that has not come to the end may have changed the others."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    """Another file of the same size and time."""
    info = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.rename(path)


def remove(path: Path) -> None:
    path.unlink()


def before(
    monkeypatch: pytest.MonkeyPatch, moment: str, change: Callable[[], object], module: Any = conversion
) -> None:
    """Let `change` happen before the step `moment` of a module, the conversion's own."""
    step = getattr(module, moment)
    done: list[Any] = []

    def late(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(change())
        return step(*arguments, **options)

    monkeypatch.setattr(module, moment, late)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model-00002-of-00002.safetensors", "sub/a.bin"])
@pytest.mark.parametrize("change", [grow, write_again, replace, remove])
@pytest.mark.parametrize("moment", ["make_plan", "write_tensors", "copy_files", "verify", "model_card"])
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None], moment: str
) -> None:
    extra = {"tokenizer.json": "{}", "sub/a.bin": "data"}
    source = write_source(tmp_path / "source", shards=2, extra=extra)
    before(monkeypatch, moment, lambda: change(source.folder / name))
    with pytest.raises(SourceError) as error:
        convert(source.folder, tmp_path / "out", Options(device="cpu", verify=True))
    assert str(error.value) == (
        f"{source.folder / name}: it {'went away' if change is remove else 'changed'} while the folder was read, which "
        "would give a mixture of old and new; run it again when nothing is writing there."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_goes_wrong_because_of_a_change_is_said_to_be_one(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights become a shorter file with other rows in other groups; whatever that does to whoever reads it."""
    path = source.folder / "model.safetensors"

    def change() -> None:
        write_source(tmp_path / "other", two_layers(group_size=-1))
        path.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())

    before(monkeypatch, "write_tensors", change)
    with pytest.raises(SourceError, match="it changed while the folder was read"):
        convert(source.folder, tmp_path / "out", Options(device="cpu", verify=True))


@pytest.mark.parametrize("whose", ["source", "out"])
def test_verification_of_what_changes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    convert(source.folder, tmp_path / "out", CPU)
    before(monkeypatch, "verify", lambda: grow(tmp_path / whose / "config.json"), pair)
    with pytest.raises(SourceError, match=f"{tmp_path / whose}/config.json: it changed while"):
        verify_pair(source.folder, tmp_path / "out", "cpu")
    assert not (tmp_path / "out" / "verify.json").exists()


@pytest.mark.parametrize("change", [grow, replace, remove])
def test_restoring_what_changes(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    convert(source.folder, tmp_path / "out", CPU)
    monkeypatch.setattr(
        "marlin_convert.conversion.restore._write_configs",
        lambda *_, **__: change(tmp_path / "out" / "model.safetensors"),
    )
    with pytest.raises(SourceError, match=r"model\.safetensors: it (changed|went away) while"):
        restore(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()
