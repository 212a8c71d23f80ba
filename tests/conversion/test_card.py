"""The model card of a result: its metadata, what it says, and cards of sources that are odd."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.card import source_card_in
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import two_layers, write_source
from tests.support.hub_server import Account, Hub

SOURCE_CARD = """---
license: llama3
license_link: LICENSE
language: [en, no]
tags: [chat, gptq]
base_model: someone/model
base_model_relation: finetune
new_version: someone/model-2
datasets: [someone/texts]
model-index: [{name: x, results: []}]
---
# The model

A picture: ![logo](assets/logo.txt)
"""


def card(tmp_path: Path, text: str | bytes | None = None, name: str = "source", **options: Any) -> Any:
    """The card of a conversion of a source that has the card `text`."""
    source = write_source(tmp_path / name)
    if text is not None:
        (source.folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    convert(source.folder, tmp_path / "out", Options(device="cpu", **options))
    written = (tmp_path / "out" / "README.md").read_text()
    page = ModelCard(written)
    assert str(page) == written, "the Hub's own class would write it otherwise"
    return page


def test_metadata_is_carried_over(tmp_path: Path) -> None:
    assert card(tmp_path, SOURCE_CARD).data.to_dict() == {
        "license": "llama3", "license_link": "LICENSE", "language": ["en", "no"], "datasets": ["someone/texts"],
        "tags": ["chat", "gptq", "marlin", "4-bit"], "base_model": "someone/model",
        "base_model_relation": "quantized", "library_name": "marlin-convert",
    }  # fmt: skip


VALIDATE = """
import sys
from huggingface_hub import ModelCard
ModelCard.load(sys.argv[1]).validate()
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, SOURCE_CARD], ids=["no card", "a card"])
def test_the_hubs_own_check(hub: Hub, tmp_path: Path, text: str | None) -> None:
    """huggingface_hub's client asks the Hub, whose rules for these fields the test's server knows."""
    card(tmp_path, text)
    settings = {"HF_ENDPOINT": hub.url, "NO_PROXY": "*", "HF_HOME": str(tmp_path / "home")}

    def validate() -> str:
        command: list[Any] = [sys.executable, "-c", VALIDATE, tmp_path / "out" / "README.md"]
        environment = {**os.environ, **settings}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    assert validate() == ""
    path = tmp_path / "out" / "README.md"
    for wrong in ("base_model: /tmp/x", "language: english", "pipeline_tag: 3", "base_model_relation: repacked"):
        path.write_text(f"---\nlicense: mit\n{wrong}\n---\n")
        assert "ValueError" in validate(), wrong


def test_the_sources_card_is_kept_below(tmp_path: Path) -> None:
    text = card(tmp_path, SOURCE_CARD).text
    assert text.endswith(SOURCE_CARD.split("---\n", 2)[2] + "\n</details>\n")
    assert text.index("## How it was made") < text.index("<summary>Card of the source</summary>")
    assert source_card_in(text) == SOURCE_CARD.split("---\n", 2)[2]
    assert source_card_in(card(tmp_path, None, name="b", force=True).text) is None


def test_a_source_without_a_card_gets_one(tmp_path: Path) -> None:
    made: Any = card(tmp_path)
    assert made.data.tags == ["marlin", "gptq", "4-bit"]
    assert "base_model" not in made.data.to_dict()
    assert "base_model_relation" not in made.data.to_dict()
    assert "| quantized layers | 2 |" in made.text
    assert "| group size | 128 |" in made.text
    assert "marlin-convert ./source ./out\n" in made.text
    assert "Card of the source" not in made.text
    assert str(tmp_path) not in str(made)


def test_engines_are_those_that_load_the_result(tmp_path: Path) -> None:
    text = card(tmp_path).text
    assert "`vllm serve REPO --dtype float16`" in text
    assert "| without marlin-convert, by what they say of themselves; not run here | how |" in text
    assert all(engine in text for engine in ("vLLM 0.3.3 to 0.10.0", "AutoGPTQ 0.7.1", "--quantize marlin", "candle"))
    sharded = card(tmp_path, name="b", force=True, max_shard_size="100KB").text
    assert "```sh\nvllm serve REPO\n```" in sharded
    assert "AutoGPTQ 0.7.1" not in sharded
    assert "--max-shard-size 100KB" in sharded
    for_tgi = card(tmp_path, name="c", force=True, quant_method="marlin").text
    assert "--quantize marlin" in for_tgi
    assert not any(engine in for_tgi for engine in ("vLLM 0.3.3", "AutoGPTQ", "candle"))
    write_source(tmp_path / "d", two_layers(group_size=-1))
    convert(tmp_path / "d", tmp_path / "out", Options(device="cpu", force=True))
    assert "candle" not in (tmp_path / "out" / "README.md").read_text()


def test_verification(tmp_path: Path) -> None:
    """The card says it at once, or when the result is verified later."""
    verdict = "| layers exactly equal | 2 of 2 |\n| other tensors, byte for byte | 3 |\n"
    at_once = card(tmp_path, SOURCE_CARD, verify=True)
    assert verdict in at_once.text
    later = card(tmp_path, SOURCE_CARD, force=True)
    assert verdict not in later.text
    assert verify_pair(tmp_path / "source", tmp_path / "out", "cpu").ok
    after = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert after.text == at_once.text.replace("./out --verify\n", "./out\n")


def test_verifying_leaves_other_cards_alone(tmp_path: Path) -> None:
    card(tmp_path)
    (tmp_path / "out" / "README.md").write_text("My own.")
    verify_pair(tmp_path / "source", tmp_path / "out", "cpu")
    assert (tmp_path / "out" / "README.md").read_text() == "My own."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no metadata",
        "---\n---\n",
        "---\n[1, 2\n---\ntext",
        "---\n- a\n- list\n---\ntext",
        "---\ntags: [1, null]\n2: 3\nself: x\nto_dict: x\nto_yaml: x\n---\ntext",
        "---\ntags: chat\neval_results: 3\nmodel-index: 3\n---\ntext",
        "---\ndate: 2024-02-31\n---\ntext",
        '---\nlicense: "\\ud800"\n---\ntext',
        b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\ntext \xff",
        "```\n---\nlicense: mit\n---\n",
    ],
    ids=repr,
)
def test_odd_cards(tmp_path: Path, text: str | bytes) -> None:
    made: Any = card(tmp_path, text)
    assert {"marlin", "gptq", "4-bit"} <= set(made.data.tags or [])
    raw = text if isinstance(text, bytes) else text.encode()
    assert (b"text" in raw) == (
        "text" in made.text.removesuffix("\n</details>\n").split("Card of the source")[-1].splitlines()[-1]
    )
    if raw.startswith(b"\xef"):
        assert made.data.license == "mit"


def test_a_folders_name_stays_on_its_line(tmp_path: Path) -> None:
    text = card(tmp_path, name="a`b\n## c").text
    assert "\n## c" not in text
    assert "# a`b ## c in Marlin format" in text


BOMB = "\n".join(["a0: &a0 [lol]", *(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 9))])


@pytest.mark.parametrize(
    "front",
    [
        BOMB + "\ntags: *a8", BOMB + "\nlanguage: *a8", "language: &l [*l]", "license: !!int ''", "x: !!float ''",
        "x: !!bool x", "x: !!timestamp x", "x: !!omap [x: 1]", "x: !!pairs [x: 1]", "x: !!python/name:os.system ''",
        "x: 0x" + "f" * 100_000, "x: 1" + ":59" * 3000, "x: " + "9" * 5000, "x: " + "[" * 3000 + "]" * 3000,
        "x: " + "y" * 70_000, "? [a]\n: b", "x: 2024-99-99", "x: {a: &b 1, c: *b}",
    ],
    ids=lambda front: front[:24],
)  # fmt: skip
def test_metadata_that_makes_much_of_little(tmp_path: Path, front: str) -> None:
    """References, types by name, very long numbers, very much: it counts as none, and the text below stays."""
    made: Any = card(tmp_path, f"---\n{front}\n---\n# The text\n")
    assert made.data.to_dict().keys() <= {"tags", "library_name"}  # all of them our own
    assert made.data.tags == ["marlin", "gptq", "4-bit"]
    assert "# The text" in made.text
    assert len(made.content) < 100_000


def test_metadata_of_all_plain_types(tmp_path: Path) -> None:
    front = "a: 1\nb: 0.5\nc: true\nd: null\ne: [x, {f: y}]\ng: 2024-01-02\nh: '1'"
    data = card(tmp_path, f"---\n{front}\n---\n# x\n").data.to_dict()
    assert {key: data.get(key) for key in "abcegh"} == {
        "a": 1, "b": 0.5, "c": True, "e": ["x", {"f": "y"}], "g": datetime.date(2024, 1, 2), "h": "1",
    }  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text.split("## Quantization")[0], re.DOTALL)


def test_the_hub_offers_no_command_that_fails(tmp_path: Path) -> None:
    """By pipeline_tag and these tags it shows Transformers' and vLLM's own commands."""
    text = "---\npipeline_tag: text-generation\nlibrary_name: transformers\ntags: [transformers, chat, vllm]\n---\n"
    made = card(tmp_path, text).data.to_dict()
    assert made == {"tags": ["chat", "marlin", "gptq", "4-bit"], "library_name": "marlin-convert"}


@pytest.mark.slow
def test_the_block_for_transformers_runs_as_it_stands(hub: Hub, tmp_path: Path) -> None:
    """From the card of a result that was published, in a process of its own."""
    hub.accounts["hf_tok"] = Account("me")
    settings = {"HF_ENDPOINT": hub.url, "NO_PROXY": "*", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "HF_TOKEN": "hf_tok", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "marlin_convert", DEMO_FOLDER, tmp_path / "out", "--push-to-hub", "me/demo"]
    subprocess.run([*map(str, command), "--device", "cpu", "-q"], env=environment, check=True)
    repository = hub.repositories["me/demo"]
    content = repository.commits[repository.refs["main"]]["README.md"]
    assert isinstance(content, bytes)
    text = content.decode()
    [block] = [block for block in blocks(text, "python") if "marlin_convert" in block]
    assert 'marlin_convert.load("me/demo")' in block
    ran = subprocess.run([sys.executable, "-c", block], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The capital of France is")


@pytest.mark.slow
@pytest.mark.cuda
def test_the_blocks_for_vllm_run_as_they_stand(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    convert(DEMO_FOLDER, tmp_path / "REPO", Options(device="cpu"))
    text = (tmp_path / "REPO" / "README.md").read_text()
    assert blocks(text, "sh") == ["vllm serve REPO\n"]
    [block] = [block for block in blocks(text, "python") if "vllm" in block]
    guarded = "if __name__ == '__main__':\n" + textwrap.indent(block, "    ")  # vLLM starts processes of its own
    (tmp_path / "block.py").write_text(guarded)
    ran = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
