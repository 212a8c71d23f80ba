"""The formats themselves: tiles, settings, what scales can hold. No files, no network, no devices.

Not public: `marlin_convert` names what is.
"""
