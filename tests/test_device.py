"""Choosing the device, with a driver of our own making: a small libcuda.so.1 that answers what a test wants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert.device import CPU, MIN_CAPABILITY, Device, pick_device
from marlin_convert.errors import DeviceError
from tests.support.cli import Run
from tests.support.gptq_checkpoints import Source

# FAKE_GPUS: one `name=major.minor` for each GPU, separated by `;`. FAKE_ERROR: `function=number` fails so.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fails(const char *function) {
    const char *error = getenv("FAKE_ERROR");
    size_t length = strlen(function);
    return error && !strncmp(error, function, length) && error[length] == '=' ? atoi(error + length + 1) : 0;
}

static int gpu(int index, char *name, int *major, int *minor) {
    const char *at = getenv("FAKE_GPUS");
    for (int i = 0; at && *at; i++, at = strchr(at, ';') ? strchr(at, ';') + 1 : 0)
        if (i == index) return sscanf(at, "%255[^=]=%d.%d", name, major, minor) == 3;
    return 0;
}

int cuInit(unsigned flags) { return flags ? 1 : fails("cuInit"); }

int cuDeviceGetCount(int *count) {
    char name[256];
    int major, minor;
    for (*count = 0; gpu(*count, name, &major, &minor); ++*count) {}
    return fails("cuDeviceGetCount");
}

/* A handle is no index. */
int cuDeviceGet(int *device, int index) { *device = 1000 + index; return fails("cuDeviceGet"); }

int cuDeviceGetName(char *text, int length, int device) {
    char name[256];
    int major, minor;
    if (!gpu(device - 1000, name, &major, &minor)) return 101;
    snprintf(text, length, "%s", name);
    return fails("cuDeviceGetName");
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    char name[256];
    int major, minor;
    if (!gpu(device - 1000, name, &major, &minor)) return 101;
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? major : minor;
    return fails("cuDeviceGetAttribute");
}

int cuGetErrorString(int error, const char **text) {
    *text = error == 100 ? "no CUDA-capable device is detected"
          : error == 35  ? "CUDA driver version is insufficient for CUDA runtime version" : NULL;
    return *text ? 0 : 1;
}
"""

T4, A100, H100, V100 = "Tesla T4=7.5", "NVIDIA A100-SXM4-80GB=8.0", "NVIDIA H100 80GB HBM3=9.0", "Tesla V100=7.0"


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled driver."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", folder / "libcuda.so.1", folder / "driver.c"],
        check=True,
    )
    return folder


@pytest.fixture
def machine(driver: Path, run: Callable[..., Run], source: Source, tmp_path: Path) -> Callable[..., Run]:
    """Convert on a machine with the GPUs given, to `out`."""

    def machine(*gpus: str, device: str = "auto", error: str = "", options: tuple[str, ...] = ()) -> Run:
        env = {"LD_LIBRARY_PATH": str(driver), "FAKE_GPUS": ";".join(gpus), "FAKE_ERROR": error}
        return run(source.folder, tmp_path / "out", "--device", device, *options, env=env)

    return machine


def refused(result: Run, tmp_path: Path) -> str:
    """The message of a refusal for the device: exit code 5, one line, nothing written."""
    assert (result.code, result.out) == (5, "")
    assert result.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "hf-home") == ["source"]
    return result.err.removeprefix("marlin-convert: ").rstrip("\n")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_is_too_old(machine: Callable[..., Run], tmp_path: Path, device: str) -> None:
    assert refused(machine(T4, device=device), tmp_path) == (
        "cuda:0 (Tesla T4) has compute capability 7.5; Marlin needs 8.0 or newer. "
        "Convert with --device cpu: converting needs no GPU, running the result does."
    )


def test_the_way_out_works(machine: Callable[..., Run]) -> None:
    result = machine(T4, device="cpu", options=("--json",))
    assert result.code == 0
    assert result.json()["device"] == "cpu"


@pytest.mark.parametrize("gpu", [A100, "RTX 3090=8.6", "B200=10.0"])
def test_a_gpu_that_is_new_enough(machine: Callable[..., Run], gpu: str) -> None:
    result = machine(gpu, options=("--json",))
    assert result.code == 0, result.err
    assert result.json()["device"] == "cuda:0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "chosen"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda:2", "cuda:2")]
)
def test_a_mixed_machine(driver: Path, device: str, chosen: str) -> None:
    """auto and cuda take the first GPU that suits; a number is taken as it is."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_GPUS": ";".join((V100, A100, H100, T4))}
    code = f"from marlin_convert.device import pick_device; print(pick_device({device!r}))"
    picked = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert picked.stdout == f"{chosen}\n"


@pytest.mark.parametrize(("device", "name"), [("cuda:0", "Tesla V100"), ("cuda:3", "Tesla T4")])
def test_an_old_gpu_of_a_mixed_machine(machine: Callable[..., Run], tmp_path: Path, device: str, name: str) -> None:
    assert refused(machine(V100, A100, H100, T4, device=device), tmp_path).startswith(f"{device} ({name}) has compute")


def test_a_number_that_is_not_there(machine: Callable[..., Run], tmp_path: Path) -> None:
    assert refused(machine(A100, device="cuda:7"), tmp_path) == (
        "--device cuda:7: there is one GPU, cuda:0; choose one that is there, or --device cpu."
    )
    assert refused(machine(A100, T4, device="cuda:2"), tmp_path) == (
        "--device cuda:2: the last GPU is cuda:1; choose one that is there, or --device cpu."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("cuInit=100", "no CUDA-capable device is detected (cuInit: 100)"),
        ("cuInit=35", "CUDA driver version is insufficient for CUDA runtime version (cuInit: 35)"),
        ("cuDeviceGetCount=999", "unknown error (cuDeviceGetCount: 999)"),
        ("cuDeviceGetAttribute=100", "no CUDA-capable device is detected (cuDeviceGetAttribute: 100)"),
    ],
)
def test_a_driver_that_fails(machine: Callable[..., Run], tmp_path: Path, error: str, text: str) -> None:
    assert refused(machine(A100, device="cuda", error=error), tmp_path) == (
        f"--device cuda: the NVIDIA driver answers: {text}; give --device cpu, which needs no GPU."
    )
    assert machine(A100, error=error, options=("--json",)).json()["device"] == "cpu"


@pytest.mark.slow
def test_a_driver_without_gpus(machine: Callable[..., Run], tmp_path: Path) -> None:
    assert refused(machine(device="cuda:0"), tmp_path) == (
        "--device cuda:0: the NVIDIA driver shows no GPU; give --device cpu, which needs no GPU."
    )
    result = machine()
    assert result.code == 0
    assert "(on this CPU, slowly)" in result.out


def test_a_library_that_is_no_driver(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    """As on a machine without a driver: the loader finds nothing that it can use."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcuda.so.1").write_bytes(b"not a library")
    env = {"LD_LIBRARY_PATH": str(tmp_path / "lib")}
    asked = run(source.folder, tmp_path / "out", "--device", "cuda", env=env)
    assert asked.code == 5
    assert asked.err == (
        "marlin-convert: --device cuda: no NVIDIA driver is installed (libcuda.so.1 was not found); "
        "give --device cpu, which needs no GPU.\n"
    )
    result = run(source.folder, tmp_path / "out", env=env)
    assert result.code == 0
    assert "(on this CPU, slowly)" in result.out


@pytest.mark.slow
def test_a_gpu_is_only_said_to_have_computed_what_it_did(machine: Callable[..., Run]) -> None:
    """The driver shows a GPU, and no kernel can run on it: auto verifies on the CPU and says why."""
    report = machine(A100, options=("--verify", "--json")).json()
    assert report["device"] == report["verification"]["device"] == "cpu"
    assert report["device_note"].startswith("cuda:0 (NVIDIA A100-SXM4-80GB) is not used: ")
    assert report["device_note"].endswith("converting and verifying need no GPU (--device cpu).")


def test_a_gpu_asked_for_by_name_is_not_replaced(machine: Callable[..., Run], tmp_path: Path) -> None:
    """Without --verify too: what was asked for cannot be done, and nothing else is done in its place."""
    message = refused(machine(A100, device="cuda:0"), tmp_path)
    assert message.endswith("converting and verifying need no GPU (--device cpu).")


@pytest.mark.parametrize("request_", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:99999", "cpu "])
def test_what_is_no_device(request_: str) -> None:
    with pytest.raises(DeviceError, match="is not a device; give auto, cpu, cuda or cuda:N"):
        pick_device(request_)


def test_the_cpu_needs_no_driver() -> None:
    assert pick_device("cpu") is CPU
    assert str(CPU) == "cpu"
    assert not CPU.suits_marlin


def test_the_bound_is_8_0() -> None:
    assert MIN_CAPABILITY == (8, 0)
    suits = {c: Device("cuda", 0, "x", c).suits_marlin for c in ((7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 3))}
    assert suits == {(7, 0): False, (7, 5): False, (8, 0): True, (8, 9): True, (9, 0): True, (10, 3): True}
