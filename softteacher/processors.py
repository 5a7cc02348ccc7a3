"""How many processors this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def cpu_count(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Those of the machine, its affinity and its container's limit, whichever is least; a started one counts.

    Args:
        cgroup: where the container's own control group is mounted, of version 2 or 1.
    """
    # OpenMP that is told to bind its threads binds this one to a single processor, which says nothing of the others
    bound = {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"} & os.environ.keys()
    known = hasattr(os, "sched_getaffinity") and not bound
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # no such file, or no limit: "max", or -1
            quota, period = (int(word) for name in files for word in (cgroup / name).read_text().split())
            if quota > 0:
                count = min(count, math.ceil(quota / period))
    return count


def engine_threads() -> int:
    """What to tell an engine that takes 0 for all cores of the machine: 0 if this process may use them all."""
    count = cpu_count()
    return 0 if count == os.cpu_count() else count
