"""Every error a user can meet, and the exit code each one ends the program with.

    MarlinConvertError            1   anything below, unless it says otherwise
    ├── AlreadyMarlin             0   the source is a Marlin checkpoint: there is nothing to convert
    ├── OptionError               2   an argument is wrong
    ├── SourceError               3   the source is missing, damaged or not readable as a checkpoint
    ├── UnsupportedError          4   the source is sound, but it cannot be converted: the message says why
    ├── DeviceError               5   the requested device is missing or too old
    ├── OutputError               6   the output cannot be written: it exists, the disk is full, no permission
    ├── VerificationError         7   the written checkpoint is not equal to its source
    └── HubError                  8   the Hub did not give what was asked for

Beside them: 70 a bug in marlin-convert, 130 interrupted.
A message is one sentence that says what is wrong, where, and what to do about it.
"""

import importlib.util


class MarlinConvertError(Exception):
    """Root of the hierarchy. `message` is meant for the user; `exit_code` is what the program ends with, and `meaning`
    what `--help` says about that code."""

    exit_code = 1
    meaning = "an error that has no code of its own"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AlreadyMarlin(MarlinConvertError):
    """The source is a Marlin checkpoint: there is nothing to convert."""

    exit_code = 0
    meaning = "success (also: the source already is a Marlin checkpoint, nothing to do)"


class OptionError(MarlinConvertError, ValueError):
    """An argument has a value that it may not have."""

    exit_code = 2
    meaning = "wrong arguments"


class SourceError(MarlinConvertError):
    """The source is missing, damaged, or not a checkpoint."""

    exit_code = 3
    meaning = "the source is missing, damaged or not a checkpoint"


class UnsupportedError(MarlinConvertError):
    """The source was understood, and cannot be converted."""

    exit_code = 4
    meaning = "the source cannot be converted; the message says why"


class DeviceError(MarlinConvertError):
    """The requested device does not exist, or its compute capability is too low."""

    exit_code = 5
    meaning = "the device is missing, or its compute capability is below 8.0"


class OutputError(MarlinConvertError):
    """The output cannot be written where it was asked for."""

    exit_code = 6
    meaning = "the output cannot be written"


class VerificationError(MarlinConvertError):
    """The written checkpoint differs from its source."""

    exit_code = 7
    meaning = "verification failed: the result differs from its source"


class HubError(MarlinConvertError):
    """The Hub refused, or could not be reached."""

    exit_code = 8
    meaning = "the Hub did not give what was asked for"


class MissingPackageError(MarlinConvertError, ImportError):
    """A package is not installed that this needs, and converting does not: torch, Transformers, Gradio."""


#: How to install it, from what there is today: a checkout, or the file of a wheel that `make wheels` has built. It is
#: on no package index yet, and a name that nobody holds must not be given to pip.
INSTALL, INSTALL_WHEEL = "pip install .", "pip install ./marlin_convert-*.whl"
#: In a checkout, with what running models needs.
INSTALL_AND_RUN = 'pip install ".[run]"'
#: What brings the packages of the extras `run`, `plot`, `ray` and `web`, by their own names.
INSTALL_RUN = 'pip install "torch>=2.6" "transformers>=5.6"'
INSTALL_PLOT, INSTALL_RAY = "pip install matplotlib", 'pip install "ray>=2.40"'
INSTALL_WEB = 'pip install "gradio>=6.31" "matplotlib>=3.8"'


def require(*packages: str, install: str = INSTALL_RUN) -> None:
    """Raise MissingPackageError, which says how to `install` them, unless all of `packages` are there."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"this needs {' and '.join(missing)}: {install}.")


BUG = 70
#: A signal ended it: 128 and the signal's number.
HUNG_UP, INTERRUPTED, TERMINATED = 129, 130, 143

#: Those without an exit code of their own have that of the root.
_KINDS: list[type[MarlinConvertError]] = [MarlinConvertError, *MarlinConvertError.__subclasses__()]

EXIT_CODES: dict[int, str] = {
    **{kind.exit_code: kind.meaning for kind in sorted(_KINDS, key=lambda kind: kind.exit_code)},
    BUG: "a bug in marlin-convert; please report it",
    HUNG_UP: "its terminal went away (SIGHUP)",
    INTERRUPTED: "interrupted (SIGINT, which Ctrl-C sends)",
    TERMINATED: "asked to end (SIGTERM)",
}  # fmt: skip
