"""Which safetensors files make up a checkpoint: by its index, by its config, or by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from ..errors import SourceError, UnsupportedError
from ..text import shortened
from .bounded import LISTING, unique_keys
from .files import CheckpointFiles

#: Weights in formats that are not read: pickles are never unpickled, the others hold no GPTQ tensors.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
OTHER_WEIGHT_SUFFIXES = (".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".mlmodel", ".npz")
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", INDEX_SUFFIX, ".bin.index.json", *PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)


def weight_files(
    files: CheckpointFiles, configs: dict[str, dict[str, Any]]
) -> tuple[list[str], dict[str, str] | None, str | None]:
    """Find the safetensors files that make up a checkpoint, of whose files only the index is read.

    Returns their names; where there is an index, its tensor → file map, and its name. Raises SourceError or
    UnsupportedError when there are none.
    """
    names = files.names
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX) and "/" not in n]
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    preferred = f"model{INDEX_SUFFIX}"
    if "model.safetensors" in found and preferred not in indexes:
        return ["model.safetensors"], None, None
    if "adapter_config.json" in names and not indexes and all(n.startswith("adapter_model") for n in found):
        raise UnsupportedError(
            f"{files.label}: a LoRA adapter (it has adapter_config.json and no model); convert the model that it was "
            "trained on, and load the adapter beside the result."
        )
    if indexes:
        if len(indexes) > 1 and preferred not in indexes:
            raise SourceError(
                f"{files.label}: several indexes ({', '.join(indexes)}); keep the one that belongs to the checkpoint."
            )
        index = preferred if preferred in indexes else indexes[0]
        return *_indexed_files(files, index), index
    for config in configs.values():
        for holder in (config, config.get("quantization_config")):
            base = holder.get("model_file_base_name") if isinstance(holder, dict) else None
            if isinstance(base, str) and f"{base}.safetensors" in found:
                return [f"{base}.safetensors"], None, None
    if not found:
        raise _no_safetensors(files.label, names)
    _require_all_parts(files.label, found)
    return found, None, None


def _indexed_files(files: CheckpointFiles, index: str) -> tuple[list[str], dict[str, str]]:
    where = files.called(index)
    weight_map = files.json(index, LISTING, unique_keys).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where}: it has no weight_map; fetch or export it again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise SourceError(
                f"{where}: {shortened(tensor)} points to {shortened(file)}, outside the folder; this index is refused."
            )
        if not file.endswith(".safetensors"):
            raise SourceError(
                f"{where}: {shortened(tensor)} points to {shortened(file)}, which is not a safetensors file."
            )
    found = sorted(set(weight_map.values()))
    missing = [f for f in found if f not in files.names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(f"{files.label}: {missing[0]}{more}, named by {index}, is missing; complete the download.")
    return found, weight_map


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name and bool(path.parts)
    )


def _require_all_parts(label: str, files: list[str]) -> None:
    """Raise SourceError where, without an index, `x-00002-of-00003.safetensors` tells that 1 or 3 is missing."""
    parts: dict[tuple[str, str], set[int]] = {}
    for file in files:
        match = re.fullmatch(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})\.safetensors", file)
        if match:
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (base, count), seen in parts.items():
        first = 0 if 0 in seen else 1
        missing = next((i for i in range(first, first + int(count)) if i not in seen), None)
        if missing is not None:
            file = f"{base}-{missing:0{len(count)}d}-of-{count}.safetensors"
            raise SourceError(f"{label}: {file} is missing, and its neighbours are there; complete the download.")


def _no_safetensors(label: str, names: Sequence[str]) -> Exception:
    ggufs = [n for n in names if n.endswith((".gguf", ".ggml"))]
    if ggufs:
        return UnsupportedError(
            f"{label}: a GGUF checkpoint ({ggufs[0]}), which has nothing to repack. llama.cpp runs it as it is."
        )
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return UnsupportedError(
            f"{label}: the weights are in a pickle file ({pickles[0]}), which can run code when it is opened and is "
            "therefore never read; save the checkpoint as safetensors first."
        )
    return SourceError(f"{label}: no .safetensors file in it; give the folder of a quantized checkpoint.")
