"""What every benchmark shares: the machine, the versions, the result file."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of x86 processors: what decides how fast matrices multiply


def write_result(script: str, figures: dict[str, Any]) -> None:
    """Write `results/<script>.json` (figures, command, versions, machine) and print it as the last line.

    Args:
        script: name of the benchmark.
        figures: what it measured.
    """
    result = {**figures, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), **machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{script}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def peak_gb() -> float:
    """Most resident memory that this process ever had, in GiB (`ru_maxrss` would count that of its parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Processor, its features (where Linux tells them), cores, memory and the versions that decide a figure."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    features = [name for name in FEATURES if name in facts.get("flags", "").split()]
    versions = {}
    for name in ("torch", "torchvision", "onnxruntime", "numpy", "kfp"):
        with suppress(PackageNotFoundError):  # of an extra that isn't installed
            versions[name] = version(name)
    return {
        "machine": {
            "processor": facts.get("model name") or platform.processor(),
            **({"features": features} if "flags" in facts else {}),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "platform": platform.platform(),
        },
        "versions": versions,
    }
