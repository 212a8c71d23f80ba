"""Every error a user can meet, and the exit code each one ends the program with.

    MarlinConvertError            1   anything below, unless it says otherwise
    ├── SourceError               3   the source is missing, damaged or not readable as a checkpoint
    ├── UnsupportedError          4   the source is sound, but it cannot be converted: the message says why
    ├── DeviceError               5   the requested device is missing or too old
    ├── OutputError               6   the output cannot be written: it exists, the disk is full, no permission
    ├── VerificationError         7   the written checkpoint is not equal to its source
    └── HubError                  8   the Hub did not give what was asked for

Beside them: 0 success, 2 wrong arguments (click's own), 70 a bug in marlin-convert, 130 interrupted.
A message is one sentence that says what is wrong, where, and what to do about it.
"""

import importlib.util

import click


class MarlinConvertError(click.ClickException):
    """Root of the hierarchy. `message` is meant for the user; `exit_code` is the process's status."""

    exit_code = 1


class SourceError(MarlinConvertError):
    """The source is missing, damaged, or not a checkpoint."""

    exit_code = 3


class UnsupportedError(MarlinConvertError):
    """The source was understood, and cannot be converted."""

    exit_code = 4


class DeviceError(MarlinConvertError):
    """The requested device does not exist, or its compute capability is too low."""

    exit_code = 5


class OutputError(MarlinConvertError):
    """The output cannot be written where it was asked for."""

    exit_code = 6


class VerificationError(MarlinConvertError):
    """The written checkpoint differs from its source."""

    exit_code = 7


class HubError(MarlinConvertError):
    """The Hub refused, or could not be reached."""

    exit_code = 8


class MissingPackageError(MarlinConvertError, ImportError):
    """torch or Transformers is not installed, which running and measuring models needs, and converting does not."""


def require(*packages: str) -> None:
    """Raise MissingPackageError, which says how to get them, unless all of `packages` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(f'this needs {" and ".join(missing)}: pip install "marlin-convert[run]".')


EXIT_CODES: dict[int, str] = {
    0: "success (also: the source already is a Marlin checkpoint, nothing to do)",
    1: "an error that has no code of its own",
    2: "wrong arguments",
    3: "the source is missing, damaged or not a checkpoint",
    4: "the source cannot be converted; the message says why",
    5: "the device is missing, or its compute capability is below 8.0",
    6: "the output cannot be written",
    7: "verification failed: the result differs from its source",
    8: "the Hub did not give what was asked for",
    70: "a bug in marlin-convert; please report it",
    130: "interrupted",
}
