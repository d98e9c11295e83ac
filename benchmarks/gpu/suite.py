"""The tests of what has kernels or moves tensors to a GPU, where pytest is installed."""

import importlib.util
import os
import re
import subprocess
import sys

from benchmarks.gpu.check import ROOT, Place

FILES = ("kernels", "sparse_step", "step", "trainer", "kernel_choice", "products", "harvest", "activity")
CPU_FILES = ("kernels", "kernel_choice")  # the others run in `make test` there


def run(place: Place) -> None:
    """The check."""
    if not importlib.util.find_spec("pytest"):
        place.note(tests="pytest is not installed")
        return
    files = [f"tests/test_{name}.py" for name in (FILES if place.on_gpu else CPU_FILES)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rfE",
        "--tb=short",
        "-p",
        "no:xdist",
        "--continue-on-collection-errors",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *files], cwd=ROOT, env=environment, text=True, capture_output=True)
    print(ran.stdout[-15_000:], ran.stderr[-2000:], flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    place.note(tests=ran.stdout.strip().splitlines()[-1], failed=failed)
    assert ran.returncode == 0, f"failed: {failed}"
