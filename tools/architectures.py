"""Try every architecture of Transformers, and write docs/reference/architectures.md.

    python tools/architectures.py [MODEL_TYPE ...]

With model types, only these are tried, and nothing is written. Takes some minutes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import architectures, architectures_page  # noqa: E402


def main(chosen: list[str]) -> None:
    import transformers

    with architectures.quietly():
        found = [_tried(model_type) for model_type in chosen or architectures.model_types()]
    if not chosen:
        text = architectures_page.page(found, transformers.__version__)
        (ROOT / "docs" / "reference" / "architectures.md").write_text(text, encoding="utf-8")
    print(architectures_page.combined(found))


def _tried(model_type: str) -> architectures.Outcome:
    started = time.monotonic()
    outcome = architectures.tried(model_type)
    error = "" if outcome.error is None else f" {outcome.error:.1e}"
    print(
        f"{model_type}: {outcome.state} {outcome.compared}{error} ({outcome.layers} layers, "
        f"{time.monotonic() - started:.1f} s) {outcome.why}",
        flush=True,
    )
    return outcome


if __name__ == "__main__":
    main(sys.argv[1:])
