"""Deciding, from headers alone, what happens to every tensor: converted, copied, dropped, or refused and why.

Of the data itself only `g_idx` and `qzeros` are read: they are small, and they alone tell act-order and
asymmetric quantization apart from what the configuration claims. Where tensors and claims differ, the tensors
count, and the plan says so in `notes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, Tensor
from .config import GPTQSettings, parse_settings
from .errors import SourceError, UnsupportedError
from .layout import GROUP_SIZES, MIN_K, MIN_N, PACK_FACTOR, b_shape
from .publish import OutTensor

#: The one group size, besides "all of K", that the original format can hold.
GROUP_SIZE = max(GROUP_SIZES)
#: Tensors of a GPTQ linear that a converted layer no longer has.
GPTQ_PARTS = ("qweight", "scales", "qzeros", "g_idx")
_SCALE_DTYPES = ("F16", "BF16", "F32")

#: Tensor-name endings that give away other quantization methods when no config does.
_FOREIGN_TENSORS = {
    ".weight_packed": "a compressed-tensors checkpoint",
    ".quant_state.bitsandbytes__nf4": "a bitsandbytes checkpoint",
    ".quant_state.bitsandbytes__fp4": "a bitsandbytes checkpoint",
    ".SCB": "a bitsandbytes checkpoint",
    ".q_weight": "an EXL2 checkpoint",
}


@dataclass(frozen=True)
class Layer:
    """One quantized linear: what its tensors say about it, and where they lie.

    `rows_per_group` is K / G: the group size that counts, whatever the config says.
    """

    name: str
    K: int
    N: int
    G: int
    bits: int
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    g_idx: Tensor | None
    bias: Tensor | None

    @property
    def rows_per_group(self) -> int:
        return self.K // self.G

    @property
    def group_size(self) -> int:
        """As a config would say it: -1 for one group over all of K."""
        return -1 if self.G == 1 else self.rows_per_group

    @property
    def B(self) -> OutTensor:
        shape = b_shape(self.K, self.N)
        return OutTensor(f"{self.name}.B", "I32", shape, math.prod(shape) * 4)

    @property
    def s(self) -> OutTensor:
        return OutTensor(f"{self.name}.s", "F16", (self.G, self.N), self.G * self.N * 2)


@dataclass
class Plan:
    """What the conversion will do. `refusals` and `notes` map a text to the layers it concerns, in source order."""

    settings: GPTQSettings
    layers: list[Layer] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    group_size: int = GROUP_SIZE  # of the result: 128 or -1
    already_marlin: bool = False
    layers_found: int = 0
    bytes_in: int = 0  # of all tensors that the source holds

    @property
    def out_tensors(self) -> list[OutTensor]:
        """Every tensor of the result, in the order of the source's files; a layer's B and s stay together."""
        position = {t.name: i for i, t in enumerate(self._source_order())}
        entries: list[tuple[int, OutTensor]] = []
        for layer in self.layers:
            at = position[layer.qweight.name]
            entries += [(at, layer.B), (at, layer.s)]
        entries += [(position[t.name], OutTensor(t.name, t.dtype, t.shape, t.nbytes)) for t in self.copies]
        return [tensor for _, tensor in sorted(entries, key=lambda e: e[0])]

    def _source_order(self) -> list[Tensor]:
        return sorted([*(x.qweight for x in self.layers), *self.copies], key=lambda t: (t.file, t.offset, t.name))

    @property
    def bytes_out(self) -> int:
        return sum(t.nbytes for t in self.out_tensors)

    @property
    def lm_head(self) -> bool:
        """Whether the output head is quantized."""
        return any(layer.name.split(".")[-1] == "lm_head" for layer in self.layers)

    def require_convertible(self) -> None:
        """Raise UnsupportedError that names every refused layer, one line for each cause."""
        if not self.refusals:
            return
        refused = {name for names in self.refusals.values() for name in names}
        lines = [f"  - {reason}: {span(names)}" for reason, names in self.refusals.items()]
        raise UnsupportedError(
            f"{len(refused)} of {self.layers_found} quantized layers do not fit the original Marlin format "
            "(4-bit, symmetric, groups of 128 or per-channel, no act-order); nothing was converted:\n"
            + "\n".join(lines)
        )


#: A number within a name, of those that count something: "07" counts nothing.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")


def span(names: list[str]) -> str:
    """All of `names` in a few words: `64 layers, layers.{0-31}.mlp.up_proj, layers.{0-31}.mlp.down_proj`."""
    if len(names) == 1:
        return names[0]
    numbers: dict[tuple[str, ...], set[tuple[int, ...]]] = {}  # texts between the numbers → the numbers
    for name in names:
        parts = _NUMBER.split(name)
        numbers.setdefault(tuple(parts[::2]), set()).add(tuple(map(int, parts[1::2])))
    lists = [
        "".join(text + number for text, number in zip(texts, (*row, ""), strict=True))
        for texts, rows in numbers.items()
        for row in _grids(rows)
    ]
    return f"{len(names)} layers, {', '.join(lists)}"


def _grids(rows: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """`rows` of equally many numbers, cut into grids: {(0, 4), (0, 5), (1, 4), (1, 5), (2, 4)} → {0-1}{4-5}, 2 4."""
    if () in rows:
        return [()]
    heads_of: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head in sorted({row[0] for row in rows}):
        heads_of.setdefault(frozenset(row[1:] for row in rows if row[0] == head), []).append(head)
    return [(_ranges(heads), *rest) for tails, heads in heads_of.items() for rest in _grids(set(tails))]


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers: [3] → 3, [0, 1, 2, 5] → {0-2,5}."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) + "}"


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Plan the conversion of `checkpoint`.

    Raises UnsupportedError for a source that is not GPTQ, SourceError for one whose tensors contradict each
    other. Layers that the original format cannot hold are not an error yet: they are listed in `refusals`.
    """
    settings = parse_settings(checkpoint.configs)
    tensors = checkpoint.tensors
    plan = Plan(
        settings, notes={note: [] for note in checkpoint.notes}, bytes_in=sum(t.nbytes for t in tensors.values())
    )
    if _is_marlin(tensors):
        plan.already_marlin = True
        return plan
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    plan.layers_found = len(names)
    if not names:
        raise UnsupportedError(f"{checkpoint.folder}: {_what_else(settings, tensors)}; a GPTQ checkpoint is needed.")
    _require_complete(tensors)

    judged = [_Judged(checkpoint, name, settings) for name in names]
    _one_group_size(plan, judged)
    for layer in judged:
        for reason in layer.refusals:
            plan.refusals.setdefault(reason, []).append(layer.name)
        for note in layer.notes:
            plan.notes.setdefault(note, []).append(layer.name)
        if layer.layer is not None and not layer.refusals:
            plan.layers.append(layer.layer)
    owned = {f"{name}.{part}" for name in names for part in GPTQ_PARTS}
    for tensor in tensors.values():
        if tensor.name not in owned:
            plan.copies.append(tensor)
        elif tensor.name.endswith((".qzeros", ".g_idx")):
            plan.dropped.append(tensor)
    if "config.json" not in checkpoint.configs:
        plan.notes["the source has no config.json, so the result has none: no engine can load it without"] = []
    for key, text in settings.conflicts.items():
        plan.notes[f"the source's configs disagree on {key} ({text}); the tensors decided"] = []
    return plan


class _Judged:
    """One layer under examination: its `layer` (None when not even its shape is known), refusals and notes."""

    def __init__(self, checkpoint: Checkpoint, name: str, settings: GPTQSettings) -> None:
        self.checkpoint, self.name, self.settings = checkpoint, name, settings.for_layer(name)
        self.refusals: list[str] = []
        self.notes: list[str] = []
        self.layer = self._measure()
        if self.layer is not None:
            self._check_format(self.layer)
            self._check_g_idx(self.layer)
            self._check_zero_points(self.layer)

    def _part(self, part: str) -> Tensor | None:
        return self.checkpoint.tensors.get(f"{self.name}.{part}")

    def _measure(self) -> Layer | None:
        """K, N, G and bits from the shapes of the tensors; the config only where shapes cannot tell."""
        qweight, scales = self._part("qweight"), self._part("scales")
        qzeros, g_idx, bias = self._part("qzeros"), self._part("g_idx"), self._part("bias")
        assert qweight is not None  # the layer was found by it
        if scales is None:
            raise SourceError(f"{self.name}: it has a qweight and no scales; the checkpoint is incomplete.")
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            self.refusals.append(
                f"qweight is {len(qweight.shape)}-D, scales are {len(scales.shape)}-D; only 2-D linears are repacked"
            )
            return None
        if qweight.dtype != "I32":
            self.refusals.append(f"qweight is {qweight.dtype}; only weights packed in int32 words can be repacked")
            return None
        if scales.dtype not in _SCALE_DTYPES:
            self.refusals.append(f"scales are {scales.dtype}; F16, BF16 or F32 was expected")
            return None
        (rows, N), (G, scale_columns) = qweight.shape, scales.shape
        if scale_columns != N:
            if scale_columns == 8 * N:
                raise UnsupportedError(
                    f"{self.name}: its qweight is packed along N, as AWQ does it, whatever the config says; "
                    "only GPTQ checkpoints can be repacked to Marlin."
                )
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} differ in N."
            )
        if not rows or not N or not G:
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)}, scales {list(scales.shape)}: an empty layer."
            )
        bits = self._bits(rows, N, G, qzeros, g_idx)
        if bits is None:
            return None
        K = rows * 32 // bits
        if self.settings.bits not in (None, bits):
            self.notes.append(
                f"the config says {self.settings.bits} bits, the tensors are {bits}-bit; the tensors count"
            )
        said = self.settings.group_size
        if said is not None and (-(-K // said) if said > 0 else 1) != G:
            self.notes.append(
                f"the config says group_size {said}, the tensors have "
                + (f"{K / G:g} rows in a group" if G > 1 else "one group over all rows")
                + "; the tensors count"
            )
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        return Layer(self.name, K, N, G, bits, qweight, scales, qzeros, g_idx, bias)

    def _bits(self, rows: int, N: int, G: int, qzeros: Tensor | None, g_idx: Tensor | None) -> int | None:
        fitting = [bits for bits in (2, 3, 4, 8) if rows * 32 % bits == 0]
        if qzeros is not None:
            if len(qzeros.shape) != 2 or qzeros.shape[0] != G or qzeros.dtype != "I32":
                raise SourceError(
                    f"{self.name}: qzeros {qzeros.dtype} {list(qzeros.shape)} does not match scales with {G} groups."
                )
            fitting = [bits for bits in fitting if -(-N * bits // 32) == qzeros.shape[1]]
        if g_idx is not None:
            if g_idx.dtype not in ("I32", "I64") or len(g_idx.shape) != 1:
                raise SourceError(
                    f"{self.name}: g_idx {g_idx.dtype} {list(g_idx.shape)}: one int32 for each row was expected."
                )
            fitting = [bits for bits in fitting if rows * 32 // bits == g_idx.shape[0]]
        if not fitting:
            raise SourceError(
                f"{self.name}: no bit width explains its shapes: qweight has {rows} rows and N = {N}, "
                f"qzeros {list(qzeros.shape) if qzeros else 'none'}, g_idx {list(g_idx.shape) if g_idx else 'none'}."
            )
        if len(fitting) > 1:  # neither qzeros nor g_idx is there to tell
            if self.settings.bits not in fitting:
                self.refusals.append("neither qzeros, nor g_idx, nor the config tells the number of bits")
                return None
            return self.settings.bits
        return fitting[0]

    def _check_format(self, layer: Layer) -> None:
        """What the original format can hold, by shape."""
        if layer.bits in (2, 3):
            self.refusals.append(f"{layer.bits}-bit weights; Marlin has 4 bits")
        elif layer.bits != 4:
            self.refusals.append(f"{layer.bits}-bit weights; the original format has 4 bits only")
        if layer.G > 1 and layer.G * GROUP_SIZE != layer.K:
            self.refusals.append(
                f"{_group_text(layer, self.settings)}; the original format has groups of 128 or one per column"
            )
        if layer.K % MIN_K:
            self.refusals.append(f"K = {layer.K} is not a multiple of {MIN_K}")
        if layer.N % MIN_N:
            self.refusals.append(f"N = {layer.N} is not a multiple of {MIN_N}")

    def _check_g_idx(self, layer: Layer) -> None:
        claimed = self.settings.desc_act
        if layer.g_idx is None:
            if claimed and layer.G > 1:
                self.refusals.append("the config says act-order (desc_act) and the g_idx that it needs is missing")
            elif "desc_act" in self.settings.conflicts and layer.G > 1:
                self.refusals.append(
                    f"no g_idx, and the configs disagree on desc_act ({self.settings.conflicts['desc_act']})"
                )
            return
        g_idx = self.checkpoint.read(layer.g_idx)
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            raise SourceError(
                f"{self.name}: g_idx names group {g_idx.max() if g_idx.max() >= layer.G else g_idx.min()} of {layer.G}."
            )
        rows_per_group = _rows_per_group(layer, self.settings)
        if rows_per_group is not None and np.array_equal(g_idx, np.arange(layer.K) // rows_per_group):
            if claimed and layer.G > 1:
                self.notes.append("desc_act in name only: g_idx is sequential, converted as plain")
        elif (g_idx == g_idx[0]).all():
            self.refusals.append(f"g_idx puts every row into group {g_idx[0]} of {layer.G}")
        elif claimed is False:
            self.refusals.append("act-order (g_idx is shuffled, although the config says desc_act false)")
        else:
            self.refusals.append("act-order (g_idx is shuffled)")

    def _check_zero_points(self, layer: Layer) -> None:
        """Symmetric means that every zero point is 8: stored as 7 by checkpoint_format gptq, as 8 by gptq_v2."""
        sym, version = self.settings.sym, self.settings.checkpoint_format
        if layer.qzeros is None:
            if "sym" in self.settings.conflicts:
                self.refusals.append(f"no qzeros, and the configs disagree on sym ({self.settings.conflicts['sym']})")
            elif sym is not True:
                said = "the config says sym false" if sym is False else "no config says whether it is symmetric"
                self.refusals.append(f"no qzeros, and {said}")
            return
        if layer.bits != 4:
            return
        words = self.checkpoint.read(layer.qzeros).view(np.uint32)
        used = np.full(words.shape[1], 0xFFFFFFFF, np.uint32)
        used[-1] >>= 4 * (-layer.N % PACK_FACTOR)  # behind the last column, anything may stand
        stored = next((z for z in (7, 8) if not ((words ^ np.uint32(0x11111111 * z)) & used).any()), None)
        if stored is None:
            claim = ", although the config says sym" if sym else ""
            self.refusals.append(f"asymmetric (zero points are not all 8{claim})")
            return
        layout, expected = ("gptq_v2", 8) if version == "gptq_v2" else ("gptq", 7)
        doubtful = sym is False or "sym" in self.settings.conflicts
        if doubtful and "checkpoint_format" in self.settings.conflicts:
            self.refusals.append(
                f"every zero point is stored as {stored}, no config says sym for certain, and they disagree on "
                f"checkpoint_format ({self.settings.conflicts['checkpoint_format']})"
            )
        elif stored == expected:
            if sym is False:
                self.notes.append("the config says sym false, and every zero point is 8; converted as symmetric")
        elif doubtful:
            # No sym to lean on: the label decides what the stored number means, and it does not mean 8.
            meant = stored + 8 - expected
            self.refusals.append(
                f"asymmetric (every zero point is stored as {stored}, which is {meant} in checkpoint_format {layout})"
            )
        else:
            self.notes.append(
                f"checkpoint_format {layout} stores zero point 8 as {expected}, here it is {stored}; read as symmetric"
            )


def _rows_per_group(layer: Layer, settings: GPTQSettings) -> int | None:
    """Rows that share a scale: K / G, or the config's size where a short last group explains G."""
    if layer.G == 1:
        return layer.K
    if layer.G * GROUP_SIZE == layer.K:
        return GROUP_SIZE
    said = settings.group_size
    if said and said > 0 and -(-layer.K // said) == layer.G:
        return said
    return layer.K // layer.G if layer.K % layer.G == 0 else None


def _group_text(layer: Layer, settings: GPTQSettings) -> str:
    rows = _rows_per_group(layer, settings)
    if rows is None:
        return f"{layer.G} groups that do not divide K = {layer.K}"
    return f"groups of {rows}" + (f" with a short last one (K = {layer.K})" if layer.K % rows else "")


def _one_group_size(plan: Plan, judged: Iterable[_Judged]) -> None:
    """The original format has one group_size for all layers: 128, or -1 when no layer has more than one group."""
    fine = [j for j in judged if j.layer is not None and not j.refusals]
    grouped = [j for j in fine if j.layer is not None and j.layer.G > 1]
    single = [j for j in fine if j.layer is not None and j.layer.G == 1 and j.layer.K != GROUP_SIZE]
    plan.group_size = GROUP_SIZE if grouped or not single else -1
    if grouped and single:
        few, many = sorted((grouped, single), key=len)
        kind = {id(grouped): "groups of 128", id(single): "one group per column"}
        for j in few:
            j.refusals.append(
                f"{kind[id(few)]}, while {len(many)} other layers have {kind[id(many)]}; "
                "the original format has one group_size for all"
            )


def _is_marlin(tensors: dict[str, Tensor]) -> bool:
    """Whatever the config says: where there is a qweight, there is something to convert."""
    if any(name.endswith(".qweight") for name in tensors):
        return False
    return any(n.endswith(".B") and t.dtype == "I32" and f"{n[:-2]}.s" in tensors for n, t in tensors.items())


def _require_complete(tensors: dict[str, Tensor]) -> None:
    """Raise SourceError for parts of a GPTQ layer without its weights, and for names that the result needs itself."""
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part in ("qzeros", "g_idx") and f"{layer}.qweight" not in tensors:
            raise SourceError(f"{layer}: it has {part} and no qweight; the checkpoint is incomplete.")
        if part in ("B", "s") and f"{layer}.qweight" in tensors:
            raise SourceError(
                f"{layer}: it has a qweight and, as Marlin layers do, {part}; remove the one or the other."
            )


def _what_else(settings: GPTQSettings, tensors: dict[str, Tensor]) -> str:
    for name in tensors:
        for ending, kind in _FOREIGN_TENSORS.items():
            if name.endswith(ending):
                return f"{kind} ({name})"
    if settings.is_marlin:
        return "its config says Marlin, and it has neither Marlin's tensors (B and s) nor GPTQ's (qweight)"
    return "an unquantized checkpoint: none of its tensors is a qweight"


def plan_as_dict(plan: Plan, source: str) -> dict[str, Any]:
    """The plan for scripts (`--dry-run --json`): every layer, what happens to it, sizes in bytes."""
    return {
        "source": source,
        "already_marlin": plan.already_marlin,
        "convertible": not plan.refusals and not plan.already_marlin,
        "format": "marlin",
        "group_size": plan.group_size,
        "layers": [
            {"name": x.name, "K": x.K, "N": x.N, "bits": x.bits, "group_size": x.group_size, "scales": x.scales.dtype,
             "bias": x.bias is not None, "action": "convert"}
            for x in plan.layers
        ],
        "refused": [{"reason": reason, "layers": names} for reason, names in plan.refusals.items()],
        "notes": [{"note": note, "layers": names} for note, names in plan.notes.items()],
        "copied": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for t in plan.copies],
        "dropped": [t.name for t in plan.dropped],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
    }  # fmt: skip
