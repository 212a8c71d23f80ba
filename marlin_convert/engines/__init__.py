"""Running what was converted: torch modules, Transformers, vLLM.

Not public: `marlin_convert` names what is.
"""
