"""Choosing the device, by asking the NVIDIA driver itself; torch is not needed for it.

The one place that knows which GPUs Marlin runs on: compute capability 8.0 (Ampere) and newer, because its
kernels are built on cp.async and the m16n8k16 tensor-core product, which arrived there.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cached_property

from .errors import DeviceError

#: The lowest compute capability (major, minor) that Marlin's kernels run on.
MIN_CAPABILITY = (8, 0)

#: What --device takes.
REQUEST = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """A device to convert on. `name` is a GPU's product name; `capability` is None for the CPU."""

    kind: str  # "cpu" or "cuda"
    index: int = 0
    name: str = "CPU"
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @cached_property
    def suits_marlin(self) -> bool:
        """Whether a Marlin model can run here."""
        return self.capability is not None and self.capability >= MIN_CAPABILITY


CPU = Device("cpu")


def cuda_devices() -> list[Device]:
    """Return the GPUs that the driver shows (CUDA_VISIBLE_DEVICES counts). Raises DeviceError if there are none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError("no NVIDIA driver is installed (libcuda.so.1 was not found)") from None

    def call(function: str, *args: object) -> None:
        status = getattr(driver, function)(*args)
        if status:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(status, ctypes.byref(text))
            raise DeviceError(
                f"the NVIDIA driver answers: {(text.value or b'unknown error').decode()} ({function}: {status})"
            )

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    devices = []
    for index in range(count.value):
        handle, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
        call("cuDeviceGet", ctypes.byref(handle), index)
        call("cuDeviceGetName", name, len(name), handle)
        call("cuDeviceGetAttribute", ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, handle)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, handle)
        devices.append(Device("cuda", index, name.value.decode(errors="replace"), (major.value, minor.value)))
    if not devices:
        raise DeviceError("the NVIDIA driver shows no GPU")
    return devices


def pick_device(request: str) -> Device:
    """Return the device for `request`: "cpu", "cuda", "cuda:N", or "auto" (the first GPU that suits, the CPU without a
    GPU).

    Raises DeviceError when CUDA was asked for and there is none, or when the GPU that would be used is older than
    compute capability 8.0; the message gives the way out.
    """
    match = REQUEST.fullmatch(request)
    if not match:
        raise DeviceError(f"{request!r} is not a device; give auto, cpu, cuda or cuda:N.")
    if request == "cpu":
        return CPU
    try:
        devices = cuda_devices()
    except DeviceError as error:
        if request == "auto":
            return CPU
        raise DeviceError(f"--device {request}: {error.message}; give --device cpu, which needs no GPU.") from None
    if match[1] is not None:
        index = int(match[1])
        if index >= len(devices):
            there = "there is one GPU, cuda:0" if len(devices) == 1 else f"the last GPU is cuda:{len(devices) - 1}"
            raise DeviceError(f"--device {request}: {there}; choose one that is there, or --device cpu.")
        chosen = devices[index]
    else:
        chosen = next((d for d in devices if d.suits_marlin), devices[0])
    if not chosen.suits_marlin:
        raise DeviceError(
            f"{chosen} ({chosen.name}) has compute capability {_dotted(chosen.capability)}; Marlin needs "
            f"{_dotted(MIN_CAPABILITY)} or newer. Convert with --device cpu: converting needs no GPU, "
            "running the result does."
        )
    return chosen


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))
