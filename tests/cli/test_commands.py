"""The program through its entry point: exit codes, messages, JSON documents, progress, help, and silence."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import marlin_convert
from marlin_convert.cli import commands
from marlin_convert.errors import EXIT_CODES
from marlin_convert.interrupts import Interrupted
from tests.support.cli import PATIENCE, Run, validate
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, two_layers, write_source

PROGRAM = [sys.executable, "-m", "marlin_convert.cli"]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
REPORTS = {"marlin_convert.json", "verify.json"}


def document(result: Run) -> dict[str, Any]:
    """The one JSON document on standard output: strict JSON, and nothing before or after it."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    value = json.loads(result.out, parse_constant=no_constant)
    validate(value)
    assert isinstance(value, dict)
    assert "Traceback" not in result.err
    return value


def one_line(result: Run) -> str:
    """The one line of an error, without the program's name; nothing went to standard output."""
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("marlin-convert: ")
    return result.err.removeprefix("marlin-convert: ").rstrip("\n")


def flip_bit(file: Path) -> None:
    """Change the last byte of a file: a byte of its last tensor."""
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


# ---------------------------------------------------------------------------------------------------------------
# Exit codes, one test for each that is documented


def test_0_success(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--device", "cpu", "--verify")
    assert result.code == 0, result.err
    assert "2 layers converted, 3 tensors copied" in result.out
    lines = result.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["result", "verified", "time", "read by", "next"]
    assert {len(re.match(r"\w+( by)? +", line)[0]) for line in lines} == {10}  # type: ignore[index]
    assert lines[0].startswith(f"result    {tmp_path / 'out'} (model.safetensors): original Marlin format, 2 layers")
    stage = r"\d+\.\d s \([\d.]+ [kMG]?B/s\)"
    assert re.fullmatch(rf"time +converting {stage}, verifying {stage}, \d+\.\d s in all, .*", lines[2])
    assert lines[4].endswith(f'marlin-convert generate {tmp_path / "out"} --prompt "…"   (on this CPU, slowly)')
    assert "2 of 2 layers exactly equal, 3 other tensors byte for byte" in result.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == REPORTS | {
        "model.safetensors", "config.json", "quantize_config.json", "README.md"
    }  # fmt: skip


def test_0_the_engines_are_those_that_read_it(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    plain = run(source.folder, tmp_path / "a", "--dry-run")
    assert (
        "original Marlin format, which vLLM 0.26 to 0.33 and Transformers 5 with marlin-convert, and vLLM 0.3.3"
        in plain.out
    )
    assert "vLLM computes" not in plain.out
    layers = {f"model.layers.0.mlp.experts.{i}.up_proj": GPTQLayer(bias=True) for i in range(3)}
    experts = write_source(tmp_path / "experts", layers)
    for command in ([experts.folder, "--dry-run"], [experts.folder, tmp_path / "out"]):
        said = run(*command).out
        assert "vLLM 0.26 to 0.33 and Transformers 5 with marlin-convert" in said
        assert "vLLM computes experts with biases where marlin-convert's CUDA kernels are built: 3 layers" in said


def test_0_an_engine_on_several_ranks(run: Callable[..., Run], tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.o_proj": GPTQLayer(K=256, N=256, g_idx=np.arange(256)[::-1] // 128),
        "model.layers.0.mlp.down_proj": GPTQLayer(K=512, N=256),
    }
    source = write_source(tmp_path / "source", layers)
    ask = [source.folder, "--dry-run", "--engine", "vllm"]
    one = run(*ask)
    assert "vLLM 0.26 to 0.33 with marlin-convert, 1 rank: takes every layer" in one.out, one.err
    two = run(*ask, "--tensor-parallel", 2).out
    assert "vLLM 0.26 to 0.33 with marlin-convert, 2 ranks: takes every layer" in two
    assert "act-order in rows that 2 ranks share out: model.layers.0.self_attn.o_proj: exact on marlin-convert's" in two
    assert "refuses 2 of 2 layers" in run(*ask, "--tensor-parallel", 3).out
    told = json.loads(run(*ask, "--tensor-parallel", 2, "--json").out)["tensor_parallel"]
    assert told["ranks"] == 2
    assert [cut["layers"] for cut in told["cuts"]] == [["model.layers.0.self_attn.o_proj"]]
    assert "computes every layer" in run(source.folder, "--dry-run", "--engine", "transformers").out


@pytest.mark.parametrize(
    "arguments",
    [["OUT", "--engine", "vllm"], ["--dry-run", "--tensor-parallel", 2], ["--dry-run", "--engine", "tgi"]],
)
def test_2_engines_without_their_options(run: Callable[..., Run], source: Source, arguments: list[Any]) -> None:
    assert run(source.folder, *arguments).code == 2


def test_0_a_refused_source_has_no_format(run: Callable[..., Run], tmp_path: Path) -> None:
    write_source(tmp_path / "source", {"a": GPTQLayer(bits=2, stored_zero=1)}, plain={})
    result = run(tmp_path / "source", "--dry-run")
    assert result.code == 4
    assert "2-bit weights; Marlin has 4 and 8 bits: a" in result.err
    assert "format:" not in result.out


def test_0_already_marlin(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    assert run(source.folder, tmp_path / "out").code == 0
    again = run(tmp_path / "out", tmp_path / "again")
    assert (again.code, again.err) == (0, "")
    assert "already is a Marlin checkpoint; there is nothing to convert" in again.out
    assert not (tmp_path / "again").exists()


def test_1_a_wrong_layer_never_reaches_the_disk(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlin_convert.native import cpu

    pack = cpu.pack

    def faulty(words: Any, out: Any, bits: int) -> Any:
        pack(words, out=out, bits=bits)
        out[0, 0] ^= 1
        return out

    monkeypatch.setattr("marlin_convert.native.cpu.pack", faulty)
    result = main(source.folder, tmp_path / "out", "--quiet")
    assert result.code == 1
    assert "repacking went wrong" in one_line(result)
    assert any(name in result.err for name in LAYERS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_1_a_wrong_order_of_rows_never_reaches_the_disk(
    main: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlin_convert.native import cpu

    g_idx = np.random.default_rng(0).permutation(np.arange(256) // 128)
    source = write_source(tmp_path / "source", {"a": GPTQLayer(g_idx=g_idx)}, plain={})
    pack = cpu.pack_sorted

    def faulty(qweight: Any, out: Any, *, perm: Any, **rest: Any) -> Any:
        swapped = perm.copy()
        swapped[[3, 200]] = perm[[200, 3]]
        return pack(qweight, out, perm=swapped, **rest)

    monkeypatch.setattr("marlin_convert.native.cpu.pack_sorted", faulty)
    result = main(source.folder, tmp_path / "out", "--quiet")
    assert result.code == 1
    assert "a: repacking went wrong (the code of row 3, column " in one_line(result)
    row = int(np.argsort(g_idx, kind="stable")[3])
    column = int(re.findall(r"column (\d+)", one_line(result))[0])
    assert f"not {source.layers['a'].codes[row, column]});" in one_line(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


BAD_ARGUMENTS = {
    "no arguments": ([], "Usage: marlin-convert"),
    "no OUT": (["source"], "Missing argument 'OUT': the folder to create (only --dry-run goes without)."),
    "verify without SOURCE": (["verify"], "Missing argument 'SOURCE'"),
    "unknown option": (["source", "out", "--bits", "4"], "No such option"),
    "too many arguments": (["source", "out", "extra"], "unexpected extra argument"),
    "quant method": (["source", "out", "--quant-method", "awq"], "'awq' is not one of 'gptq', 'marlin'"),
    "device": (
        ["source", "out", "--device", "nonsense"],
        "'nonsense' is not a device; give auto, cpu, cuda or cuda:N.",
    ),
    "device of verify": (["verify", "source", "out", "--device", "cuda:"], "'cuda:' is not a device"),
    "device of demo": (["demo", "--device", "gpu"], "'gpu' is not a device"),
    **{
        f"shard size {size!r}": (
            ["source", "out", "--max-shard-size", size],
            f"{size!r} is not a size; write it like 5GB",
        )
        for size in ("huge", "5", "GB", "0GB", "-1GB", "5 apples", "1e3GB", "")
    },
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_2_wrong_arguments(main: Callable[..., Run], name: str) -> None:
    args, message = BAD_ARGUMENTS[name]
    result = main(*args)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize("size", ["5GB", "500MB", "1.5gb", "150 KB", "2TB"])
def test_shard_sizes_that_are_fine(main: Callable[..., Run], source: Source, tmp_path: Path, size: str) -> None:
    assert main(source.folder, tmp_path / "out", "--quiet", "--max-shard-size", size).code == 0
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert files > 1 if size == "150 KB" else files == 1


def test_2_a_mistyped_command(main: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = main("verfy", "source", "out")
    assert (result.code, result.out) == (2, "")
    assert "There is no command 'verfy'; did you mean `marlin-convert verify`?" in result.err
    (tmp_path / "verfy").mkdir()  # a folder that is called so is a source
    assert main("verfy", "out").code == 3


def test_examples_are_of_commands_that_there_are(main: Callable[..., Run]) -> None:
    from marlin_convert.cli.params import EXAMPLES

    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        assert f"  {example}\n" in main("--help").out
        program, *words = example.split()
        assert program == "marlin-convert"
        name = words[0] if words[0] in commands.cli.commands else "convert"
        arguments = words[words[0] in commands.cli.commands :]
        parent = click.Context(commands.cli, **commands.cli.context_settings)
        commands.cli.commands[name].make_context(name, list(arguments), parent=parent)


def test_completion_in_the_shell(run: Callable[..., Run]) -> None:
    result = run(env={"_MARLIN_CONVERT_COMPLETE": "bash_source"})
    assert result.code == 0
    assert "complete -o nosort -F _marlin_convert_completion marlin-convert" in result.out


def test_help_in_other_words(main: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("help").out == main("--help").out
    assert main("help", "verify").out == main("verify", "--help").out
    assert main("help", "nothing").out == main("--help").out


def test_3_a_folder_that_was_meant(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    folder = source.folder.rename(source.folder.parent / "mistral-gptq")
    wrong = folder.parent / "mistal-gptq"
    assert one_line(run(wrong, "--dry-run")) == f"{wrong}: no such folder; did you mean {folder}?"
    result = run("models/mistal-gptq", "--dry-run", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert (result.code, "Did you mean" in one_line(result)) == (8, False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mistral-gptq").mkdir()
    result = run("models/mistal-gptq", "--dry-run", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert one_line(result).endswith("Did you mean the folder ./models/mistral-gptq?")


def test_4_verify_with_its_arguments_swapped(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source.folder, out)
    result = run("verify", out, source.folder)
    assert result.code == 4
    assert one_line(result) == (
        f"{out} is a Marlin checkpoint, and {source.folder} is none: the source comes first. "
        f"Run `marlin-convert verify {source.folder} {out}`."
    )
    assert one_line(run("verify", out, out)).endswith(f"give the checkpoint that {out} was made from.")


def test_4_a_lora_adapter(run: Callable[..., Run], tmp_path: Path) -> None:
    tmp_path.joinpath("adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base.lora_A.weight": torch.zeros(8, 64)}, tmp_path / "adapter" / "adapter_model.safetensors")
    result = run(tmp_path / "adapter", tmp_path / "out")
    assert result.code == 4
    assert "adapter: a LoRA adapter (it has adapter_config.json and no model); convert the GPTQ model" in one_line(
        result
    )


def test_3_missing_source(run: Callable[..., Run], tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere", tmp_path / "out")
    assert result.code == 3
    assert one_line(result) == f"{tmp_path / 'nowhere'}: no such folder."


def test_3_damaged_source(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    with (source.folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    result = run(source.folder, tmp_path / "out")
    assert result.code == 3
    assert "damaged safetensors file: it is truncated" in one_line(result)


@pytest.mark.parametrize("kind", ["broken link", "pipe"])
def test_3_a_small_file_that_cannot_be_copied(
    main: Callable[..., Run], source: Source, tmp_path: Path, kind: str
) -> None:
    tokenizer = source.folder / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(tokenizer)
    else:
        tokenizer.symlink_to("nowhere")
    result = main(source.folder, tmp_path / "out")
    assert result.code == 3
    why = "it is not a regular file" if kind == "pipe" else "it cannot be read"
    assert one_line(result).startswith(f"{tokenizer}: {why}")


def test_4_unsupported(run: Callable[..., Run], tmp_path: Path) -> None:
    write_source(tmp_path / "source", two_layers(bits=8, stored_zero=127), quantization=quantization_config(bits=8))
    result = run(tmp_path / "source", tmp_path / "out", "--format", "marlin")
    assert result.code == 4
    assert "2 of 2 quantized layers do not fit the original Marlin format" in result.err
    assert f"  - 8-bit weights; the original format has 4 bits only: 2 layers, {LAYERS[1]}, {LAYERS[0]}" in result.err
    assert not (tmp_path / "out").exists()


def test_5_no_such_device(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--device", "cuda:99")
    assert result.code == 5
    assert "--device cpu" in one_line(result)


def test_6_output_exists(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    result = run(source.folder, tmp_path / "out")
    assert result.code == 6
    why = "it exists already, and marlin-convert did not make it (it has no marlin_convert.json); choose another name."
    assert one_line(result) == f"{tmp_path / 'out'}: {why}"


def test_7_verification_fails(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    run(source.folder, tmp_path / "out")
    flip_bit(tmp_path / "out" / "model.safetensors")
    result = run("verify", source.folder, tmp_path / "out")
    assert result.code == 7
    assert "the Marlin checkpoint is not equal to its source; see the table above." in result.err
    assert "not equal 2 of 2 layers exactly equal, 2 other tensors byte for byte" in result.out
    assert "model.odd.flags: byte 12 differs from the source" in result.out


def test_8_hub(run: Callable[..., Run], tmp_path: Path) -> None:
    result = run("owner/name", tmp_path / "out", env={"HF_HUB_OFFLINE": "1"})
    assert result.code == 8
    assert "offline mode is on (HF_HUB_OFFLINE) and the cache does not hold it" in one_line(result)


def _break(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("marlin_convert.conversion.convert.make_plan", broken)


def test_70_bug(main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, ZeroDivisionError("division by zero"))
    result = main(source.folder, tmp_path / "out")
    assert result.code == 70
    assert one_line(result) == (
        "ZeroDivisionError: division by zero; this is a bug. Run again with --verbose, and report what it prints."
    )
    as_json = main(source.folder, tmp_path / "out", "--json")
    assert as_json.code == document(as_json)["exit_code"] == 70
    result = main(source.folder, tmp_path / "out", "--verbose")
    assert result.code == 70
    assert "Traceback" in result.err
    assert "ZeroDivisionError" in result.err


def test_130_interrupted(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, KeyboardInterrupt())
    result = main(source.folder, tmp_path / "out")
    assert result.code == 130
    # The empty line ends the one that holds the terminal's ^C.
    assert result.err == "\nmarlin-convert: interrupted; nothing half-done was left behind.\n"


def test_129_its_terminal_went_away(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, Interrupted(signal.SIGHUP))
    assert main(source.folder, tmp_path / "out").code == 129


def test_143_asked_to_end(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, Interrupted(signal.SIGTERM))
    result = main(source.folder, tmp_path / "out", "--json")
    assert result.code == 143
    assert result.json()["exit_code"] == 143


def test_every_exit_code_has_a_test() -> None:
    tested = {int(match[1]) for name in globals() if (match := re.match(r"test_(\d+)_", name))}
    assert tested == set(EXIT_CODES)


# ---------------------------------------------------------------------------------------------------------------
# JSON documents


def test_json_of_a_conversion(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--device", "cpu", "--verify", "--json")
    assert result.err == ""
    report = document(result)
    assert {k: report[k] for k in ("ok", "source", "format", "layers_converted", "tensors_copied", "device")} == {
        "ok": True, "source": "source", "format": "marlin", "layers_converted": 2, "tensors_copied": 3, "device": "cpu",
    }  # fmt: skip
    assert report["out"] == str(tmp_path / "out")
    # B [K/16, 2N] int32 and s [G, N] fp16 of both layers, and the three other tensors.
    layers = (256 * 512 + 384 * 256) // 2 + (2 * 512 + 3 * 256) * 2
    assert report["bytes_out"] == layers + 64 * 256 * 2 + 256 * 4 + 13
    assert report["weight_files"] == ["model.safetensors"]
    assert report["verification"]["ok"] is True
    assert {x["name"] for x in report["verification"]["layers"]} == set(LAYERS)


def test_json_of_a_plan(run: Callable[..., Run], source: Source) -> None:
    result = run("--dry-run", source.folder, "--json")
    assert (result.code, result.err) == (0, "")
    plan = document(result)
    assert plan["convertible"] is True
    by_name = {x["name"]: x for x in plan["layers"]}
    assert by_name[LAYERS[0]] == {
        "name": LAYERS[0], "K": 256, "N": 512, "bits": 4, "group_size": 128, "sym": True,
        "desc_act": False, "stored_K": 256, "stored_N": 512, "stored_group_size": 128, "scales": "F16", "bias": False,
        "action": "convert",
    }  # fmt: skip
    assert {x["name"] for x in plan["copied"]} == set(source.plain)
    assert sorted(plan["dropped"]) == sorted(f"{n}.{p}" for n in LAYERS for p in ("g_idx", "qzeros"))


def test_json_of_a_plan_with_refusals_is_one_document(main: Callable[..., Run], tmp_path: Path) -> None:
    layers = {"good": GPTQLayer(), "narrow": GPTQLayer(K=256, N=320)}
    write_source(tmp_path / "source", layers)
    result = main("--dry-run", tmp_path / "source", "--json", "--format", "marlin")
    assert (result.code, result.err) == (4, "")
    plan = document(result)
    assert plan["convertible"] is False
    assert plan["refused"] == [{"reason": "N = 320 is not a multiple of 256", "layers": ["narrow"]}]
    text = main("--dry-run", tmp_path / "source", "--format", "marlin")
    assert text.code == 4
    assert "1 layers to convert" in text.out
    assert "  - N = 320 is not a multiple of 256: narrow" in text.err


def test_json_of_a_verification(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out")
    good = main("verify", source.folder, tmp_path / "out", "--json")
    assert (good.code, good.err) == (0, "")
    assert document(good)["ok"] is True
    flip_bit(tmp_path / "out" / "model.safetensors")
    bad = main("verify", source.folder, tmp_path / "out", "--json")
    assert (bad.code, bad.err) == (7, "")
    assert document(bad)["ok"] is False
    assert document(bad)["problems"] == ["model.odd.flags: byte 12 differs from the source"]


@pytest.mark.parametrize(
    ("args", "code", "kind", "text"),
    [
        (["nowhere/at/all", "out"], 3, "SourceError", "nowhere/at/all: no such folder."),
        (["source", "out", "--device", "x"], 2, "BadParameter", "Invalid value for '--device': 'x' is not a device"),
        (["source"], 2, "UsageError", "Missing argument 'OUT'"),
        (["source", "source", "--device", "cpu"], 6, "OutputError", "source: it exists already"),
        (["source", "x", "--device", "cuda:99"], 5, "DeviceError", "--device cuda:99: "),
    ],
)
def test_json_of_an_error(
    main: Callable[..., Run], source: Source, args: list[str], code: int, kind: str, text: str
) -> None:
    result = main(*args, "--json")
    error = document(result)
    assert (result.code, result.err) == (code, "")
    assert (error["ok"], error["exit_code"], error["error"]) == (False, code, kind)
    assert text in error["message"]


def test_json_when_there_is_nothing_to_do(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out")
    convert, plan = main(tmp_path / "out", "x", "--json"), main(tmp_path / "out", "--dry-run", "--json")
    assert (convert.code, plan.code) == (0, 0)
    assert document(convert)["already_marlin"] is document(plan)["already_marlin"] is True


def test_json_when_verification_fails_while_converting(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "marlin_convert.conversion.convert.copy_files", lambda _, folder: flip_bit(folder / "model.safetensors")
    )
    result = main(source.folder, tmp_path / "out", "--verify", "--json")
    assert result.code == document(result)["exit_code"] == 7
    assert "model.odd.flags: byte 12 differs from the source" in document(result)["message"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# ---------------------------------------------------------------------------------------------------------------
# Other options


def test_quiet_says_nothing(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for args in (
        [source.folder, out, "--verify"], ["verify", source.folder, out], [source.folder, "--dry-run"], [out, "x"]
    ):  # fmt: skip
        result = main(*args, "--quiet")
        assert (result.code, result.out, result.err) == (0, "", ""), args


def test_quiet_names_what_differs(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out", "--quiet")
    flip_bit(tmp_path / "out" / "model.safetensors")
    result = main("verify", "-q", source.folder, tmp_path / "out")
    assert (result.code, result.out) == (7, "")
    assert result.err == (
        "marlin-convert: the Marlin checkpoint is not equal to its source:\n"
        "  - model.odd.flags: byte 12 differs from the source\n"
    )


def test_verbose_names_everything(main: Callable[..., Run], tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.proj": GPTQLayer(K=128, N=256, seed=i) for i in range(14)}
    write_source(tmp_path / "source", layers)
    short = main("--dry-run", tmp_path / "source").out
    plan = main("--dry-run", tmp_path / "source", "--verbose").out
    assert not any(name in short for name in layers)
    assert all(f"  convert {name}  128 x 256" in plan for name in layers)
    assert "  copy    model.norm.weight  F32 [256]" in plan
    brief = main(tmp_path / "source", tmp_path / "out", "--verify").out
    full = main("verify", tmp_path / "source", tmp_path / "out", "-v").out
    assert not any(name in brief for name in layers)
    assert all(name in full for name in layers)


def test_options_may_stand_anywhere(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for i, args in enumerate((
        ["--quiet", "--device", "cpu", source.folder, tmp_path / "out0"],
        [source.folder, "--quiet", tmp_path / "out1"],
        ["convert", "--quiet", source.folder, tmp_path / "out2"],
        ["-q", "--", source.folder, tmp_path / "out3"],
    )):  # fmt: skip
        assert main(*args).code == 0
        assert (tmp_path / f"out{i}").is_dir()


def test_dry_run_writes_nothing(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for args in ([], [tmp_path / "out"]):
        result = main(source.folder, "--dry-run", *args)
        assert result.code == 0
        assert "2 layers to convert, 3 tensors to copy" in result.out
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert re.search(r"1 +256 x 512 +4 +128 +f16 +convert", result.out)
    assert re.search(r"1 +384 x 256 +4 +128 +f16 +convert", result.out)


def test_force_replaces(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    assert main(source.folder, tmp_path / "out").code == 0
    assert main(source.folder, tmp_path / "out", "--quant-method", "marlin").code == 6
    assert main(source.folder, tmp_path / "out", "--quant-method", "marlin", "--force").code == 0
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["quant_method"] == "marlin"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_notes_are_shown(main: Callable[..., Run], tmp_path: Path) -> None:
    scales = np.full((2, 256), 0.01)
    import torch

    layers = {"a": GPTQLayer(scales=scales, scale_dtype=torch.float32, stored_zero=8)}
    write_source(tmp_path / "source", layers, quantization=quantization_config(desc_act=True))
    result = main(tmp_path / "source", tmp_path / "out")
    assert result.code == 0
    assert "note desc_act in name only: g_idx is sequential, converted as plain: a" in result.out
    assert "note checkpoint_format gptq stores zero point 8 as 7, here it is 8; read as symmetric: a" in result.out
    own = np.float32(0.01)
    rounding = abs(float(np.float16(own)) - float(own)) / float(own)
    assert f"note scales rounded, by at most {rounding:.2e} of their value" in result.out


def test_demo(run: Callable[..., Run], tmp_path: Path) -> None:
    """The checkpoint that ships with the package, through everything, where nothing but the package is there."""
    result = run("demo", "--device", "cpu", env={"HF_HUB_OFFLINE": "1"})
    assert result.code == 0, result.err
    out = tmp_path / "demo-out"
    assert "result    demo-out (model.safetensors): " in result.out
    verdict = json.loads((out / "verify.json").read_text())
    assert verdict["ok"]
    assert verdict["layers_checked"] > 10
    assert f"{verdict['layers_checked']} of {verdict['layers_checked']} layers exactly equal" in result.out
    assert {"tokenizer.json", "config.json", "quantize_config.json", "marlin_convert.json"} <= {
        p.name for p in out.iterdir()
    }
    assert run("demo").code == 6
    assert run("demo", "elsewhere", "--json").json()["ok"]
    assert run("verify", commands.DEMO_FOLDER, out).code == 0
    # Nothing is left of GPTQ in the result.
    header = (out / "model.safetensors").read_bytes()[:20000]
    assert b".B" in header
    assert not any(part in header for part in (b".qweight", b".qzeros", b".g_idx", b".scales"))


def test_slow_work_is_announced(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", env={"MARLIN_CONVERT_NO_NATIVE": "1"})
    assert result.code == 0
    assert "slow: torch twin: MARLIN_CONVERT_NO_NATIVE is set" in result.err
    assert "torch twin" in result.out


# ---------------------------------------------------------------------------------------------------------------
# Help and version


def test_version(run: Callable[..., Run]) -> None:
    result = run("--version")
    assert (result.code, result.out, result.err) == (0, f"marlin-convert {marlin_convert.__version__}\n", "")


@pytest.mark.parametrize("command", [None, *commands.cli.commands])
def test_help(main: Callable[..., Run], command: str | None) -> None:
    args = [] if command is None else [command]
    result = main(*args, "--help")
    assert (result.code, result.err) == (0, "")
    assert main(*args, "-h").out == result.out
    shown = commands.cli.commands[command or "convert"]
    options = [p for p in shown.params if isinstance(p, click.Option)]
    assert options
    for option in options:
        assert option.help, option.name
        assert option.help.endswith((".", ")")), option.help
        for name in option.opts:
            assert name in result.out
    assert shown.help
    if command is None:
        assert all(f"  {name} " in result.out for name in commands.cli.commands)
        assert all(re.search(rf"^  {code} +\S", result.out, re.MULTILINE) for code in EXIT_CODES)


HEAVY = ("torch", "transformers", "numpy", "rich", "huggingface_hub", "safetensors", "tqdm")


def heavy_imports(*args: object) -> set[str]:
    """Which of the heavy packages a run of the program has imported by its end."""
    code = (
        "import sys\nfrom marlin_convert.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', *({HEAVY!r} & sys.modules.keys() if 0 else [m for m in {HEAVY!r} if m in sys.modules]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return set(process.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["convert", "--help"], ["verify", "--help"], ["demo", "--help"], [], ["source"],
     ["--nonsense"], ["source", "out", "--max-shard-size", "huge"], ["source", "out", "--device", "gpu"]],
    ids=" ".join,
)  # fmt: skip
def test_quick_answers_import_nothing_heavy(args: list[str]) -> None:
    assert heavy_imports(*args) == set()


@pytest.mark.slow
def test_a_conversion_needs_no_torch(source: Source, tmp_path: Path) -> None:
    loaded = heavy_imports(source.folder, tmp_path / "out", "--verify", "--device", "cpu", "--quiet")
    assert (tmp_path / "out").is_dir()
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers"}


# ---------------------------------------------------------------------------------------------------------------
# Progress


def test_plain_lines_in_a_log(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--verify")
    lines = result.err.splitlines()
    assert lines[0] == "converting: 2 layers, 152.1 kB"
    assert re.fullmatch(r"converting: done, 2 layers, 152\.1 kB in \d+\.\d s", lines[1])
    assert lines[2] == "verifying: 2 layers, 152.1 kB"
    assert re.fullmatch(r"verifying: done, 2 layers, 152\.1 kB in \d+\.\d s", lines[3])
    assert len(lines) == 4
    assert "\x1b" not in result.err + result.out


def test_plain_lines_on_the_way(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marlin_convert.cli.progress.PLAIN_INTERVAL", 0)
    lines = main(source.folder, tmp_path / "out").err.splitlines()[1:-1]
    pattern = (
        r"converting: (\d+) %, (\d)/2 layers, [\d.]+ k?B of 152\.1 kB, [\d.]+ [kMG]?B/s, \d+ s left, model\.[\w.]+"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert len(found) > 5
    assert all(found), lines
    percent = [int(match[1]) for match in found if match]
    assert percent == sorted(percent)
    assert percent[-1] == 100


# ---------------------------------------------------------------------------------------------------------------
# Pipes, encodings, secrets


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_closed_pipe_is_no_bug(source: Source, tmp_path: Path, closed: str) -> None:
    """As with `| head`: the reader is gone before the program has printed all."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= dict.fromkeys(("stdout", "stderr"), writer) if closed == "both" else {closed: writer}
    process = subprocess.Popen([*PROGRAM, str(source.folder), str(tmp_path / "out"), "--verify"], text=True, **streams)
    os.close(writer)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    for text in (out or "", err or ""):
        assert "Traceback" not in text
        assert "BrokenPipe" not in text
        assert "bug" not in text
    left = {p.name for p in tmp_path.iterdir()}
    assert left == ({"source", "out"} if closed == "stdout" else {"source"})


def test_output_that_is_not_utf8(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for args in (["--dry-run"], [tmp_path / "ou→t", "--json"], ["x", "--verify"]):
        result = run(source.folder, *args, env={"PYTHONIOENCODING": "ascii"})
        assert result.code == 0, result.err
    assert run(source.folder, "y", "--json", env={"PYTHONIOENCODING": "ascii"}).json()["ok"]


@pytest.mark.slow
def test_file_names_that_are_not_utf8(source: Source, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(source.folder, os.fsdecode(folder))
    for extra in ([], [b"--force", b"--json"]):
        command = [*map(os.fsencode, PROGRAM), folder, folder + b"-out", *extra]
        process = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        assert process.returncode == 0, process.stderr
    report = json.loads((Path(os.fsdecode(folder + b"-out")) / "marlin_convert.json").read_text("utf-8"))
    assert report["source"] == "caf\ufffd"


def test_long_lines_in_a_pipe_are_not_folded(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    out = tmp_path.joinpath(*["deep" * 20] * 4) / "out"
    assert main(source.folder, out).out.startswith(f"result    {out} (model.safetensors): original Marlin format, 2")


SECRET = "SECRETXYZ"


def test_tokens_are_never_shown(
    main: Callable[..., Run], run: Callable[..., Run], source: Source, tmp_path: Path
) -> None:
    token = ["--token", SECRET]
    runs = [
        main(source.folder, tmp_path / "out", *token, "--verify", "--verbose"),
        main(source.folder, tmp_path / "out2", *token, "--json"),
        main("verify", source.folder, tmp_path / "out", *token, "--verbose"),
        main(tmp_path / "nowhere", tmp_path / "x", *token),
        main(tmp_path / "nowhere", tmp_path / "x", *token, "--json"),
        run("owner/name", tmp_path / "x", *token, env={"HF_HUB_OFFLINE": "1"}),
        run("owner/name", tmp_path / "x", *token, "--verbose", env={"HF_ENDPOINT": "http://127.0.0.1:9"}),
        main(source.folder, *token),
        main(source.folder, tmp_path / "x", *token, "--device", "?"),
    ]
    assert [r.code for r in runs] == [0, 0, 0, 3, 3, 8, 8, 2, 2]
    assert not [r.out + r.err for r in runs if SECRET in r.out + r.err]
    written = [p for folder in ("out", "out2") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert len(written) >= 9
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
