"""`pipeline stream` against `harvest`, then `train`: the same bytes, the largest size on the disk, the CPU time.

    .venv/bin/python benchmarks/stream.py --limit 2windows
    .venv/bin/python benchmarks/stream.py --limit 2windows --whole runs    # with the store of `make all`
    .venv/bin/python benchmarks/stream.py --limit 2windows --repeats 3 --set harvest.hooks=[model.layers.8]

Runs configs/smollm2.yaml (or --config) with one epoch, in a temporary folder. What the training rows take on the disk
is looked at every 0.2 s: whole blocks of all files below store/train but the records and the metadata. Prints JSON.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.2


def run(stage: str, runs: Path, options: argparse.Namespace, *more: str) -> float:
    """CPU-seconds of one command, its children included."""
    command = [sys.executable, "-m", "pipeline", stage, "--config", options.config, "--runs", str(runs)]
    settings = ["train.epochs=1", "train.training_tokens=null", *options.set, *more]
    malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}  # as pipeline/environment.py
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, **malloc})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def weights(runs: Path) -> dict[str, str]:
    """sha256 of every trained SAE of one epoch, by fingerprint and hook."""
    paths = runs.glob("train/*/*/sae_weights.safetensors")
    return {"/".join(p.parts[-3:-1]): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


class DiskWatch(threading.Thread):
    """The largest size of the training rows below a runs folder, in bytes of whole blocks, while it runs."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self._runs, self._ended = runs, threading.Event()
        self.largest, self.looks = 0, 0

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            total = 0
            for path in self._runs.glob("harvest/*/store/train/*/**/c/**/*"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                total += 512 * stat.st_blocks if path.is_file() else 0
            self.largest, self.looks = max(self.largest, total), self.looks + 1

    def stop(self) -> None:
        self._ended.set()
        self.join()


def compare(options: argparse.Namespace, temporary: Path) -> dict:
    """One round."""
    whole, streamed = options.whole or temporary / "whole", temporary / "streamed"
    for runs in {temporary / "whole", streamed} - ({temporary / "whole"} if options.whole else set()):
        run("sample", runs, options)
    cpu = 0.0 if options.whole else run("harvest", whole, options)
    cpu += run("train", whole, options)
    watch = DiskWatch(streamed)
    watch.start()
    began = time.monotonic()
    cpu_stream = run("stream", streamed, options, f"harvest.runtime.disk_limit={options.limit}")
    seconds = time.monotonic() - began
    watch.stop()
    expected, found = weights(whole), weights(streamed)
    return {
        "byte_identical": bool(found) and all(expected.get(name) == data for name, data in found.items()),
        "largest_bytes": watch.largest,
        "looks": watch.looks,
        "stream_seconds": round(seconds, 1),
        "cpu_seconds_stream": round(cpu_stream, 1),
        **(
            {}
            if options.whole
            else {"cpu_seconds_one_after_the_other": round(cpu, 1), "ratio": round(cpu_stream / cpu, 4)}
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smollm2.yaml")
    parser.add_argument("--limit", default="2 windows", help="harvest.runtime.disk_limit")
    parser.add_argument("--set", nargs="*", default=[], help="settings of both")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--whole", type=Path, help="a runs folder that has the whole store of these settings")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as temporary:
            rounds.append(compare(options, Path(temporary)))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    ratios = [found["ratio"] for found in rounds if "ratio" in found]
    machine = {"machine": platform.platform(), "cores": os.cpu_count(), "limit": options.limit, "set": options.set}
    print(
        json.dumps(
            machine | {"rounds": rounds, "median_ratio": statistics.median(ratios) if ratios else None}, indent=1
        )
    )
    sys.exit(not all(found["byte_identical"] for found in rounds))


if __name__ == "__main__":
    main()
