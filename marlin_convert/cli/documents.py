"""What every JSON document that a command prints begins with. docs/reference/json.schema.json describes them all."""

from __future__ import annotations

from typing import Any

#: Increased when a key is removed or changes its meaning; not when one is added.
SCHEMA_VERSION = 1


def document(value: dict[str, Any], source: str | None) -> dict[str, Any]:
    """Return `value` behind `schema_version`, `ok` and `source`: what was read, unless `value` names it better."""
    first = {"schema_version": SCHEMA_VERSION, "ok": value["ok"], "source": value.get("source", source)}
    return first | {key: each for key, each in value.items() if key not in first}
