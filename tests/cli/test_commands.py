"""The program through its entry point: exit codes, one test for each that is documented, and their messages."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.errors import EXIT_CODES
from marlin_convert.interrupts import Interrupted
from tests.support.cli import Run, document, one_line
from tests.support.gptq_checkpoints import LAYERS, GPTQLayer, Source, quantization_config, two_layers, write_source
from tests.support.safetensors_files import flip_bit

REPORTS = {"marlin_convert.json", "verify.json"}


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


def test_every_command_is_found_by_a_word_near_it(main: Callable[..., Run]) -> None:
    for wrong, command in {"wep": "web", "evn": "env", "bacth": "batch", "restor": "restore", "pusch": "push"}.items():
        assert f"There is no command '{wrong}'; did you mean `marlin-convert {command}`?" in main(wrong).err


def test_results_that_are_not_there(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    """What `verify` and `push` are given beside a source or a repository is named with the nearest, too."""
    assert main(source.folder, "mistral-marlin", "--device", "cpu").code == 0
    near = "mistal-marlin: no such folder; did you mean ./mistral-marlin?"
    for command in (["verify", source.folder, "mistal-marlin"], ["push", "mistal-marlin", "me/name"]):
        result = main(*command)
        assert (result.code, one_line(result)) == (3, near)
    assert one_line(main("push", "nothing", "me/name")) == "nothing: no such folder."
    swapped = main("push", "me/name", "mistral-marlin")
    right = "marlin-convert push mistral-marlin me/name"
    assert swapped.code == 3
    assert one_line(swapped) == (
        f"me/name: no such folder, and mistral-marlin is one: the result comes first. Run `{right}`."
    )


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
    assert "adapter: a LoRA adapter (it has adapter_config.json and no model); convert the model" in one_line(result)


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
