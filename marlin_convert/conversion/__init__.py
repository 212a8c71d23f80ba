"""From a quantized checkpoint to a Marlin one and back, planned, checked and reported.

Not public: `marlin_convert` names what is.
"""
