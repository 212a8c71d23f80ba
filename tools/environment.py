"""Make the environment that the Makefile's targets run in, and say at every moment what is going on.

    python tools/environment.py run [FOLDER]    the package, and what running models needs: `make demo`
    python tools/environment.py dev [FOLDER]    and what the tests, the checks and the documentation need: `make test`

FOLDER is .venv unless given. uv does it where it is installed, otherwise venv and pip do. A step that takes long tells
every few seconds how long it has taken and what its program said last. Run it from the project's folder; it needs
nothing but Python.
"""

import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

# Before anything that an older Python cannot read: it gets this far, and no further.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"marlin-convert needs Python 3.10 or newer, and {sys.executable} is {sys.version.split()[0]}: "
        "name a newer one, such as make demo PYTHON=python3.12"
    )

#: Seconds between two lines of a step that goes on.
INTERVAL = 5.0

#: Lines that start so come from setup.py, and are for whoever installs.
REMARK = "marlin-convert: "

#: pip's settings that choose where packages come from, and uv's variables for the same.
UV_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}


class Failure(Exception):
    """One sentence for whoever ran this."""


class Steps:
    """The steps' lines on standard output, each behind the time since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self.started)
        print(f"{seconds // 60:3}:{seconds % 60:02}  {text}", flush=True)

    def run(self, label: str, command: list[str], env: dict[str, str]) -> None:
        """Run one step; raises Failure, after showing all that the program said, if it fails."""
        self.say(label)
        process = subprocess.Popen(
            command, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line.rstrip())

        reader = threading.Thread(target=read)
        reader.start()
        said: list[str] = []
        shown = time.monotonic()
        while reader.is_alive() or not lines.empty():
            try:
                line = lines.get(timeout=0.2)
                said.append(line)
                if line.startswith(REMARK):
                    self.say(line.removeprefix(REMARK))
                    shown = time.monotonic()
            except queue.Empty:
                pass
            if time.monotonic() - shown >= INTERVAL:
                last = next((line.strip() for line in reversed(said) if line and not line.startswith("WARNING")), "")
                self.say(f"  … {label}: {last[:100]}" if last else f"  … {label}")
                shown = time.monotonic()
        code = process.wait()
        if code:
            raise Failure("\n".join([*said, f"{label}: `{shlex.join(command)}` ended with exit code {code}."]))


def compiler() -> str:
    """The C++ compiler that setup.py will call. Raises Failure if there is none."""
    name = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if shutil.which(name) is None:
        raise Failure(
            f"there is no C++ compiler {name}: install g++ (Debian, Ubuntu: apt install g++), or name another with "
            "CXX=…, then run this again."
        )
    return name


def uv_environment() -> dict[str, str]:
    """The environment for uv, with pip's settings of where packages come from, which uv does not read by itself."""
    env = dict(os.environ)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    for line in listed.splitlines():  # global.index-url='https://…'; later ones outrank earlier ones
        key, _, value = line.partition("=")
        name = UV_SETTINGS.get(key.rpartition(".")[2])
        if name and name not in os.environ:
            joined = "," if name == "UV_FIND_LINKS" else " "
            env[name] = joined.join(value.strip("'\"").split())
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # the newest of all indexes, as pip takes it
    return env


def make(extra: str, folder: Path, steps: Steps) -> None:
    uv = shutil.which("uv")
    python = folder / "bin" / "python"
    version = ".".join(map(str, sys.version_info[:3]))
    steps.say(f"Python {version}, {compiler()}, {'uv' if uv else 'pip'}; the environment is {folder}")
    if uv:
        env = uv_environment()
        create = [uv, "venv", "--seed", "--python", sys.executable, str(folder)]
        install = [uv, "pip", "install", "--python", str(python)]
    else:
        env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        create = [sys.executable, "-m", "venv", str(folder)]
        install = [str(python), "-m", "pip", "install", "--no-compile"]
        if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True, check=False).returncode:
            raise Failure("this Python cannot make environments: install uv, or python3-venv (Debian, Ubuntu: apt).")
    if not python.exists():
        steps.run("a new environment", create, env)
    steps.run("build tools", [*install, "setuptools>=77"], env)
    steps.run("native libraries", [str(python), "setup.py", "build_ext", "--inplace"], env)
    # With its pinned version: a bare "torch" takes the newest build, with several GB of CUDA packages.
    steps.run("packages: torch", [*install, "-c", "constraints.txt", "torch"], env)
    what = {"run": "Transformers and the rest", "dev": "Transformers, the tests' and the documentation's"}[extra]
    # "compat" puts the folder's path where Python looks. The other way imports a finder of its own whenever this
    # environment's Python starts, which takes as long as Python itself.
    mode = ["--config-settings", "editable_mode=compat"]
    editable = [*install, "-c", "constraints.txt", "--no-build-isolation", *mode, "-e", f".[{extra}]"]
    steps.run(f"packages: {what}", editable, env)
    for name in ("run", "dev") if extra == "dev" else ("run",):
        (folder / f".{name}").touch()
    steps.say("installed")


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2) or arguments[0] not in ("run", "dev"):
        raise Failure(str(__doc__))
    make(arguments[0], Path(arguments[1] if len(arguments) == 2 else ".venv"), Steps())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Failure as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
