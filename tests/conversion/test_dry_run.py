"""A dry run says what the conversion then does: the same format, layers, refusals, notes, sizes and exit code, for
sources of every kind, sound or not, and every choice of options.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, write_source
from tests.support.hub_server import Hub

#: What a scale may be that is no usual number, and the types that can hold it.
ODD_SCALES = {
    "0": 0.0, "inf": np.inf, "NaN": np.nan, "beyond fp16": 1e6, "below fp16": 1e-30, "beyond bf16": 3.4028e38,
    "rounded": 0.0123456789,
}  # fmt: skip
OPTIONS = (
    (), ("--format", "marlin"), ("--format", "marlin-ext"), ("--zero-points", "nibble"), ("--zero-points", "word"),
    ("--quant-method", "marlin"), ("--max-shard-size", "40KB"),
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """One layer, as a strategy draws it."""

    K: int = 256
    N: int = 256
    bits: int = 4
    group_size: int = 128
    zeros: str = "symmetric"  # "none", "asymmetric", "with 0"
    order: str = "sequential"  # "shuffled", "none"
    dtype: torch.dtype = torch.float16
    odd_scale: str | None = None
    bias: bool = False
    damage: str | None = None

    def layer(self, seed: int) -> GPTQLayer:
        rng = np.random.default_rng(seed)
        G = 1 if self.group_size == -1 else -(-self.K // self.group_size)
        stored: Any = {"symmetric": 2 ** (self.bits - 1) - 1, "none": None}.get(self.zeros)
        if self.zeros in ("asymmetric", "with 0"):
            stored = rng.integers(0, 2**self.bits - 1, (G, self.N))
            stored[0, 0] = 2**self.bits - 1 if self.zeros == "with 0" else 0
        order: Any = {"sequential": "sequential", "none": None}.get(self.order)
        if self.order == "shuffled":
            order = rng.permutation(np.arange(self.K) // (self.K if self.group_size == -1 else self.group_size))
        scales = rng.integers(32, 256, (G, self.N)) * 2.0**-14
        if self.odd_scale:
            scales[-1, -1] = ODD_SCALES[self.odd_scale]
        return GPTQLayer(
            K=self.K, N=self.N, bits=self.bits, group_size=self.group_size, seed=seed, stored_zero=stored,
            g_idx=order, scale_dtype=self.dtype, scales=scales, bias=self.bias,
        )  # fmt: skip


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "no scales": lambda tensors, name: tensors.pop(f"{name}.scales"),
    "scales of another width": lambda tensors, name: tensors.update({f"{name}.scales": torch.ones(2, 8).half()}),
    "scales of whole numbers": lambda tensors, name: tensors.update(
        {f"{name}.scales": tensors[f"{name}.scales"].int()}
    ),
    "qweight of int64": lambda tensors, name: tensors.update({f"{name}.qweight": tensors[f"{name}.qweight"].long()}),
    "a weight beside": lambda tensors, name: tensors.update({f"{name}.weight": torch.ones(8, 8)}),
    "a name of ours": lambda tensors, name: tensors.update({f"{name}.marlin_perm": torch.ones(8)}),
    "g_idx beyond": lambda tensors, name: tensors.update({f"{name}.g_idx": torch.full((256,), 99, dtype=torch.int32)}),
}


def layers() -> st.SearchStrategy[Made]:
    sizes = st.sampled_from([(256, 256), (128, 64), (384, 512), (72, 40), (576, 96), (1000, 64), (64, 256)])
    kinds = st.builds(
        lambda size, **rest: Made(K=size[0], N=size[1], **rest),
        sizes,
        bits=st.sampled_from([4, 4, 4, 4, 8, 8, 3]),
        group_size=st.sampled_from([128, 128, 32, 64, 16, -1]),
        zeros=st.sampled_from(["symmetric", "symmetric", "none", "asymmetric", "with 0"]),
        order=st.sampled_from(["sequential", "sequential", "none", "shuffled"]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        odd_scale=st.sampled_from([None] * 20 + list(ODD_SCALES)),
        bias=st.booleans(),
        damage=st.sampled_from([None] * 40 + list(DAMAGES)),
    )
    return kinds.filter(lambda made: made.K * made.bits % 32 == 0)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.lists(layers(), min_size=1, max_size=3),
    claims=st.fixed_dictionaries(
        {},
        optional={
            "bits": st.sampled_from([4, 8, None]),
            "group_size": st.sampled_from([128, 32, -1, None]),
            "sym": st.booleans(),
            "desc_act": st.booleans(),
            "checkpoint_format": st.sampled_from(["gptq_v2", "gptq_v2", "gemm", "marlin_ext", None]),
            "quant_method": st.sampled_from(["auto-round", "gptq", "gptqmodel", "awq"]),
            "dynamic": st.sampled_from([{"-:.*1.*": {}}, {"+:.*1.*": {"bits": 8}}]),
        },
    ),
    options=st.sampled_from(OPTIONS),
)
@example(made=[Made(dtype=torch.bfloat16, odd_scale="beyond fp16")], claims={}, options=())
@example(made=[Made(dtype=torch.bfloat16, odd_scale="beyond fp16")], claims={}, options=("--format", "marlin"))
@example(made=[Made(), Made(dtype=torch.float32, odd_scale="beyond bf16")], claims={}, options=())
@example(made=[Made(odd_scale="NaN")], claims={}, options=())
@example(made=[Made(), Made(odd_scale="inf", group_size=32)], claims={}, options=())
def test_a_dry_run_says_what_the_conversion_does(
    main: Callable[..., Run], made: list[Made], claims: dict[str, Any], options: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "source"
        named = {f"model.layers.{i}.mlp.up_proj": layer for i, layer in enumerate(made)}
        write_source(
            folder,
            {name: layer.layer(i) for i, (name, layer) in enumerate(named.items())},
            {"model.norm.weight": torch.ones(8)},
            quantization=quantization_config(**{"bits": made[0].bits, "group_size": made[0].group_size, **claims}),
        )
        if any(layer.damage for layer in made):
            tensors = load_file(folder / "model.safetensors")
            for name, layer in named.items():
                if layer.damage:
                    DAMAGES[layer.damage](tensors, name)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        event(f"exit code {compare(main, folder, Path(room) / 'out', options)}")


HUB_SOURCES = {
    "sound": [Made(), Made(K=384, N=512)],
    "beyond fp16": [Made(dtype=torch.bfloat16, odd_scale="beyond fp16")],
    "beyond bf16": [Made(), Made(dtype=torch.float32, odd_scale="beyond bf16")],
    "NaN": [Made(odd_scale="NaN")],
    "inf among groups of 32": [Made(), Made(odd_scale="inf", group_size=32)],
    "act-order": [Made(order="shuffled", zeros="asymmetric")],
    "damaged": [Made(), Made(damage="no scales")],
}


@pytest.mark.parametrize("kind", HUB_SOURCES)
def test_of_a_source_on_the_hub(hub: Hub, online: Callable[..., Run], tmp_path: Path, kind: str) -> None:
    """Of which a dry run fetches parts only."""
    folder, made = tmp_path / "upload", HUB_SOURCES[kind]
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(len(made))]
    write_source(folder, {name: layer.layer(i) for i, (name, layer) in enumerate(zip(names, made, strict=True))})
    if made[-1].damage:
        tensors = load_file(folder / "model.safetensors")
        DAMAGES[made[-1].damage](tensors, names[-1])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hub.add("someone/source", folder)
    compare(online, "someone/source", tmp_path / "out", ())


def test_scales_of_nothing_but_zeros_on_the_hub(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    hub.add("someone/zeros", write_source(tmp_path / "zeros", {"a": GPTQLayer(scales=np.zeros((2, 256)))}).folder)
    hub.add("someone/sound", write_source(tmp_path / "sound", {"a": GPTQLayer()}).folder)
    for name, noted in (("zeros", True), ("sound", False)):
        for where in ("--dry-run", tmp_path / f"{name}-out"):
            notes = online(f"someone/{name}", where, "--json").json()["notes"]
            assert any(note["note"].startswith("every scale is 0") for note in notes) is noted


def compare(main: Callable[..., Run], source: Path | str, out: Path, options: tuple[str, ...]) -> int:
    """The exit code of both."""
    planned, done = (main(source, *where, *options, "--json", "--device", "cpu") for where in (("--dry-run",), (out,)))
    assert planned.code == done.code, (planned.out, done.out)
    plan, result = planned.json(), done.json()
    assert out.exists() == (done.code == 0)
    if done.code != 0:
        if "convertible" not in plan:  # an error of another kind than a layer that cannot be converted
            assert plan == result
            return done.code
        assert plan["convertible"] is False
        told = result["message"]
        assert plan["refused"]
        for refusal in plan["refused"]:
            assert refusal["reason"] in told, told
        return done.code
    assert plan["convertible"] is True
    assert plan["refused"] == []
    same = ("format", "group_size", "why_extended", "notes", "bytes_in", "bytes_out", "source")
    assert {key: plan[key] for key in same} == {key: result[key] for key in same}
    assert (len(plan["layers"]), len(plan["copied"])) == (result["layers_converted"], result["tensors_copied"])
    stored: dict[str, list[int]] = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    weight = "B" if plan["format"] == "marlin" else "marlin_qweight"
    found = {name.rpartition(".")[0]: shape for name, shape in stored.items() if name.endswith(f".{weight}")}
    assert found == {
        layer["name"]: [layer["stored_K"] // 16, layer["stored_N"] * layer["bits"] // 2] for layer in plan["layers"]
    }
    assert {c["name"]: c["shape"] for c in plan["copied"]}.items() <= stored.items()
    assert not stored.keys() & set(plan["dropped"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == plan["format"]
    return done.code


@pytest.mark.parametrize("options", [(), ("--format", "marlin-ext")], ids=["auto", "marlin-ext"])
def test_of_a_result(main: Callable[..., Run], tmp_path: Path, options: tuple[str, ...]) -> None:
    """A Marlin checkpoint as the source: both say that there is nothing to do, and do nothing."""
    write_source(tmp_path / "gptq")
    assert main(tmp_path / "gptq", tmp_path / "marlin", *options).code == 0
    planned = main(tmp_path / "marlin", "--dry-run", "--json")
    done = main(tmp_path / "marlin", tmp_path / "again", "--json")
    assert planned.code == done.code == 0
    assert planned.json()["already_marlin"] is True
    assert not (tmp_path / "again").exists()
