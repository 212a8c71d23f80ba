"""Builds the native libraries; everything else about the package stands in pyproject.toml.

    marlin_convert/_cpu.so    kernels/cpu/*.cpp    always, with g++ or $CXX
    marlin_convert/_cuda.so   kernels/cuda/*.cu    when nvcc is on the PATH or in $CUDA_HOME/bin; *.cpp there too

Both are plain shared libraries with a C interface: no torch, no Python headers. So one wheel serves every Python and
every torch, and building needs neither.

Environment variables:

    CXX                 the C++ compiler (default: g++)
    MARLIN_NO_CUDA=1    leave _cuda.so out even if nvcc is there
    MARLIN_CUDA_ARCHS   GPU architectures to compile for, such as "80,90a", or "all", as for wheels
                        (default: those of the GPUs that are here; without such a GPU, _cuda.so is left out)
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# setup.py runs in the project's folder, and setuptools wants source paths relative to it.
CPU_SOURCES = sorted(Path("kernels/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(path for kind in ("*.cu", "*.cpp") for path in Path("kernels/cuda").glob(kind))

CACHE = Path("build/native")

# The C++ runtime goes into the library and stays hidden there, so that the library runs on systems with an older one
# and does not meet the runtime of torch.
RUNTIME_FLAGS = ["-static-libstdc++", "-static-libgcc"]
HIDDEN_FLAGS = ["-Wl,--exclude-libs,ALL"]
CPU_FLAGS = [
    *("-shared", "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *RUNTIME_FLAGS,
    *HIDDEN_FLAGS,
]
CUDA_FLAGS = ["-O3", "-std=c++17", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_LINK_FLAGS = [
    *("-shared", "-cudart", "static"),
    *("-Xcompiler", ",".join(RUNTIME_FLAGS)),
    *("-Xlinker", "--exclude-libs,ALL"),
]

# ptxas tells each kernel's registers and spills, and wgmma that it makes wait; `compile_library` keeps it for a test.
REPORT_FLAGS = ["-Xptxas", "-v"]
ABOUT_A_KERNEL = ("ptxas info    :", "    ")

MIN_CAPABILITY = (8, 0)
# Ampere (A100), Ampere (A10, RTX 30), Ada (L4, RTX 40), Hopper (with wgmma), Blackwell (B200), Blackwell (RTX 50).
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
#: Those of a wheel. Code for 8.0 runs on 8.6 and 8.9 too; code of their own would be a third of the time and the size.
WHEEL_ARCHS = ("80", "90a", "100", "120")

# Sources named gemm_sm90* use instructions of sm_90a: they are compiled for it alone, and left out without it.
# Hopper then never chooses a kernel of gemm_sm80*. So wheels have no machine code of these for it, a sixth of the
# time; one that is asked for there is made by the driver, of the PTX.
SM90_ARCH, SM90_PREFIX, SM80_PREFIX = "90a", "gemm_sm90", "gemm_sm80"


def find_nvcc() -> str | None:
    if os.environ.get("MARLIN_NO_CUDA", "") not in ("", "0"):
        return None
    cuda_home = os.environ.get("CUDA_HOME")
    in_home = shutil.which("nvcc", path=str(Path(cuda_home) / "bin")) if cuda_home else None
    return in_home or shutil.which("nvcc")


def asked_archs() -> list[str]:
    """What MARLIN_CUDA_ARCHS asks for; [] if it does not say."""
    return os.environ.get("MARLIN_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()


def gpu_capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs that are here, as the driver's own tool tells them; [] without one."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return []
    found = re.findall(r"^(\d+)\.(\d+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return sorted({(int(major), int(minor)) for major, minor in found})


def arch_of(capability: tuple[int, int], known: set[str]) -> str | None:
    """The architecture, of those known to nvcc, whose code runs fastest on a GPU; None if no code for it can be made.

    Code for a capability runs on those of the same first number that are not lower. For a GPU without such code it is
    the lowest architecture, whose PTX the driver compiles.
    """
    lowest = {arch: divmod(int(arch.rstrip("af")), 10) for arch in CUDA_ARCHS if arch.rstrip("af") in known}
    usable = [arch for arch in lowest if lowest[arch] <= capability]
    alike = [arch for arch in usable if lowest[arch][0] == capability[0]]
    return next(iter(alike[-1:] + usable), None)


def known_archs(nvcc: str) -> set[str]:
    """The architectures that nvcc knows, such as 80; it lists 90a only as 90."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return {line.removeprefix("compute_").strip() for line in listed.splitlines()}


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures asked for (all must be known to nvcc), a wheel's, or those of the GPUs that are here.

    Empty if nothing is asked for and no GPU is here that Marlin runs on.
    """
    known, asked = known_archs(nvcc), asked_archs()
    unknown = [arch for arch in asked if arch.rstrip("af") not in known and arch != "all"]
    if unknown:
        raise CompileError(
            f"MARLIN_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )
    capabilities = [capability for capability in gpu_capabilities() if capability >= MIN_CAPABILITY]
    if "all" in asked:
        archs = [arch for arch in WHEEL_ARCHS if arch.rstrip("af") in known]
    elif asked or not capabilities:
        return asked
    else:
        wanted = {arch_of(capability, known) for capability in capabilities}
        archs = [arch for arch in CUDA_ARCHS if arch in wanted]
    if not archs:
        raise CompileError(
            f"{nvcc} knows none of {', '.join(CUDA_ARCHS)}; use CUDA 11.8 or newer, or set MARLIN_NO_CUDA=1"
        )
    return archs


def arch_flags(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the lowest for every other GPU.

    The driver compiles PTX for whatever GPU it finds, but only for one of that architecture or a higher one. PTX of the
    lowest thus serves later GPUs and those between the listed ones. An "a" architecture runs on no other GPU.
    """
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]
    if portable:
        lowest = min(portable, key=int)
        flags.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    return flags


def cpu_command() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    return [*compiler, *CPU_FLAGS, *map(str, CPU_SOURCES)]


def size_flags(nvcc: str) -> list[str]:
    """Machine code compressed to a third. Drivers before CUDA 12.4 cannot read it; those that CUDA 13 needs can."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", version)
    return ["--compress-mode=size"] if release and int(release[1]) >= 13 else []


def cuda_commands(nvcc: str) -> dict[Path, list[str]]:
    """For each source that is compiled, the command, without what it writes."""
    size, sm90 = size_flags(nvcc), SM90_ARCH in ARCHS
    commands = {}
    for source in CUDA_SOURCES:
        for_sm90 = source.name.startswith(SM90_PREFIX)
        if for_sm90 and not sm90:
            continue
        of_a_wheel = source.name.startswith(SM80_PREFIX) and "all" in asked_archs()
        others = [arch for arch in ARCHS if arch != SM90_ARCH]
        flags = arch_flags([SM90_ARCH] if for_sm90 else others if of_a_wheel else ARCHS)
        defined = ["-DMARLIN_HAS_SM90"] if sm90 else []
        report = REPORT_FLAGS if for_sm90 else []
        commands[source] = [nvcc, *CUDA_FLAGS, *size, *flags, *defined, *report, "-c", str(source)]
    return commands


def cuda_library(nvcc: str, headers: list[Path], hint: str, force: bool) -> Path:
    """Compiles what is new, on all cores, and links."""
    commands = cuda_commands(nvcc)
    # The longest first: those for sm_90a have hundreds of kernels.
    sources = sorted(commands, key=lambda source: (not source.name.startswith(SM90_PREFIX), source.suffix != ".cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: Path) -> Path:
            return cached(f"{source.stem}.o", commands[source], [source, *headers], hint, force)

        objects = list(pool.map(compiled, sources))
    return cached("_cuda.so", [nvcc, *CUDA_LINK_FLAGS, *map(str, objects)], objects, hint, force)


def compile_library(command: list[str], report: Path | None, hint: str) -> None:
    """Run a compiler; its own messages go to the terminal or pip's log, those about each kernel to `report`."""
    print(shlex.join(command), flush=True)
    to = {} if report is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, check=False, text=True, **to)
    except OSError as error:
        raise CompileError(f"cannot run {command[0]} ({error.strerror}): {hint}") from None
    code = done.returncode
    if report is not None:
        report.write_text(done.stdout)
        lines = done.stdout.splitlines()
        told = [line for line in lines if code or not line.startswith(ABOUT_A_KERNEL)]
        print("".join(f"{line}\n" for line in told), end="", flush=True)
    if code:
        raise CompileError(f"{command[0]} failed with exit code {code}, see its messages above: {hint}")


def cached(name: str, command: list[str], inputs: list[Path], hint: str, force: bool) -> Path:
    """What the command writes, in CACHE; made anew if an input is newer or the command is another one.

    pip gives every build a new, empty output folder; without this each `pip install -e .` would compile everything.
    """
    output, stamp = CACHE / name, CACHE / f"{name}.command"
    report = CACHE / f"{name}.report" if set(REPORT_FLAGS) <= set(command) else None
    newest = max(path.stat().st_mtime for path in inputs)
    same = stamp.exists() and stamp.read_text() == shlex.join(command)
    whole = output.exists() and (report is None or report.exists())
    if force or not same or not whole or output.stat().st_mtime <= newest:
        CACHE.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        compile_library([*command, "-o", str(output)], report, hint)
        stamp.write_text(shlex.join(command))
    return output


class BuildLibraries(build_ext):
    """Calls g++ and nvcc; what comes out are plain shared libraries and not Python extension modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no ".cpython-311-x86_64-linux-gnu"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit_

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [Path(path) for path in (*ext.sources, *ext.depends)]
        if ext.name.endswith("_cuda"):
            hint = "set MARLIN_NO_CUDA=1 to build without CUDA"
            library = cuda_library(str(NVCC), [Path(path) for path in ext.depends], hint, self.force)
        else:
            hint = "set CXX to a C++17 compiler such as g++ 9 or newer"
            library = cached(output.name, cpu_command(), inputs, hint, self.force)
        shutil.copy(library, output)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: any Python 3, since nothing links to it."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def extension(name: str, sources: list[Path], folder: str) -> Extension:
    headers = [path for path in Path(folder).iterdir() if path.suffix in (".h", ".cuh", ".inl")]
    depends = [*Path("kernels").glob("*.h"), *headers]
    return Extension(f"marlin_convert.{name}", sorted(map(str, sources)), depends=sorted(map(str, depends)))


# Decided here and not while building: an editable install fails if a declared extension is not built.
NVCC = find_nvcc()
try:
    ARCHS = cuda_archs(NVCC) if NVCC else []
except CompileError as error:
    raise SystemExit(f"error: {error}") from None
if NVCC and not ARCHS:
    print(
        f"marlin-convert: {NVCC} is here and no GPU that the kernels run on, so the CUDA library is left out; "
        "MARLIN_CUDA_ARCHS=all builds it for every GPU, MARLIN_CUDA_ARCHS=90a for Hopper",
        flush=True,
    )
extensions = [extension("_cpu", CPU_SOURCES, "kernels/cpu")]
if ARCHS:
    extensions.append(extension("_cuda", CUDA_SOURCES, "kernels/cuda"))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
