"""kill -9 at random moments of a stage, started again until it is done: are the results byte-identical?

    python benchmarks/faults.py --stage train --kills 20
    python benchmarks/faults.py --stage harvest --kills 30

Runs configs/tiny.yaml on assets that it makes; each process is killed at a random moment after it has begun to
work. Prints JSON: kills, finished runs, how many equal an undisturbed one, and where the kills fell.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Enough work that a process lives a few seconds after its start.
OVERRIDES = ["sample.train_tokens=12288", "train.epochs=6", "train.runtime.checkpoint_every=50"]


def pipeline(stage: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", stage, "--config", str(ROOT / "configs" / "tiny.yaml"), *OVERRIDES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run_to_end(stage: str, cwd: Path) -> float:
    began = time.monotonic()
    process = pipeline(stage, cwd)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{stage} failed: {errors.decode()[-2000:]}")
    return time.monotonic() - began


def result(stage: str, cwd: Path) -> dict[str, str]:
    """sha256 of everything that the stage promises to be the same, by name; metrics without their timings."""
    (directory,) = (cwd / "runs" / stage).iterdir()
    out = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if stage == "harvest" and not name.startswith("store/"):
            continue
        if stage == "train" and not name.endswith((".safetensors", "sae.json", "metrics.jsonl")):
            continue
        data = path.read_bytes()
        if name.endswith("metrics.jsonl"):
            data = json.dumps([json.loads(line) | {"timings": None} for line in data.splitlines()]).encode()
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def work_done(stage: str, cwd: Path) -> int:
    """A count that grows as the stage works."""
    pattern = "*/store/*/shards/*.json" if stage == "harvest" else "*/*/metrics.jsonl"
    found = list((cwd / "runs" / stage).glob(pattern))
    return len(found) if stage == "harvest" else sum(path.stat().st_size for path in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["harvest", "train"], required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import tiny

    rng = random.Random(options.seed)
    kills, finished, equal, moments = 0, 0, 0, []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        tiny.make_assets(base)
        for stage in ("sample", "harvest")[: 1 if options.stage == "harvest" else 2]:
            run_to_end(stage, base)
        undisturbed = Path(temporary) / "undisturbed"
        shutil.copytree(base, undisturbed)
        seconds = run_to_end(options.stage, undisturbed)
        expected = result(options.stage, undisturbed)
        while kills < options.kills:
            folder = Path(temporary) / f"killed-{finished}"
            shutil.copytree(base, folder)
            while True:
                before = work_done(options.stage, folder)
                process = pipeline(options.stage, folder)
                while process.poll() is None and work_done(options.stage, folder) == before:
                    time.sleep(0.01)
                try:
                    process.wait(timeout=rng.uniform(0, 0.3 * seconds))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    moments.append(work_done(options.stage, folder))
                    if kills < options.kills:
                        continue
                    run_to_end(options.stage, folder)
                break
            finished += 1
            equal += result(options.stage, folder) == expected
            shutil.rmtree(folder)
    figures = {"stage": options.stage, "kills": kills, "runs": finished, "byte_identical": equal, "kills_at": moments}
    print(json.dumps(figures))
    sys.exit(equal != finished)


if __name__ == "__main__":
    main()
