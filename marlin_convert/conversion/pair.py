"""Verifying a Marlin checkpoint that is there against its source."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from ..checkpoint.bounded import read_json
from ..checkpoint.files import Folder
from ..checkpoint.output_folder import json_bytes, replace_files
from ..checkpoint.reader import Checkpoint
from ..errors import OptionError, OutputError, SourceError, UnsupportedError
from ..formats.gptq_config import find_configs
from ..formats.marlin_config import is_marlin
from ..hub.client import require_folder
from ..hub.open import opened_whole
from ..native.choose import usable_device
from ..options import CARD_FILE, REPORT_FILE, VERIFY_FILE, Format, HubAccess, ZeroPointReading
from ..progress import Progress
from .card import with_verdict
from .digests import report_with
from .plan import make_plan
from .verify import Verification, verify


def verify_pair(
    source: str | Path,
    out: str | Path,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
    zero_points: ZeroPointReading | str | None = None,
) -> Verification:
    """Check an existing Marlin checkpoint `out` against its `source`, and write `verify.json` into `out`.

    `device` is where to compute; `zero_points` is how the source's are read, by default as the result's report says.
    """
    out, progress = Path(out), progress or Progress()
    require_folder(out)
    chosen, _ = usable_device(device, computes=True)
    with (
        opened_whole(str(source), access or HubAccess(), progress.transfer) as (_, checkpoint),
        _result(out) as result,
    ):
        found = list(find_configs(result.configs).values())
        extended = bool(found) and found[0].get("checkpoint_format") == Format.MARLIN_EXT
        plan = make_plan(checkpoint, Format.MARLIN_EXT if extended else Format.MARLIN, zero_points or _noted(out))
        if plan.already_marlin:
            if found and is_marlin(found[0]):
                what = f"; give the checkpoint that {out} was made from."
            else:
                command = shlex.join(["marlin-convert", "verify", str(out), str(source)])
                what = f", and {out} is none: the source comes first. Run `{command}`."
            raise UnsupportedError(f"{source} is a Marlin checkpoint{what}")
        plan.require_convertible()
        report = verify(checkpoint, plan, result, chosen, progress)
        checkpoint.require_unchanged()
        result.require_unchanged()
    try:
        card = with_verdict(out, report)
        changed = {VERIFY_FILE: json_bytes(report.as_dict())} | ({CARD_FILE: card} if card else {})
        replace_files(out, changed | report_with(changed, out))
    except OSError as error:
        verdict = "equal to its source" if report.ok else "not equal to its source"
        raise OutputError(
            f"{out}: {verdict}, but {VERIFY_FILE} and {CARD_FILE} cannot be written there: {error.strerror}; what was "
            "there is as it was."
        ) from None
    return report


def _result(out: Path) -> Checkpoint:
    """Open the result; what another `verify` of it may replace meanwhile is not read from it."""
    files = Folder(out)
    for name in (CARD_FILE, REPORT_FILE, VERIFY_FILE):
        files.forget(name)
    return Checkpoint(files)


def _noted(out: Path) -> ZeroPointReading | None:
    """Return how zero points were read for `out`; None if its report does not say."""
    with contextlib.suppress(SourceError, OptionError):
        options = read_json(out / REPORT_FILE).get("options")
        reading = options.get("zero_points") if isinstance(options, dict) else None
        return ZeroPointReading.chosen(reading, "zero_points") if isinstance(reading, str) else None
    return None
