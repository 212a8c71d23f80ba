"""Progress on a terminal: one display, which leaves nothing behind."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source
from tests.support.hub_server import Account, Hub
from tests.support.terminal import Terminal, on_a_terminal
from tests.support.tiny_models import llama, make

PROGRAM = [sys.executable, "-m", "marlin_convert.cli"]

SLOW = """
import sys, threading, time
from marlin_convert import cli
from marlin_convert.conversion import convert
write, one_at_a_time = convert.Shards.write, threading.Lock()
def slow(*args, **kw):
    with one_at_a_time:
        time.sleep(0.12)
        write(*args, **kw)
convert.Shards.write = slow
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 160])
def test_a_bar_on_a_terminal(source: Source, tmp_path: Path, columns: int) -> None:
    command = [sys.executable, "-c", SLOW, str(source.folder), str(tmp_path / "out"), "--verify", "--device", "cpu"]
    code, terminal = on_a_terminal(command, columns=columns)
    assert code == 0, terminal.text
    plain = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]", "", terminal.frames)
    frames = [f for f in re.split(r"\r\x1b\[2K|\r\n|\r", plain) if f.startswith(("converting", "verifying"))]
    rate, left, layer = r"(\?|[\d.]+ [kMG]?B/s)", r"(-:--:--|\d:\d\d:\d\d)", r"(…?[\w.]+)?"
    pattern = rf"(converting|verifying) [━╸╺]+ [\d.]+/152\.1 kB {rate} {left} [012]/2 layers {layer} *"
    found = [re.fullmatch(pattern, frame) for frame in frames]
    assert all(found), frames  # nothing is cut, at 80 columns either
    assert {len(frame) for frame in frames} == {columns}  # and all of it is one line
    shown = [match.groups() for match in found if match]
    assert {stage for stage, *_ in shown} == {"converting", "verifying"}
    assert any(rate.endswith("B/s") and ":" in left and layer for _, rate, left, layer in shown)
    assert terminal.cursor_visible
    first, *rest = terminal.text.splitlines()
    assert first.startswith("result  "), terminal.text  # nothing is left of the bars, not even an empty line
    assert not frames_of(Terminal(terminal.text), "converting", "verifying")
    assert "verified  2 of 2 layers exactly equal" in terminal.text
    assert all(line for line in rest)


@pytest.mark.slow
def test_an_error_leaves_no_bar_on_a_terminal(source: Source, tmp_path: Path) -> None:
    full = SLOW.replace("write(*args, **kw)", "raise OSError(28, 'No space left on device')")
    code, terminal = on_a_terminal([sys.executable, "-c", full, str(source.folder), str(tmp_path / "out")])
    assert code == 6
    assert "converting" in terminal.frames
    assert terminal.cursor_visible
    assert " ".join(terminal.text.splitlines()) == (
        f"marlin-convert: {tmp_path / 'out'}: writing failed: No space left on device; nothing was left behind."
    )


@pytest.mark.slow
def test_quiet_on_a_terminal(source: Source, tmp_path: Path) -> None:
    code, terminal = on_a_terminal([*PROGRAM, str(source.folder), str(tmp_path / "out"), "--quiet"])
    assert (code, terminal.frames) == (0, "")


@pytest.mark.slow
def test_json_on_a_terminal(source: Source, tmp_path: Path) -> None:
    code, terminal = on_a_terminal([*PROGRAM, str(source.folder), str(tmp_path / "out"), "--json"])
    assert code == 0
    assert json.loads(terminal.frames)["ok"] is True


def frames_of(terminal: Terminal, *labels: str) -> list[str]:
    """Every line of the display that begins with one of `labels`."""
    plain = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[\d*A", "", terminal.frames)
    return [line for line in re.split(r"\r\n|\r|\x1b\[2K", plain) if line.startswith(labels)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "shows_rate", "shows_bar"), [(76, True, True), (64, False, True), (48, False, False)]
)
def test_a_narrow_terminal(source: Source, tmp_path: Path, columns: int, shows_rate: bool, shows_bar: bool) -> None:
    """What finds no room is left out, the layer first; nothing is cut, and no line is broken."""
    command = [sys.executable, "-c", SLOW, str(source.folder), str(tmp_path / "out"), "--device", "cpu"]
    code, terminal = on_a_terminal(command, columns=columns)
    assert code == 0, terminal.text
    frames = frames_of(terminal, "converting")
    assert {len(frame) for frame in frames} == {columns}
    assert not [frame for frame in frames if "model." in frame or "…" in frame]
    assert any("B/s" in frame for frame in frames) is shows_rate
    assert any("━" in frame for frame in frames) is shows_bar
    assert all(re.search(r"/152\.1 kB .*[012]/2 layers", frame) for frame in frames)


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "shows_bar"), [(100, True), (64, True), (48, False)])
def test_many_checkpoints_on_a_narrow_terminal(tmp_path: Path, columns: int, shows_bar: bool) -> None:
    """How many have ended is never cut; what is at hand takes the room that is left, and the bar none below 60."""
    name = "a-folder-with-a-long-name-" * 3
    sources = [write_source(tmp_path / f"{name}{i}").folder for i in range(2)]
    (tmp_path / "list").write_text("".join(f"{folder} t{i}\n" for i, folder in enumerate(sources)))
    arguments = [tmp_path / "list", "--state", tmp_path / "state", "--out", tmp_path / "out", "--device", "cpu"]
    code, terminal = on_a_terminal([*PROGRAM, "batch", *map(str, arguments)], columns=columns)
    assert code == 0, terminal.text
    frames = [f for f in frames_of(terminal, "") if re.search(r"[012]/2 \d:\d\d:\d\d", f)]
    assert frames
    assert {len(frame) for frame in frames} == {columns}
    assert any(re.search(r"…[\w-]*-[01] \d+ %", frame) for frame in frames)
    assert any("━" in frame for frame in frames) is shows_bar
    assert ("kB" in terminal.text) is (columns >= 80)
    assert terminal.text.endswith("2 done")
    assert terminal.cursor_visible


#: What huggingface_hub's own bars say.
FOREIGN = ("Fetching", "Downloading", "Processing Files", "New Data", "model.safetensors:", "it/s", "%|")


def hub_settings(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
        "NO_PROXY": "*", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "0",
    }  # fmt: skip


@pytest.mark.slow
def test_a_download_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    """One display for both, and no time left of what waits for the other; nothing is left of it."""
    layers = {f"layer.{number}": GPTQLayer(K=2048, N=8192) for number in range(4)}  # 10 MB are handed on at once
    hub.add("someone/model", write_source(tmp_path / "source", layers, {}).folder)
    hub.rate = 12e6
    command = [*PROGRAM, "someone/model", str(tmp_path / "out"), "--device", "cpu"]
    code, terminal = on_a_terminal(command, columns=100, environment=hub_settings(hub, tmp_path))
    assert code == 0, terminal.text
    assert not [word for word in FOREIGN if word in terminal.frames]
    frames = frames_of(terminal, "converting", "downloading")
    downloads = [place for place, frame in enumerate(frames) if frame.startswith("downloading")]
    assert any(re.search(r"B/s \d:\d\d:\d\d ", frames[place]) for place in downloads)
    meanwhile = [frame for frame in frames[: downloads[-1]] if frame.startswith("converting")]
    assert meanwhile
    assert not [frame for frame in meanwhile if re.search(r"\d:\d\d:\d\d", frame)]
    assert "loading" not in terminal.text
    assert terminal.cursor_visible


@pytest.mark.slow
def test_an_upload_on_a_terminal(hub: Hub, source: Source, tmp_path: Path) -> None:
    hub.accounts["hf_tok"] = Account("me")
    settings = {**hub_settings(hub, tmp_path), "HF_TOKEN": "hf_tok"}
    command = [*PROGRAM, str(source.folder), str(tmp_path / "out"), "--device", "cpu", "--push-to-hub", "me/model"]
    code, terminal = on_a_terminal(command, environment=settings)
    assert code == 0, terminal.text
    assert not [word for word in FOREIGN if word in terminal.frames]
    assert frames_of(terminal, "uploading to me/model")
    assert "uploading" not in terminal.text


@pytest.mark.slow
def test_loading_a_model_on_a_terminal(tmp_path: Path) -> None:
    pair = make(tmp_path / "model", llama(num_hidden_layers=1))
    code, terminal = on_a_terminal([*PROGRAM, "generate", str(pair.out), "--prompt", "x", "--device", "cpu"])
    assert frames_of(terminal, "loading the model") or frames_of(terminal, "loading torch")
    assert code == 3, terminal.text  # it has no tokenizer
    assert "loading" not in terminal.text.splitlines()[0]
