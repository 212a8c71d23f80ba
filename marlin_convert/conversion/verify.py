"""Proving that a Marlin checkpoint on disk equals its source: layer by layer, exactly and numerically.

Exactly: the codes and scales unpacked from `B` and `s` are the source's, read by the definition of its format, every
element; every other tensor is the same bytes. Numerically: random activations through the Marlin tensors against the
same activations times the fp16 weights that the source's tensors stand for. The second shows what the first implies,
by another road: it does not unpack `B` back to the source's order, it computes with it as a kernel does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor
from ..device import Device
from ..errors import VerificationError
from ..formats.bf16 import widened
from ..formats.gptq_config import find_configs
from ..formats.layout import TILE_K, unpack_zeros, unpermute_scales
from ..formats.marlin_config import marlin_ext_settings
from ..options import Format, QuantMethod
from ..progress import Progress
from .blocks import Buffers, byte_blocks, column_panels, group_strips, run_all, stored_blocks
from .layer import Layer
from .layer_reader import Groups, LayerReader, code_difference, order_difference
from .plan import Plan
from .products import LayerGroups, product_device, product_for

#: Largest relative error (Frobenius norm) between Marlin's product and the reference. fp32 accumulation stays
#: below 1e-6; fp16 outputs and tensor-core accumulation, as on a GPU, below 5e-4.
TOLERANCE = 1e-3

I32 = npt.NDArray[np.int32]


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
    """Return a number as JSON, which has no NaN and no infinity: "nan" and "inf" then."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


class Verifier:
    """Checks `result`, a converted checkpoint as it lies on disk, against `source` and its plan, item by item.

    A difference is reported, not raised; damaged files raise SourceError.
    """

    def __init__(
        self, source: Checkpoint, plan: Plan, result: Checkpoint, device: Device, progress: Progress | None = None
    ) -> None:
        self._source, self._plan, self._result, self._device = source, plan, result, device
        self._progress, self._buffers = progress or Progress(), Buffers()
        self._layers: dict[str, LayerCheck] = {}
        self._differing: dict[str, str] = {}

    def check(self, item: Layer | Tensor) -> None:
        """Check a layer, or a tensor that was copied; reads both sides completely, in blocks. Thread-safe."""
        if isinstance(item, Layer):
            self._layers[item.name] = _check_layer(
                self._source, self._result, item, self._device, self._buffers, self._progress
            )
        else:
            self.check_copy(item, 0, item.nbytes)

    def check_copy(self, tensor: Tensor, first: int, end: int) -> None:
        """Check bytes `first` to `end` of a tensor that was copied; of all parts, the first difference counts."""
        if tensor.name not in self._differing and (problem := self._copy_problem(tensor, first, end)):
            self._differing[tensor.name] = problem

    def _copy_problem(self, tensor: Tensor, first: int, end: int) -> str | None:
        problem = _shape_problem(self._result, OutTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes))
        if problem:
            return problem
        for offset, length in byte_blocks(end - first):
            start = first + offset
            ours, theirs = (self._buffers.array(whose, (length,), np.uint8) for whose in ("ours", "theirs"))
            self._source.read_into(tensor, theirs, start)
            self._result.read_into(self._result.tensors[tensor.name], ours, start)
            self._progress.advance(length)
            if not np.array_equal(ours, theirs):
                return f"byte {start + int(np.argmax(ours != theirs))} differs from the source"
        return None

    def report(self, result: Checkpoint) -> Verification:
        """Return what was found, once every item is checked; and what `result`, with its configs, has or lacks beside
        them."""
        plan = self._plan
        report = Verification(product_device(self._device))
        expected = {t.name for t in plan.out_tensors}
        report.problems += [f"{n} is in the result and should not be" for n in sorted(set(result.tensors) - expected)]
        _check_config(report, plan, self._source, result)
        report.layers = [self._layers[layer.name] for layer in plan.layers]
        report.tensors_equal = len(plan.copies) - len(self._differing)
        report.problems += [f"{t.name}: {self._differing[t.name]}" for t in plan.copies if t.name in self._differing]
        return report


def verify(
    source: Checkpoint, plan: Plan, result: Checkpoint, device: Device, progress: Progress | None = None
) -> Verification:
    """Check `result`, a converted checkpoint as it lies on disk, against `source` and its plan; see `Verifier`."""
    progress = progress or Progress()
    verifier = Verifier(source, plan, result, device, progress)
    progress.stage("verifying", plan.bytes_out, len(plan.layers))
    items: list[Layer | Tensor] = [*plan.layers, *plan.copies]
    run_all(partial(verifier.check, item) for item in items)
    progress.end()
    return verifier.report(result)


def _check_layer(
    source: Checkpoint, result: Checkpoint, layer: Layer, device: Device, buffers: Buffers, progress: Progress
) -> LayerCheck:
    problem = next(filter(None, (_shape_problem(result, tensor) for tensor in layer.out)), None)
    if problem:
        return LayerCheck(layer.name, layer.K, layer.N, layer.G, False, None, None, problem)
    reader = LayerReader(source, layer, defined=True)
    groups = LayerGroups(reader.source_groups, partial(_result_groups, result, layer))
    perm = result.read(result.tensors[layer.marlin_perm.name]) if layer.marlin_perm else None
    problem = _groups_difference(reader, groups) or _perm_difference(perm, reader.perm)
    product = product_for(device, layer, groups, reader.g_idx, perm)
    progress.advance(sum(t.nbytes for t in layer.out) - layer.B.nbytes, layer.name)

    if layer.by_columns:
        problem = problem or _order_problem(reader, result, buffers)
    for k0, rows in stored_blocks(layer):
        B = buffers.array("B", (rows // TILE_K, layer.B.shape[1]), np.int32)
        result.read_into(result.tensors[layer.B.name], B, k0 // TILE_K * layer.B.shape[1] * 4)
        filled, words = max(0, min(rows, layer.K - k0)), None
        if not layer.by_columns:
            words = reader.rows(k0, rows, buffers)
            problem = problem or code_difference(B, words, k0, layer.bits)
        if filled:
            qweight = words
            if qweight is None or (filled, layer.N) != (rows, layer.stored_N):
                qweight = buffers.array("qweight", (filled * layer.bits // 32, layer.N), np.int32)
                reader.source_rows(k0, qweight, buffers)
            product.add_source(k0, qweight)
        product.add_stored(k0, B)
        progress.advance(B.nbytes, layer.name)
    max_error, relative_error = product.errors()
    exact = problem is None
    if exact and not relative_error <= TOLERANCE:  # written this way, NaN fails too
        problem = f"outputs differ by {relative_error:.2e} relative to the reference (allowed: {TOLERANCE:.0e})"
    progress.advance(0, layer.name, done=True)
    return LayerCheck(layer.name, layer.K, layer.N, layer.G, exact, max_error, relative_error, problem)


def _order_problem(reader: LayerReader, result: Checkpoint, buffers: Buffers) -> str | None:
    """Return where the codes of a layer that is compared column by column first differ; None if nowhere."""
    layer, order = reader.layer, reader.order
    for n0, columns in column_panels(layer):
        qweight = reader.columns(n0, columns, buffers)
        B = buffers.array("B columns", (layer.stored_K // TILE_K, columns * layer.bits // 2), np.int32)
        result.read_columns(result.tensors[layer.B.name], B, n0 * layer.bits // 2)
        problem = order_difference(B, qweight, order.columns(n0, columns), layer.bits, n0)
        if problem:
            return problem
    return None


def _result_groups(result: Checkpoint, layer: Layer, first: int, count: int) -> Groups:
    """Return groups `first` … of a converted layer: `s` as it is stored, zero points in their own order."""
    s = result.read_rows(result.tensors[layer.s.name], first, count)
    if layer.marlin_qzeros is None:
        return Groups(s, None)
    return Groups(s, unpack_zeros(result.read_rows(result.tensors[layer.marlin_qzeros.name], first, count), layer.bits))


def _groups_difference(reader: LayerReader, groups: LayerGroups) -> str | None:
    """Return where scales or zero points first differ; None if nowhere."""
    layer = reader.layer
    for first, count in group_strips(layer.stored_G, layer.stored_N):
        stored, expected = groups.stored(first, count), reader.stored_groups(first, count)
        found = {"scale": (unpermute_scales(stored.scales, layer.stored_G), expected.scales)}
        if stored.zeros is not None and expected.zeros is not None:
            found["zero point"] = (stored.zeros, expected.zeros)
        for what, (ours, theirs) in found.items():
            width = np.uint16 if ours.itemsize == 2 else np.uint8
            different = ours.view(width) != theirs.view(width)
            if different.any():
                group, column = np.argwhere(different)[0]
                values = [(widened(x) if x.dtype == np.uint16 else x)[group, column] for x in (ours, theirs)]
                return f"the {what} of group {first + group}, column {column} is {values[0]}, not {values[1]}"
    return None


def _perm_difference(stored: I32 | None, expected: I32 | None) -> str | None:
    """Return where the order of rows first differs; None if nowhere."""
    if stored is None or expected is None or np.array_equal(stored, expected):
        return None
    row = int(np.argmax(stored != expected))
    return f"stored row {row} is said to be the source's row {stored[row]}, not {expected[row]}"


def _shape_problem(result: Checkpoint, expected: OutTensor) -> str | None:
    found = result.tensors.get(expected.name)
    if found is None:
        return f"{expected.name} is missing"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{expected.name} is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    return None


def _check_config(report: Verification, plan: Plan, source: Checkpoint, result: Checkpoint) -> None:
    """Check that each of the result's configs describes the checkpoint as it is."""
    required: dict[str, Any] = {
        "bits": 4, "group_size": plan.group_size, "sym": True, "desc_act": False,
        "checkpoint_format": Format.MARLIN.value, "is_marlin_format": True,
    }  # fmt: skip
    if plan.extended:
        required = marlin_ext_settings({x.name: x.settings for x in plan.layers}, lm_head=plan.lm_head)
    found = find_configs(result.configs)
    for file in ("config.json", "quantize_config.json"):
        if file not in found and (file in source.configs or file == "quantize_config.json"):
            report.problems.append(f"{file} has no quantization settings")
    for where, config in found.items():
        wrong = [f"{k} is {config.get(k)!r}, not {v!r}" for k, v in required.items() if config.get(k) != v]
        if config.get("quant_method") not in list(QuantMethod):
            wrong.append(f"quant_method is {config.get('quant_method')!r}, not {' or '.join(QuantMethod)}")
        if wrong:
            report.problems.append(f"{where}: {', '.join(wrong)}")
