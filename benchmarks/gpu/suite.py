"""`make test` on this machine's device: all test files whose packages are installed.

Without a GPU only those of the kernels, as `make test` runs there anyway.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.check import ROOT, Place

TESTS = ROOT / "tests"
CPU_FILES = ("test_kernels.py", "test_kernel_choice.py")
PROCESSES = 10


def lacking(file: Path, seen: frozenset[Path] = frozenset()) -> list[str]:
    """Packages, not installed, that a test file imports at its top, or a file of tests/ that it imports."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    tests = {TESTS / f"{name}.py" for name in names if (TESTS / f"{name}.py").exists()} - seen
    below = [name for test in tests for name in lacking(test, seen | tests | {file})]
    here = {path.stem for path in (*TESTS.iterdir(), *ROOT.iterdir(), *(ROOT / "benchmarks").iterdir())}
    return sorted({*below, *(name for name in names - here if not importlib.util.find_spec(name))})


def run(place: Place) -> None:
    """The check."""
    if not importlib.util.find_spec("pytest"):
        place.note(tests="pytest is not installed")
        return
    files = sorted(TESTS.glob("test_*.py")) if place.on_gpu else [TESTS / name for name in CPU_FILES]
    without = {file.name: missing for file in files if (missing := lacking(file))}
    place.note(left_out=without)
    options = ["-p", "benchmarks.gpu.at_once", "-rfEs", "--tb=short", "--durations=15"]
    options += ["--continue-on-collection-errors"]
    if place.on_gpu and importlib.util.find_spec("xdist"):
        options += ["-n", str(PROCESSES), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    chosen = [str(file) for file in files if file.name not in without]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command, lines = [sys.executable, "-m", "pytest", *options, *chosen], []
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as ran:
        assert ran.stdout
        for line in ran.stdout:  # at once, so that the log of a run out of time says where it was
            print(line, end="", flush=True)
            lines.append(line.strip())
    failed = [found[1] for line in lines if (found := re.match(r"(?:FAILED|ERROR) (\S+)", line))]
    place.note(tests=lines[-1].strip("= "), failed=failed)
    assert ran.returncode == 0, f"failed: {failed}"
