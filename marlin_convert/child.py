"""Other processes of this program."""

from __future__ import annotations

import sys
from pathlib import Path


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that calls `main` of a module, with `arguments`, in another process.

    It imports what this process would. `python -m` and `-c` alone would look for every module in the current folder
    first, which may be anybody's.
    """
    path = [str(Path(folder).absolute()) for folder in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path}; from {module} import main; main()", *arguments]
