"""What a user may choose, for the command line and the library alike: words, defaults and file names.

Nothing heavy is imported here, so that the command line can name its choices without loading what does the work. Each
choice is spelled in one way, that of the files (`marlin_ext`), and checked in one place; a wrong one is refused with
the choices that there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from .errors import OptionError
from .text import shortened

#: The largest weight file that is written, as Transformers cuts its shards.
DEFAULT_SHARD_SIZE = "5GB"

#: In every finished output: how it was made. Its presence also means that --force may replace the folder.
REPORT_FILE = "marlin_convert.json"
#: The result of verification.
VERIFY_FILE = "verify.json"
#: The model card.
CARD_FILE = "README.md"

#: The models whose layers `bench` knows by name.
PRESETS = ("mistral-7b", "llama-3-8b", "llama-70b")

W = TypeVar("W", bound="Word")


class Word(str, Enum):
    """A choice, equal to its spelling."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def chosen(cls: type[W], value: Any, option: str) -> W:
        """Return the choice that `value`, given for `option`, names. A hyphen is as good as an underscore.

        Raises OptionError, which lists the choices, for any other value.
        """
        for word in cls:
            if isinstance(value, str) and value.replace("-", "_") == word.value:
                return word
        raise OptionError(f"{option} is {value!r}; choose {', '.join(cls)}.")


class Format(Word):
    """The format of a result. AUTO: the original one where every layer fits it, else the extended one."""

    AUTO = "auto"
    MARLIN = "marlin"
    MARLIN_EXT = "marlin_ext"


class ZeroPointReading(Word):
    """How to read a v1 checkpoint that stores a zero point of 0: less one in each number by itself, or as a word."""

    NIBBLE = "nibble"
    WORD = "word"


class QuantMethod(Word):
    """The `quant_method` in a result's config: GPTQ for vLLM ≤ 0.10.0, AutoGPTQ and candle-vllm, MARLIN for TGI."""

    GPTQ = "gptq"
    MARLIN = "marlin"


#: Their names in messages.
FORMAT_NAMES = {Format.MARLIN: "original Marlin format", Format.MARLIN_EXT: "extended Marlin format"}


@dataclass(frozen=True)
class HubAccess:
    """How to read from the Hugging Face Hub: a branch, tag or commit, a token, and a cache other than the usual one."""

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None


@dataclass(frozen=True)
class PublishTarget:
    """Where a result goes on the Hub, and how. A `repo_id` without an owner is the user's own."""

    repo_id: str
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    commit_message: str | None = None


@dataclass(frozen=True)
class Options:
    """How to convert. Words may be given as strings.

    `max_shard_size` is a number of bytes or a text such as "5GB"; `low_disk` removes what was downloaded from the cache
    as soon as it is converted; `target` says where to publish the result, an empty repo_id naming it after the source;
    `attest` is the file that an in-toto statement about the result goes to.

    Raises OptionError for a word or a size that there is not.
    """

    device: str = "auto"
    format: Format = Format.AUTO
    zero_points: ZeroPointReading | None = None
    verify: bool = False
    force: bool = False
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    quant_method: QuantMethod = QuantMethod.GPTQ
    low_disk: bool = False
    target: PublishTarget | None = None
    attest: Path | None = None

    def __post_init__(self) -> None:
        words: dict[str, Any] = {
            "format": Format.chosen(self.format, "format"),
            "quant_method": QuantMethod.chosen(self.quant_method, "quant_method"),
            "max_shard_size": shard_size(self.max_shard_size),
        }
        if self.zero_points is not None:
            words["zero_points"] = ZeroPointReading.chosen(self.zero_points, "zero_points")
        for name, word in words.items():
            object.__setattr__(self, name, word)


def shard_size(value: int | str) -> int | str:
    """Return `value` if it is a size for weight files: a positive number of bytes, or a text such as 5GB or 500MB.

    Raises OptionError otherwise.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(?:KB|MB|GB|TB)", value.strip(), re.IGNORECASE | re.ASCII)
        fits = match is not None and float(match[1]) > 0
    else:
        fits = type(value) is int and value > 0
    if not fits:
        raise OptionError(f"{shortened(value)} is not a size; write it like 5GB or 500MB.")
    return value
