"""Repack GPTQ checkpoints into the Marlin format: exactly, on a CPU, with bounded memory.

`MarlinLinear` and `load` run the result; they bring torch (and transformers) with them, so they are imported when they
are first asked for.
"""

from ._version import __version__

TYPE_CHECKING = False  # as type checkers know it; to import typing takes longer than anything else here
if TYPE_CHECKING:
    from .engines.linear import MarlinLinear as MarlinLinear
    from .engines.transformers_quantizer import load as load

__all__ = ["MarlinLinear", "__version__", "load"]

_LATE = {"MarlinLinear": "engines.linear", "load": "engines.transformers_quantizer"}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .errors import require

    require("torch", "transformers")
    return getattr(import_module(f".{_LATE[name]}", __name__), name)
