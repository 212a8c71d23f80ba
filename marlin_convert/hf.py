"""`import marlin_convert.hf` teaches Transformers the Marlin formats (engines/transformers_quantizer.py)."""

from .engines.transformers_quantizer import load as load
