"""Draw what `marlin-convert demo` prints at its end into docs/images/demo.svg: `python tools/demo_picture.py`.

Needs torch and Transformers, as the demo's prompt does. A test compares the picture's text with what the demo prints.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"
#: Columns of the picture; longer lines are folded.
WIDTH = 110


def run_demo(folder: Path) -> str:
    """What the demo prints on standard output, with a terminal's colours."""
    env = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "marlin_convert.cli", "demo", "demo-out", "--device", "cpu", "--force"]
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def end_of(output: str) -> list[str]:
    """The lines of the picture."""
    return output.rstrip().splitlines()


def draw(lines: list[str]) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line))
    # The reader's own font: the template would fetch one. A fixed id: the same text gives the same file.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    svg = console.export_svg(title="make demo", unique_id="demo", code_format=template)
    PICTURE.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw(end_of(run_demo(Path(folder))))
    print(PICTURE)
