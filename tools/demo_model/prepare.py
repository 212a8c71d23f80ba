"""Text to tokenizer and token arrays: step 1 of the demo model.

Reads the King James Bible with Debian's `bible` program, splits it by whole chapters into training, validation and
test text, trains a byte-level BPE tokenizer on the training text, and writes everything that `train.py` needs.

    python tools/demo_model/prepare.py WORK_DIR
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
MAX_LENGTH = 512
# Of every 120 of the 1189 chapters, two choose the checkpoint ("valid") and one gives the reported perplexity ("test").
HELD_OUT_EVERY = 120
HELD_OUT = {20: "valid", 60: "valid", 100: "test"}

_VERSE = re.compile(r"^(?P<book>\d?[A-Za-z]+?)(?P<chapter>\d+):\d+ (?P<text>.*)$")


def read_chapters() -> list[str]:
    """Return the 1189 chapters in canonical order, one verse a line, without the verse references."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    dump = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in dump.splitlines():
        verse = _VERSE.match(line)
        if verse is None:
            raise ValueError(f"not a verse: {line!r}")
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"].strip())
    return ["\n".join(verses) for verses in chapters.values()]


def split(chapters: list[str]) -> dict[str, str]:
    """Return the text of each split; chapters are separated by an empty line."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for index, chapter in enumerate(chapters):
        name = HELD_OUT.get(index % HELD_OUT_EVERY, "train")
        parts[name].append(chapter)
    return {name: "\n\n".join(texts) + "\n" for name, texts in parts.items()}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text encodes; `<s>` is put in front of every text, as Llama tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that Transformers 4 and 5 both know; 5 by itself writes one that 4 does not."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work_dir", type=Path, help="where the text, the tokenizer and the token arrays go")
    work_dir: Path = parser.parse_args().work_dir
    work_dir.mkdir(parents=True, exist_ok=True)

    texts = split(read_chapters())
    tokenizer = train_tokenizer(texts["train"])
    save_tokenizer(tokenizer, work_dir / "tokenizer")
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise AssertionError(f"{name}: decoding the tokens does not give the text back")
        (work_dir / f"{name}.txt").write_text(text, encoding="utf-8")
        np.save(work_dir / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
        print(f"{name}: {len(text)} characters, {len(ids)} tokens")


if __name__ == "__main__":
    main()
