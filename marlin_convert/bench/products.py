"""This GPU's speed: fp16 (cuBLAS) against Marlin, for the layers of a checkpoint or of a well-known model.

Every number comes from one run on one GPU. A time is the median over replays of a CUDA graph whose launches rotate
through copies of the weights that together are larger than the L2 cache, as the layers of a model do: nothing is
found in the cache that a model would not find there, and nothing is spent on launching. Codes, scales and activations
are random: a GPU that multiplies zeros draws less power and runs faster.

The limit of a product is the larger of two times: that of its bytes (weights, scales, activations and outputs, each
once) at the bandwidth of a large copy, and that of its 2·M·K·N operations at the rate of a large fp16 product. Both
rates are measured at the start of the same run. A kernel that only reads can be a little faster than a copy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata, util
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DeviceError, UnsupportedError, require
from ..formats.layout import b_shape, pack_factor
from ..options import HubAccess
from ..progress import Progress
from .gpu import cuda_rig, pick_gpu
from .results import ROTATE, Calls, Cell, Kernels, LayerResult, Limits, Machine, Report, Rig, Speed
from .shapes import DEFAULT_PRESET, PRESETS, Notes, Shape, source_shapes

if TYPE_CHECKING:
    import torch

BATCH = tuple(2**i for i in range(13))  # M = 1 … 4096

MAX_COPIES = 1024
SLACK_BYTES = 512 << 20  # workspaces of cuBLAS and of the kernels, graphs, fragmentation
BUSY_US = 1.5e6  # how long the GPU is kept busy while its clocks are read, in µs


# ---- What measures ----


@dataclass(frozen=True)
class Packed:
    """One layer as Marlin stores it: weight int32 [K'/16, N' bits/2], scales fp16 [G, N'], zeros int32 [G, N' bits/32]
    and perm int32 [K] where it has them."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Copies of one layer's random weights: as Marlin stores them, and as fp16."""

    packed: list[Packed]
    plain: list[torch.Tensor]  # fp16 [K, N]


#: (shape, weights, device) → for activations [M, K], the calls to time.
Prepare = Callable[[Shape, Weights, "torch.device"], Callable[["torch.Tensor"], Calls]]


@dataclass(frozen=True)
class Peer:
    """Another quantized kernel. `own_weights`: it keeps copies in a layout of its own."""

    name: str
    version: str
    prepare: Prepare
    own_weights: bool = False


def copies(nbytes: int, l2_bytes: int) -> int:
    """Return how many copies of weights of `nbytes` to rotate through."""
    return max(2, min(MAX_COPIES, -(-ROTATE * l2_bytes // nbytes)))


def random_weights(shape: Shape, rig: Rig) -> Weights:
    import torch

    K, N = shape.stored

    def words(*size: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=rig.device)

    def packed() -> Packed:
        scales = torch.empty((shape.G, N), dtype=torch.float16, device=rig.device).uniform_(0.001, 0.02)
        zeros = words(shape.G, N // pack_factor(shape.bits)) if shape.zeros else None
        perm = torch.randperm(shape.K, device=rig.device).to(torch.int32) if shape.act_order else None
        return Packed(words(*b_shape(K, N, shape.bits)), scales, zeros, perm)

    plain = copies(shape.fp16_bytes, rig.l2_bytes)
    W = torch.empty((plain, shape.K, shape.N), dtype=torch.float16, device=rig.device).normal_(0, 0.05)
    return Weights([packed() for _ in range(copies(shape.packed_bytes, rig.l2_bytes))], list(W.unbind()))


def bytes_needed(shape: Shape, M: int, rig: Rig, peers: Sequence[Peer] = ()) -> int:
    """Return device memory for measuring a layer at M rows."""
    weights = copies(shape.packed_bytes, rig.l2_bytes) * shape.packed_bytes
    peer_weights = sum(weights for peer in peers if peer.own_weights)
    plain = (
        copies(shape.fp16_bytes, rig.l2_bytes) + 1
    ) * shape.fp16_bytes  # plus one that weights are dequantized into
    rows = 2 * M * (shape.K + 2 * shape.N)  # activations, an output, another output
    return weights + peer_weights + plain + rows + SLACK_BYTES


def measure_limits(rig: Rig) -> tuple[Limits, Machine]:
    """Return the two rates that bound every product, and the machine as it is while it works."""
    import torch

    words = min(rig.copy_bytes, rig.free_bytes() // 8) // 4
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=rig.device)
    target = torch.empty_like(source)
    # The driver's copy, and a kernel that reads and writes as much: the faster one counts.
    us = min(rig.time([copy]) for copy in (partial(target.copy_, source), partial(torch.neg, source, out=target)))
    bandwidth = 2 * source.nbytes / us * 1e6
    del source, target
    n = rig.product_size
    a, b = (torch.randn((n, n), dtype=torch.float16, device=rig.device) for _ in range(2))
    product = partial(rig.fp16, a, b, out=torch.empty_like(a))
    us = rig.time([product])
    for _ in range(min(1000, int(BUSY_US / us) + 1)):  # queued, not waited for; the driver's queue holds 1024
        product()
    machine = rig.describe()
    rig.synchronize()
    return Limits(bandwidth, 2 * n**3 / us * 1e6), machine


def bench(
    title: str,
    shapes: Sequence[Shape],
    rig: Rig,
    *,
    batch: Sequence[int] = BATCH,
    peers: Sequence[Peer] = (),
    notes: Notes | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure `shapes` at every M of `batch`. `progress` counts timings, not bytes.

    What does not fit the GPU's memory is left out with a note; DeviceError if that is everything.
    """
    progress = progress or Progress()
    progress.stage("measuring", len(shapes) * len(batch), len(shapes))
    limits, machine = measure_limits(rig)
    rig.release()
    report = Report(title, machine, limits, {peer.name: peer.version for peer in peers}, notes=dict(notes or {}))
    for shape in shapes:
        fitting = _fitting(shape, batch, rig, peers, report)
        progress.advance(len(batch) - len(fitting), str(shape))
        cells = _measure_layer(shape, fitting, rig, peers, report, progress) if fitting else []
        if cells:
            report.layers.append(LayerResult(shape, cells))
        progress.advance(0, str(shape), done=True)
        rig.release()
    progress.end()
    if not report.layers:
        raise DeviceError(f"nothing could be measured on {machine.name}: {'; '.join(report.notes)}.")
    return report


def _note(report: Report, text: str, where: str) -> None:
    report.notes.setdefault(text, []).append(where)


def _fitting(shape: Shape, batch: Sequence[int], rig: Rig, peers: Sequence[Peer], report: Report) -> list[int]:
    """Return the batch sizes whose measurement fits the memory that is free; notes about the others."""
    free = rig.free_bytes()
    fitting = [M for M in batch if bytes_needed(shape, M, rig, peers) <= free]
    for M in batch:
        if M not in fitting:
            needed = bytes_needed(shape, M, rig, peers) / 1e9
            _note(report, f"left out: it needs {needed:.1f} GB of memory and {free / 1e9:.1f} GB are free",
                  f"{shape}, M = {M}")  # fmt: skip
    if fitting and copies(shape.packed_bytes, rig.l2_bytes) * shape.packed_bytes < 2 * rig.l2_bytes:
        _note(report, "so small that its weights come from the L2 cache, not from memory", str(shape))
    return fitting


def _measure_layer(
    shape: Shape, batch: Sequence[int], rig: Rig, peers: Sequence[Peer], report: Report, progress: Progress
) -> list[Cell]:
    """Return all of one layer's cells. Its tensors live in this function only."""
    import torch

    cells: list[Cell] = []
    try:
        weights = random_weights(shape, rig)
        prepared = {
            peer.name: _guarded(peer.name, str(shape), rig, report, partial(peer.prepare, shape, weights, rig.device))
            for peer in peers
        }
    except torch.OutOfMemoryError:
        _note(report, "left out: the GPU's memory ran out", str(shape))
        progress.advance(len(batch))
        return cells
    for M in batch:
        progress.advance(0, f"{shape}, M = {M}")
        try:
            cells.append(_measure(shape, M, weights, prepared, rig, report))
        except torch.OutOfMemoryError:
            _note(report, "left out: the GPU's memory ran out", f"{shape}, M = {M}")
        rig.release()
        progress.advance(1)
    return cells


def _measure(
    shape: Shape,
    M: int,
    weights: Weights,
    prepared: dict[str, Callable[[torch.Tensor], Calls] | None],
    rig: Rig,
    report: Report,
) -> Cell:
    import torch

    limits, flops, row_bytes = report.limits, 2 * M * shape.K * shape.N, 2 * M * (shape.K + shape.N)

    def speed(us: float, weight_bytes: int) -> Speed:
        nbytes = weight_bytes + row_bytes
        return Speed(us, nbytes, flops, limits.us(nbytes, flops), limits.bound(nbytes, flops))

    a = torch.randn((M, shape.K), dtype=torch.float16, device=rig.device)
    out = torch.empty((M, shape.N), dtype=torch.float16, device=rig.device)
    fp16 = rig.time([partial(rig.fp16, a, W, out=out) for W in weights.plain])
    marlin = rig.time([partial(_product, rig.kernels, shape, layer, a) for layer in weights.packed])
    K, N = shape.stored
    dequantizes = rig.kernels.dequantizing_pays(
        M, N, K, rig.device.index or 0, bits=shape.bits, group_size=shape.group_size, zeros=shape.zeros
    )
    peers: dict[str, Speed | None] = {}
    for name, calls in prepared.items():
        peers[name] = None
        if calls is not None:
            us = _guarded(name, f"{shape}, M = {M}", rig, report, partial(_time_peer, rig, calls, a))
            peers[name] = None if us is None else speed(us, shape.packed_bytes)
    return Cell(
        M,
        speed(fp16, shape.fp16_bytes),
        speed(marlin, shape.packed_bytes),
        "dequantize" if dequantizes else "kernel",
        peers,
    )


def _product(kernels: Kernels, shape: Shape, layer: Packed, a: torch.Tensor) -> torch.Tensor:
    return kernels.matmul(
        a, layer.weight, layer.scales, zeros=layer.zeros, perm=layer.perm, bits=shape.bits, in_features=shape.K,
        out_features=shape.N,
    )  # fmt: skip


def _time_peer(rig: Rig, calls: Callable[[torch.Tensor], Calls], a: torch.Tensor) -> float:
    return rig.time(calls(a))


# ---- Peers ----


R = TypeVar("R")


def _guarded(name: str, where: str, rig: Rig, report: Report, work: Callable[[], R]) -> R | None:
    """Run a peer's code: what it prints goes to standard error, what it raises becomes a note (and None).

    Raises DeviceError if the GPU does not work any more after it.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return work()
    except Exception as error:  # noqa: BLE001 - others' code may raise anything; none of it ends our measurement
        text = _first_line(error)
    _note(report, f"{name} failed: {text}", where)
    try:
        rig.synchronize()
    except RuntimeError:
        raise DeviceError(f"{name} left the GPU unusable ({where}: {text}); measure again without --compare.") from None
    rig.release()
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def find_peers() -> tuple[list[Peer], Notes]:
    """Return the peers that are installed here, and why the others do not take part."""
    peers: list[Peer] = []
    notes: Notes = {}
    for name, module, package, find in (
        ("vLLM Marlin", "vllm", "vllm", _vllm_marlin),
        ("humming", "humming", "humming-kernels", _humming),
    ):
        if util.find_spec(module) is None:
            notes[f"{package} is not installed"] = ["--compare"]
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                prepare = find()
        except Exception as error:  # noqa: BLE001 - importing others' code may raise anything; the note says what
            notes[f"{package} is installed and cannot be used: {_first_line(error)}"] = ["--compare"]
            continue
        peers.append(Peer(name, _version(package), prepare, own_weights=find is _humming))
    return peers, notes


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _vllm_marlin() -> Prepare:
    """Return vLLM's Marlin, whose weights are stored as ours."""
    import torch

    import_module("vllm._custom_ops")  # registers the operators
    utils: Any = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    uint4b8 = import_module("vllm.scalar_type").scalar_types.uint4b8
    apply = utils.apply_gptq_marlin_linear

    def prepare(shape: Shape, weights: Weights, device: torch.device) -> Callable[[torch.Tensor], Calls]:
        if shape.kind or shape.stored != (shape.K, shape.N):
            raise UnsupportedError("compared for 4-bit symmetric layers without act-order and padding only")
        none = torch.empty(0, dtype=torch.int32, device=device)  # no zero points, no act-order
        workspace = utils.marlin_make_workspace_new(device)
        rest = (none, none, none, workspace, uint4b8, shape.N, shape.K, True)
        return lambda a: [partial(apply, a, layer.weight, layer.scales, *rest) for layer in weights.packed]

    return prepare


def _humming() -> Prepare:
    """Return humming-kernels, with weights of its own in its own layout."""
    import torch

    layer_type = import_module("humming.layer").HummingLayer

    def prepare(shape: Shape, weights: Weights, device: torch.device) -> Callable[[torch.Tensor], Calls]:
        config = {"dtype": f"uint{shape.bits}", "group_size": max(0, shape.group_size)}  # 0: one group

        def layer() -> Any:
            new = layer_type(shape_n=shape.N, shape_k=shape.K, weight_config=config, torch_dtype=torch.float16)
            new = new.to(device)
            W = torch.empty((shape.N, shape.K), dtype=torch.float16, device=device).normal_(0, 0.05)
            new.load_from_unquantized(W)
            new.transform()
            return new

        layers = [layer() for _ in weights.packed]
        return lambda a: [partial(each, a) for each in layers]

    return prepare


# ---- In one call ----


def run(
    source: str | None = None,
    preset: str | None = None,
    *,
    batch: Sequence[int] = BATCH,
    compare: bool = False,
    device: str = "auto",
    access: HubAccess | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a checkpoint's layers, or those of a preset, on the GPU that `device` names.

    Raises DeviceError without a GPU, a driver or the library that it needs.
    """
    require("torch")
    import torch

    rig = cuda_rig(pick_gpu(device))
    if source is None:
        title = preset or DEFAULT_PRESET
        shapes, notes = list(PRESETS[title]), Notes()
    else:
        title, shapes, notes = source_shapes(source, access or HubAccess())
    peers: list[Peer] = []
    with torch.cuda.device(rig.device), torch.no_grad():
        if compare:
            peers, absent = find_peers()
            notes |= absent
        return bench(title, shapes, rig, batch=batch, peers=peers, notes=notes, progress=progress)
