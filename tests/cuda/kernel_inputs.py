"""What the tests of the kernels give to them, and which instances run here."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import cuda_library
from tests.cuda.cuda_library import (
    CLUSTERS,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    assert_close,
    variant,
)

FP16, BF16 = torch.float16, torch.bfloat16
GROUP = cuda_library.GROUP_SIZE
GROUP_SIZES = (16, 32, 64, 128, -1)


def why_not() -> str | None:
    if not cuda_library.PATH.exists():
        return f"the CUDA library is not built ({cuda_library.PATH})"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or torch was built without CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


#: Marks of a file of such tests.
KERNEL_TESTS = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("fresh_inputs"),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, device="cuda").to(dtype)


def runs_here(name: str) -> bool:
    return INSTANCES[name].capability != 90 or torch.cuda.get_device_capability() == (9, 0)


def names(bits: int, group_size: int, zeros: bool = False) -> list[str]:
    """The instances that take such weights and run here."""
    return [name for name, x in INSTANCES.items() if x.takes(bits, group_size, zeros) and runs_here(name)]


def groups_of(k: int, size: int) -> int:
    return 1 if size < 0 else k // size


def run_splits(library: Library, name: str, layer: Layer, a: torch.Tensor, bias: torch.Tensor) -> int:
    """One instance with every split that it can do, against float64; how many these are."""
    weight, ran = library.operand(layer, a, variant(name)), 0
    optional = (*CLUSTERS, STREAM_K) if name.startswith("sm90_wide") else CLUSTERS  # needs a rest of tiles to split
    for split in (*CLUSTERS, STREAM_K, DATA_PARALLEL):
        out = poisoned(a.shape[0], layer.n, a.dtype)
        try:
            library.gemm(a, layer.b, layer.s, out, bias, variant(name, 0, split), **layer.rest)
        except CudaError as error:
            if error.code != -9 or split not in optional:  # more blocks than steps, or than fit
                raise
            continue
        assert_close(out, a, weight, bias)
        ran += 1
    return ran
