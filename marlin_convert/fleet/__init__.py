"""Many checkpoints: a list of them, what has become of each, and processes or a cluster that convert them.

Not public: `marlin_convert` names what is.
"""
