"""What the program asks of OpenMP and glibc for itself, before torch loads."""

import json
import os
import subprocess
import sys

from conftest import ROOT

# As `python -m pipeline --help`; then blocks that glibc always maps apart, taken and freed: new pages are faults.
PROGRAM = """
import json, os, resource, runpy, sys
sys.argv = ["pipeline", "--help"]
try:
    runpy.run_module("pipeline", run_name="__main__")
except SystemExit:
    pass
started = "torch" in sys.modules
size = 40 << 20
b"x" * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for fewer in range(10):
    b"x" * (size - fewer)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
sys.stderr.write(json.dumps([os.environ.get("OMP_WAIT_POLICY"), started, faults]))
"""
MALLOC = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc's own defaults


def started(**own: str) -> tuple[str, bool, int]:
    """OMP_WAIT_POLICY as the program leaves it, whether torch was loaded by then, and page faults."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment | own, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(ran.stderr))


def test_memory_is_kept_and_threads_sleep_unless_the_user_says_otherwise():
    policy, torch_was_loaded, faults = started()
    assert (policy, torch_was_loaded) == ("passive", False)  # the variable is there before torch can be
    policy, _, faults_of_glibc = started(OMP_WAIT_POLICY="active", **MALLOC)
    assert policy == "active"
    assert faults * 10 < faults_of_glibc
