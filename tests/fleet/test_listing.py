"""The list of a batch, in its three forms, and what is wrong in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlin_convert.errors import OptionError, SourceError
from marlin_convert.fleet.batch import shard
from marlin_convert.fleet.listing import Line, read_list

DEFAULTS = {
    "format": "auto", "zero_points": None, "max_shard_size": "5GB", "quant_method": "gptq", "verify": False,
    "low_disk": False,
}  # fmt: skip

TEXT = """
# two of them
org/one-gptq
org/two  second --revision v2 --format marlin-ext --verify   # a remark
"./a folder" third --max-shard-size=500MB
"""
CSV = """source,revision,target,options
org/one-gptq,,,
org/two,v2,second,--format marlin-ext --verify
./a folder,,third,--max-shard-size 500MB
"""
JSON = """{"source": "org/one-gptq"}
{"source": "org/two", "revision": "v2", "target": "second", "options": {"format": "marlin_ext", "verify": true}}

{"source": "./a folder", "target": "third", "options": ["--max-shard-size", "500MB"]}
"""


def written(folder: Path, text: str, name: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(("text", "name"), [(TEXT, "list.txt"), (TEXT, "list"), (CSV, "list.csv"), (JSON, "l.jsonl")])
def test_three_forms_of_one_list(tmp_path: Path, text: str, name: str) -> None:
    one, two, three = read_list(written(tmp_path, text, name), DEFAULTS)
    assert (one.source, one.revision, one.target, one.options) == ("org/one-gptq", None, "one-gptq-marlin", DEFAULTS)
    assert (two.source, two.revision, two.target) == ("org/two", "v2", "second")
    assert two.options == {**DEFAULTS, "format": "marlin_ext", "verify": True}
    assert (three.source, three.options["max_shard_size"]) == ("./a folder", "500MB")


def test_what_people_paste(tmp_path: Path) -> None:
    text = "https://huggingface.co/org/name/tree/v2\norg/other@v3\n"
    found = [(line.source, line.revision, line.target) for line in read_list(written(tmp_path, text, "l"), DEFAULTS)]
    assert found == [("org/name", "v2", "name-marlin"), ("org/other", "v3", "other-marlin")]


def test_what_all_lines_get(tmp_path: Path) -> None:
    """A line's own options come before."""
    lines = read_list(written(tmp_path, JSON, "l.jsonl"), {**DEFAULTS, "verify": True, "format": "marlin"})
    assert [line.options["verify"] for line in lines] == [True, True, True]
    assert [line.options["format"] for line in lines] == ["marlin", "marlin_ext", "marlin"]


WRONG: dict[str, tuple[str, str, str]] = {
    "nothing": ("# only this\n", "l.txt", "no checkpoint in it"),
    "one target twice": ("org/a\nother/a\n", "l.txt", "line 2: line 1 has the target a-marlin too"),
    "an unknown option": (
        "org/a --fast\n",
        "l.txt",
        "line 1: '--fast' is not an option of a line, which may have",
    ),
    "a wrong word": ("org/a --format int4\n", "l.txt", "line 1: format is 'int4'; choose auto, marlin, marlin_ext"),
    "open quotes": ("'org/a\n", "l.txt", "line 1: no closing quotation"),
    "three names": ("a b c\n", "l.txt", "line 1: 'c' is one word too many"),
    "a path as target": ("org/a ../up\n", "l.txt", "line 1: its target is '../up'"),
    "a hidden target": ("org/a .b\n", "l.txt", "its target is '.b'"),
    "a long target": (f"org/a {'t' * 201}\n", "l.txt", "give a name of at most 200 bytes"),
    "open quotes in options": ("source,options\norg/a,--verify 'x\n", "l.csv", "line 2: its options are"),
    "half an escape in options": ('{"source": "a", "options": "\\\\"}\n', "l.jsonl", "line 1: its options are"),
    "a data set": (
        "https://huggingface.co/datasets/a/b\n",
        "l.txt",
        "line 1: https://huggingface.co/datasets/a/b: the",
    ),
    "no header": ("org/a,b\n", "l.csv", "the first line of a CSV list names its columns"),
    "a column too many": ("source\norg/a,b\n", "l.csv", "line 2: it has more columns"),
    "no source": ("source,target\n,b\n", "l.csv", "line 2: it names no source"),
    "not JSON": ("org/a\n", "l.jsonl", "line 1: not a JSON object"),
    "another key": ('{"sauce": "a"}\n', "l.jsonl", "line 1: write an object with source"),
    "a number": ('{"source": 3}\n', "l.jsonl", "line 1: its source is 3"),
    "a switch that is none": ('{"source": "a", "options": {"verify": "yes"}}\n', "l.jsonl", "verify is 'yes'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lists_are_refused_by_line(tmp_path: Path, kind: str) -> None:
    text, name, said = WRONG[kind]
    with pytest.raises(OptionError) as caught:
        read_list(written(tmp_path, text, name), DEFAULTS)
    assert said in caught.value.message


def test_what_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        read_list(tmp_path / "none", DEFAULTS)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="not UTF-8"):
        read_list(tmp_path / "bytes", DEFAULTS)


def test_parts_of_a_list_are_all_of_it() -> None:
    made: dict[str, Any] = {}
    lines = [Line(number, "a", None, f"t{number}", made) for number in range(10)]
    parts = [shard(lines, (i, 3)) for i in (1, 2, 3)]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert sorted(line.number for part in parts for line in part) == list(range(10))
    assert [line.number for line in parts[1]] == [1, 4, 7]
