"""Proving that a Marlin checkpoint on disk equals its GPTQ source: layer by layer, exactly and numerically.

Exactly: the codes and scales unpacked from `B` and `s` are those of `qweight` and `scales`, every element; every
other tensor is the same bytes. Numerically: random activations through the Marlin tensors against the same
activations times the fp16 weights that the GPTQ tensors stand for. The second shows what the first implies, by
another road: it does not unpack `B` back to GPTQ's order, it computes with it as a kernel does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from . import ops
from .checkpoint import Checkpoint, Tensor
from .config import QUANT_METHODS, find_configs
from .device import Device
from .errors import VerificationError
from .layout import PACK_FACTOR, TILE_K, ZERO_POINT, unpermute_scales
from .plan import Layer, Plan
from .progress import Progress
from .publish import OutTensor
from .scales import F16, to_fp16
from .stream import Buffers, byte_blocks, row_blocks, run_all

#: Largest relative error (Frobenius norm) between Marlin's product and the reference. fp32 accumulation stays
#: below 1e-6; fp16 outputs and tensor-core accumulation, as on a GPU, below 5e-4.
TOLERANCE = 1e-3

#: Rows of random activations for each layer on a CPU.
CPU_ROWS = 4

#: Rows in each of the products on a GPU: one token, a small batch, and one that takes another path of the kernel.
CUDA_ROWS = (1, 16, 128)

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerCheck:
    """One layer's result. `max_error` is absolute; `relative_error` is ‖y - ref‖ / ‖ref‖; both None if not computed."""

    name: str
    K: int
    N: int
    G: int
    exact: bool
    max_error: float | None
    relative_error: float | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.exact and self.problem is None


@dataclass
class Verification:
    """The whole result. `problems` are those outside the layers: missing, additional or altered tensors, the config."""

    device: str
    layers: list[LayerCheck] = field(default_factory=list)
    tensors_equal: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems and all(layer.ok for layer in self.layers)

    @property
    def worst(self) -> float:
        """The largest relative error of all layers; NaN if one of them is."""
        return _largest([x.relative_error for x in self.layers])

    @property
    def max_error(self) -> float:
        """The largest absolute error of all layers; NaN if one of them is."""
        return _largest([x.max_error for x in self.layers])

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "device": self.device,
            "tolerance": TOLERANCE,
            "layers_checked": len(self.layers),
            "tensors_equal": self.tensors_equal,
            "worst_relative_error": _json_number(self.worst),
            "max_error": _json_number(self.max_error),
            "problems": self.problems,
            "layers": [
                {key: _json_number(value) for key, value in asdict(layer).items()} | {"ok": layer.ok}
                for layer in self.layers
            ],
        }

    def require_ok(self) -> None:
        """Raise VerificationError that names what differs."""
        if self.ok:
            return
        bad = [layer for layer in self.layers if not layer.ok]
        lines = [f"  - {layer.name}: {layer.problem}" for layer in bad[:20]] + [f"  - {p}" for p in self.problems[:20]]
        count = len(bad) + len(self.problems)
        if count > len(lines):
            lines.append(f"  - and {count - len(lines)} more")
        raise VerificationError("the Marlin checkpoint is not equal to its source:\n" + "\n".join(lines))


def _largest(errors: list[float | None]) -> float:
    return float(np.max([x for x in errors if x is not None], initial=0.0))  # np.max keeps a NaN, max may lose it


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: "nan" and "inf" then."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


class Product(Protocol):
    """Computes one layer's outputs twice, from its GPTQ and its Marlin tensors, fed in blocks of rows of K."""

    def add(self, k0: int, qweight: I32, B: I32) -> None:
        """Take rows k0 … of the layer: `qweight` [kb/8, N] and `B` [kb/16, 2N]."""

    def errors(self) -> tuple[float, float]:
        """(largest absolute error, relative error) of Marlin's product against the reference."""


def product_for(device: Device, layer: Layer, scales: F16, s: F16) -> Product:
    """The one place where a device's way of multiplying is chosen."""
    return CPUProduct(layer, scales, s) if device.kind == "cpu" else CUDAProduct(device, layer, scales, s)


def product_device(device: Device) -> str:
    """Where `product_for` computes, as the report names it."""
    return str(device) if device.kind == "cpu" else f"{device} ({device.name})"


class CPUProduct:
    """The CPU's product, accumulated block by block in fp32 over weights rounded to fp16, as the definition says."""

    def __init__(self, layer: Layer, scales: F16, s: F16) -> None:
        self.layer, self.scales, self.s = layer, scales, s
        self.x = activations(layer, CPU_ROWS)
        self.reference = np.zeros((CPU_ROWS, layer.N), np.float32)
        self.result = np.zeros((CPU_ROWS, layer.N), np.float32)

    def add(self, k0: int, qweight: I32, B: I32) -> None:
        rows = self.layer.rows_per_group
        ops.matmul_gptq(self.x, qweight, self.scales, self.reference, k0=k0, rows_per_group=rows)
        ops.matmul_marlin(self.x, B, self.s, self.result, k0=k0, rows_per_group=rows)

    def errors(self) -> tuple[float, float]:
        return compare(self.result, self.reference)


class CUDAProduct:
    """The bundled kernel's product on a GPU, in fp16, against the definition in float64.

    The reference is computed from the GPTQ words by plain torch operations, and never sees `B` or the kernels.
    """

    def __init__(self, device: Device, layer: Layer, scales: F16, s: F16) -> None:
        import torch

        from . import cuda

        self.layer, self.device = layer, cuda.torch_device(device)
        self.scales, self.s = (torch.from_numpy(x).to(self.device) for x in (scales, s))
        self.x = torch.from_numpy(activations(layer, sum(CUDA_ROWS))).to(self.device)
        self.B = torch.empty(layer.B.shape, dtype=torch.int32, device=self.device)
        self.reference = torch.zeros((sum(CUDA_ROWS), layer.N), dtype=torch.float64, device=self.device)

    def add(self, k0: int, qweight: I32, B: I32) -> None:
        import torch

        from . import repack

        codes = repack.unpack_gptq(torch.from_numpy(qweight).to(self.device))
        rows = torch.arange(k0, k0 + codes.shape[0], device=self.device)
        weight = (codes.half() - ZERO_POINT) * self.scales[rows // self.layer.rows_per_group]  # fp16, rounded once
        self.reference += self.x[:, k0 : k0 + codes.shape[0]].double() @ weight.double()
        self.B[k0 // TILE_K : k0 // TILE_K + B.shape[0]] = torch.from_numpy(B)

    def errors(self) -> tuple[float, float]:
        from . import cuda

        worst, first = (0.0, 0.0), 0
        for rows in CUDA_ROWS:
            result = cuda.gemm(self.x[first : first + rows].half(), self.B, self.s)
            found = compare(result.cpu().numpy(), self.reference[first : first + rows].cpu().numpy())
            worst, first = (float(np.max([worst[0], found[0]])), float(np.max([worst[1], found[1]]))), first + rows
        return worst


def activations(layer: Layer, rows: int) -> F32:
    """Random normal activations [rows, K], representable in fp16; the same for the same layer on every run."""
    generator = np.random.default_rng(zlib.crc32(layer.name.encode()))
    return generator.standard_normal((rows, layer.K), np.float32).astype(np.float16).astype(np.float32)


def compare(result: npt.NDArray[Any], reference: npt.NDArray[Any]) -> tuple[float, float]:
    """(max |result - reference|, ‖result - reference‖ / ‖reference‖), in float64; a zero reference counts as norm 1."""
    wide = reference.astype(np.float64)
    difference = result.astype(np.float64) - wide
    # Not np.linalg.norm: it wakes BLAS's own threads, which then spin beside ours.
    norm, distance = (float(np.sqrt(np.square(v).sum())) for v in (wide, difference))
    return float(np.abs(difference).max()), distance / (norm or 1.0)


def verify(
    source: Checkpoint, plan: Plan, result: Checkpoint, device: Device, progress: Progress | None = None
) -> Verification:
    """Check `result`, a converted checkpoint as it lies on disk, against `source` and its plan.

    Reads both completely, in blocks. A difference is reported, not raised; damaged files raise SourceError.
    """
    progress = progress or Progress()
    report = Verification(product_device(device))
    expected = {t.name: t for t in plan.out_tensors}
    for name in sorted(set(result.tensors) - set(expected)):
        report.problems.append(f"{name} is in the result and should not be")
    _check_config(report, plan, source, result)
    progress.stage("verifying", plan.bytes_out, len(plan.layers))

    checks: dict[str, LayerCheck] = {}
    differing: dict[str, str] = {}
    buffers = Buffers()

    def tasks() -> Iterator[Callable[[], None]]:
        for layer in plan.layers:
            yield partial(check_layer, layer)
        for tensor in plan.copies:
            yield partial(check_copy, tensor)

    def check_layer(layer: Layer) -> None:
        checks[layer.name] = _check_layer(source, result, layer, device, buffers, progress)

    def check_copy(tensor: Tensor) -> None:
        problem = _shape_problem(result, OutTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes))
        if problem is None:
            for start, length in byte_blocks(tensor.nbytes):
                ours, theirs = buffers.array("ours", (length,), np.uint8), buffers.array("theirs", (length,), np.uint8)
                source.read_into(tensor, theirs, start)
                result.read_into(result.tensors[tensor.name], ours, start)
                progress.advance(length)
                if not np.array_equal(ours, theirs):
                    problem = f"byte {start + int(np.argmax(ours != theirs))} differs from the source"
                    break
        if problem:
            differing[tensor.name] = problem

    run_all(tasks())
    progress.end()
    report.layers = [checks[layer.name] for layer in plan.layers]
    report.tensors_equal = len(plan.copies) - len(differing)
    report.problems += [f"{t.name}: {differing[t.name]}" for t in plan.copies if t.name in differing]
    return report


def _check_layer(
    source: Checkpoint, result: Checkpoint, layer: Layer, device: Device, buffers: Buffers, progress: Progress
) -> LayerCheck:
    problem = _shape_problem(result, layer.B) or _shape_problem(result, layer.s)
    if problem:
        return LayerCheck(layer.name, layer.K, layer.N, layer.G, False, None, None, problem)
    B_on_disk, N = result.tensors[layer.B.name], layer.N
    scales = to_fp16(source.read(layer.scales), layer.scales.dtype).scales
    s = result.read(result.tensors[layer.s.name])
    unpermuted = unpermute_scales(s).view(np.uint16)
    if not np.array_equal(unpermuted, scales.view(np.uint16)):
        group, column = np.argwhere(unpermuted != scales.view(np.uint16))[0]
        ours, theirs = unpermuted.view(np.float16)[group, column], scales[group, column]
        problem = f"the scale of group {group}, column {column} is {ours}, not {theirs}"

    product = product_for(device, layer, scales, s)
    progress.advance(s.nbytes, layer.name)
    for k0, rows in row_blocks(layer.K, N):
        qweight = buffers.array("qweight", (rows // PACK_FACTOR, N), np.int32)
        B = buffers.array("B", (rows // TILE_K, 2 * N), np.int32)
        source.read_into(layer.qweight, qweight, k0 * N * 4 // PACK_FACTOR)
        result.read_into(B_on_disk, B, k0 * N * 4 // PACK_FACTOR)
        unpacked = ops.unpack(B, out=buffers.array("unpacked", qweight.shape, np.int32))
        problem = problem or code_difference(unpacked, qweight, k0)
        product.add(k0, qweight, B)
        progress.advance(B.nbytes, layer.name)
    max_error, relative_error = product.errors()
    exact = problem is None
    if exact and not relative_error <= TOLERANCE:  # so written, NaN fails too
        problem = f"outputs differ by {relative_error:.2e} relative to the reference (allowed: {TOLERANCE:.0e})"
    progress.advance(0, layer.name, done=True)
    return LayerCheck(layer.name, layer.K, N, layer.G, exact, max_error, relative_error, problem)


def code_difference(unpacked: I32, qweight: I32, k0: int) -> str | None:
    """Where two blocks of GPTQ words first differ: the row and column of the weight and both codes; None if nowhere."""
    at = ops.first_difference(unpacked, qweight)
    if at is None:
        return None
    word_row, column = divmod(at, qweight.shape[1])
    ours, theirs = int(unpacked.flat[at]) & 0xFFFFFFFF, int(qweight.flat[at]) & 0xFFFFFFFF
    nibble = next(i for i in range(PACK_FACTOR) if (ours ^ theirs) >> 4 * i & 15)
    row = k0 + word_row * PACK_FACTOR + nibble
    return f"the code of row {row}, column {column} is {ours >> 4 * nibble & 15}, not {theirs >> 4 * nibble & 15}"


def _shape_problem(result: Checkpoint, expected: OutTensor) -> str | None:
    found = result.tensors.get(expected.name)
    if found is None:
        return f"{expected.name} is missing"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{expected.name} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    return None


def _check_config(report: Verification, plan: Plan, source: Checkpoint, result: Checkpoint) -> None:
    """Each of the result's configs must describe the checkpoint as it is."""
    required = {"bits": 4, "group_size": plan.group_size, "sym": True, "desc_act": False, "checkpoint_format": "marlin",
                "is_marlin_format": True}  # fmt: skip
    found = find_configs(result.configs)
    for file in ("config.json", "quantize_config.json"):
        if file not in found and (file in source.configs or file == "quantize_config.json"):
            report.problems.append(f"{file} has no quantization settings")
    for where, config in found.items():
        wrong = [f"{k} is {config.get(k)!r}, not {v!r}" for k, v in required.items() if config.get(k) != v]
        if config.get("quant_method") not in QUANT_METHODS:
            wrong.append(f"quant_method is {config.get('quant_method')!r}, not {' or '.join(QUANT_METHODS)}")
        if wrong:
            report.problems.append(f"{where}: {', '.join(wrong)}")
