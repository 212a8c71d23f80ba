"""Repack GPTQ, AWQ and compressed-tensors checkpoints into the Marlin format: exactly, on a CPU, with bounded memory.

    convert   a checkpoint into a Marlin one            plan      what that would do
    verify    one against the other                     prove     a result, by the source that it names
    restore   the source again                          push      a result to the Hugging Face Hub
    load      a Marlin model, ready to run

`MarlinLinear` is one layer as a torch module. Errors derive from `MarlinConvertError`. What is not named in `__all__`
is not public. Everything is imported when it is first asked for: running a model needs torch, converting does not.
"""

from ._version import __version__

TYPE_CHECKING = False  # type checkers know the name; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from ._api import convert as convert
    from ._api import plan as plan
    from ._api import prove as prove
    from ._api import push as push
    from ._api import restore as restore
    from ._api import verify as verify
    from .conversion.plan import Plan as Plan
    from .conversion.proof import Proof as Proof
    from .conversion.report import Report as Report
    from .conversion.restore import Restored as Restored
    from .conversion.verify import Verification as Verification
    from .engines.linear import MarlinLinear as MarlinLinear
    from .engines.transformers_quantizer import load as load
    from .errors import AlreadyMarlin as AlreadyMarlin
    from .errors import DeviceError as DeviceError
    from .errors import HubError as HubError
    from .errors import MarlinConvertError as MarlinConvertError
    from .errors import MissingPackageError as MissingPackageError
    from .errors import OptionError as OptionError
    from .errors import OutputError as OutputError
    from .errors import SourceError as SourceError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import VerificationError as VerificationError
    from .options import Format as Format
    from .options import PublishTarget as PublishTarget
    from .options import QuantMethod as QuantMethod
    from .options import ZeroPointReading as ZeroPointReading
    from .progress import ProgressEvent as ProgressEvent

__all__ = [
    "AlreadyMarlin",
    "DeviceError",
    "Format",
    "HubError",
    "MarlinConvertError",
    "MarlinLinear",
    "MissingPackageError",
    "OptionError",
    "OutputError",
    "Plan",
    "ProgressEvent",
    "Proof",
    "PublishTarget",
    "QuantMethod",
    "Report",
    "Restored",
    "SourceError",
    "UnsupportedError",
    "Verification",
    "VerificationError",
    "ZeroPointReading",
    "__version__",
    "convert",
    "load",
    "plan",
    "prove",
    "push",
    "restore",
    "verify",
]

#: Where each name comes from.
_HOMES = {
    "_api": ("convert", "plan", "prove", "push", "restore", "verify"),
    "conversion.plan": ("Plan",),
    "conversion.proof": ("Proof",),
    "conversion.report": ("Report",),
    "conversion.restore": ("Restored",),
    "conversion.verify": ("Verification",),
    "engines.linear": ("MarlinLinear",),
    "engines.transformers_quantizer": ("load",),
    "errors": (
        "AlreadyMarlin", "DeviceError", "HubError", "MarlinConvertError", "MissingPackageError", "OptionError",
        "OutputError", "SourceError", "UnsupportedError", "VerificationError",
    ),
    "options": ("Format", "PublishTarget", "QuantMethod", "ZeroPointReading"),
    "progress": ("ProgressEvent",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if _HOME_OF[name].startswith("engines."):
        from .errors import require

        require("torch", "transformers")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
