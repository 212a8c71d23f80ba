"""A result proves itself: `verify` with a result alone, and its report. Every kind of tampering is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.differences import difference
from tests.support.awq_checkpoints import AWQLayer, awq_config, write_awq
from tests.support.cli import SECRET, Run
from tests.support.ct_checkpoints import CTLayer, ct_config, write_ct
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, shuffled, two_layers, write_source
from tests.support.hub_server import Hub
from tests.support.hub_sources import EXTRA, add_source, sha256

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def out(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> Path:
    """A result of `org/gptq`, verified."""
    add_source(hub, tmp_path / "gptq")
    done = online("org/gptq", tmp_path / "out", "--verify", "--device", "cpu")
    assert done.code == 0, done.err
    return tmp_path / "out"


def test_a_result_in_a_folder(hub: Hub, online: Callable[..., Run], out: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    proof = online("verify", out, "--device", "cpu", "--json").json()
    assert (proof["ok"], proof["source"], proof["notes"]) == (True, "org/gptq", [])
    assert proof["source_commit"] == hub.repositories["org/gptq"].refs["main"]
    assert {file["name"] for file in proof["files"]} == {path.relative_to(out).as_posix() for path in before}
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shown = online("verify", out, "--device", "cpu").out
    assert f"is exactly what org/gptq at commit {proof['source_commit']} gives" in shown


@pytest.mark.parametrize(
    "changes",
    [{}, {"shards": 3}, {"g_idx": None, "shards": 2}, {"group_size": 64, "bits": 8}, {"act_order": True, "shards": 3}],
    ids=["plain", "shards", "mixed shards", "8 bits", "act-order"],
)
def test_both_on_the_hub(hub: Hub, online: Callable[..., Run], tmp_path: Path, changes: dict[str, Any]) -> None:
    """By Range requests: no weight file is fetched as a whole, and the cache gets none."""
    settings = dict(changes)
    if settings.pop("act_order", False):
        layers = {Q: GPTQLayer(256, 512, g_idx=shuffled(256))}
        quantization = quantization_config(desc_act=True)
        write_source(tmp_path / "gptq", layers, extra=EXTRA, quantization=quantization, shards=3)
        hub.add("org/gptq", tmp_path / "gptq")
    else:
        said = {key: settings[key] for key in ("bits", "group_size") if key in settings}
        settings["quantization"] = quantization_config(**said)
        if settings.get("bits") == 8:
            settings["stored_zero"] = 127
        add_source(hub, tmp_path / "gptq", **settings)
    made = online("org/gptq", tmp_path / "out", "--device", "cpu", "--max-shard-size", "40KB")
    assert made.code == 0, made.err
    hub.add("me/marlin", tmp_path / "out")
    hub.requests.clear()
    home = tmp_path / "fresh"
    done = online("verify", "me/marlin", "--device", "cpu", "--json", env={"HF_HOME": str(home)})
    assert done.code == 0, done.err + done.out
    weights = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert weights
    assert all(r.range for r in weights)
    stored = sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and not path.is_symlink())
    assert stored < 40_000  # the card, configs and the like
    assert done.json()["bytes_read"] > 100_000


@pytest.mark.parametrize("kind", ["compressed-tensors", "compressed-tensors, act-order", "awq", "awq, gemv"])
def test_sources_of_other_formats(hub: Hub, online: Callable[..., Run], tmp_path: Path, kind: str) -> None:
    """What a source's layer is read from is brought, whatever its tensors are called."""
    if kind.startswith("compressed-tensors"):
        g_idx = shuffled(256) if kind.endswith("act-order") else None
        write_ct(tmp_path / "source", CTLayer(g_idx=g_idx, bias=True), ct_config())
    else:
        layout = "gemv" if kind.endswith("gemv") else "gemm"
        write_awq(tmp_path / "source", AWQLayer(layout=layout, bias=True), awq_config(version=layout))
    hub.add("org/source", tmp_path / "source")
    assert online("org/source", tmp_path / "out", "--device", "cpu").code == 0
    hub.add("me/marlin", tmp_path / "out")
    done = online("verify", "me/marlin", "--device", "cpu", env={"HF_HOME": str(tmp_path / "fresh")})
    assert done.code == 0, done.out + done.err


def test_a_published_result(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """Its card names the repository; its report has every SHA-256."""
    from tests.support.hub_server import Account

    hub.accounts[SECRET] = Account("me")
    add_source(hub, tmp_path / "gptq")
    options = ["--push-to-hub", "me/marlin", "--device", "cpu", "--quant-method", "marlin"]
    done = online("org/gptq", tmp_path / "out", *options, env={"HF_TOKEN": SECRET})
    assert done.code == 0, done.err
    files = hub.repositories["me/marlin"].commits[hub.repositories["me/marlin"].refs["main"]]
    noted = json.loads(files["marlin_convert.json"])  # type: ignore[arg-type]
    contents = {name: content for name, content in files.items() if isinstance(content, bytes)}
    assert noted["result_files"] == {
        name: sha256(content)
        for name, content in sorted(contents.items())
        if name not in ("marlin_convert.json", ".gitattributes")
    }
    assert b"`marlin-convert verify me/marlin`" in contents["README.md"]
    assert online("verify", "me/marlin", "--device", "cpu").code == 0


def test_what_the_report_says_of_files(hub: Hub, out: Path, tmp_path: Path) -> None:
    """Of the source's weights, what the Hub says; of the result's, nothing: nobody asked for it."""
    noted = json.loads((out / "marlin_convert.json").read_text())
    gptq = tmp_path / "gptq"
    assert noted["source_files"] == {
        name: sha256((gptq / name).read_bytes())
        for name in sorted(path.relative_to(gptq).as_posix() for path in gptq.rglob("*") if path.is_file())
    }
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"marlin_convert.json"}
    assert noted["result_files"] == {
        name: None if name.endswith(".safetensors") else sha256((out / name).read_bytes()) for name in sorted(files)
    }
    assert noted["options"] == {
        "format": "auto", "zero_points": None, "max_shard_size": "5GB", "quant_method": "gptq", "verify": True,
        "published_as": None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Tampering


def tensors(out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit tensors in their places, so that nothing but these bytes changes."""
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    before = load_file(path)
    after = {name: tensor.clone() for name, tensor in before.items()}
    edit(after)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in after.items():
        begin, end = header[name]["data_offsets"]
        content[8 + length + begin : 8 + length + end] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)


def text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def edit(out: Path) -> None:
        content = (out / name).read_text()
        assert old in content
        (out / name).write_text(content.replace(old, new, 1))

    return edit


def settings(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def change(out: Path) -> None:
        value = json.loads((out / name).read_text())
        edit(value)
        (out / name).write_text(json.dumps(value, indent=2) + "\n")

    return change


def flip_scale(out: Path) -> None:
    tensors(out, lambda t: t[f"{Q}.s"].view(torch.int16)[1, 7].bitwise_xor_(1))


def flip_code(out: Path) -> None:
    tensors(out, lambda t: t[f"{DOWN}.B"][3, 11].bitwise_xor_(1 << 9))


def change_bias(out: Path) -> None:
    tensors(out, lambda t: t[f"{Q}.bias"][5].add_(1))


def save_again(out: Path) -> None:
    """The same tensors, by another writer."""
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt", "x": "y"})


def note(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return settings("marlin_convert.json", edit)


def forged_hash(noted: dict[str, Any]) -> None:
    noted["result_files"]["README.md"] = "0" * 64


def forged_source(noted: dict[str, Any]) -> None:
    noted["source_files"]["model.safetensors"] = "0" * 64


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "scale": (flip_scale, "the scale of group 1, column"),
    "code": (flip_code, DOWN),
    "bias": (change_bias, f"{Q}.bias: byte 1"),
    "another writer": (save_again, "model.safetensors: its header is not the one that the conversion writes"),
    "config": (settings("config.json", lambda c: c.update(rope_theta=5.0)),
               "config.json: rope_theta is 5.0, and should not be there"),
    "quantization": (settings("quantize_config.json", lambda c: c.update(bits=8)),
                     "quantize_config.json: bits is 8, not 4"),
    "card": (text("README.md", "license: mit", "license: gpl"), "README.md: line 4 is 'license: gpl', not"),
    "card's verdict": (text("README.md", "equal | 2 of 2", "equal | 3 of 3"), "README.md: line"),
    "tokenizer": (text("tokenizer.json", "1", "2"), "tokenizer.json: it differs from the source's"),
    "code beside": (text("code/model.py", "1", "2"), "code/model.py: it differs from the source's"),
    "one more file": (lambda out: (out / "modeling.py").write_text("x"),
                      "modeling.py: it is not a file that the conversion writes"),
    "one file less": (lambda out: (out / "LICENSE").unlink(), "LICENSE: it is missing"),
    "report": (note(lambda n: n.update(bytes_in=7)), "marlin_convert.json: bytes_in is 7, not"),
    "report's hash": (note(forged_hash), "marlin_convert.json: result_files.README.md is '0000"),
    "report's hash of the source": (note(forged_source), "marlin_convert.json: source_files.model.safetensors is"),
    "proof": (settings("verify.json", lambda v: v["layers"][0].update(K=7)), "verify.json: layers"),
    "a large error": (settings("verify.json", lambda v: v["layers"][0].update(relative_error=0.5)),
                      "verify.json: model.layers.0"),
    "no proof": (lambda out: (out / "verify.json").unlink(), "verify.json: it is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_tampering_is_found(online: Callable[..., Run], out: Path, kind: str, tmp_path: Path) -> None:
    change, said = TAMPERED[kind]
    change(out)
    statement = tmp_path / "statement.json"
    done = online("verify", out, "--device", "cpu", "--attest", statement)
    assert done.code == 7, done.err
    assert said in done.out
    assert "is not exactly what org/gptq" in done.out
    assert not statement.exists()


def test_another_source_than_it_says(hub: Hub, online: Callable[..., Run], out: Path, tmp_path: Path) -> None:
    """A result of one commit that claims another."""
    shutil.rmtree(tmp_path / "gptq")
    write_source(tmp_path / "gptq", two_layers(bias=True, seed=9), extra=EXTRA)
    files = {p.relative_to(tmp_path / "gptq").as_posix(): p for p in (tmp_path / "gptq").rglob("*") if p.is_file()}
    commit = hub.repositories["org/gptq"].commit(dict(files))
    note(lambda n: n.update(source_commit=commit))(out)
    done = online("verify", out, "--device", "cpu", "--json")
    assert done.code == 7
    assert not any(layer["ok"] for layer in done.json()["verification"]["layers"])


def test_json_of_a_difference(online: Callable[..., Run], out: Path) -> None:
    flip_scale(out)
    done = online("verify", out, "--device", "cpu", "--json")
    assert (done.code, done.err) == (7, "")
    assert done.json()["ok"] is False


def test_results_that_do_not_say_enough(hub: Hub, online: Callable[..., Run], out: Path, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda out: (out / "marlin_convert.json").unlink(), "it has no marlin_convert.json"),
        (note(lambda n: n.update(source_commit=None)), "it was made from a folder, 'org/gptq'"),
        (note(lambda n: n.update(source="../../etc")), "names '../../etc' at"),
        (
            note(lambda n: n.update(source_commit="main")),
            "at 'main' as its source, which is not a repository and a commit",
        ),
        (note(lambda n: n.pop("options")), "it is of an earlier version"),
        (note(lambda n: n["options"].update(format="x")), "the options in its marlin_convert.json are not valid"),
    ]
    for number, (change, said) in enumerate(cases):
        folder = tmp_path / f"case{number}"
        shutil.copytree(out, folder)
        change(folder)
        done = online("verify", folder, "--device", "cpu")
        assert (done.code, done.err.count("\n")) == (3, 1), done.err
        assert said in done.err
    hub.repositories.clear()
    gone = online("verify", out, "--device", "cpu")
    assert gone.code == 8
    assert "org/gptq: no such repository" in gone.err


def test_another_version_made_it(online: Callable[..., Run], out: Path) -> None:
    """What versions may write in different ways is not compared, and that is said; the weights are."""
    note(lambda n: n.update(marlin_convert="0.0.9"))(out)
    text("README.md", "Nothing was quantized again", "Not quantized again")(out)
    done = online("verify", out, "--device", "cpu")
    assert done.code == 0, done.out
    assert "it was made by marlin-convert '0.0.9'" in done.out
    flip_code(out)
    assert online("verify", out, "--device", "cpu").code == 7


def test_a_result_verified_later(online: Callable[..., Run], hub: Hub, tmp_path: Path) -> None:
    """verify.json and the card's verdict came after the report, and it knows their SHA-256."""
    gptq = tmp_path / "gptq"
    add_source(hub, gptq)
    out = tmp_path / "out"
    assert online("org/gptq", out, "--device", "cpu").code == 0
    assert online("verify", "org/gptq", out, "--device", "cpu").code == 0
    noted = json.loads((out / "marlin_convert.json").read_text())
    for name in ("README.md", "verify.json"):
        assert noted["result_files"][name] == sha256((out / name).read_bytes())
    assert online("verify", out, "--device", "cpu").code == 0


def test_where_things_differ() -> None:
    assert difference(b'{"a": {"b": [1]}}', b'{"a": {"b": [1]}}') is None
    assert difference(b'{"a": {"b": 1}}', b'{"a": {"b": 1.0}}') == "a.b is 1.0, not 1"
    assert difference(b'{"a": 1}', b"{}") == "a is missing"
    assert difference(b'{"a": 1}', b'{"a":  1}') == "line 1 is '{\"a\":  1}', not '{\"a\": 1}'"
    assert difference(b"x\ny\n", b"x\nz\n") == "line 2 is 'z', not 'y'"
    assert difference(b"x\n", b"x\n\n") == "line 2 is '', not None"
    assert difference(b"x\n", b"x\r\n") == "its line ends differ"
