"""kill -9 of a stream at random moments.

    .venv/bin/python benchmarks/stream_faults.py --kills 20
    unshare -Urm .venv/bin/python benchmarks/stream_faults.py --disk

Runs configs/tiny.yaml with one epoch and rows that are read twice; after each kill the stream is started again, until
it is complete; then the next run begins. --disk fills the disk (a tmpfs of its own, hence unshare) under a running
stream instead. Prints JSON: kills, or what was said; finished runs, how many equal `harvest`, then `train`, byte for
byte, and the most training shards that were ever on the disk.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMIT = 8
SETTINGS = ["train.epochs=1", "sample.train_tokens=12288", "train.exclude.positions=[0]", "train.batch_size=32"]
SETTINGS += ["train.window_shards=4", "train.runtime.checkpoint_every=50"]
PATIENCE = 300  # seconds for a stream to end


def pipeline(command: str, cwd: Path, *more: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "pipeline", command, "--config", str(ROOT / "configs" / "tiny.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*arguments, *SETTINGS, *more],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )


def weights(cwd: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cwd)): p.read_bytes() for p in sorted(cwd.glob("runs/train/*/*/*.safetensors"))}


def on_disk(cwd: Path) -> int:
    """Training shards whose rows are there, the one that is being written included."""
    return sum(any(folder.iterdir()) for folder in cwd.glob("runs/harvest/*/store/train/*/acts/c/*") if folder.is_dir())


def work_done(cwd: Path) -> int:
    """A count that grows as either side works."""
    records = len(list(cwd.glob("runs/harvest/*/store/*/shards/*.json")))
    return records + sum(path.stat().st_size for path in cwd.glob("runs/train/*/*/metrics.jsonl"))


def killed_once(cwd: Path, rng: random.Random) -> tuple[bool, int]:
    """Start the stream and kill it at a random moment: whether it was killed, and the most shards that were seen."""
    process = pipeline("stream", cwd, f"harvest.runtime.disk_limit={LIMIT} shards")
    before, most, moment = work_done(cwd), 0, float("inf")
    while process.poll() is None and time.monotonic() < moment:
        most = max(most, on_disk(cwd))
        time.sleep(0.02)
        if moment == float("inf") and work_done(cwd) != before:
            moment = time.monotonic() + rng.uniform(0, 4)
    killed = process.poll() is None
    process.kill()
    if process.wait() and not killed:
        sys.exit(f"the stream ended with status {process.returncode} though it was not killed; settings {SETTINGS}")
    return killed, max(most, on_disk(cwd))


def prepared(base: Path, whole: Path) -> dict[str, bytes]:
    """Make what a stream starts from; the weights of `harvest`, then `train`, in a folder beside it."""
    import tiny

    tiny.make_assets(base)
    assert not pipeline("sample", base).wait()
    shutil.copytree(base, whole)
    for stage in ("harvest", "train"):
        assert not pipeline(stage, whole).wait()
    return weights(whole)


def finish(folder: Path, expected: dict[str, bytes]) -> bool:
    """Run the stream to its end; whether the weights are those expected."""
    status = pipeline("stream", folder, f"harvest.runtime.disk_limit={LIMIT} shards").wait(PATIENCE)
    return not status and weights(folder) == expected


def kills(options: argparse.Namespace, temporary: Path) -> dict:
    rng, done, most, finished, equal = random.Random(options.seed), 0, 0, 0, 0
    expected = prepared(temporary / "base", temporary / "whole")
    while done < options.kills:
        folder = temporary / f"run-{finished}"
        shutil.copytree(temporary / "base", folder)
        while not list(folder.glob("runs/train/*/manifest.json")) and done < options.kills:
            killed, seen = killed_once(folder, rng)
            done, most = done + killed, max(most, seen)
            print(f"{done} kills, {seen} shards on the disk at most", file=sys.stderr, flush=True)
        equal += finish(folder, expected)
        finished += 1
        shutil.rmtree(folder)
    figures = {"kills": done, "seed": options.seed, "runs": finished}
    return figures | {"byte_identical": equal, "most_shards": most, "limit": LIMIT}


def full_disk(temporary: Path) -> dict:
    """A disk that fills up under a running stream, and has room again."""
    mounted = temporary / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(mounted)], check=True)
    folder, filler = mounted / "base", mounted / "filler"
    expected = prepared(folder, temporary / "whole")
    stream = pipeline("stream", folder, f"harvest.runtime.disk_limit={LIMIT} shards", stderr=subprocess.PIPE)
    while stream.poll() is None and on_disk(folder) < LIMIT // 2:
        time.sleep(0.01)
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64K"], stderr=subprocess.DEVNULL, check=False)
    errors = stream.communicate(timeout=PATIENCE)[1]
    said = [line for line in errors.splitlines() if "No space" in line or line.startswith("error: ")]
    filler.unlink()
    out = {"exit": stream.returncode, "said": said, "runs": 1, "byte_identical": int(finish(folder, expected))}
    subprocess.run(["umount", str(mounted)], check=True)
    return out | {"most_shards": 0, "limit": LIMIT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true", help="a full disk in place of kills")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = full_disk(Path(temporary)) if options.disk else kills(options, Path(temporary))
    print(json.dumps(figures, indent=1))
    sys.exit(figures["byte_identical"] != figures["runs"] or figures["most_shards"] > LIMIT)


if __name__ == "__main__":
    main()
