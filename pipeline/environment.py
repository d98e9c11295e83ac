"""What this process asks of OpenMP and glibc, before torch loads: on a CPU both cost much as they come.

Waiting threads sleep: they spin otherwise, and a busy neighbour then costs five times as much. Freed memory is kept:
glibc gives large blocks back to the system at once, and new pages for every tensor are 10% of a forward pass. Neither
changes a result. Variables that the user has set win.
"""

import ctypes
import os

# mallopt's numbers of malloc.h, the value, and the variable and tunable that a user sets the same with.
MALLOC = (
    (-4, 0, "MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max"),  # no block is a mapping of its own, which a free unmaps
    (-1, -1, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),  # the end of the heap is never given back
)


def set_up() -> None:
    """Make the settings for this process and, of OpenMP, for its children; called before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    for number, value, variable, tunable in MALLOC:
        if mallopt and variable not in os.environ and tunable not in os.environ.get("GLIBC_TUNABLES", ""):
            mallopt(number, value)
