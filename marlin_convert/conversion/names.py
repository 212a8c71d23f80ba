"""Many layers' names in a few words."""

from __future__ import annotations

import re

#: A number within a name that counts something; "07" does not.
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]*)(?![0-9])")


def span(names: list[str]) -> str:
    """Return all of `names` in a few words: `64 layers, layers.{0-31}.mlp.up_proj, layers.{0-31}.mlp.down_proj`."""
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
    """Write `rows` of equally many numbers, cut into grids: {(0, 4), (0, 5), (1, 4), (1, 5), (2, 4)} → {0-1}{4-5},
    2 4."""
    if () in rows:
        return [()]
    heads_of: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head in sorted({row[0] for row in rows}):
        heads_of.setdefault(frozenset(row[1:] for row in rows if row[0] == head), []).append(head)
    return [(_ranges(heads), *rest) for tails, heads in heads_of.items() for rest in _grids(set(tails))]


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers: [3] → 3, [0, 1, 2, 5] → {0-2,5}."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs) + "}"
