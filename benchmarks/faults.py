"""What a stage is after kill -9 at random moments, and a harvest after its disk was full or read-only.

    .venv/bin/python benchmarks/faults.py --stage train --kills 20
    .venv/bin/python benchmarks/faults.py --stage train --kills 20 --signal INT
    .venv/bin/python benchmarks/faults.py --kills 10 --set train.sae.kind=batchtopk train.sae.k=4
    .venv/bin/python benchmarks/faults.py --stage harvest --kills 30 --workers 2
    unshare -Urm .venv/bin/python benchmarks/faults.py --disk

Runs configs/tiny.yaml on assets that it makes. --kills: processes are killed at a random moment after they have begun
to work, one of them or all, and started again until the stage is complete; then the next run begins. --disk mounts
a tmpfs of its own, hence unshare. Prints JSON: kills, finished runs, how many equal an undisturbed one byte for byte,
where the kills fell, and what the survivors said.
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
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Enough work that a process lives a few seconds after its start.
OVERRIDES = ["sample.train_tokens=12288", "train.epochs=6", "train.runtime.checkpoint_every=50"]
PATIENCE = 120  # seconds for a process to end by itself


def pipeline(stage: str, cwd: Path, rank: int = 0, workers: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", stage, "--config", str(ROOT / "configs" / "tiny.yaml"), *OVERRIDES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(workers)} if workers > 1 else {}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run_to_end(stage: str, cwd: Path) -> float:
    began = time.monotonic()
    process = pipeline(stage, cwd)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{stage} failed: {errors[-2000:]}")
    return time.monotonic() - began


def result(stage: str, cwd: Path, stopped_by: str = "KILL") -> dict[str, str]:
    """sha256 of everything that the stage promises to be the same, by name; metrics without their timings.

    Ctrl-C adds checkpoints of its own, so after one they are not compared.
    """
    (directory,) = (cwd / "runs" / stage).iterdir()
    out = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = str(path.relative_to(directory))
        if stage == "harvest" and not name.startswith("store/"):
            continue
        if stage == "train" and not name.endswith((".safetensors", "sae.json", "metrics.jsonl")):
            continue
        if stage == "train" and stopped_by != "KILL" and "/checkpoints/" in name:
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


def prepared(stage: str, base: Path, undisturbed: Path, stopped_by: str = "KILL") -> tuple[float, dict[str, str]]:
    """Make what the stage starts from, and an undisturbed run beside it; its seconds and its result."""
    import tiny

    tiny.make_assets(base)
    for before in ("sample", "harvest")[: 1 if stage == "harvest" else 2]:
        run_to_end(before, base)
    shutil.copytree(base, undisturbed)
    return run_to_end(stage, undisturbed), result(stage, undisturbed, stopped_by)


def killed_once(
    stage: str, cwd: Path, options: argparse.Namespace, seconds: float, rng: random.Random, said: Counter
) -> bool:
    """Start the workers and kill one or all of them at a random moment; whether any was still there to be killed.

    Those that are left go on to their own end; how they ended is counted.
    """
    before, workers = work_done(stage, cwd), options.workers
    processes = [pipeline(stage, cwd, rank, workers) for rank in range(workers)]
    while any(p.poll() is None for p in processes) and work_done(stage, cwd) == before:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1 * seconds))
    victims = [rng.randrange(workers)] if workers > 1 and rng.random() < 0.7 else list(range(workers))
    alive = [rank for rank in victims if processes[rank].poll() is None]
    for rank in alive:
        processes[rank].send_signal(getattr(signal, f"SIG{options.signal}"))
    for rank, process in enumerate(processes):
        errors = process.communicate(timeout=PATIENCE)[1]
        if rank not in alive and alive:
            last = (errors.strip().splitlines() or [""])[-1].partition("shards are missing")
            how = (
                "named the missing shards" if last[1] else "made all of its own" if not process.returncode else last[0]
            )
            said[f"worker {rank}, exit {process.returncode}: {how}"] += 1
    return bool(alive)


def kills(options: argparse.Namespace, temporary: Path) -> dict:
    stage, rng = options.stage, random.Random(options.seed)
    seconds, expected = prepared(stage, temporary / "base", temporary / "undisturbed", options.signal)
    count, finished, equal, moments, said = 0, 0, 0, [], Counter()
    while count < options.kills:
        folder = temporary / f"killed-{finished}"
        shutil.copytree(temporary / "base", folder)
        while count < options.kills and killed_once(stage, folder, options, seconds, rng, said):
            count += 1
            moments.append(work_done(stage, folder))
            print(f"kill {count} of {options.kills}, run {finished + 1}", file=sys.stderr, flush=True)
        run_to_end(stage, folder)
        finished += 1
        equal += result(stage, folder, options.signal) == expected
        print(f"{equal} of {finished} runs equal the undisturbed one", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    settings = {name: getattr(options, name) for name in ("stage", "signal", "workers", "seed", "set")}
    figures = settings | {"kills": count, "runs": finished}
    return figures | {"byte_identical": equal, "kills_at": moments, "survivors": dict(said)}


def disk_faults(temporary: Path) -> dict:
    """A disk that fills up under a running harvest, and one that turns read-only between two starts."""
    mounted = temporary / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(mounted)], check=True)
    _, expected = prepared("harvest", mounted / "base", temporary / "undisturbed")
    out: dict = {}
    folder, filler = mounted / "base", mounted / "filler"
    process = pipeline("harvest", folder)
    while process.poll() is None and work_done("harvest", folder) < 5:
        time.sleep(0.01)
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    errors = process.communicate(timeout=PATIENCE)[1]
    out["full"] = {"exit": process.returncode, "shards": work_done("harvest", folder), "said": errors.splitlines()[-1]}
    filler.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    process = pipeline("harvest", folder)
    errors = process.communicate(timeout=PATIENCE)[1]
    left = work_done("harvest", folder)
    out["read-only"] = {"exit": process.returncode, "shards": left, "said": errors.splitlines()[-1]}
    subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
    run_to_end("harvest", folder)
    out |= {"runs": 1, "byte_identical": int(result("harvest", folder) == expected)}
    subprocess.run(["umount", str(mounted)], check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["harvest", "train"], default="harvest")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "INT", "TERM"], default="KILL")
    parser.add_argument("--workers", type=int, default=1, help="processes that share a harvest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], help="further settings of all runs, as train.sae.kind=topk")
    parser.add_argument("--disk", action="store_true", help="the disk's faults in place of kills")
    options = parser.parse_args()
    OVERRIDES.extend(options.set)
    if options.workers > 1 and options.stage == "train":
        parser.error("--workers: for the harvest alone")
    with tempfile.TemporaryDirectory() as temporary:
        figures = disk_faults(Path(temporary)) if options.disk else kills(options, Path(temporary))
    print(json.dumps(figures, indent=1))
    sys.exit(figures["byte_identical"] != figures["runs"])


if __name__ == "__main__":
    main()
