"""The tests of what has kernels or moves tensors to a GPU, where pytest is installed."""

import importlib.util
import os
import re
import subprocess
import sys

from benchmarks.gpu.check import ROOT, Place

FILES = ("kernels", "kernel_choice", "step", "trainer", "sparse_step")  # those of whole stages take minutes
CPU_FILES = FILES[:2]  # the others run in `make test` there


def run(place: Place) -> None:
    """The check."""
    if not importlib.util.find_spec("pytest"):
        place.note(tests="pytest is not installed")
        return
    files = [f"tests/test_{name}.py" for name in (FILES if place.on_gpu else CPU_FILES)]
    options = ["-v", "-rfE", "--tb=short", "--durations=10", "-p", "no:xdist", "--continue-on-collection-errors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, lines = [sys.executable, "-m", "pytest", *options, *files], []
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as ran:
        assert ran.stdout
        for line in ran.stdout:  # at once, so that the log of a run out of time says where it was
            print(line, end="", flush=True)
            lines.append(line.strip())
    failed = [found[1] for line in lines if (found := re.match(r"(?:FAILED|ERROR) (\S+)", line))]
    place.note(tests=lines[-1].strip("= "), failed=failed)
    assert ran.returncode == 0, f"failed: {failed}"
