"""The configs of a result."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.output_folder import write_json
from ..checkpoint.reader import Checkpoint
from ..formats.marlin_config import marlin_ext_settings, marlin_model_config, marlin_settings
from ..options import QuantMethod
from .plan import Plan


def write_configs(checkpoint: Checkpoint, plan: Plan, folder: Path, quant_method: QuantMethod) -> None:
    """Write config.json and quantize_config.json, with the same Marlin settings in both."""
    if plan.extended:
        settings = marlin_ext_settings({x.name: x.settings for x in plan.layers}, lm_head=plan.lm_head)
    else:
        settings = marlin_settings(
            plan.settings, group_size=plan.group_size, lm_head=plan.lm_head, quant_method=quant_method
        )
    if "config.json" in checkpoint.configs:
        config = marlin_model_config(
            checkpoint.configs["config.json"], settings, float16=not plan.extended, own_head=plan.lm_head
        )
        write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", settings)
