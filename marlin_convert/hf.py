"""`import marlin_convert.hf` teaches Transformers the Marlin formats (engines/transformers_quantizer.py)."""

from .errors import require

require("torch", "transformers")

from .engines.transformers_quantizer import load as load  # noqa: E402
