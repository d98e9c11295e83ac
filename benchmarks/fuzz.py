"""Mutated files under every stage: each fault must be refused with a message, or the result must be the right one.

    .venv/bin/python benchmarks/fuzz.py --count 300 --seed 0

Runs configs/tiny.yaml once. Then, fault by fault, one file of a copy is damaged, and the command that reads it runs, in
a process of its own. Prints JSON: faults by stage and kind of file, and how they ended:

    refused     exit status 1 or 2 and a message
    right       exit status 0, and byte for byte the result of the undamaged files
    accepted    exit status 0 where nothing says what is right (a changed setting, the user's own rows)
    OPEN        a traceback, a hang, another result in silence, a file outside of the folder; the exit status is then 1
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ["HF_HUB_OFFLINE"] = "1"
PATIENCE = 120  # seconds for the commands of one fault
TRACEBACK = 99
SETTINGS = ["evaluate.features=null", "evaluate.reason_score=null", "evaluate.steering=null"]
ALSO = "evaluate.also=[{name: other, path: exported/blocks.1.hook_resid_post}]"
COMPARE = (("status", *SETTINGS), ("compare", "tiny.yaml", *SETTINGS))
DECIDES = "apply_b_dec_to_input"  # with another value, cfg.json is that of another SAE, for SAELens as well
WORDS = ("../../outside", "/outside", "model.layers.0", "", "\x1b[2J", "9" * 400)
NUMBERS = (0, -1, 1, 2**31, 2**63, 10**15, 0.5, float("nan"), None, True, [], {}, *WORDS)


class Target(NamedTuple):
    """Files to damage, the stage that made them, and who reads them."""

    stage: str
    patterns: Sequence[str]
    removed: Sequence[str]  # beforehand, so that the commands have something to do
    commands: Sequence[Sequence[str]]
    result: Sequence[str]  # files that must be the same; () where nothing says what is right


WEIGHTS = ("runs/train/*/*/sae_weights.safetensors",)
TARGETS = [
    Target("settings", ("tiny.yaml",), (), (("status",),), ()),
    Target(
        "sample",
        ("runs/sample/*/*.json", "runs/sample/*/contexts/**/*"),
        ("runs/harvest", "runs/train", "runs/evaluate"),
        (("harvest",),),
        ("runs/harvest/*/store/**/c/**/*",),
    ),
    Target(
        "harvest",
        ("runs/harvest/*/*.json", "runs/harvest/*/store/**/*"),
        ("runs/train", "runs/evaluate"),
        (("train",),),
        WEIGHTS,
    ),
    Target(
        "harvest, verified",
        ("runs/harvest/*/store/**/*", "runs/harvest/*/manifest.json"),
        ("runs/train", "runs/evaluate"),
        (("verify",), ("harvest",), ("verify",), ("harvest",), ("train",)),  # metadata first, then the shards
        (*WEIGHTS, "runs/harvest/*/store/**/*"),
    ),
    Target(
        "checkpoint",
        ("runs/train/*/begun.json", "runs/train/*/*/checkpoints/**/*", "runs/train/*/*/metrics.jsonl"),
        ("runs/train/*/manifest.json", "runs/train/*/*/sae.json", "runs/train/*/*/*.safetensors", "runs/evaluate"),
        (("train",),),
        WEIGHTS,
    ),
    Target(
        "train",
        ("runs/train/*/*.json", "runs/train/*/*/sae.json", *WEIGHTS, "runs/train/*/*/metrics.jsonl"),
        ("runs/evaluate",),
        (("evaluate", *SETTINGS),),
        ("runs/evaluate/*/metrics.json",),
    ),
    Target(
        "evaluate", ("runs/evaluate/*/*.json",), (), (("status", *SETTINGS), ("compare", "tiny.yaml", *SETTINGS)), ()
    ),
    Target(
        "SAEs of others",
        ("exported/*/cfg.json",),
        ("runs/evaluate",),
        (("evaluate", *SETTINGS, ALSO),),
        ("runs/evaluate/*/metrics.json",),
    ),
    Target("ingest", ("given/*",), (), (("ingest",),), ()),
]


def ran(folder: Path, commands: Sequence[Sequence[str]]) -> tuple[int, str]:
    """Exit status and output of commands, one after another until one fails, in a process of their own."""
    log = folder.parent / "log"
    child = os.fork()
    if not child:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(_in_child(folder, commands))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def _in_child(folder: Path, commands: Sequence[Sequence[str]]) -> int:
    from typer.testing import CliRunner

    from pipeline.cli import app

    signal.alarm(PATIENCE)
    os.chdir(folder)
    try:
        for name, *overrides in commands:
            config = [] if name == "compare" else ["--config", "ingest.yaml" if name == "ingest" else "tiny.yaml"]
            done = CliRunner().invoke(app, [name, *config, *overrides])
            sys.stdout.write(done.output)
            sys.stdout.flush()
            if done.exception and not isinstance(done.exception, SystemExit):
                raise done.exception
            if done.exit_code and name != "verify":  # which marks what is bad, for the harvest to make it anew
                return done.exit_code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return TRACEBACK
    return 0


def prepare(folder: Path) -> None:
    """A finished run, its SAE exported, rows of the user's own."""
    import numpy as np
    import tiny

    tiny.make_assets(folder)
    (folder / "tiny.yaml").write_text((ROOT / "configs" / "tiny.yaml").read_text())
    given = "ingest: {path: given, shard_rows: 64, holdout_fraction: 0.2, chunk_rows: 16}\n"
    rest = "train: {sae: {d_sae: 64}, epochs: 1, batch_size: 32, window_shards: 2, pool_rows: 128}\n"
    (folder / "ingest.yaml").write_text(given + rest)
    (folder / "given").mkdir()
    np.save(folder / "given" / "rows.npy", np.random.default_rng(0).normal(size=(640, 32)).astype(np.float32))
    status, said = ran(folder, [("run", *SETTINGS), ("export", "--to", "exported")])
    if status:
        sys.exit(said)


def outcome(folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """What must be the same, by name."""
    out: dict[str, Any] = {}
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file()):
        name = "/".join(path.parts[len(folder.parts) + 3 :])
        out[name] = path.read_bytes()
        if path.name == "metrics.json":  # figures, not what files say of themselves
            figures = json.loads(path.read_bytes())
            out[name] = [sae | {"about": None} for sae in figures["saes"]]
    return out


def flipped(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(min(len(data), 600) if rng.random() < 0.5 else len(data))  # headers are where it hurts
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors or JSON header that announces something else."""
    return rng.choice([2**40, 2**63, 0, len(data)]).to_bytes(8, "little") + data[8:]


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, one of whose values is another."""
    value = json.loads(data)
    at: Any = value
    while True:
        key = rng.choice(list(at) if isinstance(at, dict) else list(range(len(at))))
        if key == DECIDES:
            continue
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice(NUMBERS)
    return json.dumps(value).encode()


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped bit": flipped,
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "longer": lambda data, rng: data + rng.randbytes(rng.choice([1, 64])),
    "zeros": lambda data, _rng: data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * len(data) // 3 :],
    "noise": lambda data, rng: rng.randbytes(len(data)),
    "header": header,
}


def damage(folder: Path, target: Target, rng: random.Random) -> tuple[str, str]:
    """Damage one file; its kind and what was done."""
    files = sorted(p for pattern in target.patterns for p in folder.glob(pattern) if p.is_file() and p.stat().st_size)
    kinds = sorted({kind(path) for path in files})
    chosen = rng.choice(kinds)  # first, or nearly all would be of the many alike
    path = rng.choice([file for file in files if kind(file) == chosen])
    ways = [*BYTES, "deleted", "traded places", "a link outside"] + ["another value"] * 6 * (path.suffix == ".json")
    way, data = rng.choice(ways), path.read_bytes()
    path.unlink()
    if way == "traded places":
        alike = [file for file in files if kind(file) == chosen and file != path] or [folder / "ingest.yaml"]
        path.write_bytes(rng.choice(alike).read_bytes())
    elif way == "a link outside":
        path.symlink_to(folder.parent / "outside")
    elif way != "deleted":
        path.write_bytes(rewritten(data, rng) if way == "another value" else BYTES[way](data, rng))
    return chosen, f"{way}: {path.relative_to(folder)}"


def kind(path: Path) -> str:
    """The kind of a file, whatever its number."""
    if "shards" in path.parts:
        return "shards/N.json"
    if "c" in path.parts:
        return "chunks of " + path.parts[path.parts.index("c") - 1]
    return path.name


def judged(status: int, said: str, found: dict[str, Any], expected: dict[str, Any], outside: bool) -> str:
    """How a fault ended."""
    if outside:
        return "OPEN: a file outside of the folder"
    if status == TRACEBACK or "Traceback" in said:
        return "OPEN: traceback"
    if status < 0:
        return "OPEN: hang" if status == -signal.SIGALRM else f"OPEN: signal {-status}"
    if status:
        return "refused" if status in (1, 2) and "error" in said.lower() else f"OPEN: status {status} without a message"
    if not expected:
        return "accepted"
    return "right" if found == expected else "OPEN: another result in silence"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=[target.stage for target in TARGETS], help="one alone")
    options = parser.parse_args()
    targets = [target for target in TARGETS if options.stage in (None, target.stage)]
    results: Counter[str] = Counter()
    table: dict[str, Counter[str]] = {}
    findings = []
    with tempfile.TemporaryDirectory() as name:
        whole, case = Path(name, "whole", "run"), Path(name, "case")
        whole.mkdir(parents=True)
        prepare(whole)
        expected = {}
        for number in range(-len(targets), options.count):  # the first of each target is not damaged
            target, rng = targets[number % len(targets)], random.Random(f"{options.seed} {number}")
            shutil.copytree(whole, case / "run")
            (case / "outside").write_text("{}")
            for pattern in target.removed:
                for path in list((case / "run").glob(pattern)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            file, what = damage(case / "run", target, rng) if number >= 0 else ("", "")
            status, said = ran(case / "run", target.commands)
            found = outcome(case / "run", target.result)
            outside = {p.name for p in case.iterdir()} != {"run", "outside", "log"} or (
                (case / "outside").read_text() != "{}"
            )
            if number < 0:
                expected[target.stage] = found
                if status or bool(found) != bool(target.result):
                    sys.exit(f"{target.stage}: not even undamaged: {said}")
            else:
                end = judged(status, said, found, expected[target.stage], outside)
                table.setdefault(f"{target.stage}: {file}", Counter())[end] += 1
                results[end] += 1
                if end.startswith("OPEN"):
                    findings.append({"fault": number, "what": what, "end": end, "said": said[-1500:]})
                    print(json.dumps(findings[-1], indent=1), file=sys.stderr, flush=True)
            shutil.rmtree(case)
    figures = {
        "seed": options.seed,
        "faults": sum(results.values()),
        "results": dict(results),
        "date": str(date.today()),
    }
    print(json.dumps(figures | {"by_file": table, "open": findings}, indent=1))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
