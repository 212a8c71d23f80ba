"""Which GPU is measured, and what nvidia-smi says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_convert.bench import gpu as the_gpu
from marlin_convert.device import CPU, Device
from marlin_convert.errors import DeviceError


def test_bench_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="bench measures a GPU: give --device cuda or cuda:N"):
        the_gpu.pick_gpu("cpu")

    def none() -> list[Device]:
        raise DeviceError("no NVIDIA driver is installed")

    monkeypatch.setattr(the_gpu, "cuda_devices", none)
    for request in ("auto", "cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=r"^bench measures a GPU: no NVIDIA driver is installed\.$"):
            the_gpu.pick_gpu(request)


def test_bench_takes_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda", 1, "H100", (9, 0))
    monkeypatch.setattr(the_gpu, "cuda_devices", lambda: [CPU, gpu])
    monkeypatch.setattr(the_gpu, "pick_device", lambda request: {"cuda:1": gpu}[request])
    assert the_gpu.pick_gpu("cuda:1") is gpu


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            'echo "$1" > asked; echo "580.82.07, 1755, 1980, 2619, 2619, 512.10, 700.00, [N/A]"',
            {"driver_version": "580.82.07", "sm_mhz": "1755", "max_sm_mhz": "1980", "memory_mhz": "2619",
             "max_memory_mhz": "2619", "power_w": "512.10", "power_limit_w": "700.00", "temperature_c": "[N/A]"},
        ),
        ("echo 'No devices were found'; exit 6", None),
        ("echo nonsense", None),
        (None, None),
    ],
)  # fmt: skip
def test_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: dict[str, str] | None
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert the_gpu.nvidia_smi("GPU-1") == expected
    if expected:
        assert (tmp_path / "asked").read_text() == "--id=GPU-1\n"
    assert the_gpu.nvidia_smi(None) is None


def test_numbers_of_nvidia_smi() -> None:
    assert the_gpu._number("1755") == 1755.0
    assert the_gpu._number("[N/A]") is None
    assert the_gpu._cuda_version(13010) == "13.1"
