"""The Hugging Face Hub: looking into a repository, streaming from it, publishing to it.

Not public: `marlin_convert` names what is.
"""
