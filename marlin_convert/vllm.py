"""The door that vLLM's plugin entry point names; the code is in engines/vllm_plugin.py and beside it."""

from .engines.vllm_plugin import register as register
