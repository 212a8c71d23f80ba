"""How many checkpoints at a time do a disk and a network bear?

    python benchmarks/fleet.py [--checkpoints 8] [--layers 1] [--rate 300] [--jobs 1,2,4] [--runs 2] [--folder DIR]

Makes checkpoints of some layers of Mistral-7B's size, and lets `marlin-convert batch` convert all of them with each
number of --jobs: from folders, where the disk and the cores are the limit, and from the Hub that the tests use, on
loopback, at --rate MB a second for all together, into an empty cache. Prints the best of the runs, each until the data
is on disk. The server takes a part of the processor, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

from convert import settle, timed
from shapes import SHAPES, make

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.hub_contents import hash_of
from tests.support.hub_server import Hub, Repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rate", type=float, default=300, help="MB a second")
    parser.add_argument("--jobs", default="1,2,4")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "marlin-convert-bench-fleet")
    options = parser.parse_args()

    shape = dataclasses.replace(SHAPES["mistral-7b"], layers=options.layers, vocabulary=4000)
    sources = [options.folder / f"m{number}" for number in range(options.checkpoints)]
    for source in sources:
        if not source.exists():
            make(source, shape)
    nbytes = sum(path.stat().st_size for source in sources for path in source.iterdir())
    cache, out, state = (options.folder / name for name in ("cache", "out", "state"))
    lists = {"folders": options.folder / "folders.txt", "Hub": options.folder / "hub.txt"}
    lists["folders"].write_text("".join(f"{source}\n" for source in sources))
    lists["Hub"].write_text("".join(f"bench/{source.name}\n" for source in sources))

    with Hub() as hub:
        for source in sources:
            repository = hub.repositories[f"bench/{source.name}"] = Repository()
            repository.commit({path.name: path for path in source.iterdir()})
            for path in source.iterdir():  # once, and not while something is timed
                hash_of(path.name, path)
        hub.rate = options.rate * 1e6
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        os.environ |= {"NO_PROXY": "*"}
        print(f"{len(sources)} checkpoints, {nbytes / 1e9:.2f} GB; the Hub at {options.rate:g} MB/s")
        for name, file in lists.items():
            for jobs in options.jobs.split(","):
                command = [sys.executable, "-m", "marlin_convert.cli", "batch", str(file), "--out", str(out), "--state"]
                command += [str(state), "--jobs", jobs, "--quiet", "--device", "cpu", "--cache-dir", str(cache)]
                times = []
                for _ in range(options.runs):
                    for folder in (cache, out, state.with_name("state.locks")):
                        shutil.rmtree(folder, ignore_errors=True)
                    state.unlink(missing_ok=True)
                    os.sync()
                    settle()
                    times.append(timed(command)[0])
                best = min(times)
                print(f"  {name:8} {jobs:>3} at a time: {best:6.1f} s, {nbytes / 1e6 / best:5.0f} MB/s", flush=True)
    shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
