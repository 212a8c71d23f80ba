"""Whole models of SGLang's own classes on a CPU: configuration, loader and tensor parallelism as they are, one process
for each of 1, 2 and 4 ranks, and of 2 that share out experts. Every rank's layers against those of the plain fp16
model, which SGLang itself has cut: to the byte, and a product of each.

The kernels need a GPU: our operators' references stand in their place. `sglang_worker` is what each rank runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.served_models import MODELS, is_mixture
from tests.support.sglang_architectures import LOADED, REFUSED
from tests.support.tiny_models import Pair, make
from tests.support.vllm_architectures import ARCHITECTURES, LINEARS, configuration

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)

#: (number of ranks, what they share out).
RANKS = [(1, "tensors"), (2, "tensors"), (4, "tensors"), (2, "experts")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(MARLIN, DENSE) of each model."""
    pairs = {}
    for name, (config, which, layer) in MODELS.items():
        pair = make(tmp_path_factory.mktemp("model"), config, which, **layer)
        pairs[name] = (pair.out, pair.dense)
    return pairs


@pytest.fixture(scope="module", params=RANKS, ids=str)
def ranks(request: pytest.FixtureRequest, folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """((number of ranks, what they share out), what each found: by model its layers' errors, or why it was refused)."""
    count, shared = request.param
    names = [name for name in MODELS if shared == "tensors" or is_mixture(name)]
    found = run(count, shared, [folders[name] for name in names], tmp_path_factory.mktemp("results"))
    return request.param, [dict(zip(names, of_rank, strict=True)) for of_rank in found]


def run(count: int, shared: str, models: list[tuple[Path, Path]], results: Path) -> list[list[Any]]:
    return on_ranks("sglang_worker.py", count, shared, models, results)


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_its_piece(ranks: Any, name: str) -> None:
    (_, shared), found = ranks
    if shared == "experts" and not is_mixture(name):
        pytest.skip("ranks share out the experts of mixtures only")
    for result in (of_rank[name] for of_rank in found):
        assert isinstance(result, dict), result
        errors = result["errors"]
        kinds = ["qkv_proj", "o_proj", *(["experts"] if is_mixture(name) else ["gate_up_proj", "down_proj"])]
        wanted = sorted(2 * kinds + ["lm_head"] * ("lm_head" in MODELS[name][1]))
        assert sorted(layer.rpartition(".")[2] for layer in errors) == wanted
        assert max(errors.values()) < 2e-3, errors  # sums of fp16


# ---- Many architectures ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A model of each architecture that SGLang loads or the plugin refuses."""
    names = (*LOADED, *REFUSED)
    return {name: make(tmp_path_factory.mktemp("model"), configuration(name), LINEARS, group_size=64) for name in names}


@pytest.fixture(scope="module", params=[1, 2])
def everywhere(request: pytest.FixtureRequest, built: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(number of ranks, by model what each rank found)."""
    models = [(pair.out, pair.dense) for pair in built.values()]
    found = run(request.param, "tensors", models, tmp_path_factory.mktemp("results"))
    return request.param, dict(zip(built, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("name", [*LOADED, *REFUSED])
def test_every_architecture(everywhere: Any, built: dict[str, Pair], name: str) -> None:
    """Every quantized layer is computed, as SGLang's own code cuts and orders its plain weight; or the model is refused
    by name."""
    count, found = everywhere
    for result in found[name]:
        if name in REFUSED:
            assert REFUSED[name] in result
            continue
        assert isinstance(result, dict), result
        assert max(result["errors"].values()) < 2e-3, result["errors"]
        if count == 1:
            assert result["weights"] == sum(layer.K * layer.N for layer in built[name].layers.values())


def test_the_lists_are_of_known_architectures() -> None:
    assert {*LOADED, *REFUSED} <= ARCHITECTURES.keys()
