"""What the commands share to show what came of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import MarlinConvertError
from .params import OutputOptions

if TYPE_CHECKING:
    from .output import Screen


@contextlib.contextmanager
def named_in_json(output: OutputOptions) -> Iterator[None]:
    """Drop the message of an error with --json: the one document that was printed has named the problems, and the exit
    code is all that is left."""
    try:
        yield
    except MarlinConvertError as error:
        if output.as_json:
            raise type(error)("") from None
        raise


def screen_for(output: OutputOptions) -> Screen:
    """Return where a command prints."""
    from .output import Screen

    return Screen(output)
