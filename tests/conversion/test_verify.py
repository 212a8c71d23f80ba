"""Every kind of damage in a converted checkpoint is found and named; what is sound is called sound."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion import pair
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.products import CPUProduct
from marlin_convert.conversion.verify import TOLERANCE, LayerCheck, Verification, verify
from marlin_convert.errors import VerificationError
from marlin_convert.options import Options, QuantMethod, ZeroPointReading
from tests.support import format_reader
from tests.support.cli import PATIENCE, Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, two_layers, write_source
from tests.support.results import CPU, DOWN, Q, change, layer_check


@pytest.mark.slow
def test_what_cannot_be_written_leaves_the_output_as_it_was(source: Source, out: Path, tmp_path: Path) -> None:
    """The card is longer than a file may be here: neither it nor verify.json is cut."""
    (source.folder / "README.md").write_text("# A card\n\n" + "of some length " * 400)
    convert(source.folder, out, Options(device="cpu", force=True))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    code = f"{limit}\nfrom marlin_convert import cli\ncli.main({['verify', str(source.folder), str(out)]})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"marlin-convert: {out}: equal to its source, but verify.json and README.md cannot be written there: File too "
        "large; what was there is as it was."
    )
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("reading", list(ZeroPointReading))
def test_zero_points_are_read_as_for_the_result(tmp_path: Path, main: Callable[..., Run], reading: Any) -> None:
    """A stored 15 means 0 to one writer and 16 to the other; what it meant for the result is in its report."""
    zeros = np.full((2, 256), 7)
    zeros[0, :2] = 15
    source = write_source(tmp_path / "source", {Q: GPTQLayer(K=256, N=256, stored_zero=zeros)}, {},
                          quantization=quantization_config(sym=False))  # fmt: skip
    out = tmp_path / "out"
    assert main(source.folder, out, "--device", "cpu").code == 4
    assert main(source.folder, out, "--zero-points", reading.value, "--device", "cpu").code == 0
    assert main("verify", source.folder, out, "--device", "cpu").code == 0
    report = out / "marlin_convert.json"
    for text in ("{", "[]", '{"options": 3}', '{"options": {"zero_points": "x"}}', '{"options": {"zero_points": 7}}'):
        report.write_text(text)
        assert main("verify", source.folder, out, "--device", "cpu").code == 4
    report.unlink()
    for other in ZeroPointReading:
        given = main("verify", source.folder, out, "--device", "cpu", "--zero-points", other.value)
        assert given.code == (0 if other is reading else 7)
    assert main("verify", out, "--zero-points", reading.value).code == 2


def test_two_at_a_time(source: Source, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one writes into the result is nothing that the other reads of it."""
    check = verify

    def beside_another(*args: Any) -> Verification:
        monkeypatch.setattr(pair, "verify", check)
        (out / "README.md").write_text("# Another card")
        assert verify_pair(source.folder, out, "cpu").ok
        return check(*args)

    monkeypatch.setattr(pair, "verify", beside_another)
    assert verify_pair(source.folder, out, "cpu").ok
    noted = json.loads((out / "marlin_convert.json").read_text())["result_files"]["verify.json"]
    assert noted == hashlib.sha256((out / "verify.json").read_bytes()).hexdigest()


def test_a_sound_result(source: Source, out: Path) -> None:
    report = verify_pair(source.folder, out, "cpu")
    assert report.ok
    assert {x.name for x in report.layers} == {Q, DOWN}
    assert all(x.exact and x.problem is None for x in report.layers)
    assert (layer_check(report, Q).K, layer_check(report, Q).N, layer_check(report, Q).G) == (256, 512, 2)
    assert report.tensors_equal == 3
    assert report.problems == []
    assert 0 <= report.worst < 1e-6
    report.require_ok()


def test_the_report_on_disk(source: Source, out: Path) -> None:
    report = verify_pair(source.folder, out, "cpu")
    written = json.loads((out / "verify.json").read_text())
    assert written == report.as_dict()
    assert {k: written[k] for k in ("ok", "device", "layers_checked", "tensors_equal", "problems")} == {
        "ok": True, "device": "cpu", "layers_checked": 2, "tensors_equal": 3, "problems": []
    }  # fmt: skip
    (q,) = [x for x in written["layers"] if x["name"] == Q]
    assert {k: q[k] for k in ("K", "N", "G", "exact", "ok", "problem")} == {
        "K": 256, "N": 512, "G": 2, "exact": True, "ok": True, "problem": None
    }  # fmt: skip
    change(out, lambda t: t[f"{Q}.s"].neg_())
    verify_pair(source.folder, out, "cpu")
    assert json.loads((out / "verify.json").read_text())["ok"] is False


# ---- Damage to a layer ----


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_named_by_row_and_column(source: Source, out: Path, seed: int) -> None:
    """Where the bit belongs is seen by a reader that knows the published format alone."""
    rng = np.random.default_rng(seed)
    K, N = 256, 512
    word, bit = (int(rng.integers(n)) for n in (K // 16 * 2 * N, 32))
    codes = source.layers[Q].codes
    places: list[list[int]] = []

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        words = tensors[f"{Q}.B"].numpy().view(np.uint32)
        words.reshape(-1)[word] ^= np.uint32(1 << bit)
        now = format_reader.codes(tensors[f"{Q}.B"], 4, N)
        places.extend(np.argwhere(now != codes).tolist())

    change(out, flip)
    ((row, column),) = places
    was = int(codes[row, column])
    report = verify_pair(source.folder, out, "cpu")
    assert not report.ok
    assert layer_check(report, Q).problem == (
        f"the code of row {row}, column {column} is {was ^ (1 << bit % 4)}, not {was}"
    )
    assert not layer_check(report, Q).exact
    assert layer_check(report, DOWN).ok
    assert report.problems == []


@pytest.mark.slow
def test_the_row_is_right_in_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_convert.conversion.blocks.BLOCK_BYTES", 1)  # one row of tiles at a time
    source = write_source(tmp_path / "source", {"a": GPTQLayer(K=512, N=256)})
    convert(source.folder, tmp_path / "out", CPU)
    change(tmp_path / "out", lambda t: t["a.B"][20].bitwise_xor_(1))  # nibble 0 of each word: row 2t, here of lane 0
    problem = layer_check(verify_pair(source.folder, tmp_path / "out", "cpu"), "a").problem
    was = int(source.layers["a"].codes[320, 0])
    assert problem == f"the code of row 320, column 0 is {was ^ 1}, not {was}"


@pytest.mark.parametrize("group_size", [128, -1])
def test_a_changed_scale(tmp_path: Path, group_size: int) -> None:
    source = write_source(tmp_path / "source", two_layers(group_size=group_size))
    convert(source.folder, tmp_path / "out", CPU)
    group = 1 if group_size == 128 else 0
    # Column 3 of s is column 24 of the scales with groups (new[8i + j] = old[i + 8j]), else 9 (old[2i + (0, 1, …)[j]]).
    column = 24 if group_size == 128 else 9
    change(tmp_path / "out", lambda t: t[f"{Q}.s"][group, 3].mul_(2))
    check = layer_check(verify_pair(source.folder, tmp_path / "out", "cpu"), Q)
    was = source.layers[Q].scale_tensor[group, column].numpy()
    assert check.problem == f"the scale of group {group}, column {column} is {was * 2}, not {was}"
    assert not check.exact
    assert check.relative_error is not None
    assert check.relative_error > TOLERANCE


def test_a_scale_that_changed_its_sign_of_zero(tmp_path: Path) -> None:
    """Equal as numbers, not as bits: exactly equal means the bits."""
    source = write_source(tmp_path / "source", {"a": GPTQLayer(scales=np.zeros((2, 256)))})
    convert(source.folder, tmp_path / "out", CPU)
    change(tmp_path / "out", lambda t: t["a.s"].copy_(torch.full((2, 256), -0.0)))
    report = verify_pair(source.folder, tmp_path / "out", "cpu")
    assert layer_check(report, "a").problem == "the scale of group 0, column 0 is -0.0, not 0.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(source: Source, out: Path, run: Callable[..., Run], value: float) -> None:
    change(out, lambda t: t[f"{Q}.s"][0, 0].fill_(value))
    report = verify_pair(source.folder, out, "cpu")
    assert layer_check(report, Q).problem is not None
    assert not np.isfinite(report.worst)  # whichever layer comes first
    written = json.loads((out / "verify.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    assert written["ok"] is False
    assert written["worst_relative_error"] in ("nan", "inf")
    result = run("verify", source.folder, out, "--json")
    assert result.code == 7
    assert json.loads(result.out, parse_constant=pytest.fail)["ok"] is False


def test_the_worst_of_all_layers_keeps_a_nan() -> None:
    def check(error: float) -> LayerCheck:
        return LayerCheck("x", 128, 256, 1, True, error, error)

    nan = float("nan")
    for errors in ([nan, 1.0], [1.0, nan]):
        report = Verification("cpu", [check(e) for e in errors])
        assert np.isnan(report.worst)
        assert np.isnan(report.max_error)
    assert Verification("cpu", [check(1.0), check(3.0), check(2.0)]).worst == 3.0
    assert Verification("cpu", []).worst == 0.0


def test_nan_in_the_product_alone_fails(source: Source, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUProduct, "errors", lambda _: (float("nan"), float("nan")))
    report = verify_pair(source.folder, out, "cpu")
    assert [x.ok for x in report.layers] == [False, False]
    assert all("outputs differ by nan" in (x.problem or "") for x in report.layers)


def wrong_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.s"] = tensors[f"{Q}.s"].to(torch.bfloat16)


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.B"] = tensors[f"{Q}.B"].reshape(32, 512)


def missing_layer(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.B"], tensors[f"{Q}.s"]


def missing_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.s"]


LAYER_DAMAGE: dict[Any, str] = {
    wrong_dtype: f"{Q}.s is BF16 [2, 512], not F16 [2, 512]",
    wrong_shape: f"{Q}.B is I32 [32, 512], not I32 [16, 1024]",
    missing_layer: f"{Q}.B is missing",
    missing_scales: f"{Q}.s is missing",
}


@pytest.mark.parametrize("edit", LAYER_DAMAGE, ids=lambda e: e.__name__)
def test_damage_to_a_whole_layer(source: Source, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    change(out, edit)
    report = verify_pair(source.folder, out, "cpu")
    check = layer_check(report, Q)
    assert (check.problem, check.exact, check.max_error) == (LAYER_DAMAGE[edit], False, None)
    assert layer_check(report, DOWN).ok
    with pytest.raises(VerificationError) as error:
        report.require_ok()
    assert f"  - {Q}: {LAYER_DAMAGE[edit]}" in error.value.message.splitlines()


# ---- Within a conversion ----


def corrupt(name: str, position: int) -> Callable[..., None]:
    """A stand-in for the step between writing and verifying that flips a bit of the file's tensor `name`."""
    from marlin_convert.conversion.configs import write_configs

    def after_writing(plan: Any, folder: Path, quant_method: str) -> None:
        write_configs(plan, folder, QuantMethod(quant_method))
        with Checkpoint(folder) as written:
            offset = written.tensors[name].offset + position
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    return after_writing


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (f"{Q}.B", rf"{Q}: the code of row \d+, column \d+ is \d+, not \d+"),
        (f"{Q}.s", rf"{Q}: the scale of group \d, column \d+ is \S+, not \S+"),
        ("model.norm.weight", "model.norm.weight: byte 100 differs from the source"),
    ],
)
def test_what_is_not_equal_is_not_published(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.setattr("marlin_convert.conversion.convert.write_configs", corrupt(name, 100))
    with pytest.raises(VerificationError, match=f"not equal to its source:\n  - {problem}$"):
        convert(source.folder, tmp_path / "out", Options(device="cpu", verify=True))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
