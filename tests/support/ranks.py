"""One process for each rank of an engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 1800


def on_ranks(
    worker: str, count: int, shared: str, models: list[tuple[Path, Path]], results: Path, **environment: str
) -> list[list[Any]]:
    """Run tests/support/`worker` in each of `count` ranks that share out `shared`; what each says of each model, a
    pair of folders (MARLIN, DENSE)."""
    script, folders = Path(__file__).with_name(worker), [str(folder) for pair in models for folder in pair]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(script.parents[2])])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(count), port, shared, str(results / str(rank)), *folders],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        for process in workers:
            _, messages = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, messages[-3000:]
    finally:
        for process in workers:
            process.kill()
            process.communicate()
    return [json.loads((results / str(rank)).read_text()) for rank in range(count)]
