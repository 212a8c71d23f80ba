"""Files of unknown origin: whatever they are, and whatever they claim, it is said at once and in little memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_convert.checkpoint import header as header_module
from marlin_convert.checkpoint.bounded import json_text, parse_json, read_file
from marlin_convert.checkpoint.header import Tensor, read_header
from marlin_convert.errors import SourceError
from tests.support.cli import PATIENCE, Run
from tests.support.gptq_checkpoints import Source


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/tty", "loop"])
def test_what_is_no_file(source: Source, run: Callable[..., Run], tmp_path: Path, name: str, kind: str) -> None:
    path = source.folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "loop" else kind)
    result = run(source.folder, tmp_path / "out")
    assert (result.code, result.err.count("\n")) in ((3, 1), (4, 1)), result.err
    assert not (tmp_path / "out").exists()


def test_a_card_without_an_end(source: Source, run: Callable[..., Run], tmp_path: Path) -> None:
    (source.folder / "README.md").symlink_to("/dev/zero")
    assert run(source.folder, tmp_path / "out").code == 3


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path / "x", 5) == b"12345"
    with pytest.raises(SourceError, match="it has more than 4 bytes"):
        read_file(tmp_path / "x", 4)


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [101, 900, 5000, 1_000_000])
def test_lists_in_lists(levels: int) -> None:
    with pytest.raises(ValueError, match="nested in more than 100 levels"):
        parse_json(nested(levels))
    with pytest.raises(ValueError, match="nested in more than 100 levels"):
        parse_json('{"a":' * levels + "1" + "}" * levels)


def test_as_deep_as_configs_are() -> None:
    assert parse_json(nested(50)) == json.loads(nested(50))


def test_more_values_than_fit_into_memory() -> None:
    assert json_text(b"[0,0,0,0,0,0,0,0,0,0]", 10) == "[0,0,0,0,0,0,0,0,0,0]"
    for raw in (b"[0,0,0,0,0,0,0,0,0,0,0]", b"[[],[],[],[],[],[]]", b'{"a":{},"b":{},"c":{},"d":{},"e":{},"f":{}}'):
        with pytest.raises(ValueError, match="more than 10 values"):
            json_text(raw, 10)


def header(text: str, data: bytes = b"") -> str:
    """The message about a file with this header."""
    raw = text.encode()
    with pytest.raises(SourceError) as error:
        parsed(struct.pack("<Q", len(raw)) + raw + data)
    assert len(error.value.message) < 400
    return error.value.message


def parsed(content: bytes) -> list[Tensor]:
    return read_header(
        lambda start, count: bytearray(content[start : start + count]), len(content), "x.safetensors", "x.safetensors"
    )


def entry(shape: str, offsets: str = "[0,4]") -> str:
    return f'{{"a":{{"dtype":"F16","shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (entry("[1" + "0" * 4000 + "]"), "not valid JSON (a number of 4001 digits)"),
        (entry("[" + ",".join(["9" * 4000] * 2000) + "]"), "a number of 4000 digits"),
        (entry("[1]", "[0," + "9" * 5000 + "]"), "a number of 5000 digits"),
        (entry("[" + ",".join(["9"] * 100_000) + "]"), "the header entry of a is malformed"),
        (entry("[" + ",".join([str(2**63)] * 64) + "]"), "takes more bytes than there are, not 4"),
        (entry("[2]", "[0,4,8]"), "the header entry of a is malformed"),
        (entry("[2]", "[4,0]"), "takes 4 bytes, not -4"),
        (entry(nested(5000)), "nested in more than 100 levels"),
        (entry("[2]").replace('"a"', '"' + "a" * 501 + '"'), "is too long, or cannot be printed"),
        (entry("[2]").replace('"a"', '"\\ud800"'), "is too long, or cannot be printed"),
    ],
    ids=lambda text: text[:40],
)
def test_headers_that_claim_too_much(text: str, expected: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert expected in header(text, bytes(4))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5


def test_a_tensor_may_be_named_as_a_part_of_a_header() -> None:
    raw = b'{"data_offsets":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert [t.name for t in parsed(struct.pack("<Q", len(raw)) + raw + b"x")] == ["data_offsets"]


def test_more_tensors_than_any_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_TENSORS", 2)
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(3))
    assert "it has 3 tensors; of one file, at most 2 are read" in header("{" + entries + "}")


def large_header(count: int, name: str) -> bytes:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = "{" + ",".join(f'"{name}{i}":{entry}' for i in range(count)) + "}"
    return struct.pack("<Q", len(raw)) + raw.encode()


LARGE: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "header of 84 MB": ("model.safetensors", lambda: large_header(1_450_000, "t"), 3),
    "header of as many tensors as there may be": ("model.safetensors", lambda: large_header(200_000, "t" * 90), 4),
    "config of 84 MB": ("config.json", lambda: b'{"a":"' + b"x" * 84_000_000 + b'"}', 3),
    "config of as many values as there may be": (
        "config.json", lambda: json.dumps({f"k{i}": i for i in range(249_000)}).encode(), 0,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_the_memory_of_a_large_file(source: Source, kind: str) -> None:
    """Refused at once, or read in what is promised for any source without act-order."""
    name, content, expected = LARGE[kind]
    (source.folder / name).write_bytes(content())
    code = (
        "import sys\nfrom pathlib import Path\nfrom marlin_convert.cli import main\n"
        "try:\n    main([sys.argv[1], '--dry-run', '--quiet'])\n"
        "except SystemExit as end:\n    print(end.code, end=' ')\nelse:\n    print(0, end=' ')\n"
        "print(next(x.split()[1] for x in Path('/proc/self/status').read_text().splitlines() if x[:6] == 'VmHWM:'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source.folder], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    exit_code, peak = map(int, done.stdout.splitlines()[-1].split())
    assert exit_code == expected, done.stderr
    assert peak * 1024 < 200_000_000
