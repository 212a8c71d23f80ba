"""How long does a conversion from the Hub take, beside the longer of its two parts, downloading and converting?

    python benchmarks/hub.py [--shape mistral-7b-8-layers] [--files 8] [--rate 100] [--runs 3] [--low-disk]

Makes a checkpoint of the shape in so many files (kept in DIR for the next time) and serves it on loopback, by the Hub
that the tests use, at --rate MB a second. Then times, in turn: fetching alone (huggingface_hub's snapshot_download into
an empty cache), converting alone (from the folder), and the conversion from the Hub into an empty cache. Prints the
medians, and the median of total / max(download, convert), for which the bound is 1.15. Each time ends when the data is
on disk. The server takes a part of the processor, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from convert import settle, timed
from shapes import SHAPES, make

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.hub_contents import hash_of
from tests.support.hub_server import Hub, Repository

BOUND = 1.15
REPO = "bench/model-gptq"
FETCH = (
    "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1], cache_dir=sys.argv[2])"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b-8-layers")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rate", type=float, default=100, help="MB a second")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "marlin-convert-bench")
    parser.add_argument("--low-disk", action="store_true")
    options = parser.parse_args()

    source = options.folder / f"{options.shape}-{options.files}-files"
    cache, out = options.folder / "cache", options.folder / "out"
    if not source.exists():
        print(f"making {source} …", flush=True)
        make(source, dataclasses.replace(SHAPES[options.shape], files=options.files))
    nbytes = sum(f.stat().st_size for f in source.iterdir())

    with Hub() as hub:
        hub.repositories[REPO] = Repository()
        hub.repositories[REPO].commit({p.name: p for p in source.iterdir()})
        for path in source.iterdir():  # once, and not while something is timed
            hash_of(path.name, path)
        hub.rate = options.rate * 1e6
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        program = [sys.executable, "-m", "marlin_convert.cli"]
        total = [*program, REPO, str(out), "--quiet", "--device", "cpu", "--cache-dir", str(cache)]
        commands = {
            "download": [sys.executable, "-c", FETCH, REPO, str(cache)],
            "convert": [*program, str(source), str(out), "--quiet", "--device", "cpu"],
            "total": [*total, "--low-disk"] if options.low_disk else total,
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(options.runs):
            for name, command in commands.items():
                for folder in (cache, out):
                    shutil.rmtree(folder, ignore_errors=True)
                os.sync()
                settle()
                times[name].append(timed(command)[0])
            print(f"run {run + 1}: " + ", ".join(f"{name} {t[-1]:.2f} s" for name, t in times.items()), flush=True)
    for folder in (cache, out):
        shutil.rmtree(folder, ignore_errors=True)

    size = f"{nbytes / 1e9:.2f} GB at {options.rate:g} MB/s"
    print(f"{options.shape}, {options.files} files: {size}, median of {options.runs}")
    for name, values in times.items():
        print(f"  {name:9} {statistics.median(values):6.2f} s")
    ratios = [t / max(d, c) for d, c, t in zip(*times.values(), strict=True)]
    print(f"  total / max(download, convert): {statistics.median(ratios):.2f} (bound {BOUND})")


if __name__ == "__main__":
    main()
