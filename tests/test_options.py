"""The words of the options: spelled one way, checked in one place, refused with the choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert.conversion.convert import convert, plan_only
from marlin_convert.errors import EXIT_CODES, AlreadyMarlin, MarlinConvertError, OptionError, UnsupportedError
from marlin_convert.options import Format, HubAccess, Options, QuantMethod, ZeroPointReading
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, two_layers, write_source


def test_words_are_their_spelling() -> None:
    assert [str(word) for word in Format] == ["auto", "marlin", "marlin_ext"]
    assert f"{Format.MARLIN_EXT}" == "marlin_ext" == Format.MARLIN_EXT
    options = Options(format="marlin_ext", zero_points="word", quant_method="marlin")  # type: ignore[arg-type]
    assert options.format is Format.MARLIN_EXT
    assert options.zero_points is ZeroPointReading.WORD
    assert options.quant_method is QuantMethod.MARLIN
    assert Options(format="marlin-ext") == Options(format=Format.MARLIN_EXT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("format", "marlin2", "format is 'marlin2'; choose auto, marlin, marlin_ext."),
        ("format", None, "format is None; choose auto, marlin, marlin_ext."),
        ("zero_points", "x", "zero_points is 'x'; choose nibble, word."),
        ("quant_method", "awq", "quant_method is 'awq'; choose gptq, marlin."),
        ("max_shard_size", "many", "'many' is not a size; write it like 5GB or 500MB."),
        ("max_shard_size", "0GB", "'0GB' is not a size; write it like 5GB or 500MB."),
        ("max_shard_size", 0, "0 is not a size; write it like 5GB or 500MB."),
        ("max_shard_size", True, "True is not a size; write it like 5GB or 500MB."),
    ],
)
def test_a_wrong_word_is_refused_with_the_choices(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options(**{option: value})
    assert caught.value.message == message
    assert isinstance(caught.value, ValueError)


def test_a_token_is_not_printed() -> None:
    assert "hf_x" not in repr(HubAccess(token="hf_x"))


def test_exit_codes_are_those_of_the_classes() -> None:
    kinds: list[type[MarlinConvertError]] = [
        MarlinConvertError,
        *(x for x in MarlinConvertError.__subclasses__() if "exit_code" in vars(x)),
    ]
    assert len({kind.exit_code for kind in kinds}) == len(kinds) == 9
    assert {kind.exit_code: kind.meaning for kind in kinds}.items() <= EXIT_CODES.items()
    assert AlreadyMarlin.exit_code == 0


SCALES = {
    "bf16 beyond fp16": (torch.bfloat16, 1e6),
    "bf16 below fp16": (torch.bfloat16, 1e-30),
    "fp32 beyond fp16": (torch.float32, 1e6),
    "fp32 beyond bf16": (torch.float32, 3.4028e38),
    "inf": (torch.float16, np.inf),
    "NaN": (torch.bfloat16, np.nan),
    "fp32 inf": (torch.float32, np.inf),
}


@pytest.mark.parametrize("format_", list(Format), ids=str)
@pytest.mark.parametrize("kind", SCALES)
def test_a_dry_run_looks_at_scales_as_the_conversion_does(tmp_path: Path, kind: str, format_: Format) -> None:
    dtype, value = SCALES[kind]
    scales = np.full((2, 256), 0.01)
    scales[1, 3] = value
    layers = two_layers() | {"odd": GPTQLayer(scale_dtype=dtype, scales=scales)}
    write_source(tmp_path / "source", layers)
    options = Options(format=format_, device="cpu")
    _, plan = plan_only(tmp_path / "source", options)
    if format_ is Format.MARLIN or kind in ("fp32 beyond bf16", "inf", "NaN", "fp32 inf"):
        with pytest.raises(UnsupportedError) as planned:
            plan.require_convertible()
        with pytest.raises(UnsupportedError) as converted:
            convert(tmp_path / "source", tmp_path / "out", options)
        assert planned.value.message == converted.value.message
        assert list(plan.refusals.values()) == [["odd"]]
    else:
        assert plan == convert(tmp_path / "source", tmp_path / "out", options).plan
        assert plan.format is Format.MARLIN_EXT


@pytest.mark.parametrize("flags", [["-qv"], ["-vq"], ["-v", "--json"], ["--json", "--verbose"]], ids=" ".join)
def test_output_options_are_read_as_click_reads_them(
    main: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str]
) -> None:
    """--verbose, in whatever way it is given, shows the traceback of a bug."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("marlin_convert.conversion.convert.make_plan", broken)
    write_source(tmp_path / "source")
    result = main(tmp_path / "source", tmp_path / "out", *flags)
    assert result.code == 70
    assert result.err.startswith("Traceback (most recent call last):\n")


@pytest.mark.parametrize(
    ("arguments", "as_json"),
    [
        (["source", "out", "--json", "--no-such-option"], True),
        (["source", "out", "--no-such-option", "--json"], True),
        (["generate", "out", "--prompt", "--json", "--top-k", "0"], False),
        (["generate", "out", "--top-k", "0", "--json"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_told_in_json_where_that_was_asked_for(
    run: Callable[..., Run], arguments: list[str], as_json: bool
) -> None:
    result = run(*arguments)
    assert result.code == 2
    if as_json:
        assert result.json()["exit_code"] == 2
    else:
        assert result.out == ""
        assert result.err
