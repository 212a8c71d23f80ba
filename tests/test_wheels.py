"""Wheels and the source distribution: what is in them, and those for others by tools/wheels.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.build_project import ROOT, Project

pytestmark = pytest.mark.slow

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_wheel_is_for_every_python_of_this_platform(project: Project) -> None:
    # A library of an earlier build lies around and must not get into a wheel that was built without it.
    project.write("marlin_convert/_cuda.so", "stale")
    done = project.setup("bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (project.root / "dist").glob("*.whl")
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("marlin_convert", "1.2.3", "py3", "none")
    assert platform.startswith("linux_")
    names = zipfile.ZipFile(wheel).namelist()
    assert "marlin_convert/_cpu.so" in names
    assert "marlin_convert/data/example.json" in names
    assert "marlin_convert/_cuda.so" not in names
    assert not [name for name in names if name.startswith(("kernels", "tests"))]


def test_sdist_has_the_kernels(project: Project) -> None:
    done = project.setup("sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (project.root / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, project.root / "unpacked")
    (root,) = (project.root / "unpacked").iterdir()
    assert (root / "kernels/marlin.h").exists()
    assert (root / "kernels/cpu/common.h").exists()
    assert (root / "kernels/cuda/gemm_sm80.cu").exists()


def wheels() -> Any:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "tools" / "wheels.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_nothing_that_was_compiled_before_gets_into_a_wheel(tmp_path: Path) -> None:
    copy = wheels().sources(tmp_path / "copy")
    assert (copy / "kernels" / "marlin.h").is_file()
    assert (copy / "marlin_convert" / "data" / "demo" / "config.json").is_file()
    assert not list(copy.rglob("*.so"))


def test_a_newer_system_without_root_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = wheels()
    monkeypatch.setattr(tool.os, "geteuid", lambda: 1000)
    with pytest.raises(tool.Failure, match="run it as root with debootstrap installed, or in a container"):
        tool.make_root(tmp_path / "root")


DEBIAN = Path(os.environ.get("MARLIN_DEBIAN_ROOT", ROOT / "build" / "debian-11"))


@pytest.mark.skipif(
    os.geteuid() != 0 or not (DEBIAN / "usr/bin/g++").exists(), reason="needs the Debian that `make wheels` makes"
)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_wheel_that_auditwheel_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Without CUDA, which takes minutes; by this system's tools, in that Debian."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    monkeypatch.setenv("MARLIN_NO_CUDA", "1")
    made = wheels().wheel(machine, tmp_path, tmp_path, DEBIAN)
    assert re.search(rf"-py3-none-.*manylinux_2_(17|2\d)_{machine}", made.name)
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
    assert "marlin_convert/_cpu.so" in names
    assert "marlin_convert/_cuda.so" not in names
