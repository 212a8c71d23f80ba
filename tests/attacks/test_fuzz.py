"""Checkpoints made of what nobody would write: whatever they hold, the program ends in one of its documented ways, and
what it accepts is sound. The cases come from fixed seeds; for more of them: `FUZZ=100 pytest tests/attacks`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlin_convert import cli
from marlin_convert.checkpoint.header import DTYPE_BITS, read_header
from marlin_convert.errors import BUG, EXIT_CODES, MarlinConvertError
from tests.support.gptq_checkpoints import GPTQLayer, write_source

pytestmark = pytest.mark.slow

MORE = int(os.environ.get("FUZZ", "1"))


def many(examples: int) -> settings:
    return settings(
        max_examples=examples * MORE, deadline=None, derandomize=MORE == 1, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )  # fmt: skip


WORDS = st.sampled_from(
    ["", "a", "gptq", "gptq_v2", "marlin", "marlin_ext", "awq", "gemm", "auto-round", "auto_round:auto_gptq", "int32",
     "float16", "torch.int32", "I32", "F16", "1.0", "\x00", "\ud800", "é[/]", "[red]", "\x1b[2J", "\u202e", "x" * 600,
     "../..", "/etc/passwd", "(", "(a+)+$", "(?P<a>x)(?P=a)", "+:.*", "-:lm_head", "$", "\\"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 4, 8, 16, 32, 64, 127, 128, 129, 2**31, 2**63, 2**64, 10**40, -(10**300)]),
    st.sampled_from([0.5, 1e308, float("nan"), float("inf"), 10**4200]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=5))


def containers(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(of, max_size=3), st.dictionaries(WORDS, of, max_size=3))


VALUES = st.recursive(SCALARS, containers, max_leaves=6)


def dumped(value: object) -> bytes:
    """JSON, also of numbers that Python writes only when it is asked to."""
    with _all_digits():
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _all_digits() -> Iterator[None]:
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


# ---- Headers ----

NAMES = st.one_of(
    WORDS, st.sampled_from(["a.qweight", "a.qzeros", "a.scales", "a.g_idx", "__metadata__", "data_offsets", "t"])
)
DIMENSIONS = st.one_of(st.lists(st.integers(0, 5), max_size=4), st.lists(NUMBERS, max_size=3), VALUES)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file: mostly sound, with something wrong in it."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    for name in draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else []:
        part = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more", None]))
        if part is None:
            header[name] = draw(VALUES)
        elif isinstance(header[name], dict):
            header[name][part] = draw(DIMENSIONS if part != "dtype" else st.one_of(WORDS, VALUES))
    raw = bytearray(dumped(header))
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    length = draw(st.one_of(st.just(len(raw)), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001])))
    data = bytes(max(0, end + draw(st.integers(-2, 2)) if draw(st.booleans()) else end))
    return struct.pack("<Q", length) + bytes(raw) + data


@many(1500)
@given(headers())
def test_headers(content: bytes) -> None:
    tensors = None
    with contextlib.suppress(MarlinConvertError):
        tensors = read_header(
            lambda start, count: bytearray(content[start : start + count]), len(content), "file", "file"
        )
    if not tensors:
        return
    position = 8 + struct.unpack("<Q", content[:8])[0]
    for tensor in tensors:  # in order, without holes, to the end
        assert tensor.offset == position
        assert tensor.name.isprintable()
        position += tensor.nbytes
    assert position == len(content)


# ---- Settings ----

KEYS = st.sampled_from(
    ["bits", "w_bit", "wbits", "group_size", "q_group_size", "groupsize", "sym", "desc_act", "zero_point",
     "checkpoint_format", "format", "version", "quant_method", "method", "packing_format", "pack_dtype",
     "is_marlin_format", "meta", "dynamic", "damp_percent", "true_sequential", "lm_head", "autoround_version",
     "model_file_base_name", "marlin_ext_version", "layers", "modules_in_block_to_quantize"]
)  # fmt: skip
MODEL_KEYS = st.sampled_from(
    ["model_type", "architectures", "torch_dtype", "dtype", "text_config", "quantization_config", "tie_word_embeddings",
     "auto_map", "rope_scaling", "id2label", "vocab_size"]
)  # fmt: skip
QUANTIZATION = st.dictionaries(
    KEYS, st.one_of(VALUES, st.dictionaries(WORDS, st.dictionaries(KEYS, VALUES))), max_size=4
)
PLAIN = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq"}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, bytes]:
    quantization = PLAIN | draw(QUANTIZATION)
    config = {"model_type": "llama", "quantization_config": quantization} | draw(
        st.dictionaries(
            MODEL_KEYS, st.one_of(VALUES, st.fixed_dictionaries({"quantization_config": QUANTIZATION})), max_size=2
        )
    )
    files = {"config.json": dumped(config)}
    if draw(st.booleans()):
        files["quantize_config.json"] = dumped(PLAIN | draw(QUANTIZATION))
    if draw(st.integers(0, 5)) == 0:
        lines = draw(st.lists(st.tuples(WORDS, VALUES), max_size=4))
        front = "\n".join(f"{key}: {value!r}" for key, value in lines)
        files["README.md"] = f"---\n{front}\n---\n# card\n".encode("utf-8", "backslashreplace")
    if draw(st.integers(0, 8)) == 0:
        name = draw(st.sampled_from(sorted(files)))
        raw = bytearray(files[name])
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        files[name] = bytes(raw)
    return files


def ended(*arguments: object) -> int:
    """Run the program in this process: its exit code. What it says has nothing that a terminal obeys."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    said = out.getvalue() + err.getvalue()
    assert code in EXIT_CODES, said
    assert code != BUG, said
    assert not {"\x1b", "\x00", "\u202e", "\x9b", "\ud800"} & set(said)
    return code


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = {"model.layers.0.q_proj": GPTQLayer(K=128, N=256), "lm_head": GPTQLayer(K=128, N=256)}
    return write_source(tmp_path_factory.mktemp("small") / "source", layers, {}).folder


@many(100)
@given(files=configs(), format=st.sampled_from(["auto", "marlin", "marlin_ext"]))
def test_configs(small: Path, files: dict[str, bytes], format: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "source"), Path(name, "out")
        shutil.copytree(small, source)
        for file, content in files.items():
            (source / file).write_bytes(content)
        code = ended(source, out, "--device", "cpu", "--format", format)
        assert code == 0 or not out.exists()
        assert {path.name for path in Path(name).iterdir()} <= {"source", "out"}


# ---- Results ----


@pytest.fixture(scope="module")
def result(small: Path) -> Path:
    out = small.parent / "result"
    assert ended(small, out, "--device", "cpu", "--format", "marlin_ext", "--quiet") == 0
    return out


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder in a JSON value, with each of its keys."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


@many(60)
@given(data=st.data())
def test_results(result: Path, data: st.DataObject) -> None:
    """What `to-gptq` and `verify` read of a result may have been changed by anybody."""
    with tempfile.TemporaryDirectory() as name:
        changed, out = Path(name, "changed"), Path(name, "out")
        shutil.copytree(result, changed)
        file = changed / data.draw(st.sampled_from(["marlin_convert.json", "config.json", "quantize_config.json"]))
        content = json.loads(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            found = list(places(content))
            if found:
                holder, key = found[data.draw(st.integers(0, len(found) - 1))]
                holder[key] = data.draw(VALUES)
        file.write_bytes(dumped(content))
        ended("to-gptq", changed, out)
        ended("verify", result.parent / "source", changed, "--device", "cpu")
