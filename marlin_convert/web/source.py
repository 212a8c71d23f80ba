"""What a visitor may name as a source: a repository on the Hub, and never a folder of the computer that serves."""

from __future__ import annotations

import re

from ..errors import SourceError
from ..hub.address import repository
from ..text import shortened


def hub_source(text: str, revision: str | None) -> tuple[str, str | None]:
    """Return a Hub id and a revision from what was pasted; raises SourceError for anything else."""
    name, revision = repository(text.strip(), revision)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise SourceError(f"{shortened(name)}is not a repository on the Hub; write it like owner/name.")
    return name, revision
