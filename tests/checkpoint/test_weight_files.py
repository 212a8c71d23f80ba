"""Which files of a folder are the model's weights, and what an index may say about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from marlin_convert.checkpoint.reader import Checkpoint
from tests.support.gptq_checkpoints import write_source
from tests.support.safetensors_files import index, refusal, shard


def test_one_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    with Checkpoint(source.folder) as checkpoint:
        assert checkpoint.weight_files == ["model.safetensors"]
        expected = source.plain.keys() | {f"{n}.{p}" for n in source.layers for p in ("qweight", "scales", "qzeros",
                                                                                     "g_idx")}  # fmt: skip
        assert checkpoint.tensors.keys() == expected
        assert checkpoint.configs["config.json"]["model_type"] == "llama"
        assert checkpoint.notes == []


def test_shards_with_index(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", shards=3)
    with Checkpoint(source.folder) as checkpoint:
        assert checkpoint.weight_files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        weight_map = json.loads((source.folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert {n: t.file for n, t in checkpoint.tensors.items()} == weight_map


@pytest.mark.parametrize(
    "file", ["gptq_model-4bit-128g.safetensors", "gptq_model-4bit--1g.safetensors", "weights.v2.safetensors"]
)
def test_one_file_of_any_name(tmp_path: Path, file: str) -> None:
    write_source(tmp_path / "m", file=file)
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.weight_files == [file]
        assert "model.layers.0.mlp.down_proj.qweight" in checkpoint.tensors


def test_index_of_another_name(tmp_path: Path) -> None:
    shard(tmp_path, "gptq_model-4bit-128g-00001-of-00002.safetensors", "a")
    shard(tmp_path, "gptq_model-4bit-128g-00002-of-00002.safetensors", "b")
    weight_map = {t: f"gptq_model-4bit-128g-0000{i}-of-00002.safetensors" for i, t in ((1, "a"), (2, "b"))}
    index(tmp_path, weight_map, "gptq_model-4bit-128g.safetensors.index.json")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_model_file_base_name(tmp_path: Path, file: str) -> None:
    """The config names one of several files; in config.json the key stands inside quantization_config."""
    shard(tmp_path, "gptq_model-4bit-128g.safetensors", "a", "b")
    shard(tmp_path, "older.safetensors", "a", "c")
    said = {"model_file_base_name": "gptq_model-4bit-128g", "bits": 4}
    (tmp_path / file).write_text(json.dumps({"quantization_config": said} if file == "config.json" else said))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.weight_files == ["gptq_model-4bit-128g.safetensors"]
        assert set(checkpoint.tensors) == {"a", "b"}


@pytest.mark.parametrize("base", ["missing", "../elsewhere", "/etc/passwd", 3, None, ["x"]])
def test_model_file_base_name_that_names_no_file_here(tmp_path: Path, base: object) -> None:
    shard(tmp_path / "m", "weights.safetensors", "a")
    shard(tmp_path, "elsewhere.safetensors", "secret")
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"model_file_base_name": base}))
    with Checkpoint(tmp_path / "m") as checkpoint:
        assert set(checkpoint.tensors) == {"a"}


def test_shards_without_index(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        shard(tmp_path, f"model-{i:05d}-of-00003.safetensors", f"t{i}")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"t1", "t2", "t3"}


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("base", ["model", "gptq_model-4bit-128g"])
def test_missing_part_without_index(tmp_path: Path, missing: int, base: str) -> None:
    for i in {1, 2, 3} - {missing}:
        shard(tmp_path, f"{base}-{i:05d}-of-00003.safetensors", f"t{i}")
    message = refusal(tmp_path)
    assert f"{base}-{missing:05d}-of-00003.safetensors" in message
    assert str(tmp_path) in message


def test_missing_part_that_another_number_hides(tmp_path: Path) -> None:
    """Three files, and one of them is no part of three: counting files is not enough."""
    for i in (1, 2, 4):
        shard(tmp_path, f"model-{i:05d}-of-00003.safetensors", f"t{i}")
    assert "model-00003-of-00003.safetensors" in refusal(tmp_path)


def test_absurd_number_of_parts_is_refused_at_once(tmp_path: Path) -> None:
    shard(tmp_path, "model-000000001-of-999999999.safetensors", "a")
    assert "model-000000002-of-999999999.safetensors" in refusal(tmp_path)


def test_tensor_in_two_shards_without_index(tmp_path: Path) -> None:
    shard(tmp_path, "model-00001-of-00002.safetensors", "a", "twice")
    shard(tmp_path, "model-00002-of-00002.safetensors", "b", "twice")
    message = refusal(tmp_path)
    assert "twice" in message
    assert "model-00001-of-00002.safetensors" in message
    assert "model-00002-of-00002.safetensors" in message


def test_tensor_in_two_shards_with_index(tmp_path: Path) -> None:
    """The index says which one counts."""
    save_file({"twice": torch.zeros(4)}, tmp_path / "one.safetensors")
    save_file({"twice": torch.ones(4), "b": torch.ones(4)}, tmp_path / "two.safetensors")
    index(tmp_path, {"twice": "two.safetensors", "b": "two.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.tensors["twice"]), np.ones(4, np.float32))
        assert checkpoint.weight_files == ["two.safetensors"]  # the other one is not opened at all
    index(tmp_path, {"twice": "one.safetensors", "b": "two.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.tensors["twice"]), np.zeros(4, np.float32))
        assert checkpoint.tensors["twice"].file == "one.safetensors"


def test_unrelated_files_are_read_together_when_they_do_not_contradict(tmp_path: Path) -> None:
    shard(tmp_path, "head.safetensors", "lm_head.weight")
    shard(tmp_path, "body.safetensors", "model.norm.weight")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.weight_files == ["body.safetensors", "head.safetensors"]
        assert set(checkpoint.tensors) == {"lm_head.weight", "model.norm.weight"}


def test_unrelated_files_that_contradict(tmp_path: Path) -> None:
    shard(tmp_path, "a-4bit.safetensors", "x")
    shard(tmp_path, "b-8bit.safetensors", "x")
    message = refusal(tmp_path)
    assert "a-4bit.safetensors" in message
    assert "b-8bit.safetensors" in message


def test_model_safetensors_beats_files_of_other_names(tmp_path: Path) -> None:
    """What Transformers loads when there is no index."""
    shard(tmp_path, "model.safetensors", "x")
    shard(tmp_path, "consolidated.safetensors", "x", "y")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"x"}


def test_index_beats_the_standard_name(tmp_path: Path) -> None:
    """One of several files may be called model.safetensors: it is not the whole model."""
    shard(tmp_path, "model.safetensors", "a")
    shard(tmp_path, "more.safetensors", "b")
    index(tmp_path, {"a": "model.safetensors", "b": "more.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


def test_tensor_beside_the_index_is_kept_and_said(tmp_path: Path) -> None:
    shard(tmp_path, "m.safetensors", "a", "extra")
    index(tmp_path, {"a": "m.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "extra"}
        assert len(checkpoint.notes) == 1
        assert "extra" in checkpoint.notes[0]
        assert "m.safetensors" in checkpoint.notes[0]


# ---- The index ----


OUTSIDE = {
    "parent": "../secret.safetensors",
    "parent further in": "sub/../../secret.safetensors",
    "absolute": "/etc/secret.safetensors",
    "backslashes": "..\\secret.safetensors",
    "a null byte": "m\0.safetensors",
    "a dot": ".",
    "empty": "",
    "a number": 3,
    "null": None,
    "a list": ["m.safetensors"],
    "an object": {"m.safetensors": 1},
}


@pytest.mark.parametrize("file", OUTSIDE.values(), ids=OUTSIDE)
def test_index_entry_outside_the_folder(tmp_path: Path, file: object) -> None:
    shard(tmp_path, "secret.safetensors", "a")
    shard(tmp_path / "m", "m.safetensors", "b")
    (tmp_path / "m" / "sub").mkdir()
    index(tmp_path / "m", {"b": "m.safetensors", "a": file})
    message = refusal(tmp_path / "m")
    assert "model.safetensors.index.json" in message
    assert "'a' points to" in message


def test_index_entry_in_a_subfolder(tmp_path: Path) -> None:
    shard(tmp_path / "parts", "one.safetensors", "a")
    index(tmp_path, {"a": "parts/one.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].file == "parts/one.safetensors"


def test_index_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"})
    message = refusal(tmp_path)
    assert "m-2.safetensors and 1 more" in message
    assert "model.safetensors.index.json" in message


def test_index_names_a_tensor_that_its_file_does_not_hold(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "b")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"})
    message = refusal(tmp_path)
    assert "'c' in m-2.safetensors" in message


def test_index_names_the_wrong_file(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "b")
    index(tmp_path, {"a": "m-2.safetensors", "b": "m-2.safetensors"})
    assert "'a' in m-2.safetensors" in refusal(tmp_path)


def test_index_names_a_pickle(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    (tmp_path / "m-2.bin").write_bytes(b"x")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.bin"})
    message = refusal(tmp_path)
    assert "m-2.bin" in message
    assert "not a safetensors file" in message


def test_index_entry_with_a_line_break(tmp_path: Path) -> None:
    shard(tmp_path, "m.safetensors", "a")
    index(tmp_path, {"a": "m.safetensors", "b\nc": "m.safetensors"})
    assert "'b\\nc' in m.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "m.safetensors", 3])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    shard(tmp_path, "m.safetensors", "a")
    index(tmp_path, weight_map)
    message = refusal(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "weight_map" in message


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    shard(tmp_path, "m-1.safetensors", "a")
    shard(tmp_path, "m-2.safetensors", "a")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}'
    )
    message = refusal(tmp_path)
    assert "model.safetensors.index.json" in message
    assert "twice" in message


def test_several_indexes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        shard(tmp_path, f"{name}.safetensors", "a")
        index(tmp_path, {"a": f"{name}.safetensors"}, f"{name}.safetensors.index.json")
    message = refusal(tmp_path)
    assert "x.safetensors.index.json, y.safetensors.index.json" in message
    index(tmp_path, {"a": "y.safetensors"})  # the standard name decides
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["a"].file == "y.safetensors"


def test_damage_in_any_shard_names_that_shard(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", shards=3)
    path = source.folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(source.folder)
    assert str(path) in message
    assert "truncated" in message
