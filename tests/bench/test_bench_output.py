"""What `bench` shows of a finished report: the table, the document, the plot."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from marlin_convert import cli
from marlin_convert.bench import products as b
from marlin_convert.bench.results import Cell, Limits, Report
from marlin_convert.bench.shapes import Shape
from marlin_convert.cli.bench_output import BenchScreen
from marlin_convert.cli.params import OutputOptions
from marlin_convert.cli.plot import Plot
from marlin_convert.cli.progress import Bars, PlainLines
from marlin_convert.errors import MarlinConvertError, OutputError
from tests.support.bench import MACHINE, SHAPE, Bench, peer
from tests.support.cli import Run, validate
from tests.support.gptq_checkpoints import Source


@pytest.fixture
def report() -> Report:
    machine = Bench()
    peers = [peer("vLLM Marlin", machine, 4.0, lambda M: M > 1)]
    report = b.bench("mistral-7b", [SHAPE, Shape("o", 128, 128, 1)], machine.rig, batch=(1, 256), peers=peers)
    report.limits = Limits(3.01e12, 762e12)
    return report


@pytest.fixture
def main(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cli.main` in this process, with a finished report in place of the measurement; `main.asked` is what it got."""
    monkeypatch.chdir(tmp_path)

    def main(*args: object) -> Run:
        def run(source: str | None, preset: str | None, **settings: Any) -> Report:
            settings["progress"].stage("measuring", 4, 2)
            settings["progress"].advance(1, "qkv", done=True)
            settings["progress"].end()
            asked_of.asked = (source, preset, settings)
            return report

        asked_of: Any = main
        monkeypatch.setattr(b, "run", run)
        capsys.readouterr()
        code = 0
        try:
            cli.main(["bench", *map(str, args)])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Run(subprocess.CompletedProcess([], code, out, err))

    return main


def test_the_table(main: Callable[..., Run]) -> None:
    result = main()
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 200
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == (
        "NVIDIA H100 [80GB] (cuda:0), capability 9.0, 132 multiprocessors, L2 52.4 MB, driver 580.1; "
        "under load SM 1755 of 1980 MHz, memory 2619 of 2619 MHz"
    )
    assert lines[1] == "torch 2.13.0, python 3.11, vLLM Marlin 1.2"
    assert lines[2] == "measured here: copy 3.01 TB/s (read + write), fp16 product 762 TFLOP/s"
    assert "mistral-7b qkv 256 x 128, group 128, 32 layers" in lines
    assert "mistral-7b o 128 x 128, group -1" in lines
    assert lines.count("M fp16 Marlin vLLM Marlin speedup GB/s TFLOP/s of limit") == 2
    rows = [line for line in lines if line.startswith(("1 8.0", "256 8.0"))]
    assert len(rows) == 4
    assert rows[0].startswith("1 8.0 2.0 4.0 4.00x 9 0.0 ")  # 17.7 kB in 2 µs
    assert rows[1].startswith("256 8.0 2.0 - 4.00x ")
    assert rows[1].endswith(" dequantize")
    assert "note vLLM Marlin failed: ValueError: no such tile: qkv 256 x 128, M = 256; o 128 x 128, M = 256" in lines
    assert "measuring: 2 layers, 4 timings" in result.err
    assert " kB" not in result.err


def test_many_places_of_a_note_are_summed_up(main: Callable[..., Run], report: Report) -> None:
    report.notes = {"tiny": [f"layer {i}" for i in range(9)]}
    assert "note tiny: layer 0; layer 1; layer 2; and 6 more\n" in main().out
    assert "layer 8" in main("--verbose").out


def test_the_document(main: Callable[..., Run]) -> None:
    result = main("--json")
    assert (result.code, result.err) == (0, "")
    document = result.json()
    assert document["ok"] is True
    assert document["machine"]["name"] == "NVIDIA H100 [80GB]"
    assert document["machine"]["clocks"]["sm_mhz"] == 1755.0
    assert document["limits"] == {"copy_gb_per_s": 3010.0, "fp16_tflop_per_s": 762.0}
    assert document["peers"] == {"vLLM Marlin": "1.2"}
    first = document["layers"][0]
    assert {k: first[k] for k in ("name", "K", "N", "group_size", "count")} == {
        "name": "qkv", "K": 256, "N": 128, "group_size": 128, "count": 32,
    }  # fmt: skip
    assert [c["M"] for c in first["cells"]] == [1, 256]
    assert first["cells"][1]["marlin"]["method"] == "dequantize"
    assert first["cells"][0]["marlin"].keys() == {
        "us", "gb_per_s", "tflop_per_s", "limit_us", "share_of_limit", "limited_by", "speedup", "method",
    }  # fmt: skip
    assert document["notes"][0]["note"].startswith("vLLM Marlin failed")
    assert document["plot"] is None


def test_quiet(main: Callable[..., Run]) -> None:
    result = main("-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_a_machine_without_nvidia_ml_py(main: Callable[..., Run], report: Report) -> None:
    report.machine = replace(MACHINE, clocks=None)
    assert "driver 580.1; clocks unknown (no nvidia-ml-py, or no answer)\n" in main().out
    assert main("--json").json()["machine"]["clocks"] is None


def test_the_options_arrive(main: Any) -> None:
    assert main("--preset", "llama-70b", "--batch", "16,1,16", "--compare", "--device", "cuda:3").code == 0
    source, preset, settings = main.asked
    assert (source, preset, settings["batch"], settings["compare"]) == (None, "llama-70b", (1, 16), True)
    assert settings["device"] == "cuda:3"
    assert main("folder", "--revision", "v2", "--token", "t", "--cache-dir", "cache").code == 0
    source, preset, settings = main.asked
    assert (source, preset, settings["batch"], settings["compare"]) == ("folder", None, b.BATCH, False)
    access = settings["access"]
    assert (access.revision, access.token, access.cache_dir) == ("v2", "t", Path("cache"))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--preset", "gpt-5"], "'gpt-5' is not one of 'mistral-7b', 'llama-3-8b', 'llama-70b'."),
        (["folder", "--preset", "llama-70b"], "Give a SOURCE or --preset, not both."),
        (["--device", "gpu"], "'gpu' is not a device"),
        *(
            (["--batch", value], f"{value!r} is not a list of batch sizes")
            for value in ("", "0", "1,", "a", "-4", "9999999")
        ),
    ],
    ids=str,
)
def test_wrong_arguments(main: Callable[..., Run], args: list[str], text: str) -> None:
    result = main(*args)
    assert (result.code, result.out) == (2, "")
    assert text in result.err


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_the_program_without_a_gpu(run: Callable[..., Run], source: Source, tmp_path: Path, device: str) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcuda.so.1").write_bytes(b"not a library")
    result = run("bench", source.folder, "--device", device, env={"LD_LIBRARY_PATH": str(tmp_path / "lib")})
    assert (result.code, result.out) == (5, "")
    assert result.err.startswith("marlin-convert: bench measures a GPU: ")
    assert result.err.count("\n") == 1


def test_bars_and_lines_count_timings(capsys: pytest.CaptureFixture[str]) -> None:
    screen = BenchScreen(OutputOptions())
    with screen.progress(timings=True) as progress:
        assert isinstance(progress, PlainLines)
    bars = Bars(screen.err, timings=True)
    bars.stage("measuring", 4, 2)
    bars.advance(1, "qkv")
    text = "".join(str(column.render(bars._bars.tasks[0])) for column in bars._bars.columns[2:3])
    assert text == "1/4"
    bars.end()


# ---- The plot ----


def test_plotting_without_matplotlib_is_said_before_anything_is_measured(
    main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = main("--plot", "out.png")
    assert (result.code, result.out) == (1, "")
    assert "pip install matplotlib" in result.err
    assert not hasattr(main, "asked")


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib, an optional extra, is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize(("name", "magic"), [("out.png", b"\x89PNG"), ("out.SVG", b"<?xml"), ("out.pdf", b"%PDF")])
def test_a_plot(main: Callable[..., Run], tmp_path: Path, name: str, magic: bytes) -> None:
    result = main("--plot", name)
    assert result.code == 0, result.err
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert f"plot:  {name}\n" in result.out
    assert main("--plot", name, "--json").json()["plot"] == name


@needs_matplotlib
def test_what_the_plot_shows(report: Report, tmp_path: Path) -> None:
    plot = Plot(tmp_path / "out.png")
    assert plot.draw(report.as_dict()) is None
    (axes,) = plot._figure.axes
    lines: dict[str, Any] = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines["qkv 256 x 128"].get_xdata()) == [1, 256]
    assert list(lines["qkv 256 x 128"].get_ydata()) == [4.0, 4.0]
    assert "o 128 x 128" in lines
    assert list(lines["ideal 4x"].get_ydata()) == [4, 4]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "256"]
    assert axes.get_ylim()[0] == 0


@needs_matplotlib
def test_plots_that_cannot_be_written(main: Callable[..., Run], report: Report, tmp_path: Path) -> None:
    with pytest.raises(MarlinConvertError, match="matplotlib writes no such file"):
        Plot(tmp_path / "out.docx")
    with pytest.raises(OutputError, match="there is no folder"):
        Plot(tmp_path / "nowhere" / "out.png")
    (tmp_path / "full.png").symlink_to("/dev/full")
    result = main("--plot", "full.png")
    assert result.code == 6
    assert "the plot cannot be written: it is not a regular file." in result.err
    assert "mistral-7b qkv" in result.out  # the numbers are not lost
    report.notes.clear()
    as_json = main("--plot", "full.png", "--json")
    assert (as_json.code, as_json.err) == (6, "")
    document = as_json.json()
    assert document["plot"] is None
    assert "not a regular file" in document["notes"][0]["note"]
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


@needs_matplotlib
def test_an_older_image_stays_where_a_new_one_cannot_be_written(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "out.png"
    image.write_bytes(b"older")
    monkeypatch.setattr("os.fsync", fail := Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    problem = Plot(image).draw(report.as_dict())
    assert fail.called
    assert problem
    assert problem.message == f"{image}: the plot cannot be written: No space left on device."
    assert image.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@needs_matplotlib
def test_a_plot_drawn_again(main: Callable[..., Run], tmp_path: Path) -> None:
    """From the document alone: nothing is measured, and the picture is the same."""
    run = main("--plot", "first.svg", "--json")
    (tmp_path / "run.json").write_text(run.out)
    del main.asked  # type: ignore[attr-defined]
    again = main("--plot", "again.svg", "--from-json", "run.json")
    assert (again.code, again.out) == (0, "plot:  again.svg\n")
    assert not hasattr(main, "asked")
    first, second = ((tmp_path / name).read_text() for name in ("first.svg", "again.svg"))
    shape = re.compile(r'<use xlink:href="[^"]+" x="([\d.]+)" y="([\d.]+)"|<!-- .* -->')
    assert [m[0].split('"', 3)[-1] for m in shape.finditer(first)] == [
        m[0].split('"', 3)[-1] for m in shape.finditer(second)
    ]
    document = main("--plot", "again.svg", "--from-json", "run.json", "--json").json()
    validate(document)
    assert document == {**run.json(), "source": "run.json", "plot": "again.svg"} | {"source": document["source"]}


@needs_matplotlib
@pytest.mark.parametrize(
    "content", ["{}", '{"layers": 1}', '{"layers": [{"name": "a"}]}', '{"sides": {}}', '{"cells": [{"batch": 1}]}']
)
def test_what_cannot_be_drawn_again(main: Callable[..., Run], tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    result = main("--plot", "again.svg", "--from-json", "run.json")
    assert (result.code, result.out) == (3, "")
    assert "run.json: it is not what `marlin-convert bench --json` prints." in result.err
    assert not (tmp_path / "again.svg").exists()


def test_from_json_goes_with_plot_alone(main: Callable[..., Run]) -> None:
    for others in ([], ["--plot", "a.svg", "--preset", "mistral-7b"], ["--plot", "a.svg", "--compare"]):
        result = main("--from-json", "run.json", *others)
        assert result.code == 2
        assert "--from-json goes with --plot, and with nothing that is measured." in result.err


def test_cells_as_documents_are_strict_json(report: Report) -> None:
    json.dumps(report.as_dict(), allow_nan=False)
    cell = report.layers[0].cells[0]
    assert isinstance(cell, Cell)
    assert cell.as_dict()["fp16"]["limited_by"] in ("memory", "compute")
