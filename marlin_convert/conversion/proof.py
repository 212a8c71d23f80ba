"""Proving a result by itself: its report names the source and the commit; what the conversion makes of them is made
again, in one's own memory, and compared with what the result has, file by file and element by element.

Both sides may lie on the Hub: their weights are then read by Range requests, a few layers at a time, and nothing of
them stays.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.bounded import json_text, parse_json
from ..checkpoint.output_folder import json_bytes
from ..checkpoint.reader import CONFIG_FILES, Checkpoint, Tensor
from ..checkpoint.writer import INDEX_FILE, Shards
from ..device import Device
from ..errors import UnsupportedError, VerificationError
from ..hub.open import NOT_REACHED, Source
from ..native.choose import usable_device
from ..options import CARD_FILE, REPORT_FILE, VERIFY_FILE, HubAccess, Options
from ..progress import Progress
from ..text import shortened
from .attest import check_place, statement, write_to
from .blocks import run_all
from .card import card_bytes, model_card
from .configs import write_configs
from .differences import difference, where_different
from .files import copied_files, needs_index
from .layer import Layer
from .plan import Plan, make_plan
from .products import product_device
from .proof_sides import Side, noted_of, noted_options, opened
from .report import Report, card_facts, source_quantization
from .verify import TOLERANCE, LayerCheck, Verification, Verifier

#: Bytes of a copied tensor that are brought from the Hub at a time.
_WINDOW = 64 << 20


@dataclass
class Proof:
    """The result of a proof. `files` says what is wrong with each file beside the weights' tensors, None if nothing."""

    result: Source
    source: Source
    made_by: str  # version of marlin-convert
    verification: Verification
    files: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    noted: dict[str, Any] = field(default_factory=dict)  # the result's report, with every SHA-256 that is known now
    bytes_read: int = 0  # of weights, by Range requests

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong, by file or layer."""
        return {
            **{layer.name: layer.problem or "differs" for layer in self.verification.layers if not layer.ok},
            **{f"the tensors ({n})": text for n, text in enumerate(self.verification.problems, 1)},
            **{name: text for name, text in self.files.items() if text},
        }

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "result": self.result.label,
            "result_commit": self.result.commit,
            "source": self.source.label,
            "source_commit": self.source.commit,
            "made_by": self.made_by,
            "files": [{"name": name, "problem": problem} for name, problem in self.files.items()],
            "notes": self.notes,
            "bytes_read": self.bytes_read,
            "verification": self.verification.as_dict(),
        }

    def require_ok(self) -> None:
        """Raise VerificationError that names what differs."""
        if self.ok:
            return
        lines = [f"  - {where}: {text}" for where, text in self.problems.items()]
        more = [f"  - and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise VerificationError(
            f"{self.result.label} is not exactly what {self.source.label} gives:\n" + "\n".join(lines[:20] + more)
        )


def prove(
    result: str | Path,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    attest: Path | None = None,
    access: HubAccess | None = None,
) -> Proof:
    """Compare a result of marlin-convert, a folder or a Hub id, with what its own source gives when it is converted
    again; neither is changed. With `attest`, a proof that holds is written there as an in-toto statement.

    Raises SourceError where the result does not say what it was made from, or says it of a folder; HubError where the
    Hub does not give one of the two.
    """
    progress, access = progress or Progress(), access or HubAccess()
    if attest:
        check_place(attest, result)
    chosen, _ = usable_device(device, computes=True)
    with opened(str(result), access, progress) as found:
        noted = noted_of(found)
        source_access = replace(access, revision=noted["source_commit"])
        with opened(noted["source"], source_access, progress) as source:
            proof = _prove(found, source, noted, chosen, progress)
    if attest and proof.ok:
        write_to(attest, statement(proof.noted, str(found.digest(REPORT_FILE))))
    return proof


# ---------------------------------------------------------------------------------------------------------------
# The proof


def _prove(result: Side, source: Side, noted: dict[str, Any], device: Device, progress: Progress) -> Proof:
    label = result.origin.label
    options = noted_options(noted, label)
    plan = make_plan(source.checkpoint, options.format, options.zero_points)
    if plan.already_marlin:
        raise UnsupportedError(f"{source.origin.label}: it is a Marlin checkpoint; {label} was not made from it.")
    plan.require_convertible()
    verification = _compared(result, source, plan, device, progress)
    proof = Proof(result.origin, source.origin, str(noted.get("marlin_convert")), verification)
    proof.bytes_read = result.bytes_read + source.bytes_read
    with tempfile.TemporaryDirectory(prefix="marlin-convert-") as name:
        _Files(proof, result, source, plan, options, noted).compare(Path(name))
    return proof


def _compared(result: Side, source: Side, plan: Plan, device: Device, progress: Progress) -> Verification:
    """Compare every tensor while it is at hand."""
    verifier = Verifier(source.checkpoint, plan, result.checkpoint, device, progress)

    def check(item: Layer | Tensor) -> None:
        if isinstance(item, Tensor):
            check_copy(item)
            return
        ours = [result.checkpoint.tensors[t.name] for t in item.out if t.name in result.checkpoint.tensors]
        with _brought(source.checkpoint, item.source.tensors), _brought(result.checkpoint, ours):
            verifier.check(item)

    def check_copy(tensor: Tensor) -> None:
        ours = result.checkpoint.tensors.get(tensor.name)
        if ours is None or ours.nbytes != tensor.nbytes:
            verifier.check(tensor)
            return
        for start in range(0, max(1, tensor.nbytes), _WINDOW):
            length = min(_WINDOW, tensor.nbytes - start)
            parts = [replace(one, offset=one.offset + start, nbytes=length) for one in (tensor, ours)]
            with _brought(source.checkpoint, parts[:1]), _brought(result.checkpoint, parts[1:]):
                verifier.check_copy(tensor, start, start + length)

    progress.stage("verifying", plan.bytes_out, len(plan.layers))
    items: list[Layer | Tensor] = [*plan.layers, *plan.copies]
    run_all(lambda item=item: check(item) for item in items)  # type: ignore[misc]
    progress.end()
    return verifier.report(result.checkpoint)


@contextlib.contextmanager
def _brought(checkpoint: Checkpoint, tensors: list[Tensor]) -> Iterator[None]:
    """Fetch tensors from wherever they are, and release them at the end."""
    checkpoint.read_ahead(tensors)
    try:
        yield
    finally:
        checkpoint.release(tensors)


class _Files:
    """Compares the files beside the tensors with those that the conversion writes."""

    def __init__(
        self, proof: Proof, result: Side, source: Side, plan: Plan, options: Options, noted: dict[str, Any]
    ) -> None:
        self.proof, self.result, self.source, self.plan, self.options = proof, result, source, plan, options
        self.noted, self.same_version = noted, noted.get("marlin_convert") == __version__

    def compare(self, scratch: Path) -> None:
        checkpoint, plan, options = self.source.checkpoint, self.plan, self.options
        with Shards(scratch, plan.out_tensors, options.max_shard_size, index=needs_index(checkpoint)) as shards:
            weights = shards.files  # of their full size, and empty but for their headers
        write_configs(plan, scratch, options.quant_method)
        expected = {path.name for path in scratch.iterdir()} | {*copied_files(checkpoint), CARD_FILE, REPORT_FILE}
        verified = VERIFY_FILE in self.result.names
        if verified or self.noted.get("verified") is not None:
            expected.add(VERIFY_FILE)
        found = self.proof.files
        for name in sorted(expected | self.result.names):
            if name not in self.result.names:
                found[name] = "it is missing"
            elif name not in expected:
                found[name] = "it is not a file that the conversion writes"
            elif name in weights:
                found[name] = self._weights(scratch / name, name)
            elif name in (*CONFIG_FILES, INDEX_FILE) and (scratch / name).exists():
                found[name] = difference((scratch / name).read_bytes(), self.result.content(name))
            elif name not in (CARD_FILE, REPORT_FILE, VERIFY_FILE):
                found[name] = self._copied(name)
        verification = self._verification(found) if verified else None
        report = self._report(weights, verification)
        found[REPORT_FILE] = self._against_report(report)
        if CARD_FILE in self.result.names and self.same_version:
            card = card_bytes(model_card(checkpoint, plan, card_facts(report, options)))
            found[CARD_FILE] = difference(card, self.result.content(CARD_FILE))
        if not self.same_version:
            self.proof.notes.append(
                f"it was made by marlin-convert {shortened(self.noted.get('marlin_convert'))}, and this is "
                f"{__version__}: of its card, its report and the headers of its weights, only what all versions write "
                "alike was compared"
            )

    def _weights(self, ours: Path, name: str) -> str | None:
        if self.same_version and self.result.header(name) != _header(ours):
            return "its header is not the one that the conversion writes"
        return None

    def _copied(self, name: str) -> str | None:
        theirs, ours = self.source.digest(name), self.result.digest(name)
        if theirs is None or ours is None:
            self.proof.notes.append(f"{name}: the Hub does not say its SHA-256, and it was not compared")
            return None
        return None if theirs == ours else "it differs from the source's"

    def _verification(self, found: dict[str, str | None]) -> Verification:
        """Return what verify.json must say: all but how large errors were, which depends on where products were
        computed."""
        content = self.result.content(VERIFY_FILE)
        try:
            report: Any = parse_json(json_text(content))
            errors = {x["name"]: (x["max_error"], x["relative_error"]) for x in report["layers"]}
            layers = [
                LayerCheck(x.name, x.K, x.N, x.G, True, _error(errors[x.name][0]), _error(errors[x.name][1]))
                for x in self.plan.layers
            ]
            claimed = Verification(str(report["device"]), layers, len(self.plan.copies))
            large = [x.name for x in layers if (x.relative_error or 0.0) > TOLERANCE]
        except (ValueError, TypeError, LookupError, RecursionError):
            found[VERIFY_FILE] = "it says something else than that all layers are equal"
            return Verification(product_device(Device("cpu")))
        found[VERIFY_FILE] = difference(json_bytes(claimed.as_dict()), content)
        if large:
            found[VERIFY_FILE] = f"{large[0]}: its error is larger than {TOLERANCE:.0e}"
        return claimed

    def _report(self, weights: list[str], verification: Verification | None) -> Report:
        origin, plan = self.source.origin, self.plan
        report = Report(
            origin, Path(), Device("cpu"), plan, "", self.options, verification=verification, files=weights,
        )  # fmt: skip
        report.source_quantization = source_quantization(self.source.checkpoint, plan)
        report.source_files = {name: self.source.digest(name) for name in sorted(self.source.names)}
        report.result_files = {name: self.result.digest(name) for name in sorted(self.result.names - {REPORT_FILE})}
        return report

    def _against_report(self, report: Report) -> str | None:
        """Return what the report says otherwise than it would be written now."""
        expected = json.loads(json_bytes(report.as_file()))
        for key in ("source_files", "result_files"):
            known, noted = expected[key], self.noted.get(key)
            if isinstance(noted, dict) and noted.keys() == known.keys():  # where one of both does not know, the other
                known.update({name: noted[name] for name in known if noted[name] is None or known[name] is None})
        self.proof.noted = {**expected, "source_files": report.source_files, "result_files": report.result_files}
        if self.noted.get("verified") is None:  # verified later, or not at all
            expected["verified"] = None
        if not self.same_version:
            return None
        noted = dict(self.noted)
        if isinstance(noted.get("notes"), list):  # offline, nobody could be asked what there is
            noted["notes"] = [note for note in noted["notes"] if note != {"note": NOT_REACHED, "layers": []}]
        if wrong := where_different(expected, noted):
            return wrong
        return None if json_bytes(self.noted) == self.result.content(REPORT_FILE) else "it is written in another way"


def _header(path: Path) -> bytes:
    """Return the bytes before the first tensor of a weight file that was just written."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def _error(value: Any) -> float | None:
    """Return the size of an error, as verify.json has it."""
    if value is None or (type(value) is float and value >= 0):
        return value
    raise ValueError(value)
