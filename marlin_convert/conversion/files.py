"""The files beside the model's own weights: tokenizer, chat template, licence, code, and weights of something else (an
adapter, a draft model's layers, a module of a pipeline). All of them travel as they are, in both directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from ..checkpoint.reader import CONFIG_FILES, Checkpoint
from ..checkpoint.writer import INDEX_FILE, SINGLE_FILE
from ..errors import OutputError, SourceError
from ..options import CARD_FILE, REPORT_FILE, VERIFY_FILE

#: What every result has of its own, and a source's are not copied: the card is a part of the result's (see `card`).
ADDED_FILES = (REPORT_FILE, VERIFY_FILE, CARD_FILE)
_CHUNK = 1 << 20


def copied_files(checkpoint: Checkpoint) -> dict[str, int]:
    """Return what is copied as it is: name → bytes."""
    return {name: checkpoint.nbytes(name) for name in checkpoint.extra_files if name not in ADDED_FILES}


def needs_index(checkpoint: Checkpoint) -> bool:
    """Tell whether the result needs an index that tells its own weights from others beside them, as its source has one:
    engines that find none read every safetensors file that lies there."""
    return checkpoint.indexed and any(n.endswith(".safetensors") and "/" not in n for n in checkpoint.weights_beside)


def require_free_names(checkpoint: Checkpoint, weights: Collection[str]) -> None:
    """Raise SourceError where a copied file, or its folder, has a name that the result needs: for its `weights`, for
    its configs and reports; or one that every reader takes for the weights."""
    replaced = {*weights, SINGLE_FILE, INDEX_FILE, *CONFIG_FILES, *ADDED_FILES}
    for name in copied_files(checkpoint):
        if name.split("/")[0] in replaced:
            raise SourceError(
                f"{checkpoint.called(name)}: it is not one of the model's own files, and would take the place of one "
                "in the result; give it another name, or remove it."
            )


def copy_files(checkpoint: Checkpoint, folder: Path, on_bytes: Callable[[int], None] = lambda nbytes: None) -> None:
    """Copy them into the new `folder`; `on_bytes` is told of bytes. Raises SourceError when one of them cannot be read,
    or is not what it was."""
    for name in copied_files(checkpoint):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = target.open("xb")
        except FileExistsError:
            raise OutputError(
                f"{target}: this disk does not tell it from another file of the result; rename or remove it in the "
                "source, or choose another disk."
            ) from None
        with file, checkpoint.open_extra(name) as fd:
            while block := _read(fd, checkpoint.called(name)):
                file.write(block)
                on_bytes(len(block))


def _read(fd: int, label: str) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        raise SourceError(f"{label}: reading failed: {error.strerror}.") from None


def keep_apart(source: Path, out: Path) -> None:
    """Raise OutputError where the output is the source, or inside it, or around it: the source is never touched."""
    a, b = (Path(os.path.realpath(path)) for path in (source, out))  # unlike resolve, no error for a loop of links
    if a == b or a in b.parents or b in a.parents:
        raise OutputError(f"{out}: it overlaps the source {source}; choose a folder outside it.")
