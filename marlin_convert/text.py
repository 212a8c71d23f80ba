"""Text from outside (names, settings, answers of a server), made fit to be shown."""

from __future__ import annotations

import re

#: What a terminal obeys instead of showing it, or what turns the rest of a line around: control characters but for
#: line ends and tabs, marks of direction, line and paragraph separators; and halves of UTF-16 pairs, which no
#: encoding has.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

#: Characters of a value that is shown in a message.
_SHORT = 80


def visible(text: str) -> str:
    """Return `text` with escapes, as Python writes them, in place of characters that a terminal would obey."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(value: object) -> str:
    """Return a value as Python writes it, on one line and not too long."""
    try:
        text = visible(repr(value))
    except (ValueError, RecursionError):  # an integer of too many digits, or endless nesting
        text = f"a {type(value).__name__} that is too long to be shown"
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 20]}…"


def size(count: float) -> str:
    """Return bytes for people, in decimal units as disks and the Hub count them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
