"""Repack GPTQ checkpoints into the Marlin format: exactly, on a CPU, with bounded memory.

`MarlinLinear` and `load` run the result; they bring torch (and transformers) with them, so they are imported when they
are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf import load as load
    from .linear import MarlinLinear as MarlinLinear

__version__ = "0.1.0"

__all__ = ["MarlinLinear", "__version__", "load"]

_LATE = {"MarlinLinear": "linear", "load": "hf"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LATE[name]}", __name__), name)
