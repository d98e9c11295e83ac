"""Harvest and training at 1, 3 and 10 times the default's tokens: are a token's cost, memory and handles flat?

    .venv/bin/python benchmarks/soak.py
    .venv/bin/python benchmarks/soak.py --set harvest.hooks=[model.layers.17]   # the whole default; hours

One decoder layer and one epoch unless --set says otherwise: store, loader and step see rows of the usual shape,
and ten times the tokens end within the hour. Each stage is a process of its own, looked at every half second. Prints
JSON: CPU and wall milliseconds for 1,000 tokens (marginal ones from size to size as well), peak resident memory, how it
grew from the second third of the
process to the last, open files; the ratios to 1x; the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 491_520
SETTINGS = ["harvest.hooks=[model.layers.0]", "train.epochs=1", "train.sae.d_sae=1152"]
LOOK_SECONDS = 0.5


def status_kb(pid: int, name: str) -> int:
    """A line of /proc/PID/status, in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def run(stage: str, runs: Path, settings: list[str], tokens: int) -> dict[str, Any]:
    """One stage, watched."""
    command = [sys.executable, "-m", "pipeline", stage, "--config", "configs/smollm2.yaml", "--runs", str(runs)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    began = time.monotonic()
    process = subprocess.Popen([*command, *settings], cwd=ROOT, env=environment, stdout=sys.stderr)
    resident, peak, handles = [], 0, 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        try:
            resident.append(status_kb(process.pid, "VmRSS"))
            peak = max(peak, status_kb(process.pid, "VmHWM"))
            handles = max(handles, len(os.listdir(f"/proc/{process.pid}/fd")))
        except OSError:
            pass
        time.sleep(LOOK_SECONDS)
    if status:
        sys.exit(f"{stage} ended with status {status}")
    third = max(1, len(resident) // 3)
    growth = statistics.median(resident[-third:]) / statistics.median(resident[third : 2 * third] or resident)
    return {
        "tokens": tokens,
        "cpu_ms_per_1000_tokens": round(1e6 * (usage.ru_utime + usage.ru_stime) / tokens, 1),
        "wall_ms_per_1000_tokens": round(1e6 * (time.monotonic() - began) / tokens, 1),
        "peak_mb": round(peak / 1024, 1),
        "last_third_over_second": round(growth, 3),
        "open_files": handles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="*", default=[1, 3, 10])
    parser.add_argument("--set", nargs="*", default=SETTINGS, help="settings of all stages")
    options = parser.parse_args()
    found: dict[str, dict[int, dict[str, Any]]] = {"sample": {}, "harvest": {}, "train": {}}
    for factor in options.factors:
        with tempfile.TemporaryDirectory() as runs:
            settings = [*options.set, f"sample.train_tokens={factor * TOKENS}"]
            for stage in found:
                found[stage][factor] = run(stage, Path(runs), settings, factor * TOKENS)
                print(f"{factor}x {stage}: {json.dumps(found[stage][factor])}", file=sys.stderr, flush=True)
    smallest = options.factors[0]
    ratios: dict[str, dict[str, Any]] = {
        stage: {
            f"{factor}x": {
                name: round(figures[name] / by_factor[smallest][name], 3)
                for name in ("cpu_ms_per_1000_tokens", "wall_ms_per_1000_tokens", "peak_mb")
            }
            for factor, figures in by_factor.items()
        }
        for stage, by_factor in found.items()
    }
    for stage, by_factor in found.items():  # without what every start costs: imports, the model, dense first steps
        points = [(f["tokens"], f["cpu_ms_per_1000_tokens"] * f["tokens"]) for f in by_factor.values()]
        ratios[stage]["marginal_cpu_ms_per_1000_tokens"] = [
            round((second[1] - first[1]) / (second[0] - first[0]), 1) for first, second in pairwise(points)
        ]
    machine = {"cores": os.cpu_count(), "date": str(date.today()), "set": options.set}
    print(json.dumps(machine | {"stages": found, f"ratios_to_{smallest}x": ratios}, indent=1))


if __name__ == "__main__":
    main()
