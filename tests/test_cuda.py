"""The door to the CUDA kernels where there is no GPU: its contract with the header, shapes, and what it says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from marlin_convert import cuda
from marlin_convert.errors import DeviceError


@pytest.fixture(autouse=True)
def loaded_afresh() -> Iterator[None]:
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


def library(folder: Path, body: str) -> Path:
    """A library of our own, in place of `_cuda.so`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "x.c").write_text(body)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "_cuda.so", folder / "x.c"], check=True)
    return folder / "_cuda.so"


def test_constants_are_those_of_the_header() -> None:
    header = (Path(cuda.__file__).parents[1] / "kernels" / "marlin_cuda.h").read_text()
    defined = dict(re.findall(r"^#define MARLIN_CUDA_(\w+) (\d+)", header, re.MULTILINE))
    names = ("ABI_VERSION", "K_MULTIPLE", "N_MULTIPLE", "GROUP_SIZE", "COUNTER_BYTES", "USE_GEMM", "USE_DEQUANTIZE")
    for name in names:
        assert int(defined[name]) == getattr(cuda, name), name
    assert ctypes.sizeof(cuda.DeviceInfo) == 4 * 4 + 2 * 8 + 2 * 4 + 256


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    with pytest.raises(DeviceError, match=re.escape("the CUDA kernels are not built")):
        cuda.library()
    assert not cuda.available()


def test_not_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cuda.so").write_text("not a library")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    with pytest.raises(DeviceError, match="the CUDA kernels cannot be loaded"):
        cuda.library()


@pytest.mark.parametrize("body", ["int x;", "int marlin_cuda_abi_version(void) { return 999; }"])
def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", library(tmp_path, body))
    with pytest.raises(DeviceError, match="of another version"):
        cuda.library()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("return 35;", "driver is missing, or older than the CUDA version"),
        ("return 100;", "there is no NVIDIA GPU"),
        ("*count = 0; return 0;", "there is no NVIDIA GPU"),
        ("return 999;", "CUDA does not start: unknown error"),
    ],
)
def test_what_the_driver_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, text: str) -> None:
    functions = [
        "gemm",
        "gemm_workspace_bytes",
        "choose",
        "device_info",
        "repack",
        "unpack",
        "dequantize",
        "stream_read",
    ]
    body = f"""
    int marlin_cuda_abi_version(void) {{ return {cuda.ABI_VERSION}; }}
    int marlin_cuda_device_count(int *count) {{ {answer} }}
    const char *marlin_cuda_error_string(int code) {{ return "unknown error"; }}
    """ + "".join(f"int marlin_cuda_{name}(void) {{ return 1; }}\n" for name in functions)
    monkeypatch.setattr(cuda, "LIBRARY", library(tmp_path, body))
    with pytest.raises(DeviceError, match=text):
        cuda.library()


def test_shapes_without_a_gpu() -> None:
    """What torch.compile asks for: the shape and type of each result, no GPU needed."""
    with FakeTensorMode():
        a = torch.empty(2, 5, 256, dtype=torch.bfloat16, device="cuda")
        B = torch.empty(16, 1024, dtype=torch.int32, device="cuda")
        s = torch.empty(2, 512, dtype=torch.float16, device="cuda")
        result = torch.ops.marlin_convert.gemm(a, B, s)
        assert (result.shape, result.dtype) == ((2, 5, 512), torch.bfloat16)
        assert torch.ops.marlin_convert.unpack(B).shape == (32, 512)
        assert torch.ops.marlin_convert.repack(torch.empty(32, 512, dtype=torch.int32, device="cuda")).shape == (
            16,
            1024,
        )
        W = torch.ops.marlin_convert.dequantize(B, s, torch.float16)
        assert (W.shape, W.dtype) == ((256, 512), torch.float16)


def test_tensors_on_the_cpu_are_refused() -> None:
    B, s = torch.zeros(16, 1024, dtype=torch.int32), torch.zeros(2, 512, dtype=torch.float16)
    with pytest.raises(ValueError, match="a is on cpu; it should be on a CUDA device"):
        cuda.gemm(torch.zeros(1, 256, dtype=torch.float16), B, s)
    with pytest.raises(ValueError, match="qweight is on cpu"):
        cuda.repack(torch.zeros(32, 512, dtype=torch.int32))
    with pytest.raises(ValueError, match=re.escape("both should be multiples of 64")):
        cuda.gemm(torch.zeros(1, 256, dtype=torch.float16), B[:, :100], s)
