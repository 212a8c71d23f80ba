"""What ptxas says of the kernels for Hopper: nothing spills, and no wgmma waits for the one before it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "cuda"
SOURCES = sorted(path.name for path in KERNELS.glob("gemm_sm90*.cu"))

pytestmark = pytest.mark.slow


def test_sources_are_found() -> None:
    assert len(SOURCES) >= 10


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_and_wgmma_is_not_serialised(tmp_path: Path, source: str) -> None:
    """C7510 to C7519 are ptxas's words for wgmma that it makes wait, and for fences that it adds."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-DMARLIN_HAS_SM90", "-cubin",
               "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin"), str(KERNELS / source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.findall(r".*C75\d\d.*", said)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert set(spills) == {("0", "0")}
