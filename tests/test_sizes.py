"""Files and functions stay short enough to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("marlin_convert", "kernels", "tests", "benchmarks", "tools")
SOURCES = {".py", ".h", ".cpp", ".inl", ".cu", ".cuh"}
MOST_LINES = 420
#: Without the docstring.
MOST_LINES_OF_A_FUNCTION = 50


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines without the docstring) of each function in a module, methods and inner ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_files() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    assert len(files) > 300
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.slow
def test_functions() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {name}": count
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for name, count in functions(path)
        if count > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_lines_are_counted(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('def f(\n    x\n):\n    """One.\n\n    Two.\n    """\n    def g():\n        pass\n    return g\n')
    assert dict(functions(module)) == {"f": 6, "g": 2}
