"""Measuring: products of single layers, and whole models.

Not public: `marlin_convert` names what is.
"""
