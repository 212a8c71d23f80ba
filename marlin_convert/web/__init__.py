"""The web page: plan, convert and publish in a browser, on this computer or as a Space.

Not public: `marlin_convert` names what is.
"""
