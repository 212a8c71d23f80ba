"""Running what was converted: torch modules, Transformers, vLLM."""
