"""Everything that only a GPU shows, in one command that ends in minutes.

    make check-gpu
    .venv/bin/python -m benchmarks.gpu --minutes 4 --out runs/check-gpu
    .venv/bin/python -m benchmarks.gpu --only kernels --only training
    .venv/bin/python -m benchmarks.gpu --only full_stages --only checkpoints --only suite --minutes 16   # if named only

Each check is a process of its own with a limit of its own, the most telling first. Its result is a line of
OUT/results.jsonl as soon as it ends; OUT/table.md, in the form of benchmarks/results.md, is written anew each time;
what the checks print is in OUT/log.txt. Without a GPU it says so, runs what Triton's interpreter and the CPU can, on
small tensors, and lists what it could not.

Ends with 1 if a check failed or passed its limit, and names it. Checks for which no time was left are named too; they
make it 1 as well, unless --minutes was given: then the caller chose how far it goes.

A GPU machine without network: benchmarks/gpu/wheels.py packs what it lacks.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.check import ROOT, Place
from harvest.device import device_name


class Check(NamedTuple):
    """A module here with a function `run(place)`, and the most seconds that it may take."""

    name: str
    seconds: int
    says: str
    on_demand: bool = False  # run where --only names it
    gpus: int = 0  # the least that it can be run on


CHECKS = (
    Check("kernels", 100, "every kernel against its plain twin, the steps of every kind of SAE against float64"),
    Check("training", 110, "killed and resumed, and in two processes: the same bytes"),
    Check("harvest", 170, "two processes write the same bytes, eager and compiled; tokens/s"),
    Check("stages", 110, "all stages of the tiny settings on GPU and CPU; a stream on one device"),
    Check("answers", 90, "no bit of an answer depends on what is beside it; answers of the 8B shape a second"),
    Check("offsets", 60, "the kernels where offsets pass 2³¹", gpus=1),
    Check("steps", 120, "one training step of every kind against its floor"),
    Check("full_training", 150, "the paper's width, killed and resumed: the same bytes; peak memory"),
    Check("ranks", 120, "harvest and training by two GPUs against one", gpus=2),
    Check(
        "full_stages", 400, "all stages at the 8B shape; the evaluation's parts, twice the same bytes", on_demand=True
    ),
    Check("checkpoints", 300, "the paper's width with and without checkpoints, tokens/s", on_demand=True),
    Check("suite", 240, "the tests", on_demand=True),
)
MINUTES, RANKS_MINUTES = 8, 2  # an NVIDIA H200 needs 7; the latter are added where there are several GPUs
NOT_RUN, CUT_OFF = "not run: no time left", "cut off"  # by the limit of all checks
NEEDS = "could not be run: "
LEAST_SECONDS = 10  # a check is not begun with less


def run_check(check: Check, limit: float, out: Path, scratch: Path | None) -> dict[str, Any]:
    """A check in a process group of its own, which ends at its limit with all its children."""
    notes, began, status = out / "notes.jsonl", time.monotonic(), "passed"
    notes.write_text("")
    print(f"{check.name}: {check.says} (at most {limit:.0f} s)", flush=True)
    with (
        tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder,
        (out / "log.txt").open("ab+") as log,
    ):
        log.write(f"== {check.name}\n".encode())
        log.flush()
        printed = log.tell()
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--run",
            check.name,
            "--folder",
            folder,
            "--notes",
            str(notes),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            if process.wait(limit):
                status = f"failed, exit {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"{CUT_OFF if limit < check.seconds else 'out of time'} after {limit:.0f} s"
        finally:
            if process.poll() is None or status != "passed":
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(printed)
        text = log.read().decode(errors="replace")
    figures: dict[str, Any] = {}
    for line in notes.read_text().splitlines():
        figures |= json.loads(line)
    notes.unlink()
    failed = status != "passed"
    print(text if failed else f"  {figures}", flush=True)
    print(f"{check.name}: {status} in {time.monotonic() - began:.1f} s", flush=True)
    result = {
        "check": check.name,
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "limit": round(limit),
    }
    return result | {"figures": figures, **({"error": text[-20_000:]} if failed else {})}


def table(results: list[dict[str, Any]], machine: str) -> str:
    """The results in Markdown."""
    lines = [
        f"## `make check-gpu` ({machine}, {date.today()})",
        "",
        "| check | result | s | figures |",
        "|---|---|---|---|",
    ]
    for result in results:
        figures = "; ".join(f"{name} {_short(value)}" for name, value in result["figures"].items())
        lines.append(
            f"| {result['check']} | {result['status']} | {result['seconds']:g} | {figures.replace('|', '/')} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def check_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the chosen checks in order."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # NVML alone may see more
    minutes = options.minutes or MINUTES + (RANKS_MINUTES if gpus > 1 else 0)
    out, end, results = options.out.resolve(), time.monotonic() + 60 * minutes, []
    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (out / name).unlink(missing_ok=True)
    device = torch.device("cuda" if gpus else "cpu")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    machine = f"{device_name(device)}, {versions}"
    room = shutil.disk_usage(options.scratch or tempfile.gettempdir()).free / 1e9
    print(f"{machine}; {room:.0f} GB of disk", flush=True)
    if not gpus:
        print("torch sees no GPU: only what a CPU and Triton's interpreter can, on small tensors", flush=True)
    for check in (c for c in CHECKS if (c.name in options.only if options.only else not c.on_demand)):
        limit = min(check.seconds, end - time.monotonic())
        needs = f"{NEEDS}needs {'a GPU' if check.gpus == 1 else f'{check.gpus} GPUs'}"
        if (too_few := gpus < check.gpus) or limit < LEAST_SECONDS:
            status = needs if too_few else NOT_RUN
            result: dict[str, Any] = {"check": check.name, "status": status, "seconds": 0, "figures": {}}
            print(f"{check.name}: {status}", flush=True)
        else:
            result = run_check(check, limit, out, options.scratch)
        results.append(result)
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"machine": machine, "date": str(date.today()), **result}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (out / "table.md").write_text(table(results, machine))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help=f"no check goes on after this; {MINUTES} unless given")
    parser.add_argument("--only", action="append", choices=[c.name for c in CHECKS], help="this check; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "check-gpu", help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder with 50 GB of room; the system's temporary one")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        import_module(f"benchmarks.gpu.{options.run}").run(Place(options.folder, options.notes))
        return
    results = check_all(options)
    print((options.out / "table.md").read_text())
    if could_not := [f"{r['check']} ({r['status'].removeprefix(NEEDS)})" for r in results if could_not_run(r)]:
        print(f"not shown here: {', '.join(could_not)}")
    if said := verdict(results, options.minutes is not None):
        sys.exit(said)


def could_not_run(result: dict[str, Any]) -> bool:
    """Whether the machine has too few GPUs for a check."""
    return result["status"].startswith(NEEDS)


def verdict(results: list[dict[str, Any]], chosen_minutes: bool) -> str:
    """What makes the exit status 1: failed checks, and unfinished ones unless the caller chose the time; or ""."""
    unfinished = [r["check"] for r in results if r["status"].startswith((NOT_RUN, CUT_OFF))]
    ended = [r for r in results if r["check"] not in unfinished and not could_not_run(r)]
    failed = [r["check"] for r in ended if r["status"] != "passed"]
    parts = {"failed": failed, "no time left for": unfinished}
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    if said and not failed and chosen_minutes:
        print(said)
        return ""
    return said


if __name__ == "__main__":
    main()
