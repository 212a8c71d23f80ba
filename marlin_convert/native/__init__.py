"""The native libraries behind Python functions, and their slow definition in torch.

Not public: `marlin_convert` names what is.
"""
