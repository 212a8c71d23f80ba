"""Whole models of vLLM's own classes on a CPU: configuration, loader and tensor parallelism as they are, one process
for each of 1, 2 and 4 ranks, and of 2 that share out experts. Every rank's layers against those of the plain fp16
model, which vLLM itself has cut.

The kernels need a GPU: references decode what they would be given. `vllm_worker` is what each rank runs.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.convert import convert
from marlin_convert.options import Options
from tests.support import source_definitions
from tests.support.ranks import on_ranks
from tests.support.served_models import MODELS, is_mixture
from tests.support.tiny_models import Pair, make
from tests.support.vllm_architectures import ARCHITECTURES, LINEARS, REFUSED, ROUNDED, configuration

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)


#: What vLLM's own kernel does not have.
LACKING = {
    "Llama, groups of 16": "vLLM's Marlin kernel has no groups of 16, and marlin-convert's are not used",
    "Llama, 8 bits, asymmetric": "vLLM's Marlin kernel has no 8-bit codes with zero points, and marlin-convert's",
}
#: (number of ranks, what they share out, whose kernel). Ours rounds its sums to fp16.
RANKS = [
    (1, "tensors", "vllm"), (2, "tensors", "vllm"), (4, "tensors", "vllm"), (2, "experts", "vllm"),
    (1, "tensors", "ours"), (2, "tensors", "ours"), (4, "tensors", "ours"), (2, "experts", "ours"),
]  # fmt: skip
CLOSE = {"vllm": 1e-9, "ours": 2e-3}


EXPERTS_REFUSED = "vLLM's fused product does not run experts with act-order, and marlin-convert's kernels are not used"
ROWS_REFUSED = (
    "become groups of 16 (it has act-order), which vLLM's Marlin kernel does not have; marlin-convert's are not used"
)


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
    """(RANKS, what each found: by model its layers' errors, or why it was refused)."""
    count, shared, kernel = request.param
    names = [name for name in MODELS if shared == "tensors" or is_mixture(name)]
    found = run(count, shared, [folders[name] for name in names], tmp_path_factory.mktemp("results"), kernel)
    return request.param, [dict(zip(names, of_rank, strict=True)) for of_rank in found]


def run(
    count: int, shared: str, models: list[tuple[Path, Path]], results: Path, kernel: str = "vllm"
) -> list[list[Any]]:
    return on_ranks("vllm_worker.py", count, shared, models, results, MARLIN_CONVERT_VLLM_KERNEL=kernel)


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_its_piece(ranks: Any, name: str) -> None:
    (count, shared, kernel), found = ranks
    if shared == "experts" and not is_mixture(name):
        pytest.skip("vLLM shares out the experts of mixtures only")
    for result in (of_rank[name] for of_rank in found):
        if "act-order" in name and kernel == "vllm" and (is_mixture(name) or count > 1):
            assert (EXPERTS_REFUSED if is_mixture(name) else ROWS_REFUSED) in result
            continue
        if name in LACKING and kernel == "vllm":
            assert LACKING[name] in result
            continue
        assert isinstance(result, dict), result
        errors = result["errors"]
        kinds = ["qkv_proj", "o_proj", *(["routed_experts"] if is_mixture(name) else ["gate_up_proj", "down_proj"])]
        wanted = sorted(2 * kinds + ["lm_head"] * ("lm_head" in MODELS[name][1]))
        assert sorted(layer.rpartition(".")[2] for layer in errors) == wanted
        assert max(errors.values()) < CLOSE[kernel], errors


# ---- Sources of other formats than GPTQ ----

SOURCES = Path(__file__).parents[1] / "data" / "sources"
#: Mixtures come first.
FROM_OTHERS = sorted((path.name for path in SOURCES.iterdir()), key=lambda name: ("stacked" not in name, name))


CLASSES = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "granitemoe": "GraniteMoeForCausalLM"}


def plain_model(source: Path, folder: Path) -> Path:
    """The source's model with weights by the definition of its format, rounded to fp16."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        f"{name}.weight": torch.from_numpy(W.T.copy()).half() for name, W in source_definitions.read(source).items()
    }
    packed = (".qweight", ".qzeros", ".scales", ".g_idx", "_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(packed):
            tensors[name] = tensor.half()
    if config["model_type"] == "granitemoe":  # whose plain experts stand in one tensor
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}.block_sparse_moe"
            each = range(config["num_local_experts"])
            first, up, down = (
                torch.stack([tensors.pop(f"{block}.experts.{number}.{part}.weight") for number in each])
                for part in ("w1", "w3", "w2")
            )
            tensors |= {
                f"{block}.input_linear.weight": torch.cat([first, up], 1),
                f"{block}.output_linear.weight": down,
            }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def from_others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a rank finds of each conversion, on our kernels: they have all kinds."""
    pairs = []
    for name in FROM_OTHERS:
        folder = tmp_path_factory.mktemp("source")
        source = folder / "source"
        shutil.copytree(SOURCES / name, source, ignore=shutil.ignore_patterns("reference*"))
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "architectures": [CLASSES[config["model_type"]]]}))
        convert(source, folder / "out", Options(device="cpu"))
        pairs.append((folder / "out", plain_model(source, folder / "plain")))
    [found] = run(1, "tensors", pairs, tmp_path_factory.mktemp("results"), "ours")
    return dict(zip(FROM_OTHERS, found, strict=True))


@pytest.mark.parametrize("name", FROM_OTHERS)
def test_conversions_from_other_formats(from_others: dict[str, Any], name: str) -> None:
    """Every layer computes what the source's format says that its weights are; or the model is refused by name."""
    result = from_others[name]
    if name == "ct-stacked-g32-asym" and isinstance(
        result, str
    ):  # Granite: newer vLLM takes its experts from one tensor
        assert "block_sparse_moe.experts: the checkpoint has no w1 for one of its experts" in result
        return
    assert isinstance(result, dict), result
    assert result["errors"]
    assert max(result["errors"].values()) < (1e-2 if "bf16" in name else CLOSE["ours"]), result["errors"]
    sizes = [W.size for W in source_definitions.read(SOURCES / name).values()]
    assert result["weights"] == sum(sizes)


# ---- All architectures ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A model of each architecture; one whose layers are those of a mixture comes first."""
    names = sorted(ARCHITECTURES, key=lambda name: name != "mixtral")
    return {name: make(tmp_path_factory.mktemp("model"), configuration(name), LINEARS, group_size=64) for name in names}


@pytest.fixture(scope="module", params=[1, 2])
def everywhere(request: pytest.FixtureRequest, built: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(number of ranks, by model what each rank found)."""
    models = [(pair.out, pair.dense) for pair in built.values()]
    found = run(request.param, "tensors", models, tmp_path_factory.mktemp("results"))
    return request.param, dict(zip(built, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(everywhere: Any, built: dict[str, Pair], name: str) -> None:
    """Every quantized layer is computed, as vLLM's own code cuts and orders its plain weight; or the model is refused
    by name."""
    count, found = everywhere
    for result in found[name]:
        if isinstance(result, str) and result.startswith("not even the plain model"):
            pytest.skip(f"this version of vLLM loads {result[:300]}")
    for result in found[name]:
        if (name, count) in REFUSED:
            assert REFUSED[name, count] in result
            continue
        assert isinstance(result, dict), result
        assert max(result["errors"].values()) < (1e-2 if name in ROUNDED else 1e-9), result["errors"]
        if count == 1:
            assert result["weights"] == sum(layer.K * layer.N for layer in built[name].layers.values())
