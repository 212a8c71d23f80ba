"""A source on the Hub that tests serve, and hashes of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.support.gptq_checkpoints import two_layers, write_source
from tests.support.hub_server import Hub, Repository

CARD = "---\nlicense: mit\n---\n# The model\n\nIt is one.\n"
EXTRA = {"README.md": CARD, "tokenizer.json": '{"a": 1}', "code/model.py": "x = 1\n", "LICENSE": "MIT"}


def add_source(hub: Hub, folder: Path, **changes: Any) -> Repository:
    """`org/gptq` on the Hub; biases, so that a copied tensor belongs to a layer."""
    written = {key: changes.pop(key) for key in ("shards", "quantization") if key in changes}
    write_source(folder, two_layers(**{"bias": True, **changes}), extra=EXTRA, **written)
    return hub.add("org/gptq", folder)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
