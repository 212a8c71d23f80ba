"""setup.py: what it compiles, how, and what it says when it cannot. The compilers here are scripts that write a log."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.build_project import ROOT, Project

pytestmark = pytest.mark.slow

NVCC_LIST = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\n"  # as CUDA 12.4 has it

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_without_nvcc_only_the_cpu_library_is_built(project: Project) -> None:
    project.build()
    assert project.libraries() == ["_cpu.so"]
    (call,) = project.calls("g++")
    assert "kernels/cpu/repack.cpp" in call.split()
    assert "-fvisibility=hidden" in call.split()
    assert not [flag for flag in call.split() if flag.startswith("-I")]  # no Python or torch headers


def gencodes(call: str) -> list[str]:
    return [flag.removeprefix("-gencode=arch=") for flag in call.split() if flag.startswith("-gencode")]


def compiled(project: Project) -> dict[str, str]:
    """The calls of nvcc that compile, by the source's name; each must be followed by a link of all of them."""
    *calls, link = project.calls("nvcc")
    sources = {Path(call.split()[call.split().index("-c") + 1]).name: call for call in calls}
    assert len(sources) == len(calls)
    objects = {word for word in link.split() if word.endswith(".o")}
    assert objects == {f"build/native/{Path(source).stem}.o" for source in sources}
    assert "-shared" in link.split()
    return sources


def test_wheels_have_code_for_every_gpu(project: Project) -> None:
    project.compiler("nvcc", archs=NVCC_LIST)
    project.gpus("8.6")
    project.build(MARLIN_CUDA_ARCHS="all")
    assert project.libraries() == ["_cpu.so", "_cuda.so"]
    calls = compiled(project)
    assert set(calls) == {"gemm_sm80.cu", "gemm_sm90_b4.cu", "plan.cpp"}
    # 100 and 120 are not known to this nvcc; 90a is, as 90; PTX is that of the lowest.
    # Hopper has kernels of its own instead of those of gemm_sm80.
    assert gencodes(calls["gemm_sm80.cu"]) == ["compute_80,code=sm_80", "compute_80,code=compute_80"]
    assert gencodes(calls["plan.cpp"]) == [
        "compute_80,code=sm_80",
        "compute_90a,code=sm_90a",
        "compute_80,code=compute_80",
    ]
    assert gencodes(calls["gemm_sm90_b4.cu"]) == ["compute_90a,code=sm_90a"]
    assert all("-DMARLIN_HAS_SM90" in call.split() for call in calls.values())


def test_without_sm90_its_sources_are_left_out(project: Project) -> None:
    project.compiler("nvcc", archs=NVCC_LIST)
    project.build(MARLIN_CUDA_ARCHS="80,90")
    calls = compiled(project)
    assert set(calls) == {"gemm_sm80.cu", "plan.cpp"}
    assert not [call for call in calls.values() if "-DMARLIN_HAS_SM90" in call.split()]


@pytest.mark.parametrize(("version", "compressed"), [("12.9", False), ("13.0", True)])
def test_machine_code_is_compressed_from_cuda_13_on(project: Project, version: str, compressed: bool) -> None:
    project.compiler("nvcc", archs=NVCC_LIST, version=version)
    project.build(MARLIN_CUDA_ARCHS="80")
    assert {"--compress-mode=size" in call.split() for call in compiled(project).values()} == {compressed}


@pytest.mark.parametrize(
    ("gpus", "built"),
    [
        (["9.0"], ["compute_90a,code=sm_90a"]),
        (["8.6", "8.6"], ["compute_86,code=sm_86", "compute_86,code=compute_86"]),
        (["9.0", "7.5", "8.0"], ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_80,code=compute_80"]),
        (["8.7"], ["compute_86,code=sm_86", "compute_86,code=compute_86"]),  # code of 8.6 runs on 8.7
        (["12.0"], ["compute_80,code=sm_80", "compute_80,code=compute_80"]),  # unknown to this nvcc: by PTX
    ],
)
def test_what_is_built_is_for_the_gpus_that_are_here(project: Project, gpus: list[str], built: list[str]) -> None:
    project.compiler("nvcc", archs=NVCC_LIST)
    project.gpus(*gpus)
    project.build()
    assert project.libraries() == ["_cpu.so", "_cuda.so"]
    assert gencodes(compiled(project)["gemm_sm80.cu"]) == built


@pytest.mark.parametrize("gpus", [[], ["7.5"]])
def test_without_a_gpu_cuda_is_left_out_and_said(project: Project, gpus: list[str]) -> None:
    nvcc = project.compiler("nvcc", archs=NVCC_LIST)
    project.gpus(*gpus)
    (line,) = [line for line in project.build().splitlines() if line.startswith("marlin-convert: ")]
    assert line.startswith(f"marlin-convert: {nvcc} is here and no GPU that the kernels run on, so the CUDA library is")
    assert "MARLIN_CUDA_ARCHS=all builds it" in line
    assert project.libraries() == ["_cpu.so"]
    assert not project.calls("nvcc")


def test_nvcc_is_found_in_cuda_home(project: Project, tmp_path: Path) -> None:
    project.gpus("8.0")
    nvcc = project.compiler("nvcc", archs=NVCC_LIST)
    home = tmp_path / "cuda" / "bin"
    home.mkdir(parents=True)
    nvcc.rename(home / "nvcc")
    project.build()
    assert project.libraries() == ["_cpu.so"]
    project.build(CUDA_HOME=str(tmp_path / "cuda"))
    assert project.libraries() == ["_cpu.so", "_cuda.so"]


def test_cuda_can_be_left_out(project: Project) -> None:
    project.gpus("8.0")
    project.compiler("nvcc", archs=NVCC_LIST)
    project.build(MARLIN_NO_CUDA="1")
    assert project.libraries() == ["_cpu.so"]
    project.build(MARLIN_NO_CUDA="0")
    assert project.libraries() == ["_cpu.so", "_cuda.so"]


@pytest.mark.parametrize("asked", ["90a,80", "90a;80", "90a 80", " 90a, 80 "])
def test_architectures_can_be_chosen(project: Project, asked: str) -> None:
    project.compiler("nvcc", archs=NVCC_LIST)
    project.build(MARLIN_CUDA_ARCHS=asked)
    codes = gencodes(compiled(project)["gemm_sm80.cu"])
    assert sorted(codes) == ["compute_80,code=compute_80", "compute_80,code=sm_80", "compute_90a,code=sm_90a"]


def test_unknown_architectures_are_refused(project: Project) -> None:
    nvcc = project.compiler("nvcc", archs=NVCC_LIST)
    (project.root / "kernels/cpu/repack.cpp").touch()
    done = project.setup("build_ext", "--inplace", MARLIN_CUDA_ARCHS="80,999")
    assert done.returncode != 0
    assert f"MARLIN_CUDA_ARCHS: {nvcc} does not know 999; it knows 75, 80, 86, 89, 90" in done.stderr
    assert "Traceback" not in done.stderr
    project.compiler("nvcc", archs="compute_35\n")
    project.gpus("8.0")
    done = project.setup("build_ext", "--inplace")
    assert "knows none of 80, 86, 89, 90a, 100, 120; use CUDA 11.8 or newer, or set MARLIN_NO_CUDA=1" in done.stderr


def test_only_what_is_older_than_its_sources_is_rebuilt(project: Project) -> None:
    project.gpus("8.0")
    project.compiler("nvcc", archs=NVCC_LIST)

    def built() -> tuple[int, int]:
        project.build()
        return len(project.calls("g++")), len(project.calls("nvcc"))

    def touch(path: str) -> None:
        file = project.root / path
        later = time.time() + 60
        os.utime(file, (later, later))

    def age(path: str) -> None:
        os.utime(project.root / path, (0, 0))

    assert built() == (1, 3)  # two sources of CUDA and the link
    assert built() == (1, 3)
    shutil.rmtree(project.root / "marlin_convert", ignore_errors=True)
    project.write("marlin_convert/_version.py", '__version__ = "1.2.3"\n')
    assert built() == (1, 3)
    assert project.libraries() == ["_cpu.so", "_cuda.so"]
    touch("kernels/cpu/common.h")
    assert built() == (2, 3)
    age("kernels/cpu/common.h")
    touch("kernels/cuda/gemm_sm80.cu")
    assert built() == (2, 5)
    age("kernels/cuda/gemm_sm80.cu")
    touch("kernels/marlin.h")
    assert built() == (3, 8)
    age("kernels/marlin.h")
    project.build(MARLIN_CUDA_ARCHS="80,86")
    assert len(project.calls("nvcc")) == 11


def test_a_failing_compiler_gives_one_clear_message(project: Project) -> None:
    project.compiler("g++", code=1)
    message = "error: g++ failed with exit code 1, see its messages above: set CXX to a C++17 compiler such as g++ 9"
    assert project.fail().startswith(message)


def test_a_missing_compiler_gives_one_clear_message(project: Project) -> None:
    assert project.fail(CXX="no-such-compiler").startswith("error: cannot run no-such-compiler (No such file")


def test_what_ptxas_says_of_hoppers_kernels_is_kept(project: Project) -> None:
    """For tests/native/test_registers.py; the log has all else that the compiler says."""
    words = ["ptxas info    : 0 bytes gmem", "    0 bytes stack frame, 0 bytes spill stores", "x.cu(1): warning: odd"]
    project.compiler("nvcc", archs=NVCC_LIST, says="\n".join(words))
    said = project.build(MARLIN_CUDA_ARCHS="80,90a")
    assert "x.cu(1): warning: odd\n" in said
    assert "bytes" not in said
    report = project.root / "build/native/gemm_sm90_b4.o.report"
    assert report.read_text().splitlines() == words
    assert [path.name for path in report.parent.glob("*.report")] == [report.name]
    report.unlink()
    project.log("nvcc").unlink()
    project.build(MARLIN_CUDA_ARCHS="80,90a")
    assert ["gemm_sm90_b4" in call for call in project.calls("nvcc")] == [True, True]  # compiled, and all linked
    assert report.exists()


def test_a_failing_nvcc_says_how_to_do_without(project: Project) -> None:
    project.gpus("8.0")
    nvcc = project.compiler("nvcc", code=2, archs=NVCC_LIST)
    done = project.setup("build_ext", "--inplace")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"error: {nvcc} failed with exit code 2, see its messages above: set MARLIN_NO_CUDA=1 to build without CUDA"
    )
    assert "_cuda.so" not in project.libraries()


def test_cxx_may_have_arguments(project: Project) -> None:
    project.compiler("other-cxx")
    project.build(CXX="other-cxx -march=native")
    assert project.calls("other-cxx")[0].startswith("-march=native -shared")
    assert not project.calls("g++")


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="no g++ or nm")
def test_the_cpu_library_shows_its_own_functions_only(tmp_path: Path) -> None:
    """With the real compiler; the C++ runtime inside must not meet another one in the process."""
    kept = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env={**kept, "MARLIN_NO_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "marlin_convert" / "_cpu.so"
    symbols = subprocess.run(["nm", "-D", "--defined-only", output], capture_output=True, text=True, check=True).stdout
    strong = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] == "T"]
    assert strong
    assert all(name.startswith("marlin_cpu_") for name in strong)
    needed = subprocess.run(["ldd", output], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" not in needed
    assert "libpython" not in needed
