"""What a visitor may name as a source: a repository on the Hub, and never a folder of the computer that serves."""

from __future__ import annotations

import re

from ..errors import SourceError
from ..hub.address import repository
from ..text import shortened

#: Characters of what is pasted: names and branches are shorter, addresses too.
_LONGEST = 500


def hub_source(text: str, revision: str | None) -> tuple[str, str | None]:
    """Return a Hub id and a revision from what was pasted; raises SourceError for anything else."""
    if len(text) > _LONGEST:
        raise SourceError(f"{shortened(text)} is too long for a repository's name; write it like owner/name.")
    name, revision = repository(text.strip(), revision)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise SourceError(f"{shortened(name)} is not a repository on the Hub; write it like owner/name.")
    if revision and (len(revision) > _LONGEST or not revision.isprintable()):
        raise SourceError(f"{shortened(revision)} is not a revision; give a branch, a tag or a commit.")
    return name, revision
