"""What ptxas said of the kernels for Hopper when they were built: nothing spills, and no wgmma waits for another.

Both make a kernel several times slower, and a small change of its source can bring them. The build keeps the words, as
compiling takes minutes (setup.py's REPORT_FLAGS).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "cuda"
SOURCES = sorted(path.stem for path in KERNELS.glob("gemm_sm90*.cu"))


def test_sources_are_found() -> None:
    assert len(SOURCES) >= 10


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_and_wgmma_is_not_serialised(source: str) -> None:
    """C7510 to C7519 are ptxas's words for wgmma that it makes wait, and for fences that it adds."""
    report = ROOT / "build" / "native" / f"{source}.o.report"
    newest = max(path.stat().st_mtime for path in [KERNELS / f"{source}.cu", *KERNELS.glob("*.*h")])
    if not report.exists() or report.stat().st_mtime < newest:
        archs = re.split("[,; ]", os.environ.get("MARLIN_CUDA_ARCHS", ""))
        asked = {"90a", "all"} & set(archs) and shutil.which("nvcc")
        (pytest.fail if asked else pytest.skip)(f"{source} was not built for sm_90a since it changed")
    said = report.read_text(encoding="utf-8")
    assert not re.findall(r".*C75\d\d.*", said)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= said.count("Compiling entry function") >= 1
    assert set(spills) == {("0", "0")}
