"""The two sides of a proof: checkpoints of which files are read as they are needed, and what a result says of its
source."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ..checkpoint.bounded import read_file, read_json
from ..checkpoint.reader import Checkpoint
from ..errors import OptionError, SourceError
from ..hub.open import Source, opened_for_planning
from ..options import REPORT_FILE, HubAccess, Options, PublishTarget
from ..progress import Progress
from ..text import shortened
from .digests import digest, is_large, known_digests


class Side:
    """A checkpoint of which files are read as they are needed."""

    def __init__(self, origin: Source, checkpoint: Checkpoint) -> None:
        self.origin, self.checkpoint = origin, checkpoint
        self._known = known_digests(origin)
        if origin.hub is not None:
            origin.hub.fetch(origin.hub.remote.small_files, Progress().transfer)

    @property
    def bytes_read(self) -> int:
        return 0 if self.origin.hub is None else self.origin.hub.bytes_read

    @property
    def names(self) -> set[str]:
        return set(self.checkpoint.names)

    def content(self, name: str) -> bytes:
        """Return all of a small file."""
        return read_file(self.checkpoint.path(name))

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file; None for weights on the Hub that it does not keep by theirs."""
        if name in self._known:
            return self._known[name]
        if self.origin.hub is not None and is_large(name):
            return None
        self._known[name] = digest(self.checkpoint.path(name))
        return self._known[name]

    def header(self, name: str) -> bytes | None:
        """Return the bytes before the first tensor of a weight file; None if it is none of the model's."""
        return self.checkpoint.raw_header(name) if name in self.checkpoint.weight_files else None


@contextlib.contextmanager
def opened(name: str, access: HubAccess, progress: Progress) -> Iterator[Side]:
    with opened_for_planning(name, access, progress.transfer) as (origin, checkpoint):
        yield Side(origin, checkpoint)
        checkpoint.require_unchanged()


def noted_of(result: Side) -> dict[str, Any]:
    """Return the result's report, as far as it says what is needed."""
    label = result.origin.label
    if REPORT_FILE not in result.names:
        raise SourceError(
            f"{label}: it has no {REPORT_FILE}, which says what it was made from; give the source too: "
            "marlin-convert verify SOURCE OUT."
        )
    noted = read_json(result.checkpoint.path(REPORT_FILE), label=result.checkpoint.called(REPORT_FILE))
    source, commit = noted.get("source"), noted.get("source_commit")
    if isinstance(source, str) and commit is None:
        raise SourceError(
            f"{label}: it was made from a folder, {shortened(source)}; whoever has that can check it: "
            "marlin-convert verify SOURCE OUT."
        )
    fits = (
        isinstance(source, str)
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source, re.ASCII)
        and isinstance(commit, str)
        and re.fullmatch(r"[0-9a-f]{40}", commit)
    )
    if not fits:
        raise SourceError(
            f"{label}: its {REPORT_FILE} names {shortened(source)} at {shortened(commit)} as its source, which is not "
            "a repository and a commit."
        )
    if not isinstance(noted.get("options"), dict):
        raise SourceError(
            f"{label}: its {REPORT_FILE} does not say with which options it was made; it is of an earlier version. "
            f"Compare it with its source: marlin-convert verify {source} OUT --revision {commit}."
        )
    return noted


def noted_options(noted: dict[str, Any], label: str) -> Options:
    options = noted["options"]
    try:
        published = options["published_as"]
        if not isinstance(options["verify"], bool) or not (published is None or isinstance(published, str)):
            raise OptionError("of another type")
        return Options(
            format=options["format"], zero_points=options["zero_points"], max_shard_size=options["max_shard_size"],
            quant_method=options["quant_method"], verify=options["verify"],
            target=None if published is None else PublishTarget(published),
        )  # fmt: skip
    except (KeyError, OptionError) as error:
        raise SourceError(f"{label}: the options in its {REPORT_FILE} are not valid ({error}).") from None
