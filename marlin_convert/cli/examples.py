"""Three examples for each command, shown at the end of its help: what is typed → what comes of it."""

from __future__ import annotations

#: By the command's name; "" is the program without one.
EXAMPLES: dict[str, dict[str, str]] = {
    "": {
        "marlin-convert org/name-gptq ./out --verify": "convert a repository of the Hub, and compare the result",
        "marlin-convert org/name-gptq --dry-run": "what would happen, from headers alone",
        "marlin-convert to-gptq ./out ./gptq": "the way back, bit for bit",
    },
    "convert": {
        "marlin-convert convert ./gptq ./out": "a folder",
        "marlin-convert convert org/name-gptq --dry-run --engine vllm": "what vLLM would do with the result",
        "marlin-convert convert org/name-awq ./out --low-disk --push-to-hub": "with little room, and published",
    },
    "verify": {
        "marlin-convert verify ./gptq ./out": "compare a result with its source",
        "marlin-convert verify me/name-marlin": "a result alone, which names its source, both on the Hub",
        "marlin-convert verify ./out --attest statement.json": "and a statement about it, to be signed",
    },
    "demo": {
        "marlin-convert demo": "into ./demo-out",
        "marlin-convert demo ./out --device cpu": "on the CPU, whatever GPUs there are",
        "marlin-convert demo ./out --force": "once more",
    },
    "push": {
        "marlin-convert push ./out me/name-marlin": "publish a result",
        "marlin-convert push ./out org/name-marlin --private": "for the organization alone",
        "marlin-convert push ./out other/name --create-pr": "offer it to somebody else's repository",
    },
    "to-gptq": {
        "marlin-convert to-gptq ./out ./gptq": "the GPTQ checkpoint that it was made from",
        "marlin-convert to-gptq me/name-marlin ./gptq": "of a result on the Hub",
        "marlin-convert to-gptq ./out ./gptq --v2": "zero points stored as they are",
    },
    "restore": {
        "marlin-convert restore ./out ./source": "what it was made from, in its own format",
        "marlin-convert restore me/name-marlin ./source --revision v1": "of a branch or a tag on the Hub",
        "marlin-convert restore ./out ./source --max-shard-size 2GB": "in smaller files",
    },
    "generate": {
        'marlin-convert generate ./out --prompt "Once upon a time"': "continue a prompt",
        'marlin-convert generate me/name-marlin --prompt "Hello" --max-new-tokens 50': "with a result on the Hub",
        'marlin-convert generate ./out --prompt "Hello" --device cpu': "without a GPU, slowly",
    },
    "env": {
        "marlin-convert env": "for people",
        "marlin-convert env --json": "for scripts",
        "marlin-convert env > env.txt": "into a file, for a bug report",
    },
    "web": {
        "marlin-convert web": "a page for this computer's user",
        "marlin-convert web --port 0 --no-browser": "on any free port; the address is printed",
        "marlin-convert web --host 0.0.0.0 --work-dir /data/marlin": "for everybody, each with a token of their own",
    },
    "batch": {
        "marlin-convert batch list.txt --out ./results --state state.jsonl": "convert them all; once more to go on",
        "marlin-convert batch list.txt --state state.jsonl --dry-run": "plan them all",
        "marlin-convert batch list.csv --push-to-hub org --state state.jsonl --jobs 4": "publish each",
    },
    "bench": {
        "marlin-convert bench --preset mistral-7b": "the layers of a model, on this GPU",
        "marlin-convert bench ./out --batch 1,16,64 --plot speed.png": "those of a checkpoint, and a picture",
        "marlin-convert bench ./out --tokens --engine vllm --source ./gptq": "tokens per second beside the source",
    },
}  # fmt: skip
