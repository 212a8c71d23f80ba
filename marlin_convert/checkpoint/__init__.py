"""Safetensors checkpoints on disk: read by header and byte range, written whole or not at all.

Not public: `marlin_convert` names what is.
"""
