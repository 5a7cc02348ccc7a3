"""Where a model came from: commit, image, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from softteacher import __version__, distributed


def surroundings(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What `provenance.json` says of code and machine.

    Args:
        device: that it was trained on.
        precision: of the student.
    """
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_sha": git_sha(),
        "image": os.environ.get("SOFTTEACHER_IMAGE"),
        "run_id": os.environ.get("SOFTTEACHER_RUN"),
        "versions": {
            "softteacher": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "platform": platform.platform(),
            "device": str(device),
            "processes": distributed.world_size(),
            "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."),
        },
    }


def git_sha() -> str | None:
    """Commit of the code, `-dirty` if the package is changed; none outside a checkout.

    An image knows it by `SOFTTEACHER_GIT_SHA`.
    """
    if sha := os.environ.get("SOFTTEACHER_GIT_SHA"):
        return sha
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        sha, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "."])
        )
        return sha + "-dirty" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None
