"""Deciding, from headers alone, what happens to every tensor: converted, copied, dropped, or refused and why; and
which of the two formats the result has.

Of the data itself only `g_idx`, `qzeros` and scales are read: they are small, and they alone tell act-order, asymmetric
quantization and what fp16 cannot hold. Where tensors and claims differ, the tensors count, and the plan says so in
`notes`. A dry run and a conversion both make their plan here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, require_unique
from ..engine_support import LayerFacts, ResultFacts, vllm_needs_our_kernels
from ..errors import SourceError, UnsupportedError
from ..formats.gptq_config import GPTQSettings, find_configs
from ..formats.layout import EXTENDED_NAMES, ORIGINAL_NAMES
from ..formats.marlin_config import ties
from ..formats.other_methods import OTHER_METHODS, RUN_BY, method_of
from ..formats.scales import LayerFit, fit_layer
from ..formats.stored import MARLIN_PARTS, is_marlin_part
from ..options import Format, QuantMethod, ZeroPointReading
from .blocks import group_strips
from .inspect import LayerInspection
from .layer import GROUP_SIZE, Layer
from .names import span
from .source_format import SourceFormat
from .source_layer import Kept
from .sources import FORMAT_TITLES, FORMATS, format_of

#: A text → the layers that it concerns, in source order.
Reasons: TypeAlias = "dict[str, list[str]]"


@dataclass(frozen=True)
class Plan:
    """What the conversion will do, as `make_plan` decides it. `why_extended` are why the original format cannot hold a
    layer; `scale_rounding` is the largest relative error of a scale that is rounded."""

    settings: GPTQSettings
    source_format: SourceFormat
    layers: list[Layer] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    refusals: Reasons = field(default_factory=dict)
    notes: Reasons = field(default_factory=dict)
    why_extended: Reasons = field(default_factory=dict)
    format: Format = Format.MARLIN  # of the result: MARLIN or MARLIN_EXT
    group_size: int = GROUP_SIZE  # of a result in the original format: 128 or -1
    already_marlin: bool = False
    layers_found: int = 0
    weights_beside: dict[str, int] = field(default_factory=dict)  # files that are copied as they are: name → bytes
    bytes_in: int = 0  # of all tensors that the source holds
    config: dict[str, Any] | None = None  # the source's config.json
    scale_rounding: float = 0.0

    @property
    def out_tensors(self) -> list[OutTensor]:
        """Every tensor of the result, in the order of the source's files; a layer's tensors stay together."""
        position = {t.name: i for i, t in enumerate(self._source_order())}
        entries: list[tuple[int, OutTensor]] = []
        for layer in self.layers:
            at = position[layer.source.weight.name]
            entries += [(at, tensor) for tensor in layer.out]
        entries += [(position[t.name], OutTensor(t.name, t.dtype, t.shape, t.nbytes)) for t in self.copies]
        return [tensor for _, tensor in sorted(entries, key=lambda e: e[0])]

    def _source_order(self) -> list[Tensor]:
        return sorted([*(x.source.weight for x in self.layers), *self.copies], key=lambda t: (t.file, t.offset, t.name))

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
        """Return what decides whether an engine reads the result."""
        return ResultFacts(self.format, self.layer_facts, self.group_size, quant_method, weight_files, self.config)

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
    def source_title(self) -> str:
        """What sentences call the source."""
        return self.source_format.called(self.settings)

    @property
    def extended(self) -> bool:
        return self.format is Format.MARLIN_EXT


def _is_head(name: str) -> bool:
    return name.split(".")[-1] == "lm_head"


def _part(tensor: Tensor) -> str:
    return tensor.name.rpartition(".")[2]


def make_plan(
    checkpoint: Checkpoint, format: Format | str = Format.AUTO, zero_points: ZeroPointReading | str | None = None
) -> Plan:
    """Plan the conversion of `checkpoint`: what is done and what a dry run shows.

    Of the weights only headers are read; `g_idx`, `qzeros` and scales are read whole. `zero_points` tells how to read a
    v1 checkpoint in which a zero point is 0.

    Raises SourceError for a checkpoint that is incomplete or contradicts itself, UnsupportedError for one in none of
    the formats, OptionError for a word that is none. Layers that cannot be converted are not an error yet: they are
    listed in `refusals`.
    """
    format = Format.chosen(format, "format")
    reading = None if zero_points is None else ZeroPointReading.chosen(zero_points, "zero_points")
    checkpoint.require_fit()
    tensors = checkpoint.tensors
    source, found = format_of(tensors, find_configs(checkpoint.configs))
    apart = source.apart(tensors)
    names = source.layer_names(apart) if found else []
    settings = source.settings(checkpoint.configs, names)
    main = checkpoint.configs.get("config.json")
    notes: Reasons = {note: [] for note in checkpoint.notes}
    bytes_in = sum(t.nbytes for t in tensors.values())
    if is_marlin_checkpoint(tensors):
        return Plan(settings, source, notes=notes, bytes_in=bytes_in, config=main, already_marlin=True)
    if not names:
        what = _what_else(source, settings, checkpoint)
        raise UnsupportedError(f"{checkpoint.label}: {what}; a checkpoint of {FORMAT_TITLES} is needed.")
    source.require_complete(tensors)
    _require_one_kind(tensors, source, names)
    small = (f"{name}.{part}" for name in found for part in source.parts[1:])
    checkpoint.read_ahead((tensors[name] for name in small if name in tensors), "reading scales and zero points")

    inspections = source.inspect(checkpoint, names, settings, reading)
    group_size = _one_group_size(inspections)  # may find a reason against the original format
    chosen = _choose(checkpoint, inspections, format)
    owned = {f"{name}.{part}" for name in names for part in source.parts}
    plan = Plan(
        settings,
        source,
        layers=chosen.convertible,
        copies=[tensor for tensor in apart.values() if tensor.name not in owned],
        dropped=[t for t in tensors.values() if t.name not in apart or t.name in owned if _part(t) in source.dropped],
        refusals=chosen.refusals | chosen.unfit,
        notes=notes | _notes(checkpoint, settings, inspections, chosen) | _unquantized_beside(apart, names),
        why_extended=chosen.why_extended,
        format=Format.MARLIN_EXT if chosen.extended else Format.MARLIN,
        group_size=group_size,
        layers_found=len(names),
        weights_beside=checkpoint.weights_beside,
        bytes_in=bytes_in,
        config=main,
        scale_rounding=max((fit.rounding for fit in chosen.fits.values()), default=0.0),
    )
    require_unique(plan.out_tensors)
    return plan


@dataclass(frozen=True)
class _Chosen:
    """The format of the result, and what becomes of the layers in it: `layers` that it can hold, but for their scales,
    what becomes of those (`fits`), and why it cannot hold the others (`refusals`)."""

    extended: bool
    why_extended: Reasons
    layers: list[Layer]
    refusals: Reasons
    fits: dict[str, LayerFit]

    @property
    def unfit(self) -> Reasons:
        """Why scales cannot be stored."""
        return _gathered(([fit.problem] if fit.problem else [], name) for name, fit in self.fits.items())

    @property
    def convertible(self) -> list[Layer]:
        """The layers that the format can hold, scales included."""
        fits = self.fits
        return [replace(x, stored_scales=fits[x.name].dtype) for x in self.layers if not fits[x.name].problem]


def _choose(checkpoint: Checkpoint, inspections: list[LayerInspection], format: Format) -> _Chosen:
    """Choose the result's format: with AUTO the original one, unless a layer, or its scales, do not fit it."""

    def chosen(why_extended: Reasons, extended: bool) -> _Chosen:
        layers, refusals = _convertible(inspections, extended)
        return _Chosen(extended, why_extended, layers, refusals, _fitted_scales(checkpoint, layers, extended))

    why_extended = _gathered((layer.why_extended, layer.name) for layer in inspections)
    found = chosen(
        why_extended,
        format is Format.MARLIN_EXT
        or (format is Format.AUTO and (bool(why_extended) or any(layer.refusals for layer in inspections))),
    )
    if not found.unfit or format is not Format.AUTO or found.extended:
        return found
    return chosen(
        {f"{problem}, which is the original format's type": names for problem, names in found.unfit.items()}, True
    )


def _notes(
    checkpoint: Checkpoint, settings: GPTQSettings, inspections: list[LayerInspection], chosen: _Chosen
) -> Reasons:
    """Return what the plan says of layers, and of the checkpoint."""
    notes: Reasons = {}
    for layer in inspections:
        for note in layer.notes + (layer.extended_notes if chosen.extended else []):
            notes.setdefault(note, []).append(layer.name)
    without = [x.name for x in chosen.layers if chosen.fits[x.name].zero]
    if without:
        notes["every scale is 0, and so is every weight: the layer was not quantized rightly, or never filled"] = (
            without
        )
    main = checkpoint.configs.get("config.json", {})
    if any(_is_head(x.name) for x in chosen.layers) and any(ties(main).values()):
        notes["the head is quantized, and the config ties it to the embedding: the result's config does not"] = []
    if "config.json" not in checkpoint.configs:
        notes["the source has no config.json, so the result has none: no engine can load it without"] = []
    for key, text in settings.conflicts.items():
        notes[f"the source's configs disagree on {key} ({text}); the tensors decided"] = []
    return notes


def _unquantized_beside(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Reasons:
    """Return what is said of layers that have a weight beside their quantized tensors."""
    found = [name for name in names if f"{name}.weight" in tensors]
    text = (
        "an unquantized weight lies beside the quantized layer, and is copied with the rest: Transformers leaves it "
        "unread, vLLM refuses a checkpoint that has one"
    )
    return {text: found} if found else {}


def _gathered(found: Iterable[tuple[list[str], str]]) -> Reasons:
    """Gather (reasons, layer) of each layer into each reason's layers, both in order of appearance."""
    gathered: Reasons = {}
    for reasons, name in found:
        for reason in reasons:
            gathered.setdefault(reason, []).append(name)
    return gathered


def _convertible(inspections: list[LayerInspection], extended: bool) -> tuple[list[Layer], Reasons]:
    """Return the layers that the format can hold, but for their scales, and why it cannot hold the others."""
    against = {x.name: x.refusals + (x.extended_refusals if extended else x.why_extended) for x in inspections}
    layers = [replace(x.layer, extended=extended) for x in inspections if x.layer is not None and not against[x.name]]
    return layers, _gathered((reasons, name) for name, reasons in against.items())


def _fitted_scales(checkpoint: Checkpoint, layers: list[Layer], extended: bool) -> dict[str, LayerFit]:
    """Return what becomes of each layer's scales."""

    def fitted(layer: Layer) -> LayerFit:
        kept: Kept = {}

        def rows() -> Iterator[npt.NDArray[Any]]:
            for first, count in group_strips(layer.G, layer.N):
                yield layer.source.raw_scales(checkpoint, first, count, kept)

        return fit_layer(rows, layer.source.scales.dtype, extended=extended)

    return {layer.name: fitted(layer) for layer in layers}


def _one_group_size(inspections: Iterable[LayerInspection]) -> int:
    """Return the original format's one group_size for all layers: 128, or -1 when no layer has more than one group.
    Layers of the rarer kind, where there are both, get a reason against the original format."""
    fine = [j for j in inspections if j.layer is not None and not j.refusals and not j.why_extended]
    grouped = [j for j in fine if j.layer is not None and j.layer.G > 1]
    single = [j for j in fine if j.layer is not None and j.layer.G == 1 and j.layer.K != GROUP_SIZE]
    if grouped and single:
        few, many = sorted((grouped, single), key=len)
        kind = {id(grouped): "groups of 128", id(single): "one group per column"}
        for j in few:
            j.why_extended.append(
                f"{kind[id(few)]}, while {len(many)} other layers have {kind[id(many)]}; "
                "the original format has one group_size for all"
            )
    return GROUP_SIZE if grouped or not single else -1


def is_marlin_checkpoint(tensors: dict[str, Tensor]) -> bool:
    """Tell whether it is one, whatever the config says: where there is a layer of a source format, there is something
    to convert."""
    if format_of(tensors)[1]:
        return False
    weights = (EXTENDED_NAMES["weight"], ORIGINAL_NAMES["weight"])
    return any(name.rpartition(".")[2] in weights and is_marlin_part(tensors, name) for name in tensors)


def _require_one_kind(tensors: dict[str, Tensor], source: SourceFormat, names: list[str]) -> None:
    """Raise SourceError for names that are the result's own, or those of a layer in another format."""
    layers = set(names)
    others = {part: other.title for other in FORMATS for part in other.telling if part not in source.parts}
    others |= dict.fromkeys(MARLIN_PARTS, "Marlin")
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if layer in layers and part in others:
            raise SourceError(
                f"{layer}: it has a {source.parts[0]} and, as {others[part]} layers do, {part}; remove the one or the "
                "other."
            )
        if is_marlin_part(tensors, name):
            raise SourceError(
                f"{name}: a tensor of a Marlin layer, in a checkpoint whose others are {source.title}'s; remove it, or "
                "export the checkpoint again."
            )


def _what_else(source: SourceFormat, settings: GPTQSettings, checkpoint: Checkpoint) -> str:
    tensors, configs = checkpoint.tensors, find_configs(checkpoint.configs)
    for name, tensor in tensors.items():
        if method := method_of(name, tensor.dtype):
            return f"{OTHER_METHODS[method]} ({name} is {tensor.dtype}), which {RUN_BY[method]} runs as it is"
    if any(source.claimed_by(config) for config in configs.values()):
        return f"its config says {source.title}, and none of its tensors is a {source.parts[0]}"
    if settings.is_marlin:
        return "its config says Marlin, and it has neither Marlin's tensors (B, marlin_qweight) nor GPTQ's (qweight)"
    return "an unquantized checkpoint: none of its tensors is a qweight or a weight_packed"


def plan_as_dict(plan: Plan, source: str) -> dict[str, Any]:
    """Return the plan for scripts (`--dry-run --json`): every layer, what happens to it, sizes in bytes."""
    facts = plan.layer_facts
    return {
        "source": source,
        "source_format": plan.source_format.name,
        "already_marlin": plan.already_marlin,
        "convertible": not plan.refusals and not plan.already_marlin,
        "format": plan.format.value,
        "group_size": None if plan.extended else plan.group_size,
        "why_extended": [{"reason": reason, "layers": names} for reason, names in plan.why_extended.items()]
        if plan.extended else [],
        "vllm_needs_our_kernels": [
            {"what": what, "layers": names} for what, names in vllm_needs_our_kernels(facts).items()
        ],
        "layers": [
            {"name": x.name, "K": x.K, "N": x.N, "bits": x.bits, "group_size": x.group_size, "sym": x.sym,
             "desc_act": x.act_order, "stored_K": x.stored_K, "stored_N": x.stored_N,
             "stored_group_size": x.stored_group_size, "scales": x.source.scales.dtype, "bias": x.bias is not None,
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
