"""Draw what a terminal shows into docs/images: `python tools/terminal_pictures.py`.

    demo.svg            the demo, which needs torch and Transformers for its prompt
    conversion-run.svg  a checkpoint that is looked at, converted and compared, by two commands

All of it is printed by the program. A test compares the pictures' texts with what it prints.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

import marlin_convert

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SOURCE = Path(marlin_convert.__file__).parent / "data" / "demo"
#: Columns of the pictures; longer lines are folded.
WIDTH = 110


def run(folder: Path, *arguments: str) -> list[str]:
    """Return the lines that the program prints on standard output, with a terminal's colours."""
    env = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "marlin_convert.cli", *arguments, "--device", "cpu"]
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip().splitlines()


def demo(folder: Path) -> list[str]:
    return run(folder, "demo", "demo-out", "--force")


def conversion(folder: Path) -> list[str]:
    shutil.copytree(SOURCE, folder / "gptq")
    lines = []
    for arguments in (["./gptq", "--dry-run"], ["./gptq", "./marlin", "--verify"]):
        lines += [f"$ marlin-convert {' '.join(arguments)}", *run(folder, *arguments), ""]
    return lines[:-1]


#: By the picture's name: the window's title, and what makes its lines in a folder.
PICTURES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "demo": ("make demo", demo),
    "conversion-run": ("marlin-convert", conversion),
}


def draw(name: str, title: str, lines: list[str]) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line))
    # The reader's own font: the template would fetch one. A fixed id: the same text gives the same file.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = console.export_svg(title=title, unique_id=name, code_format=template)
    picture = IMAGES / f"{name}.svg"
    picture.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(picture)


if __name__ == "__main__":
    for name, (title, lines_in) in PICTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            draw(name, title, lines_in(Path(folder)))
