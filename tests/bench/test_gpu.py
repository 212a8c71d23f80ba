"""Which GPU is measured, and what the driver says of it."""

from __future__ import annotations

import sys
import types
from typing import Any

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


class Driver(types.ModuleType):
    """nvidia-ml-py, of a GPU of which some values are not known; `answers` tells whether there is a driver."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, answers: bool = True) -> None:
        super().__init__("pynvml")
        self.answers, self.open = answers, 0

    def nvmlInit(self) -> None:
        if not self.answers:
            raise self.NVMLError
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.82.07"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, gpu: str, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 512_100

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, gpu: str, kind: int) -> int:
        raise self.NVMLError


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert the_gpu.driver_version() == "580.82.07"
    assert the_gpu.gpu_state("GPU-1") == {
        "sm_mhz": 1755, "max_sm_mhz": 1980, "memory_mhz": 2619, "max_memory_mhz": 2619, "power_w": pytest.approx(512.1),
        "power_limit_w": pytest.approx(700), "temperature_c": None,
    }  # fmt: skip
    assert the_gpu.gpu_state("GPU-2") is None
    assert the_gpu.gpu_state(None) is None
    assert driver.open == 0


@pytest.mark.parametrize("module", [None, Driver(answers=False)], ids=["no package", "no driver"])
def test_without_a_driver_nothing_is_said(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert the_gpu.driver_version() is None
    assert the_gpu.gpu_state("GPU-1") is None


def test_the_real_package_has_what_is_asked() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    asked = {name for name in dir(Driver) if name.lower().startswith("nvml")}
    assert len(asked) > 10
    assert not asked - set(dir(pynvml))


def test_cuda_versions() -> None:
    assert the_gpu._cuda_version(13010) == "13.1"
