"""The settings of a source, and what is said of wrong ones."""

from __future__ import annotations

from typing import Any

import pytest

from marlin_convert.errors import MarlinConvertError, UnsupportedError
from marlin_convert.formats.gptq_config import GPTQSettings, parse_settings


def parse(**raw: Any) -> GPTQSettings:
    """The settings of a source whose only config is a quantize_config.json with `raw`."""
    return parse_settings({"quantize_config.json": raw})


def refusal(configs: dict[str, dict[str, Any]], kind: type[MarlinConvertError] = UnsupportedError) -> str:
    with pytest.raises(kind) as caught:
        parse_settings(configs)
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    return message
