"""Deciding, from headers alone, what happens to every tensor: converted, copied, dropped, or refused and why; and
which of the two formats the result has.

Of the data itself only `g_idx` and `qzeros` are read: they are small, and they alone tell act-order and
asymmetric quantization apart from what the configuration claims. Where tensors and claims differ, the tensors
count, and the plan says so in `notes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, require_unique
from ..engine_support import LayerFacts, ResultFacts, vllm_needs_our_kernels, vllm_refuses
from ..errors import SourceError, UnsupportedError
from ..formats.gptq import ZeroPointEncoding, decode_zeros
from ..formats.gptq_config import GPTQSettings, parse_settings
from ..formats.layout import (
    EXT_BITS,
    EXTENDED_NAMES,
    GROUP_SIZES,
    MIN_K,
    MIN_N,
    ORIGINAL_NAMES,
    TILE_K,
    b_shape,
    gptq_zeros,
    pack_factor,
    padded_size,
    stored_group_size,
    stored_groups,
    zero_point,
)
from ..formats.marlin_config import LayerSettings, ties
from ..formats.scales import LayerFit, fit_layer
from ..formats.stored import MARLIN_PARTS, is_marlin_part
from ..options import Format, QuantMethod, ZeroPointReading
from .blocks import group_strips

#: The one group size, besides "all of K", that the original format can hold.
GROUP_SIZE = max(GROUP_SIZES)
#: Tensors of a GPTQ linear that a converted layer no longer has.
GPTQ_PARTS = ("qweight", "scales", "qzeros", "g_idx")
_SCALE_DTYPES = ("F16", "BF16", "F32")
#: `--zero-points`: how to read a v1 checkpoint in which a zero point is 0, where its writer is not known.
READINGS = {
    ZeroPointReading.NIBBLE: ZeroPointEncoding.V1_NIBBLE, ZeroPointReading.WORD: ZeroPointEncoding.V1_WORD
}  # fmt: skip

#: A text → the layers that it concerns, in source order.
Reasons: TypeAlias = "dict[str, list[str]]"

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
    """One quantized linear: what its tensors say about it, and where they lie; and what it becomes.

    `group_rows` are the rows that share a scale (K if all do), whatever the config says; the last group may have fewer.
    `extended` tells the format of the result, `stored_scales` the dtype of its scales.
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
    group_rows: int
    zeros: ZeroPointEncoding = ZeroPointEncoding.SYMMETRIC
    act_order: bool = False
    extended: bool = False
    stored_scales: str = "F16"
    stored_zero: int | None = None  # of a symmetric layer, if it is not what the source's checkpoint_format stores

    @property
    def rows_per_group(self) -> int:
        """Rows of the result that share a scale."""
        return self.stored_K // self.stored_G

    @property
    def group_size(self) -> int:
        """The source's, as a config would say it: -1 for one group over all of K."""
        return -1 if self.G == 1 else self.group_rows

    @property
    def sym(self) -> bool:
        return self.zeros is ZeroPointEncoding.SYMMETRIC

    @property
    def stored_K(self) -> int:
        return padded_size(self.K, self.N)[0] if self.extended else self.K

    @property
    def stored_N(self) -> int:
        return padded_size(self.K, self.N)[1] if self.extended else self.N

    @property
    def stored_group_size(self) -> int:
        """As the result's config says it."""
        return (stored_group_size(self.group_size) or self.group_size) if self.extended else self.group_size

    @property
    def stored_G(self) -> int:
        return stored_groups(self.K, self.stored_group_size) if self.extended else self.G

    @property
    def settings(self) -> LayerSettings:
        """As the extended format describes it."""
        return LayerSettings(
            bits=self.bits,
            group_size=self.stored_group_size,
            sym=self.sym,
            desc_act=self.act_order,
            in_features=self.K if self.stored_K != self.K else None,
            out_features=self.N if self.stored_N != self.N else None,
            source_group_size=self.group_size if self.stored_group_size != self.group_size else None,
        )

    @property
    def B(self) -> OutTensor:
        shape = b_shape(self.stored_K, self.stored_N, self.bits)
        return OutTensor(self._name("B", "marlin_qweight"), "I32", shape, math.prod(shape) * 4)

    @property
    def s(self) -> OutTensor:
        shape = (self.stored_G, self.stored_N)
        return OutTensor(self._name("s", "marlin_scales"), self.stored_scales, shape, math.prod(shape) * 2)

    @property
    def marlin_qzeros(self) -> OutTensor | None:
        if self.sym:
            return None
        shape = (self.stored_G, self.stored_N // pack_factor(self.bits))
        return OutTensor(f"{self.name}.marlin_qzeros", "I32", shape, math.prod(shape) * 4)

    @property
    def marlin_perm(self) -> OutTensor | None:
        return OutTensor(f"{self.name}.marlin_perm", "I32", (self.K,), self.K * 4) if self.act_order else None

    @property
    def out(self) -> list[OutTensor]:
        """Every tensor that the layer becomes."""
        return [t for t in (self.B, self.s, self.marlin_qzeros, self.marlin_perm) if t is not None]

    def _name(self, original: str, extended: str) -> str:
        return f"{self.name}.{extended if self.extended else original}"

    def zero_points(self, qzeros: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """The source's `qzeros` [G, ⌈N bits/32⌉] → zero points [G, N]."""
        return decode_zeros(qzeros, self.bits, self.N, self.zeros)


@dataclass(frozen=True)
class Plan:
    """What the conversion will do, as `make_plan` decides it. `misfits` are why the original format cannot hold a
    layer; `scale_rounding` is the largest relative error of a scale that is rounded."""

    settings: GPTQSettings
    layers: list[Layer] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    refusals: Reasons = field(default_factory=dict)
    notes: Reasons = field(default_factory=dict)
    misfits: Reasons = field(default_factory=dict)
    format: Format = Format.MARLIN  # of the result: MARLIN or MARLIN_EXT
    group_size: int = GROUP_SIZE  # of a result in the original format: 128 or -1
    already_marlin: bool = False
    layers_found: int = 0
    weights_beside: dict[str, int] = field(default_factory=dict)  # files that are copied as they are: name → bytes
    bytes_in: int = 0  # of all tensors that the source holds
    scale_rounding: float = 0.0

    @property
    def out_tensors(self) -> list[OutTensor]:
        """Every tensor of the result, in the order of the source's files; a layer's tensors stay together."""
        position = {t.name: i for i, t in enumerate(self._source_order())}
        entries: list[tuple[int, OutTensor]] = []
        for layer in self.layers:
            at = position[layer.qweight.name]
            entries += [(at, tensor) for tensor in layer.out]
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
        return any(_is_head(layer.name) for layer in self.layers)

    @property
    def layer_facts(self) -> list[LayerFacts]:
        """What decides whether an engine computes the layers."""
        return [
            LayerFacts(
                x.name, x.bits, x.stored_group_size, not x.sym, x.act_order,
                padded=(x.stored_K, x.stored_N) != (x.K, x.N), bias=x.bias is not None, K=x.K, N=x.N,
            )
            for x in self.layers
        ]  # fmt: skip

    def result_facts(self, quant_method: QuantMethod, weight_files: int) -> ResultFacts:
        """What decides whether an engine reads the result."""
        return ResultFacts(self.format, self.layer_facts, self.group_size, quant_method, weight_files)

    def require_convertible(self) -> None:
        """Raise UnsupportedError that names every refused layer, one line for each cause."""
        if not self.refusals:
            return
        refused = {name for names in self.refusals.values() for name in names}
        lines = [f"  - {reason}: {span(names)}" for reason, names in self.refusals.items()]
        many = f"{len(refused)} of {self.layers_found} quantized layers"
        if not self.extended:
            text = (
                f"{many} do not fit the original Marlin format (4-bit, symmetric, groups of 128 or per-channel, no "
                "act-order, scales in fp16); nothing was converted:"
            )
        else:
            text = f"{many} cannot be converted to either Marlin format; nothing was converted:"
        raise UnsupportedError("\n".join([text, *lines]))

    @property
    def extended(self) -> bool:
        return self.format is Format.MARLIN_EXT


def _is_head(name: str) -> bool:
    return name.split(".")[-1] == "lm_head"


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


def make_plan(
    checkpoint: Checkpoint, format: Format | str = Format.AUTO, zero_points: ZeroPointReading | str | None = None
) -> Plan:
    """Plan the conversion of `checkpoint`: what is done and what a dry run shows.

    Of the weights only headers are read; `g_idx`, `qzeros` and scales are read whole. `zero_points` tells how to read a
    v1 checkpoint in which a zero point is 0.

    Raises SourceError for a checkpoint that is incomplete or contradicts itself, UnsupportedError for one that is no
    GPTQ checkpoint, OptionError for a word that is none. Layers that cannot be converted are not an error yet: they are
    listed in `refusals`.
    """
    format = Format.chosen(format, "format")
    reading = None if zero_points is None else ZeroPointReading.chosen(zero_points, "zero_points")
    checkpoint.require_fit()
    settings, tensors = parse_settings(checkpoint.configs), checkpoint.tensors
    notes: Reasons = {note: [] for note in checkpoint.notes}
    bytes_in = sum(t.nbytes for t in tensors.values())
    if is_marlin_checkpoint(tensors):
        return Plan(settings, notes=notes, bytes_in=bytes_in, already_marlin=True)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        raise UnsupportedError(f"{checkpoint.folder}: {_what_else(settings, tensors)}; a GPTQ checkpoint is needed.")
    _require_complete(tensors)

    own = settings.for_layers(names)
    judged = [_Judged(checkpoint, name, own[name], reading) for name in names]
    group_size = _one_group_size(judged)
    misfits = _gathered((layer.misfits, layer.name) for layer in judged)
    extended = format is Format.MARLIN_EXT or (
        format is Format.AUTO and (bool(misfits) or any(layer.refusals for layer in judged))
    )
    layers, refusals = _convertible(judged, extended)
    fits = _fitted_scales(checkpoint, layers, extended)
    unfit = _gathered(([fit.problem] if fit.problem else [], name) for name, fit in fits.items())
    if unfit and format is Format.AUTO and not extended:
        misfits = {f"{problem}, which is the original format's type": found for problem, found in unfit.items()}
        extended = True
        layers, refusals = _convertible(judged, extended)
        fits = _fitted_scales(checkpoint, layers, extended)
        unfit = _gathered(([fit.problem] if fit.problem else [], name) for name, fit in fits.items())
    refusals |= unfit
    for layer in judged:
        for note in layer.notes + (layer.extended_notes if extended else []):
            notes.setdefault(note, []).append(layer.name)
    owned = {f"{name}.{part}" for name in names for part in GPTQ_PARTS}
    without = [x.name for x in layers if fits[x.name].zero]
    if without:
        notes["every scale is 0, and so is every weight: the layer was not quantized rightly, or never filled"] = (
            without
        )
    main = checkpoint.configs.get("config.json", {})
    if any(_is_head(x.name) for x in layers) and any(ties(main).values()):
        notes["the head is quantized, and the config ties it to the embedding: the result's config does not"] = []
    if "config.json" not in checkpoint.configs:
        notes["the source has no config.json, so the result has none: no engine can load it without"] = []
    for key, text in settings.conflicts.items():
        notes[f"the source's configs disagree on {key} ({text}); the tensors decided"] = []
    plan = Plan(
        settings,
        layers=[replace(x, stored_scales=fits[x.name].dtype) for x in layers if not fits[x.name].problem],
        copies=[tensor for tensor in tensors.values() if tensor.name not in owned],
        dropped=[t for t in tensors.values() if t.name in owned and t.name.endswith((".qzeros", ".g_idx"))],
        refusals=refusals,
        notes=notes,
        misfits=misfits,
        format=Format.MARLIN_EXT if extended else Format.MARLIN,
        group_size=group_size,
        layers_found=len(names),
        weights_beside=checkpoint.weights_beside,
        bytes_in=bytes_in,
        scale_rounding=max((fit.rounding for fit in fits.values()), default=0.0),
    )
    require_unique(plan.out_tensors)
    return plan


def _gathered(found: Iterable[tuple[list[str], str]]) -> Reasons:
    """(reasons, layer) of each layer → each reason's layers, both in order of appearance."""
    gathered: Reasons = {}
    for reasons, name in found:
        for reason in reasons:
            gathered.setdefault(reason, []).append(name)
    return gathered


def _convertible(judged: list[_Judged], extended: bool) -> tuple[list[Layer], Reasons]:
    """The layers that the format can hold, but for their scales, and why it cannot hold the others."""
    against = {x.name: x.refusals + (x.extended_refusals if extended else x.misfits) for x in judged}
    layers = [replace(x.layer, extended=extended) for x in judged if x.layer is not None and not against[x.name]]
    return layers, _gathered((reasons, name) for name, reasons in against.items())


def _fitted_scales(checkpoint: Checkpoint, layers: list[Layer], extended: bool) -> dict[str, LayerFit]:
    """What becomes of each layer's scales."""

    def fitted(layer: Layer) -> LayerFit:
        def rows() -> Iterator[npt.NDArray[Any]]:
            for first, count in group_strips(layer.G, layer.N):
                yield checkpoint.read_rows(layer.scales, first, count)

        return fit_layer(rows, layer.scales.dtype, extended=extended)

    return {layer.name: fitted(layer) for layer in layers}


class _Judged:
    """One layer under examination: its `layer` (None when not even its shape is known) and what there is to say.

    `refusals` hold for both formats, `misfits` for the original one, `extended_refusals` and `extended_notes` for the
    extended one.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> None:
        self.checkpoint, self.name, self.settings = checkpoint, name, settings
        self.reading = reading
        self.refusals: list[str] = []
        self.misfits: list[str] = []
        self.notes: list[str] = []
        self.extended_refusals: list[str] = []
        self.extended_notes: list[str] = []
        self.stored_zero: int | None = None
        self.layer = self._measure()
        if self.layer is not None:
            self.layer = self._sized_by_g_idx(self.layer)
            self._note_group_size(self.layer)
            self._check_format(self.layer)
            act_order = self._check_g_idx(self.layer)
            zeros = self._check_zero_points(self.layer)
            stored = self.stored_zero if zeros is ZeroPointEncoding.SYMMETRIC else None
            self.layer = replace(self.layer, act_order=act_order, zeros=zeros, stored_zero=stored)

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
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        group_rows = _rows_per_group(K, G, self.settings) or 0
        return Layer(self.name, K, N, G, bits, qweight, scales, qzeros, g_idx, bias, group_rows)

    def _bits(self, rows: int, N: int, G: int, qzeros: Tensor | None, g_idx: Tensor | None) -> int | None:
        fitting = [bits for bits in (2, 3, 4, 8) if rows * 32 % bits == 0]
        if qzeros is not None:
            if qzeros.dtype != "I32":
                self.refusals.append(
                    f"qzeros are {qzeros.dtype}; only zero points packed in int32 words can be repacked"
                )
                return None
            if len(qzeros.shape) != 2 or qzeros.shape[0] != G:
                raise SourceError(f"{self.name}: qzeros {list(qzeros.shape)} does not match scales with {G} groups.")
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
        """What the formats can hold, by shape."""
        if layer.bits in (2, 3):
            self.refusals.append(f"{layer.bits}-bit weights; Marlin has 4 and 8 bits")
        elif layer.bits != 4:
            self.misfits.append(f"{layer.bits}-bit weights; the original format has 4 bits only")
        groups = _group_text(layer)
        if layer.G > 1 and (layer.group_rows != GROUP_SIZE or layer.K % GROUP_SIZE):
            if not layer.group_rows:
                self.refusals.append(groups)
            elif stored_group_size(layer.group_rows) is None:
                self.extended_refusals.append(f"{groups}; Marlin's kernels take groups of a multiple of {TILE_K} rows")
            if layer.group_rows:
                self.misfits.append(f"{groups}; the original format has groups of 128 or one per column")
        if layer.K % MIN_K:
            self.misfits.append(f"K = {layer.K} is not a multiple of {MIN_K}")
        if layer.N % MIN_N:
            self.misfits.append(f"N = {layer.N} is not a multiple of {MIN_N}")

    def _sized_by_g_idx(self, layer: Layer) -> Layer:
        """Where there is a g_idx, it tells the size of the groups: all but the last have as many rows as the first."""
        if layer.g_idx is None or layer.G == 1:
            return layer
        g_idx = self.checkpoint.read(layer.g_idx)
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            return layer
        sizes = np.bincount(g_idx, minlength=layer.G)
        regular = (sizes[:-1] == sizes[0]).all() and 0 < sizes[-1] <= sizes[0]
        return replace(layer, group_rows=int(sizes[0])) if regular else layer

    def _note_group_size(self, layer: Layer) -> None:
        said = self.settings.group_size
        if said is None or (said == layer.group_rows if layer.G > 1 else not 0 < said < layer.K):
            return
        found = (
            f"{layer.group_rows or layer.K / layer.G:g} rows in a group" if layer.G > 1 else "one group over all rows"
        )
        self.notes.append(f"the config says group_size {said}, the tensors have {found}; the tensors count")

    def _check_g_idx(self, layer: Layer) -> bool:
        """Whether the layer has act-order."""
        claimed = self.settings.desc_act
        if layer.g_idx is None:
            if claimed and layer.G > 1:
                self.refusals.append("the config says act-order (desc_act) and the g_idx that it needs is missing")
            elif "desc_act" in self.settings.conflicts and layer.G > 1:
                self.refusals.append(
                    f"no g_idx, and the configs disagree on desc_act ({self.settings.conflicts['desc_act']})"
                )
            return False
        g_idx = self.checkpoint.read(layer.g_idx)
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            raise SourceError(
                f"{self.name}: g_idx names group {g_idx.max() if g_idx.max() >= layer.G else g_idx.min()} of {layer.G}."
            )
        rows = layer.group_rows
        if rows and np.array_equal(g_idx, np.arange(layer.K) // rows):
            if claimed and layer.G > 1:
                self.notes.append("desc_act in name only: g_idx is sequential, converted as plain")
            return False
        if (g_idx == g_idx[0]).all():
            self.refusals.append(f"g_idx puts every row into group {g_idx[0]} of {layer.G}")
            return False
        if claimed is False:
            self.misfits.append("act-order (g_idx is shuffled, although the config says desc_act false)")
            self.extended_notes.append("the config says desc_act false and g_idx is shuffled; converted with act-order")
        else:
            self.misfits.append("act-order (g_idx is shuffled)")
        if rows:
            sizes = np.bincount(g_idx, minlength=layer.G)
            expected = np.full(layer.G, rows)
            expected[-1] = layer.K - rows * (layer.G - 1)
            wrong = np.flatnonzero(sizes != expected)
            if wrong.size:
                group = int(wrong[0])
                self.extended_refusals.append(
                    f"act-order with groups of unequal size (group {group} has {sizes[group]} rows, not "
                    f"{expected[group]})"
                )
        return True

    def _check_zero_points(self, layer: Layer) -> ZeroPointEncoding:
        """How zero points are stored. Symmetric means that every one is the middle, 8 or 128: stored one less by
        checkpoint_format gptq, as it is by gptq_v2."""
        sym, version = self.settings.sym, self.settings.checkpoint_format
        if layer.qzeros is None:
            if "sym" in self.settings.conflicts:
                self.refusals.append(f"no qzeros, and the configs disagree on sym ({self.settings.conflicts['sym']})")
            elif sym is not True:
                said = "the config says sym false" if sym is False else "no config says whether it is symmetric"
                self.refusals.append(f"no qzeros, and {said}")
            return ZeroPointEncoding.SYMMETRIC
        if layer.bits not in EXT_BITS:
            return ZeroPointEncoding.SYMMETRIC
        numbers, middle = self._stored_numbers(layer, layer.qzeros), zero_point(layer.bits)
        stored = next((z for z in (middle - 1, middle) if numbers == {z}), None)
        layout, expected = ("gptq_v2", middle) if version == "gptq_v2" else ("gptq", middle - 1)
        if stored is None:
            claim = ", although the config says sym" if sym else ""
            self.misfits.append(f"asymmetric (zero points are not all {middle}{claim})")
            if sym:
                self.extended_notes.append("the config says sym and zero points differ; converted as asymmetric")
            return self._asymmetric(layer, numbers)
        doubtful = sym is False or "sym" in self.settings.conflicts
        if doubtful and "checkpoint_format" in self.settings.conflicts:
            self.refusals.append(
                f"every zero point is stored as {stored}, no config says sym for certain, and they disagree on "
                f"checkpoint_format ({self.settings.conflicts['checkpoint_format']})"
            )
        elif stored == expected:
            if sym is False:
                self.notes.append(
                    f"the config says sym false, and every zero point is {middle}; converted as symmetric"
                )
        elif doubtful:
            # No sym to lean on: the label decides what the stored number means, and it does not mean the middle.
            meant = stored + middle - expected
            self.misfits.append(
                f"asymmetric (every zero point is stored as {stored}, which is {meant} in checkpoint_format {layout})"
            )
            return self._asymmetric(layer, numbers)
        else:
            self.stored_zero = stored
            self.notes.append(
                f"checkpoint_format {layout} stores zero point {middle} as {expected}, here it is {stored}; "
                "read as symmetric"
            )
        return ZeroPointEncoding.SYMMETRIC

    def _stored_numbers(self, layer: Layer, qzeros: Tensor) -> set[int]:
        """Every number that stands in `qzeros`."""
        present, factor = np.zeros(2**layer.bits, np.bool_), pack_factor(layer.bits)
        for first, count in group_strips(layer.G, layer.N):
            words, columns = self.checkpoint.read_rows(qzeros, first, count), layer.N
            if layer.N % factor == 0 and (words == words[0, 0]).all():  # as they mostly are: one word tells all
                words, columns = words[:1, :1], factor
            present[gptq_zeros(words, layer.bits, columns)] = True
        return set(np.flatnonzero(present).tolist())

    def _asymmetric(self, layer: Layer, numbers: set[int]) -> ZeroPointEncoding:
        """How the zero points of an asymmetric layer are stored, in which `numbers` stand."""
        if "checkpoint_format" in self.settings.conflicts:
            self.extended_refusals.append(
                "asymmetric, and the configs disagree on checkpoint_format "
                f"({self.settings.conflicts['checkpoint_format']}), which tells how zero points are stored"
            )
            return ZeroPointEncoding.V2
        if self.settings.checkpoint_format == "gptq_v2":
            return ZeroPointEncoding.V2
        if self.reading is not None:
            return READINGS[self.reading]
        highest = 2**layer.bits - 1
        if highest not in numbers:  # every reading agrees
            return ZeroPointEncoding.V1_NIBBLE
        writer = self.settings.writer
        if writer == "gptqmodel":
            return ZeroPointEncoding.V1_WORD
        if writer == "autoround":
            return ZeroPointEncoding.V1_NIBBLE
        lost = (
            "AutoGPTQ, which wrote it, loses the numbers beside it"
            if writer == "autogptq"
            else "its writers differ in what they mean by that, and no config names this one"
        )
        self.extended_refusals.append(
            f"asymmetric with a zero point stored as {highest}: {lost}; give --zero-points word (GPTQModel) or nibble "
            "(others) if you know"
        )
        return ZeroPointEncoding.V1_NIBBLE


def _rows_per_group(K: int, G: int, settings: GPTQSettings) -> int | None:
    """Rows that share a scale: K / G, or the config's size where a short last group explains G."""
    if G == 1:
        return K
    if G * GROUP_SIZE == K:
        return GROUP_SIZE
    said = settings.group_size
    if said and said > 0 and -(-K // said) == G:
        return said
    return K // G if K % G == 0 else None


def _group_text(layer: Layer) -> str:
    rows = layer.group_rows
    if not rows:
        return f"{layer.G} groups that do not divide K = {layer.K}"
    return f"groups of {rows}" + (f" with a short last one (K = {layer.K})" if layer.K % rows else "")


def _one_group_size(judged: Iterable[_Judged]) -> int:
    """The original format's one group_size for all layers: 128, or -1 when no layer has more than one group. Layers of
    the other kind, where there are both, get a misfit."""
    fine = [j for j in judged if j.layer is not None and not j.refusals and not j.misfits]
    grouped = [j for j in fine if j.layer is not None and j.layer.G > 1]
    single = [j for j in fine if j.layer is not None and j.layer.G == 1 and j.layer.K != GROUP_SIZE]
    if grouped and single:
        few, many = sorted((grouped, single), key=len)
        kind = {id(grouped): "groups of 128", id(single): "one group per column"}
        for j in few:
            j.misfits.append(
                f"{kind[id(few)]}, while {len(many)} other layers have {kind[id(many)]}; "
                "the original format has one group_size for all"
            )
    return GROUP_SIZE if grouped or not single else -1


def is_marlin_checkpoint(tensors: dict[str, Tensor]) -> bool:
    """Whatever the config says: where there is a qweight, there is something to convert."""
    if any(name.endswith(".qweight") for name in tensors):
        return False
    weights = (EXTENDED_NAMES["weight"], ORIGINAL_NAMES["weight"])
    return any(name.rpartition(".")[2] in weights and is_marlin_part(tensors, name) for name in tensors)


def _require_complete(tensors: dict[str, Tensor]) -> None:
    """Raise SourceError for parts of a GPTQ layer without its weights, and for names that are the result's own."""
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part in ("qzeros", "g_idx") and f"{layer}.qweight" not in tensors:
            raise SourceError(f"{layer}: it has {part} and no qweight; the checkpoint is incomplete.")
        if f"{layer}.qweight" in tensors and part in MARLIN_PARTS:
            raise SourceError(
                f"{layer}: it has a qweight and, as Marlin layers do, {part}; remove the one or the other."
            )
        if is_marlin_part(tensors, name):
            raise SourceError(
                f"{name}: a tensor of a Marlin layer, in a checkpoint whose others are GPTQ's; remove it, or export "
                "the checkpoint again."
            )


def _what_else(settings: GPTQSettings, tensors: dict[str, Tensor]) -> str:
    for name in tensors:
        for ending, kind in _FOREIGN_TENSORS.items():
            if name.endswith(ending):
                return f"{kind} ({name})"
    if settings.is_marlin:
        return "its config says Marlin, and it has neither Marlin's tensors (B, marlin_qweight) nor GPTQ's (qweight)"
    return "an unquantized checkpoint: none of its tensors is a qweight"


def plan_as_dict(plan: Plan, source: str) -> dict[str, Any]:
    """The plan for scripts (`--dry-run --json`): every layer, what happens to it, sizes in bytes."""
    facts = plan.layer_facts
    return {
        "source": source,
        "already_marlin": plan.already_marlin,
        "convertible": not plan.refusals and not plan.already_marlin,
        "format": plan.format.value,
        "group_size": None if plan.extended else plan.group_size,
        "why_extended": [{"reason": reason, "layers": names} for reason, names in plan.misfits.items()]
        if plan.extended else [],
        "vllm_refuses": [{"what": what, "layers": names} for what, names in vllm_refuses(facts).items()],
        "vllm_needs_our_kernels": [
            {"what": what, "layers": names} for what, names in vllm_needs_our_kernels(facts).items()
        ],
        "layers": [
            {"name": x.name, "K": x.K, "N": x.N, "bits": x.bits, "group_size": x.group_size, "sym": x.sym,
             "desc_act": x.act_order, "stored_K": x.stored_K, "stored_N": x.stored_N,
             "stored_group_size": x.stored_group_size, "scales": x.scales.dtype, "bias": x.bias is not None,
             "action": "convert"}
            for x in plan.layers
        ],
        "refused": [{"reason": reason, "layers": names} for reason, names in plan.refusals.items()],
        "notes": [{"note": note, "layers": names} for note, names in plan.notes.items()],
        "copied": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for t in plan.copies],
        "weights_beside": [{"name": name, "bytes": nbytes} for name, nbytes in plan.weights_beside.items()],
        "dropped": [t.name for t in plan.dropped],
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
    }  # fmt: skip
