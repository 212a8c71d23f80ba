"""The door that SGLang's plugin entry point names; the code is in engines/sglang_plugin.py and beside it."""

from .engines.sglang_plugin import register as register
