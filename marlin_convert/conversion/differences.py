"""Where texts and settings differ, in words."""

from __future__ import annotations

import contextlib
from typing import Any

from ..checkpoint.bounded import json_text, parse_json
from ..text import shortened


def difference(expected: bytes, found: bytes) -> str | None:
    """Return where a file first differs from what is expected: a setting, or a line; None if nowhere."""
    if expected == found:
        return None
    with contextlib.suppress(ValueError):
        if where := where_different(*(parse_json(json_text(content)) for content in (expected, found))):
            return where
    lines = [content.decode("utf-8", "replace").splitlines() for content in (expected, found)]
    for number in range(max(map(len, lines))):
        one, other = (text[number] if number < len(text) else None for text in lines)
        if one != other:
            return f"line {number + 1} is {shortened(other)}, not {shortened(one)}"
    return "its line ends differ"


def where_different(expected: Any, found: Any, path: str = "") -> str | None:
    """Return the first place where two JSON values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *found]:
            place = f"{path}.{key}" if path else str(key)
            if key not in found:
                return f"{place} is missing"
            if key not in expected:
                return f"{place} is {shortened(found[key])}, and should not be there"
            if wrong := where_different(expected[key], found[key], place):
                return wrong
        return None
    same = type(expected) is type(found) and expected == found
    return None if same else f"{path or 'it'} is {shortened(found)}, not {shortened(expected)}"
