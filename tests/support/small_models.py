"""Small models of Transformers, each built from its own config with random weights, and what they compute.

The config of a class is shrunk by the names of its fields.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto

#: Auto classes in the order in which one is chosen for a config.
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq", "AutoModelForMaskedLM", "AutoModel", "AutoModelForDepthEstimation",
    "AutoModelForKeypointDetection", "AutoModelForObjectDetection", "AutoModelForTextToWaveform", "AutoBackbone",
)  # fmt: skip


#: The first pattern that a field's name matches as a whole tells its small value; each with its kind.
SMALL: tuple[tuple[str, str, int], ...] = (
    ("vocabulary", r"(.*_)?vocab_size|vocabulary_size|vocab_size_or_config_json_file", 512),
    ("layers", r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth", 2),
    ("layers", r".*_num_hidden_layers|.*_layers_num|num_.*_layers|.*_num_layers", 2),
    ("layers", r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    ("layers", r"num_nextn_predict_layers|mtp_num_.*|num_mtp_.*|num_sparse_(en|de)coder_layers", 0),
    ("heads", r"(.*_)?num_key_value_heads|num_kv_heads|n_kv_heads?|num_query_groups|multi_query_group_num", 2),
    ("heads", r"n_heads?|(.*_)?num_heads|.*attention_heads|.*_n_heads", 4),
    ("heads", r"qk_rope_head_dim|rotary_dim", 16),
    ("heads", r"(.*_)?head_dim|d_kv|kv_channels|(.*_)?head_size|d_head", 32),
    ("sizes", r"(.*_)?hidden_size|(.*_)?d_model|n_embd|(.*_)?embed_dim|dim|.*hidden_dim|n_embed|embedding_dim", 128),
    (
        "sizes",
        r"(.*_)?embedding_size|word_embed_proj_dim|projection_dim|model_dim|width|lru_width|d_embed|emb_dim",
        128,
    ),
    ("sizes", r"hidden_size_per_layer_input|feature_size", 128),
    ("sizes", r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden.*|d_ff|d_inner|n_inner|mlp_dim|feed_forward_size", 256),
    ("sizes", r".*mlp_hidden.*|ffn_embed_dim|.*_ffn_size", 256),
    ("sizes", r".*lora_rank|q_rank|kv_rank|.*_low_rank_dim", 64),
    ("experts", r"n_routed_experts|n_experts|num_.*experts|(.*_)?num_experts", 8),
    ("experts", r"(.*_)?(num_)?experts_per_tok(en)?|top_k(_experts)?|moe_top_?k|moe_k", 2),
    ("experts", r"n_group|topk_group|num_expert_groups?|n_shared_experts", 1),
    ("lengths", r"max_position_embeddings|n_positions|max_seq_len|n_ctx|seq_length|max_sequence_length", 256),
    ("lengths", r"sliding_window|attention_window|window_size|chunk_size|attention_chunk_size|local_window_size", 64),
    ("other", r"state_size|ssm_state_size|mamba_d_state|d_state", 16),
    ("other", r"(.*_)?pad_token_id", 0),
)


#: What the names of fields do not tell.
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_ssm": 256, "mamba_n_groups": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1,
                         "layer_types": ["mamba", "attention"]},
    "zamba": {"attention_hidden_size": 256, "attention_head_dim": 64, "mamba_dt_rank": 16},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "zamba2": {"attention_hidden_size": 256, "attention_head_dim": 64,
               "mamba_headdim": 32, "n_mamba_heads": 8, "num_hidden_layers": 4,
               "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4,
                   "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1, "moe_latent_size": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 1},
    "informer": {"prediction_length": 4, "context_length": 16},
    "autoformer": {"prediction_length": 4, "context_length": 16},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16},
    "hunyuan_v1_dense": {"head_dim": 32, "intermediate_size": 256},
    "hunyuan_v1_moe": {"head_dim": 32},
    "ministral": {"head_dim": 32},
    "xlnet": {"d_head": 32, "n_head": 4},
    "gemma3n_text": {"intermediate_size": 256, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "dbrx": {"d_model": 128, "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "glm4v_text": {"rope_parameters": {"mrope_section": [4, 6, 6]}},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [2, 3, 3]}},
    "glm_image_text": {"rope_parameters": {"mrope_section": [4, 6, 6]}},
    "glm4v": {"text_config": {"rope_parameters": {"mrope_section": [4, 6, 6]}}},
    "nemotron": {"num_key_value_heads": 4},
    "hunyuan_vl_text": {"head_dim": 32},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "reformer": {"is_decoder": True},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "hunyuan_vl": {"text_config": {"head_dim": 32}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "decision_transformer": {"vocab_size": 512},
}  # fmt: skip


#: Most parameters of a model that is built.
MOST = 110_000_000


def small(settings: dict[str, Any], without: str = "") -> dict[str, Any]:
    """The fields of a config with small values, but for those of the kinds `without`; those of configs in it too."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        name = str(key)
        result[key] = value
        if name == "per_layer_config" or (isinstance(value, list) and "lists" in without):
            del result[key]  # worked out again
        elif isinstance(value, dict) and not re.search("rope|label", name):
            result[key] = small(value, without)
        elif "mrope_section" in (value if isinstance(value, dict) else ()):
            old = value["mrope_section"]
            _, *rest = (part * 16 // sum(old) for part in old)
            result[key] = {**value, "mrope_section": [16 - sum(rest), *rest]}
        elif isinstance(value, int) and not isinstance(value, bool):
            for kind, pattern, chosen in SMALL:
                if re.fullmatch(pattern, name) and kind not in without:
                    result[key] = min(value, chosen) if value or chosen else value
                    break
    for many, few in (("num_attention_heads", "num_key_value_heads"), ("num_heads", "num_kv_heads")):
        if settings.get(many) and settings.get(many) == settings.get(few) and many in result:
            result[few] = result[many]
    names = ("num_hidden_layers", "num_layers", "n_layer")
    layers = next((result[k] for k in names if isinstance(result.get(k), int)), 2)
    for key, value in result.items():
        if str(key).endswith(("layer_types", "block_types", "layers_block_type")) and isinstance(value, list) and value:
            result[key] = (list(dict.fromkeys(value)) * layers)[:layers]
    _keep_stages(result, layers)
    return result


def _keep_stages(settings: dict[str, Any], layers: int) -> None:
    """Let a backbone have a layer for each of its results, where those of its last layers are asked for."""
    asked = settings.get("out_features")
    numbers = [int(name.removeprefix("stage")) for name in asked or () if re.fullmatch(r"stage\d+", str(name))]
    if not numbers or max(numbers) <= layers or "num_hidden_layers" not in settings:
        return
    layers = settings["num_hidden_layers"] = max(layers, len(numbers))
    settings["out_features"] = [f"stage{layers - len(numbers) + i + 1}" for i in range(len(numbers))]
    for name in ("out_indices", "stage_names"):
        settings.pop(name, None)


def model_types() -> list[str]:
    """Every model type that Transformers has a config for."""
    return sorted(configuration_auto.CONFIG_MAPPING.keys())


def _merged(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(settings[key], value) for key, value in own.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }  # fmt: skip
    return {**settings, **own, **both}


def _sectioned(total: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with three sections of positions, `total` together, wherever they rotate; 0 changes nothing."""
    if not total:
        return settings
    result = {k: _sectioned(total, v) if isinstance(v, dict) and "rope" not in k else v for k, v in settings.items()}
    if isinstance(result.get("rope_parameters"), dict):
        third = total // 3
        result["rope_parameters"] = {**result["rope_parameters"], "mrope_section": [total - 2 * third, third, third]}
    return result


#: What is left as it is when a config does not agree with all of it small.
ATTEMPTS = ("", "lists", "heads", "lists heads", "layers", "heads sizes", "heads sizes lists", "heads sizes layers",
            "heads sizes layers lists other")  # fmt: skip


def small_model(model_type: str) -> tuple[Any, Any]:
    """A small model of this type with random weights in float32, and the class that makes it from its config: the
    first that computes something, else the first that can be built."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    default = config_class().to_dict()
    for name in ("transformers_version", "model_type", "architectures", "dtype", "_name_or_path"):
        default.pop(name, None)
    problems: list[str] = []
    first = None
    section, ways = 0, list(ATTEMPTS)
    while ways:
        without = ways.pop(0)
        try:
            config = config_class.from_dict(
                _sectioned(section, _merged(small(default, without), OWN.get(model_type, {})))
            )
            kinds = [kind for name in AUTO_CLASSES if (kind := getattr(transformers, name, None)) is not None]
            kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
            if kind is None:
                raise LookupError("no class of a model by itself")
            with torch.device("meta"):
                count = sum(x.numel() for x in kind.from_config(copy.deepcopy(config)).parameters())
            if count > MOST:
                raise LookupError(f"{count} parameters at its smallest")
            torch.manual_seed(0)
            model = kind.from_config(config, dtype=torch.float32).eval()
        except Exception as error:  # noqa: BLE001 - whatever a config does not like
            problems.append(" ".join(f"{type(error).__name__}: {error}".split()))
            if isinstance(error, (ImportError, LookupError)):
                break
            continue
        first = first or (model, kind)
        try:
            if computed(model):
                return model, kind
        except RuntimeError as error:  # the sections of Qwen's and GLM's positions, of which the config says nothing
            if (match := re.search(r"split_sizes to sum exactly to (\d+)", str(error))) and not section:
                section = int(match[1])
                ways.insert(0, without)
        except Exception as error:  # noqa: BLE001
            problems.append(str(error))
    if first is None:
        raise LookupError(problems[0])
    return first


def inputs_for(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What the model's forward may take, as far as that can be told from outside."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    accepted = set(inspect.signature(model.forward).parameters)
    vocab = min(getattr(text, "vocab_size", None) or 512, 500)
    ids = torch.randint(3, vocab, (2, 9), generator=generator)
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size or 224, size or 224)
    bins: int = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    values = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator),
        "input_values": torch.randn(2, 4000, generator=generator),
        "input_features": torch.randn(2, bins, 2 * getattr(config, "max_source_positions", 128), generator=generator),
        "past_values": torch.randn(2, 64, getattr(config, "num_input_channels", 1), generator=generator),
    }
    decoder = {"decoder_input_ids": ids[:, :5]} if "decoder_input_ids" in accepted else {}
    main = model.main_input_name
    for names in (
        (main,),
        ("input_ids",),
        ("input_ids", "pixel_values"),
        ("input_ids", "input_features"),
        ("input_values",),
    ):
        if {*names} <= accepted & values.keys():
            given = {name: values[name] for name in names}
            yield given
            if decoder:
                yield given | decoder


def computed(model: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]] | None:
    """Inputs of which the model makes finite numbers, and these; None where none are found."""
    why = None
    for inputs in inputs_for(model):
        try:
            found = outputs(model, inputs)
        except Exception as error:  # noqa: BLE001
            why = why or error
            continue
        if found and all(bool(x.isfinite().all()) for x in found):
            return inputs, found
    if why is not None:
        raise why
    return None


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every number that the model gives for `inputs`."""
    torch.manual_seed(0)  # some models draw masks or noise
    with torch.no_grad():
        result = model(**copy.deepcopy(inputs))
    return [tensor for tensor in _tensors(result) if tensor.is_floating_point()]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in ("past_key_values", "cache_params", "mems", "state"):
                yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
