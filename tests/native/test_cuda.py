"""The door to the CUDA kernels where there is no GPU: its contract with the header, shapes, and what it says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.plan import make_plan
from marlin_convert.conversion.products import product_for
from marlin_convert.conversion.verify import TOLERANCE, verify
from marlin_convert.device import Device
from marlin_convert.errors import DeviceError
from marlin_convert.formats.layout import permute_scales
from marlin_convert.native import cuda, cuda_library, reference
from marlin_convert.native.choose import packer
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import GPTQLayer, write_source
from tests.support.products import groups_of


@pytest.fixture(autouse=True)
def loaded_afresh() -> Iterator[None]:
    cuda.load_library.cache_clear()
    yield
    cuda.load_library.cache_clear()


def library(folder: Path, body: str) -> Path:
    """A library of our own, in place of `_cuda.so`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "x.c").write_text(body)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "_cuda.so", folder / "x.c"], check=True)
    return folder / "_cuda.so"


def test_constants_are_those_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "kernels" / "marlin_cuda.h").read_text()
    defined = dict(re.findall(r"^#define MARLIN_CUDA_(\w+) (\d+)", header, re.MULTILINE))
    names = ("ABI_VERSION", "K_MULTIPLE", "N_MULTIPLE", "GROUP_SIZE", "COUNTER_BYTES", "USE_GEMM", "USE_DEQUANTIZE")
    for name in names:
        assert int(defined[name]) == getattr(cuda_library, name), name
    assert ctypes.sizeof(cuda_library.DeviceInfo) == 4 * 4 + 2 * 8 + 2 * 4 + 256


@pytest.mark.slow
@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built")
def test_instances_are_what_their_names_say() -> None:
    """Numbers and names are for ever; the name tells instructions, output tile, bits and groups."""
    lib = ctypes.CDLL(str(cuda_library.LIBRARY))
    found = cuda_library.instances(lib)
    assert len(found) == lib.marlin_cuda_instance_count() > 0
    assert len({instance.id for instance in found.values()}) == len(found)
    for name, x in found.items():
        parts = re.fullmatch(r"sm(80|90)(_wide)?_m(\d+)n(\d+)(?:k64)?_b([48])_g(any|16|32|64|128)(z?)", name)
        assert parts, name
        capability, wide, m, n, bits, group, z = parts.groups()
        assert (x.capability, x.block_m, x.block_n, x.bits) == (int(capability), int(m), int(n), int(bits))
        assert x.group_size == (0 if group == "any" else int(group))
        either = bool(z) or (capability == "90" and (bits == "8" or group != "128"))
        rounds = bool(wide) or (capability == "80" and (int(m) >= 32 or (m, n) == ("16", "128")))
        takes_zeros = 2 * bool(z) if rounds else either  # 2: weights with zero points alone
        assert (x.zero_points, x.rounds_weights) == (takes_zeros, rounds)
        assert 0 < x.id < 1 << 12
    known = {
        "sm80_m8n256_b4_g128": 2,
        "sm80_m128n256_b8_gany": 53,
        "sm90_m16n128_b4_g64": 122,
        "sm90_wide_m256n128_b8_ganyz": 331,
    }
    built = {name: number for name, number in known.items() if name in found}  # those of sm_90: for Hopper alone
    assert built == {name: found[name].id for name in built}
    assert built
    code = lib.marlin_cuda_instance(len(found), ctypes.byref(cuda_library.Instance()))
    assert code == -9  # MARLIN_CUDA_ERROR_VARIANT


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_cuda.so")
    with pytest.raises(DeviceError, match=re.escape("the CUDA kernels are not built")):
        cuda.load_library()
    assert not cuda.available()


@pytest.mark.slow
def test_not_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cuda.so").write_text("not a library")
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "_cuda.so")
    with pytest.raises(DeviceError, match="the CUDA kernels cannot be loaded"):
        cuda.load_library()


@pytest.mark.slow
@pytest.mark.parametrize("body", ["int x;", "int marlin_cuda_abi_version(void) { return 999; }"])
def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(cuda_library, "LIBRARY", library(tmp_path, body))
    with pytest.raises(DeviceError, match="of another version"):
        cuda.load_library()


@pytest.mark.slow
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
        "moe",
        "moe_layout",
        "workspace_bytes",
        "choose",
        "instance",
        "plan",
        "device_info",
        "gather",
        "repack",
        "unpack",
        "dequantize",
        "stream_read",
    ]
    body = f"""
    int marlin_cuda_abi_version(void) {{ return {cuda_library.ABI_VERSION}; }}
    int marlin_cuda_device_count(int *count) {{ {answer} }}
    const char *marlin_cuda_error_string(int code) {{ return "unknown error"; }}
    """ + "".join(f"int marlin_cuda_{name}(void) {{ return 1; }}\n" for name in functions)
    monkeypatch.setattr(cuda_library, "LIBRARY", library(tmp_path, body))
    with pytest.raises(DeviceError, match=text):
        cuda.load_library()


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
    with pytest.raises(ValueError, match="B is on cpu; it should be on a CUDA device"):
        cuda.gemm(torch.zeros(1, 256, dtype=torch.float16), B, s)
    with pytest.raises(ValueError, match="qweight is on cpu"):
        cuda.repack(torch.zeros(32, 512, dtype=torch.int32))
    with pytest.raises(ValueError, match=re.escape("both should be multiples of 64")):
        cuda.gemm(torch.zeros(1, 256, dtype=torch.float16), B[:, :100], s)


# ---- What uses the kernels, with the torch twin in their place: everything but the kernels themselves ----


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A "GPU" whose memory is the CPU's and whose kernels are the twin's."""
    monkeypatch.setattr(cuda, "torch_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(cuda, "gemm", lambda a, B, s: reference.matmul_marlin(a.float(), B, s).half())
    monkeypatch.setattr(cuda, "repack", reference.gptq_to_marlin)
    return Device("cuda", 0, "a twin", (8, 0))


@pytest.mark.parametrize("group_size", [128, -1])
def test_verify_with_the_gpus_product(tmp_path: Path, twin: Device, group_size: int) -> None:
    source = write_source(tmp_path / "source", {"a": GPTQLayer(K=384, N=256, group_size=group_size)}, {})
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    with Checkpoint(source.folder) as original, Checkpoint(tmp_path / "out") as result:
        report = verify(original, make_plan(original, "marlin"), result, twin)
    assert report.ok
    assert report.device == "cuda:0 (a twin)"
    error = report.layers[0].relative_error
    assert error is not None
    assert 1e-5 < error < 5e-4  # what rounding the outputs to fp16 costs


def test_the_gpus_product_finds_wrong_scales(tmp_path: Path, twin: Device) -> None:
    """Fed block by block, as `verify` does it; scales of the other permutation, and one scale of many doubled."""
    layer = GPTQLayer(K=256, N=256)
    source = write_source(tmp_path / "source", {"a": layer}, {})
    with Checkpoint(source.folder) as checkpoint:
        planned = make_plan(checkpoint, "marlin").layers[0]
        qweight, scales = checkpoint.read(planned.source.weight), checkpoint.read(planned.source.scales)
    doubled = permute_scales(scales)
    doubled[1, 7] *= 2
    errors = []
    for s in (permute_scales(scales), permute_scales(scales, G=1), doubled):
        product = product_for(twin, planned, groups_of(scales, s), None, None)
        for k0 in range(0, 256, 64):
            block = np.ascontiguousarray(qweight[k0 // 8 : k0 // 8 + 8])
            product.add_source(k0, block)
            product.add_stored(k0, reference.gptq_to_marlin(torch.from_numpy(block)).numpy())
        errors.append(product.errors()[1])
    assert errors[0] < 5e-4
    assert errors[1] > 0.1
    assert errors[2] > TOLERANCE  # one scale in 512 is enough to fail


def test_repacking_on_the_gpu(twin: Device) -> None:
    """Asked for by name, the GPU repacks; auto leaves it to the CPU. Both write into the array they are given."""
    qweight = np.random.default_rng(0).integers(-(2**31), 2**31, (32, 256), dtype=np.int32)
    expected = reference.gptq_to_marlin(torch.from_numpy(qweight)).numpy()
    for options in (Options(device="cuda:0"), Options(device="auto")):
        B = np.zeros((16, 512), np.int32)
        packer(twin, options.device).pack(qweight, B, 4)
        np.testing.assert_array_equal(B, expected)
