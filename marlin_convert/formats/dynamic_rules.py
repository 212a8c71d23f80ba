"""Regular expressions from a checkpoint, matched with a bound on time and memory.

A `dynamic` rule is a regular expression as Python's `re` reads it, look-around and references back included, and comes
from whoever made the checkpoint. To compile or to match one may take for ever, and `re` cannot be stopped: so it works
in a process of its own, which the system ends when it has used its share of the processor.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence

#: Processor seconds of the other process: for all of it, and for each rule and name; at most.
_SECONDS, _SECONDS_EACH, _MOST_SECONDS = 0.25, 2e-6, 10.0
_BYTES = 1 << 30  # of memory that it may ask for

#: What it runs: a line with the number of every rule that it begins, then one of JSON.
_PROGRAM = r"""
import json, os, re, resource, signal, sys
job = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (job["bytes"],) * 2)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, job["seconds"])
names, found = job["names"], {}
number = {name: i for i, name in enumerate(names)}
left = list(range(len(names)))
for rule, pattern in enumerate(job["patterns"]):
    exact = re.fullmatch(r"\^?((?:[\w-]|\\\.)+)\$", pattern, re.ASCII)
    if exact:  # a checkpoint may have thousands of these, each for one layer
        hit = number.get(exact[1].replace("\\.", "."))
        if hit is not None:
            found.setdefault(hit, rule)
        continue
    os.write(1, b"%d\n" % rule)
    try:
        match = re.compile(pattern).match
        hits = {i for i in left if i not in found and match(names[i])}
    except (re.error, ArithmeticError, RecursionError, MemoryError, ValueError) as error:
        text = str(error) if isinstance(error, re.error) else "it is too large"
        print(json.dumps({"wrong": text}))
        sys.exit()
    found.update(dict.fromkeys(hits, rule))
    left = [i for i in left if i not in hits]
print(json.dumps({"found": [found.get(i) for i in range(len(names))]}))
"""


class RuleError(Exception):
    """A rule cannot be used: its number, and why."""

    def __init__(self, rule: int, why: str) -> None:
        super().__init__(rule, why)
        self.rule, self.why = rule, why


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return, for each name, the number of the first pattern that matches at its beginning (`re.match`).

    Raises RuleError for the first pattern that is no regular expression, or takes too long.
    """
    if not patterns or not names:
        return [None] * len(names)
    seconds = min(_MOST_SECONDS, _SECONDS + _SECONDS_EACH * len(patterns) * len(names))
    job = {"patterns": list(patterns), "names": list(names), "seconds": seconds, "bytes": _BYTES}
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _PROGRAM]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    *begun, last = done.stdout.splitlines() or [""]
    if done.returncode:
        why = "it takes too long to match" if done.returncode == -signal.SIGPROF else "it cannot be matched"
        raise RuleError(int(last or 0), why)
    answer = json.loads(last)
    if "wrong" in answer:
        raise RuleError(int(begun[-1]), f"it is not a regular expression: {answer['wrong']}")
    found: list[int | None] = answer["found"]
    return found
