"""Output folders as earlier runs leave them, and runs that are limited in what they may do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from marlin_convert.checkpoint.output_folder import new_folder
from marlin_convert.options import REPORT_FILE
from tests.support.cli import PATIENCE, Run
from tests.support.gptq_checkpoints import Source


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, with its text."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def earlier_result(out: Path) -> dict[str, str]:
    (out / "deep").mkdir(parents=True)
    (out / REPORT_FILE).write_text("{}")
    (out / "deep" / "weights").write_text("old")
    return contents(out)


def write_new(out: Path, *, force: bool = False, error: BaseException | None = None) -> None:
    with new_folder(out, force=force) as folder:
        (folder / "weights").write_text("new")
        if error:
            raise error


def hidden_folders(parent: Path) -> list[Path]:
    return [p for p in parent.iterdir() if p.name.startswith(".out.marlin-convert-") and p.name.endswith(".tmp")]


#: Takes from root the right to ignore permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH).
NO_OVERRIDE = "import ctypes; [ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) for capability in (1, 2)]"
SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"


def limited(source: Source, tmp_path: Path, limit: str = "") -> Run:
    """A conversion in a process that has run the code `limit` on itself first."""
    return limited_program(limit, source.folder, tmp_path / "results" / "out")


def limited_program(limit: str, *args: object, cwd: Path | None = None) -> Run:
    """The program with these arguments, in a process that has run the code `limit` on itself first."""
    program = ["-m", "marlin_convert.cli", *map(str, args)]
    code = f"{limit}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *{program!r}])"
    command = [sys.executable, "-c", code]
    return Run(subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, check=False))
