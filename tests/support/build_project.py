"""A copy of the project's build files with compilers that are scripts and write a log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Project:
    """A copy of the project's build files, two sources, and a folder of compilers."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root / "project", root / "bin"
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
            self.write(name, (ROOT / name).read_text())
        self.write("README.md", "# marlin-convert\n")
        self.write("marlin_convert/__init__.py", "")
        self.write("marlin_convert/_version.py", '__version__ = "1.2.3"\n')
        self.write("marlin_convert/data/example.json", "{}\n")
        self.write("kernels/marlin.h", "")
        self.write("kernels/cpu/repack.cpp", "")
        self.write("kernels/cpu/common.h", "")
        for name in ("gemm_sm80.cu", "gemm_sm90_b4.cu", "plan.cpp"):
            self.write(f"kernels/cuda/{name}", "")
        self.compiler("g++")
        self.gpus()

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def compiler(self, name: str, code: int = 0, archs: str = "", version: str = "12.4", says: str = "") -> Path:
        """A script that logs its arguments, writes the file after -o and exits with `code`; asked for a report of each
        kernel, it `says` so."""
        self.bin.mkdir(exist_ok=True)
        script = self.bin / name
        script.write_text(f"""#!{sys.executable}
import pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--list-gpu-arch"]:
    print({archs!r}, end="")
    sys.exit()
if arguments == ["--version"]:
    print("Cuda compilation tools, release {version}, V{version}.88")
    sys.exit()
with open({str(self.log(name))!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if "-v" in arguments:
    print({says!r}, file=sys.stderr)
if {code}:
    print("kernels/x:1:1: error: no", file=sys.stderr)
else:
    pathlib.Path(arguments[arguments.index("-o") + 1]).write_bytes(b"library")
sys.exit({code})
""")
        script.chmod(0o755)
        return script

    def gpus(self, *capabilities: str) -> None:
        """The GPUs of this machine; without any, the driver's tool fails, as it does where there is no driver."""
        script = self.bin / "nvidia-smi"
        lines = "\n".join(capabilities)
        script.write_text(f"""#!{sys.executable}
import sys
if sys.argv[1:] != ["--query-gpu=compute_cap", "--format=csv,noheader"] or not {lines!r}:
    sys.exit(9)
print({lines!r})
""")
        script.chmod(0o755)

    def log(self, name: str) -> Path:
        return self.bin / f"{name}.log"

    def calls(self, name: str) -> list[str]:
        return self.log(name).read_text().splitlines() if self.log(name).exists() else []

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MARLIN_", "CUDA_", "CXX"))}
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        return subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=self.root,
            env={**kept, "PATH": path, **environment},
            text=True,
            capture_output=True,
        )

    def build(self, **environment: str) -> str:
        """Build in place; the output, which must be a success."""
        done = self.setup("build_ext", "--inplace", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fail(self, **environment: str) -> str:
        """Build in place; the last line of what it says when failing."""
        done = self.setup("build_ext", "--inplace", **environment)
        assert done.returncode != 0
        assert not list(self.root.glob("marlin_convert/*.so"))
        return done.stderr.strip().splitlines()[-1]

    def libraries(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("marlin_convert/*.so"))
