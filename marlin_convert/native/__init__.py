"""The native libraries behind Python functions, and their slow definition in torch."""
