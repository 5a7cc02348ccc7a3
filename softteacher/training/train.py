"""Step 2: `train`, from manifests to a model folder."""

from __future__ import annotations

import copy
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

from softteacher import __version__, storage
from softteacher.config import Settings
from softteacher.console import say
from softteacher.data.check import check_images
from softteacher.data.coco import CocoDataset, load_coco, require_same_classes
from softteacher.data.loader import batches
from softteacher.data.split import images_only
from softteacher.detectors.build import build
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.device import find_device, use_bf16
from softteacher.errors import UserError
from softteacher.evaluation.inference import score
from softteacher.methods import build_method
from softteacher.model_folder import ModelFolder
from softteacher.training.trainer import run_training


def train(labeled: str, unlabeled: str | None, validation: str, out: str, settings: Settings) -> dict[str, Any]:
    """Train a detector and write its model folder.

    Args:
        labeled: manifest or COCO json with boxes.
        unlabeled: manifest, COCO json, folder or `s3://` prefix of images; none for supervised training.
        validation: manifest or COCO json; scored at the end, and handed on in the model folder.
        out: the model folder, local or `s3://`.
        settings: everything else.

    Returns:
        `metrics.json`: AP and more of teacher and student.

    Raises:
        UserError: bad input; nothing is left at `out` then.
    """
    device = find_device(settings.training.device)
    train_set, val_set = load_coco(labeled), load_coco(validation)
    require_same_classes(train_set, val_set)
    extra = _unlabeled(unlabeled, train_set, settings)
    val_set = check_images(val_set, settings.data.max_bad_images, "check val")  # not found out after days of training
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    torch.manual_seed(settings.training.seed)
    student = build(settings.detector, len(train_set.categories)).to(device)
    student.to(memory_format=torch.channels_last)
    student.bf16 = use_bf16(settings.training.precision, device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    method = build_method(settings, student, teacher)
    say(
        f"train: {settings.method.name}, {settings.detector.name}, {len(train_set.categories)} classes, "
        f"{len(train_set)} labelled and {len(extra or ())} unlabelled images, "
        f"{settings.training.iterations} iterations, {device}, {'bf16' if student.bf16 else 'fp32'}"
    )

    def validate(detector: FasterRCNN) -> dict[str, Any]:
        return score(detector, val_set, settings, device)[0]

    with storage.output_folder(out) as folder:
        burn_in = round(settings.method.burn_in * settings.training.iterations)
        sets = {"labeled": train_set} | ({"unlabeled": extra} if extra else {})
        facts = run_training(
            student,
            teacher,
            method,
            batches(train_set, extra, settings, start=0, burn_in=burn_in),
            settings,
            device,
            folder,
            sets,
            lambda step: {f"{n}_AP": validate(d)["AP"] for n, d in (("teacher", teacher), ("student", student))},
        )
        metrics = {"teacher": validate(teacher), "student": validate(student)}
        provenance = {
            "format": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": settings.method.name,
            "seed": settings.training.seed,
            "data": {
                name: {"source": d.source, "root": d.root, "images": len(d), "fingerprint": d.fingerprint()}
                for name, d in {**sets, "validation": val_set}.items()
            },
            "git_sha": git_sha(),
            "versions": versions(),
            "machine": {"platform": platform.platform(), "device": str(device), "threads": torch.get_num_threads()},
            "training": facts,
        }
        ModelFolder.write(folder, student, teacher, settings, val_set, metrics, provenance)
    say(f"train: teacher AP {metrics['teacher']['AP']:.3f}, student AP {metrics['student']['AP']:.3f} -> {out}")
    return metrics


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "softteacher": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def git_sha() -> str | None:
    """Commit of the code, `-dirty` if changed; none outside a checkout. An image knows it by `SOFTTEACHER_GIT_SHA`."""
    if sha := os.environ.get("SOFTTEACHER_GIT_SHA"):
        return sha
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _unlabeled(unlabeled: str | None, train_set: CocoDataset, settings: Settings) -> CocoDataset | None:
    if settings.method.name == "supervised":
        return None
    found = None
    if unlabeled is not None:
        found = load_coco(unlabeled, labeled=False) if unlabeled.endswith(".json") else images_only(unlabeled)
    if not found:
        say(f"warning: no unlabelled images ({unlabeled or 'no --unlabeled'}): this is supervised training then")
        return None
    if found.categories:
        require_same_classes(train_set, found)
    if not settings.training.unlabeled_per_batch:
        raise UserError(
            "training.unlabeled_per_batch = 0: no unlabelled image would be used; set it, or use supervised"
        )
    return found
