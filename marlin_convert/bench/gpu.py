"""The GPU that is measured: which it is, how calls are timed on it, what the driver says of it."""

from __future__ import annotations

import contextlib
import gc
import platform
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..device import Device, cuda_devices, pick_device
from ..errors import DeviceError
from .results import REPLAYS, Calls, Machine, Rig

if TYPE_CHECKING:
    import torch

GRAPH_US = 2000.0  # a graph should run at least this long, so that its launch (a few µs) does not matter …
REPEATS = 16  # … so its calls are repeated, at most this many times


def pick_gpu(request: str) -> Device:
    """Return a GPU, as `pick_device` does. Raises DeviceError when there is none that suits."""
    if request == "cpu":
        raise DeviceError("bench measures a GPU: give --device cuda or cuda:N.")
    try:
        cuda_devices()
    except DeviceError as error:  # pick_device's message would advise converting on the CPU
        raise DeviceError(f"bench measures a GPU: {error.message}.") from None
    return pick_device(request)


class GraphTimer:
    """Times calls by replaying a CUDA graph of them. All work goes to one stream of its own."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, calls: Calls) -> float:
        """Return the median time of one call, in µs."""
        import torch

        torch.cuda.synchronize(self.stream.device)  # the tensors were made on another stream
        with torch.cuda.stream(self.stream):
            for call in calls[:2]:  # loads and tunes kernels, which must not happen during graph capture
                call()
            once = self._elapsed_us(lambda: _run_all(calls))
        repeats = max(1, min(REPEATS, round(GRAPH_US / max(once, 1.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(repeats):
                _run_all(calls)
        with torch.cuda.stream(self.stream):
            graph.replay()
            times = [self._elapsed_us(graph.replay) for _ in range(REPLAYS)]
        graph.reset()
        return median(times) / (repeats * len(calls))

    def _elapsed_us(self, work: Callable[[], object]) -> float:
        import torch

        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3  # from ms


def _run_all(calls: Calls) -> None:
    for call in calls:
        call()  # the result is dropped at once, so that the next call can reuse its memory


def cuda_rig(device: Device) -> Rig:
    """Return the rig of a GPU. Raises DeviceError when the kernels cannot run there."""
    import torch

    from ..native import cuda

    where = cuda.torch_device(device)
    info = cuda.device_info(device.index)

    def release() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def describe() -> Machine:
        return Machine(
            device=str(device),
            name=info.name.decode(errors="replace"),
            capability=f"{info.capability_major}.{info.capability_minor}",
            multiprocessors=info.multiprocessors,
            l2_bytes=info.l2_bytes,
            memory_bytes=info.memory_bytes,
            driver=driver_version() or f"of CUDA {_cuda_version(info.driver_version)}",
            versions={
                "marlin-convert": __version__,
                "torch": torch.__version__,
                "CUDA of torch": str(torch.version.cuda),
                "CUDA of the kernels": _cuda_version(info.runtime_version),
                "python": platform.python_version(),
            },
            clocks=gpu_state(_uuid(where)),
        )

    return Rig(
        device=where,
        kernels=cuda,
        fp16=torch.matmul,
        time=GraphTimer(where),
        describe=describe,
        free_bytes=lambda: torch.cuda.mem_get_info(where)[0],
        synchronize=partial(torch.cuda.synchronize, where),
        release=release,
        l2_bytes=info.l2_bytes,
    )


def described(versions: dict[str, str]) -> Machine:
    """Return the GPU that torch takes first, with no kernel of ours, and the `versions` of what runs on it."""
    import torch

    index = torch.cuda.current_device()
    found = torch.cuda.get_device_properties(index)
    return Machine(
        device=f"cuda:{index}",
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
        memory_bytes=found.total_memory,
        driver=driver_version() or "unknown",
        versions=versions,
        clocks=gpu_state(_uuid(torch.device("cuda", index))),
    )


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _uuid(device: torch.device) -> str | None:
    """Return the GPU as the driver names it: torch's numbers follow CUDA_VISIBLE_DEVICES, the driver's own do not."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else None


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Return the driver's management library, through nvidia-ml-py; None where the package or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Return the NVIDIA driver's version; None where nothing tells."""
    with _nvml() as nvml:
        return None if nvml is None else _asked(nvml, nvml.nvmlSystemGetDriverVersion)


def gpu_state(uuid: str | None) -> dict[str, float | None] | None:
    """Return clocks (MHz), power (W) and temperature (°C) of a GPU now; None where nothing tells, or the GPU cannot be
    named to it; a value that this GPU does not have is None."""
    with _nvml() as nvml:
        gpu = None if nvml is None or uuid is None else _asked(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)
        if gpu is None:
            return None
        asked: dict[str, tuple[Any, ...]] = {
            "sm_mhz": (nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
            "max_sm_mhz": (nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": (nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
            "max_memory_mhz": (nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_MEM),
            "power_w": (nvml.nvmlDeviceGetPowerUsage, gpu),
            "power_limit_w": (nvml.nvmlDeviceGetEnforcedPowerLimit, gpu),
            "temperature_c": (nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
        }
        found = {name: _asked(nvml, *question) for name, question in asked.items()}
        scale = {name: 1e-3 if name.startswith("power") else 1.0 for name in found}  # power comes in mW
        return {name: None if value is None else value * scale[name] for name, value in found.items()}


def _asked(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the driver answers; None if it does not."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
