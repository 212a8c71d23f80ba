"""The pages: what they tell to run runs and prints what they show, and what they list is what there is.

A code block behind `<!-- run -->` is run (`<!-- run 3 -->`: and ends with exit code 3), in a folder of its page's own
where `gptq` is a GPTQ checkpoint. Each line of a block behind `<!-- prints -->` is a line that the block before has
printed; `…` stands for anything. Other commands are parsed: their options exist.
"""

from __future__ import annotations

import ast
import contextlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from marlin_convert import errors
from marlin_convert.cli.commands import DEMO_FOLDER, cli
from tests.support.cli import Run
from tests.support.gptq_checkpoints import Source
from tests.support.hub_server import Hub
from tests.test_rooms import ROOMS
from tools import terminal_pictures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Files that pages name without their folder: sources, and the model card of a checkpoint.
SHORT = {path.name for folder in ("kernels", "tests") for path in (ROOT / folder).rglob("*")} | {"README.md"}
BLOCK = re.compile(r"(?:<!-- (run|prints)(?: (\d+))? -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A code block of a page. `mark` is what stands before it: run, prints or nothing."""

    mark: str
    code: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(mark or "", int(code or 0), language, text)
        for mark, code, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `gptq`, and a `marlin-convert` on the PATH, in bin."""
    shutil.copytree(DEMO_FOLDER, tmp_path / "gptq")
    program = tmp_path / "bin" / "marlin-convert"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m marlin_convert.cli "$@"\n')
    program.chmod(0o755)
    return tmp_path


def run_block(block: Block, place: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c"] if block.language == "python" else ["sh", "-ec"]
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf-home")}
    return subprocess.run([*command, block.text], cwd=place, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark for b in blocks(page))], ids=name)
def test_what_a_page_says_to_run(page: Path, place: Path) -> None:
    printed = ""
    for block in blocks(page):
        if block.mark == "run":
            done = run_block(block, place)
            assert done.returncode == block.code, done.stderr
            printed = done.stdout
        elif block.mark == "prints":
            for line in block.text.splitlines():
                pattern = ".*".join(map(re.escape, line.split("…")))
                assert re.search(f"^{pattern}$", printed, re.MULTILINE), f"{line!r} is not in:\n{printed}"


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) for every `marlin-convert …` with arguments, of a shell block or within a sentence."""
    for page in PAGES:
        lines = [line for b in blocks(page) if b.language in ("", "sh") for line in b.text.splitlines()]
        prose = re.sub(r"```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in [*lines, *re.findall(r"`([^`]+)`", prose)]:
            text = line.removeprefix("$ ").split("  #")[0].strip()
            if text.startswith("marlin-convert ") and "..." not in text and "…" not in text:
                yield name(page), text


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_are_such_as_the_program_takes(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    sub = words.pop(0) if words[0] in cli.commands else "convert"
    # A sentence may leave an argument out: `marlin-convert --verify`.
    with contextlib.suppress(click.exceptions.MissingParameter):
        # click keeps a command's help option, as the first context asks for it.
        cli.commands[sub].make_context(sub, words, **cli.context_settings)


def test_every_command_and_option_is_in_the_reference() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text()
    options = {
        option for command in cli.commands.values() for p in command.params for option in p.opts if option[0] == "-"
    }
    assert len(options) > 25
    assert not [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", page)]
    assert not [
        command for command in cli.commands if command != "convert" and f"## marlin-convert {command}\n" not in page
    ]


def test_the_architecture_page_draws_the_rooms_in_their_order() -> None:
    drawing = (ROOT / "docs/concepts/architecture.md").read_text().split("```")[1].splitlines()
    rows = [next(y for y, line in enumerate(drawing) if set(rooms) <= set(line.split())) for rooms in ROOMS]
    assert rows == sorted(rows)


FILE = re.compile(r"[\w./-]+\.(?:py|cpp|cu|cuh|h|inl|md|toml)(?!\w)")


def files() -> Iterator[tuple[str, str]]:
    """(page, file) for every source file that a page or a comment of kernels/ names."""
    for path in (ROOT / "kernels").rglob("*.*"):
        yield from ((name(path), file) for file in re.findall(r"marlin_convert/[\w/]+\.py", path.read_text("utf-8")))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "tools").rglob("*.md")]:
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            yield from ((name(page), file) for file in FILE.findall(span))


@pytest.mark.parametrize(("page", "file"), sorted(set(files())))
def test_files_that_a_page_names_exist(page: str, file: str) -> None:
    places = [ROOT, ROOT / "marlin_convert", (ROOT / page).parent]
    assert any((place / file).is_file() for place in places) or file in SHORT


# ---- Installing ----


def test_install_lines_are_those_of_one_place() -> None:
    """No page gives pip a name that is on no index, and each says what the program's messages say."""
    known = {value for key, value in vars(errors).items() if key.startswith("INSTALL")}
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    known |= {f'pip install ".[{extra}]"' for extra in extras}
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for b in blocks(page) if b.language in ("", "sh") for line in b.text.splitlines()]
        for line in [*lines, *re.findall(r"`(pip install[^`]*)`", re.sub(r"```.*?^```", "", text, flags=re.M | re.S))]:
            if line.strip().startswith("pip install"):
                found.add(line.split("  #")[0].strip())
    assert found - known == {"pip install torch"}  # which a remark warns of
    assert {errors.INSTALL, errors.INSTALL_WHEEL, 'pip install ".[run]"'} <= found
    for path in (ROOT / "marlin_convert").rglob("*.py"):
        said = set(re.findall(r"pip install (?!vllm)[^{}`]*", path.read_text(encoding="utf-8")))
        assert not said or path.name == "errors.py", path


# ---- JSON ----


def documented(document: str) -> list[str]:
    text = (ROOT / "docs/reference/json.md").read_text().split(f"<!-- keys: {document} -->")[1].split("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [key for row in rows for key in re.findall(r"`(\w+)`", row)]


#: What every document that is printed begins with.
FIRST = ["schema_version", "ok", "source"]


def test_json_documents_have_the_documented_keys(
    source: Source, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = {
        engine: run(source.folder, "--dry-run", "--engine", engine, "--json").json()
        for engine in ("vllm", "transformers")
    }
    found = {
        "convert": run(source.folder, out, "--verify", "--json").json(),
        "dry-run": asked["vllm"] | asked["transformers"],
        "env": run("env", "--json").json(),
        "to-gptq": run("to-gptq", out, tmp_path / "gptq", "--json").json(),
        "error": run(source.folder, out, "--json").json(),
    }
    for document, value in found.items():
        assert list(value)[:3] == FIRST
        assert sorted(FIRST + documented(document)) == sorted(value), document
    verification = json.loads((out / "verify.json").read_text())
    assert documented("verify") == list(verification)
    report = json.loads((out / "marlin_convert.json").read_text())
    keys = documented("convert")
    assert list(report) == [keys[0], "source", *keys[1 : len(report) - 1]]
    page = (ROOT / "docs/reference/json.md").read_text()
    assert "{" + ", ".join(verification["layers"][0]) + "}" in page
    assert "{" + ", ".join(found["dry-run"]["layers"][0]) + "}" in page
    assert "{" + ", ".join(found["dry-run"]["copied"][0]) + "}" in page


def test_json_of_generate_and_demo(tmp_path: Path, run: Callable[..., Run]) -> None:
    out = tmp_path / "out"
    demo = run("demo", out, "--json", "--device", "cpu").json()
    assert sorted([*FIRST, *documented("convert"), "continuation"]) == sorted(demo)
    assert list(demo["continuation"]) == ["prompt", "source", "result", "equal"]
    done = run("generate", out, "--prompt", "And", "--max-new-tokens", "1", "--json", "--device", "cpu").json()
    assert sorted(FIRST + documented("generate")) == sorted(done)
    assert "{" + ", ".join(done["sampling"]) + "}" in (ROOT / "docs/reference/json.md").read_text()


def test_json_of_a_proof(hub: Hub, online: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    hub.add("org/gptq", source.folder)
    assert online("org/gptq", tmp_path / "out", "--device", "cpu").code == 0
    proof = online("verify", tmp_path / "out", "--json", "--device", "cpu").json()
    assert sorted(FIRST + documented("prove")) == sorted(proof)
    noted = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())
    assert "{" + ", ".join(noted["options"]) + "}" in (ROOT / "docs/reference/json.md").read_text()


def test_json_of_a_batch(hub: Hub, online: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    hub.add("org/gptq", source.folder)
    (tmp_path / "list").write_text("org/gptq\n")
    document = online("batch", tmp_path / "list", "--dry-run", "--state", tmp_path / "state", "--json").json()
    assert sorted(FIRST + documented("batch")) == sorted(document)
    assert sorted(documented("checkpoint")) == sorted(document["checkpoints"][0])


# ---- The picture ----


def text_of(picture: Path) -> str:
    """What a terminal's picture shows, line after line."""
    lines: dict[float, str] = {}
    svg = picture.read_text(encoding="utf-8")
    for y, text in re.findall(r'<text class="[\w-]+-r\d+" x="[^"]*" y="([^"]*)"[^>]*>(.*?)</text>', svg):
        lines[float(y)] = lines.get(float(y), "") + html.unescape(text)
    return "".join(lines[y] for y in sorted(lines))


def steady(text: str) -> str:
    """`text` without what differs between runs and machines (times, speed, the CPU's instructions), and without colours
    and spaces: a picture has spaces as distances, and folds lines."""
    plain = re.sub(r"\x1b\[[\d;]*m|\s", "", text)
    return re.sub(r"time(converting|verifying).*?nativeCPUlibrary\(.*?\)", "time", plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", terminal_pictures.PICTURES)
def test_terminals_end_as_their_pictures_show(tmp_path: Path, name: str) -> None:
    _, lines_in = terminal_pictures.PICTURES[name]
    shown = steady(text_of(terminal_pictures.IMAGES / f"{name}.svg"))
    assert "verified56of56layers" in shown
    assert shown == steady("".join(lines_in(tmp_path)))


# ---- Tables ----


def sentences() -> list[str]:
    """All string constants of the package, an f-string's values as a gap."""
    found = []
    for path in (ROOT / "marlin_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_troubleshooting_exist() -> None:
    text = (ROOT / "docs/guides/troubleshooting.md").read_text()
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for message in re.findall("`(.*?)`", row)
    ]
    assert len(messages) > 10
    known = sentences()
    for message in messages:
        assert any(message in sentence for sentence in known), message


def test_every_variable_that_is_read_is_documented() -> None:
    sources = [*(ROOT / "marlin_convert").rglob("*.py"), ROOT / "setup.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(re.findall(r'"(MARLIN_[A-Z_]+)"', text))
    read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', text))
    kernels = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.c*")]
    read |= set(re.findall(r'getenv\("(\w+)"\)', "\n".join(kernels)))
    page = (ROOT / "docs/reference/environment.md").read_text()
    assert {"MARLIN_CONVERT_NO_NATIVE", "MARLIN_CUDA_ARCHS", "CXX"} <= read
    assert not [variable for variable in read if f"`{variable}" not in page]
