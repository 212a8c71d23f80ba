"""Other processes of the program: what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from marlin_convert import child


def test_a_child_imports_what_this_process_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what lies in the current folder, even under the name of a module of Python's own or of this package."""
    for folder, module in [("here", "json"), ("here", "marlin_convert"), ("here", "spoken"), ("there's", "spoken")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{module}.py").write_text("raise SystemExit(99)")
    (tmp_path / "there's" / "spoken.py").write_text(
        "import json, sys\n\nimport marlin_convert\n\n"
        "def main(): print(json.dumps(sys.argv[1:]), marlin_convert.__file__)\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "there's"), *filter(None, sys.path)])
    said = subprocess.run(child.python("spoken", "one", "two words"), capture_output=True, text=True, check=True).stdout
    assert said == f'["one", "two words"] {Path(child.__file__).with_name("__init__.py")}\n'
