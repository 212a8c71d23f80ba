"""Repack GPTQ checkpoints into the Marlin format: exactly, on a CPU, with bounded memory."""

__version__ = "0.1.0"
