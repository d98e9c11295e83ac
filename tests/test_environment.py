"""What the program asks of OpenMP and glibc for itself, before torch loads."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# As `python -m pipeline --help`; then blocks of 1 MB, taken and freed: pages that are new each time are faults.
PROGRAM = """
import json, os, resource, runpy, sys
sys.argv = ["pipeline", "--help"]
try:
    runpy.run_module("pipeline", run_name="__main__")
except SystemExit:
    pass
started = "torch" in sys.modules
b"x" * (1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1 << 20, (1 << 20) + 100):
    b"x" * size
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
sys.stderr.write(json.dumps([os.environ.get("OMP_WAIT_POLICY"), started, faults]))
"""
MALLOC = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc's own defaults


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active", **MALLOC}])
def test_memory_is_kept_and_threads_sleep_unless_the_user_says_otherwise(own):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment | own, capture_output=True, text=True, check=True
    )
    policy, torch_was_loaded, faults = json.loads(ran.stderr)
    assert policy == own.get("OMP_WAIT_POLICY", "passive")
    assert not torch_was_loaded  # `--help` loads no torch, so the variable is there before it can be
    assert faults > 10_000 if own else faults < 2000
