"""The configs of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.output_folder import write_json
from ..formats.marlin_config import marlin_ext_settings, marlin_model_config, marlin_settings
from ..options import QuantMethod
from .plan import Plan


def result_settings(plan: Plan, quant_method: QuantMethod) -> dict[str, Any]:
    """Return the Marlin settings of the result."""
    if plan.extended:
        return marlin_ext_settings({x.name: x.settings for x in plan.layers}, lm_head=plan.lm_head)
    return marlin_settings(plan.settings, group_size=plan.group_size, lm_head=plan.lm_head, quant_method=quant_method)


def result_config(plan: Plan, quant_method: QuantMethod) -> dict[str, Any] | None:
    """Return the result's config.json; None if the source has none."""
    if plan.config is None:
        return None
    settings = result_settings(plan, quant_method)
    return marlin_model_config(plan.config, settings, float16=not plan.extended, untied_head=plan.lm_head)


def write_configs(plan: Plan, folder: Path, quant_method: QuantMethod) -> None:
    """Write config.json and quantize_config.json, with the same Marlin settings in both."""
    config = result_config(plan, quant_method)
    if config is not None:
        write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", result_settings(plan, quant_method))
