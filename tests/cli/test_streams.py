"""What reaches a terminal, and outputs that take nothing: closed, full, without a reader."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert.text import shortened, visible
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source

PROGRAM = [sys.executable, "-m", "marlin_convert"]
TITLE = "\x1b]0;PWN\x07"  # sets a terminal's title


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("größe 漢字 👩‍🚀\tx\ny", "größe 漢字 👩‍🚀\tx\ny"),  # joined emoji stay
        ("a\x1b]0;PWN\x07", "a\\x1b]0;PWN\\x07"),
        ("a\x9b2J\x7f\r", "a\\x9b2J\\x7f\\r"),
        ("a\u202ex\u2066y\u2028z", "a\\u202ex\\u2066y\\u2028z"),
        ("\ud800", "\\ud800"),
    ],
)
def test_visible(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_shortened() -> None:
    assert shortened("a\nb") == "'a\\nb'"
    assert shortened([1, None]) == "[1, None]"
    assert shortened("x" * 1000) == "'" + "x" * 59 + "…"
    assert shortened(10**5000) == "a int that is too long to be shown"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shortened(nested) == "a list that is too long to be shown"
    while nested:  # freed level by level: Python would do it by recursion
        nested = nested.pop()  # type: ignore[assignment]


def on_a_terminal(*args: object) -> tuple[int, bytes]:
    """Exit code, and all that came to the terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [*PROGRAM, *map(str, args)], stdin=child, stdout=child, stderr=child, env=environment, close_fds=True
    )
    os.close(child)
    shown = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the program has ended
            break
        shown += part
    os.close(parent)
    return process.wait(60), shown


@pytest.mark.slow
@pytest.mark.parametrize("mark", [TITLE, "[red]x[/red]", "[link=http://evil]b", "[/]", ":bomb:", "\u202e", "\x9b2J"])
def test_names_on_a_terminal(tmp_path: Path, mark: str) -> None:
    """In a layer's name, a file's name, the folder's name, and a setting: shown, and not obeyed."""
    name = "layer" + "".join(c for c in mark if c.isprintable()) + ".q"
    source = write_source(tmp_path / f"source{mark.replace('/', '')}", {name: GPTQLayer(K=128, N=256, bits=8)}, {})
    (source.folder / f"extra{mark.replace('/', '')}.json").symlink_to("/nonexistent")
    broken = on_a_terminal(source.folder, tmp_path / "out")
    (source.folder / f"extra{mark.replace('/', '')}.json").unlink()
    fine = on_a_terminal(source.folder, tmp_path / "out", "--verbose", "--verify", "--device", "cpu")
    config = source.folder / "config.json"
    config.write_text(config.read_text().replace('"gptq"', '"x\\u001b]0;PWN\\u0007"'))
    refused = on_a_terminal(source.folder, tmp_path / "out2")
    assert [code for code, _ in (broken, fine, refused)] == [3, 0, 4]
    for _, shown in (broken, fine, refused):
        assert not any(sequence in shown for sequence in (b"\x1b]0;", b"\x1b]8;", b"\x1b[31m", b"\xc2\x9b"))
        assert "\u202e".encode() not in shown
        assert "💣".encode() not in shown
    assert name.encode() in fine[1]


def limited(command: str, *args: object) -> Run:
    """Run a shell's command line, in which "$@" is the program with its arguments."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    shell = ["bash", "-c", command, "bash", *PROGRAM, *map(str, args)]
    return Run(subprocess.run(shell, capture_output=True, text=True, env=environment, timeout=60, check=False))


@pytest.mark.slow
def test_a_closed_output(source: Source, tmp_path: Path) -> None:
    for number, command in enumerate(('"$@" >&-', '"$@" >&- 2>&-', '"$@" --json >&-', '"$@" <&- >&- 2>&-')):
        out = tmp_path / f"out{number}"
        result = limited(command, source.folder, out)
        assert (result.code, result.out) == (0, "")
        assert (out / "marlin_convert.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output(source: Source, tmp_path: Path, unbuffered: str) -> None:
    for number, options in enumerate(([], ["--json"], ["--dry-run"])):
        out = tmp_path / f"out{number}{unbuffered}"
        command = f'export PYTHONUNBUFFERED={unbuffered}; "$@" >/dev/full'
        result = limited(command, source.folder, out, *options)
        assert result.code == 1, result.err
        assert result.err.splitlines()[-1] == (
            "marlin-convert: standard output cannot be written: No space left on device."
        )
    for number, options in enumerate(([], ["--quiet"], ["--json"])):
        out = tmp_path / f"err{number}{unbuffered}"
        result = limited(f'export PYTHONUNBUFFERED={unbuffered}; "$@" 2>/dev/full', source.folder, out, *options)
        assert result.code == 0
        assert (out / "marlin_convert.json").is_file()
    assert limited('"$@" 2>/dev/full', tmp_path / "nothing", tmp_path / "x").code == 3


@pytest.mark.slow
def test_a_working_directory_that_was_removed(source: Source, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    result = limited(f'cd {tmp_path / "gone"}; rmdir {tmp_path / "gone"}; "$@"', source.folder, "out")
    assert (result.code, result.err.count("\n")) == (6, 1), result.err


@pytest.mark.slow
@pytest.mark.parametrize("place", ["{private}/model", "~nosuchuser/model", "x" * 300, "loop/model", "a\nb", "\x1b[2J"])
def test_sources_and_outputs_in_odd_places(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Folders that may not be entered, links in a circle, names that nobody has: one sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    private = tmp_path / "private"
    private.mkdir(mode=0)
    drop = "setpriv --bounding-set=-dac_override,-dac_read_search,-fowner "
    place = place.format(private=private)
    for given in ((place, "out"), (source.folder, f"{place}/out")):
        result = limited(f'{drop if os.geteuid() == 0 else ""}"$@"', *given)
        assert result.code in (3, 6) or given[1].startswith(("a\n", "\x1b", "~")), result.err
        assert "bug" not in result.err
        assert "\x1b" not in result.err
    private.chmod(0o700)


@pytest.mark.slow
def test_signals_from_the_first_moment(tmp_path: Path) -> None:
    """While the program still imports what it needs: no traceback, and 128 and the signal's number. (Before its first
    line it is Python's own beginning, which a signal may end.)"""
    code = (
        "import builtins, os, signal, sys\n"
        "number, after, imported = int(sys.argv[1]), int(sys.argv[2]), 0\n"
        "original = builtins.__import__\n"
        "def counting(*args, **options):\n"
        "    global imported\n"
        "    if signal.getsignal(number).__class__.__name__ == 'function':\n"
        "        imported += 1\n"
        "        if imported == after:\n"
        "            os.kill(os.getpid(), number)\n"
        "    return original(*args, **options)\n"
        "builtins.__import__ = counting\n"
        "sys.argv[1:] = [sys.argv[3], sys.argv[4]]\n"
        "import marlin_convert.__main__ as program\n"
        "program.program()\n"
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for after in (1, 10, 60, 200):
            process = subprocess.run(
                [sys.executable, "-c", code, str(int(number)), str(after), "/nonexistent", tmp_path / "x"],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert process.returncode == 128 + number, process.stderr
            assert process.stderr.strip() == "marlin-convert: interrupted; nothing half-done was left behind."


@pytest.mark.slow
def test_nothing_is_imported_before_signals_are_handled() -> None:
    """But what Python has loaded at its own start, and what is empty or built into it."""
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        "import _signal\nkept = _signal.signal\n"
        "def signal(*args):\n    print(*sorted(set(sys.modules) - before))\n    return kept(*args)\n"
        "_signal.signal = signal\n"
        "import marlin_convert.__main__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = "_signal marlin_convert marlin_convert.__main__ marlin_convert._version"
    assert {*done.stdout.splitlines()} <= {modules, modules.removeprefix("_signal ")}
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_early_signal_in_json(number: signal.Signals) -> None:
    code = f"import os, sys\nimport marlin_convert.__main__\nos.kill(os.getpid(), {int(number)})"
    done = subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number
    value = Run(done).json()
    assert value["message"] == "interrupted; nothing half-done was left behind."
    assert (value["ok"], value["exit_code"]) == (False, 128 + number)


@pytest.mark.slow
def test_a_second_signal_does_not_stop_the_cleaning_up(source: Source, tmp_path: Path) -> None:
    """As from an impatient finger, or from a shell that passes on what its whole group gets."""
    code = (
        "import os, signal, sys\nfrom marlin_convert.cli import main\n"
        "from marlin_convert.checkpoint import output_folder as writer\nfrom marlin_convert.conversion import convert\n"
        "remove = writer._remove\n"
        "def interrupted(folder):\n    os.kill(os.getpid(), signal.SIGTERM)\n    remove(folder)\n"
        "writer._remove = interrupted\n"
        "convert.write_tensors = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, source.folder, tmp_path / "new" / "out", "--quiet"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert process.stderr == "\nmarlin-convert: interrupted; nothing half-done was left behind.\n"
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_a_signal_after_the_end_changes_nothing(source: Source, tmp_path: Path) -> None:
    """OUT is complete: while the summary is written, a signal makes no failure of it."""
    code = (
        "import os, signal, sys\nfrom marlin_convert.cli import main, output\n"
        "report = output.Screen.report\n"
        "def interrupted(*args):\n    os.kill(os.getpid(), signal.SIGINT)\n    report(*args)\n"
        "output.Screen.report = interrupted\n"
        "main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, source.folder, tmp_path / "out"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (process.returncode, "2 layers converted" in process.stdout) == (0, True), process.stderr


def test_ignored_signals_stay_ignored(source: Source, tmp_path: Path, run: Callable[..., Run]) -> None:
    """As for a program that a script runs in the background."""
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import marlin_convert.__main__ as program\nfrom marlin_convert.conversion import convert\n"
        "configs = convert.write_configs\n"
        "def interrupted(*args):\n    os.kill(os.getpid(), signal.SIGINT)\n    configs(*args)\n"
        "convert.write_configs = interrupted\n"
        "program.program()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, source.folder, tmp_path / "out", "--quiet"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
