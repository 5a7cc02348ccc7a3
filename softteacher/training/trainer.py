"""The training loop. It doesn't know which method it runs: forward, sum of the loss terms, step, EMA, log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from softteacher.config import Settings, TrainingSettings
from softteacher.console import Bar, say
from softteacher.data.check import report_broken
from softteacher.data.coco import CocoDataset
from softteacher.data.loader import Batch
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.errors import UserError
from softteacher.methods import Method
from softteacher.training.ema import ema_momentum, update_teacher

MAX_SKIPPED = 20


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then divided by 10 after each of `lr_steps`."""
    warm = min(1.0, step / settings.warmup_iterations) if settings.warmup_iterations else 1.0
    drops = sum(step >= round(share * settings.iterations) for share in settings.lr_steps)
    return settings.lr * (settings.warmup_factor + (1 - settings.warmup_factor) * warm) * 0.1**drops


def run_training(
    student: FasterRCNN,
    teacher: FasterRCNN,
    method: Method,
    batches: Iterator[Batch],
    settings: Settings,
    device: torch.device,
    log_folder: Path,
    sets: dict[str, CocoDataset],
    validate: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train the student; the teacher follows.

    Args:
        student: trained in place.
        teacher: moved in place.
        method: gives the losses.
        batches: one per step.
        settings: optimisation.
        device: where the detectors are.
        log_folder: gets `training.jsonl` and TensorBoard events.
        sets: the data sets by the names that `Batch.broken` uses.
        validate: called every `evaluate_every` steps; its numbers are logged.

    Returns:
        Facts of the run: steps, skipped steps, images per second.

    Raises:
        UserError: too many unreadable images, or a loss that stays not finite.
    """
    s = settings.training
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay)
    broken: dict[str, set[str]] = {name: set() for name in sets}
    skipped, in_a_row, images, started = 0, 0, 0, time.monotonic()
    window: dict[str, list[float]] = {}
    window_started, window_images = started, 0
    with (
        Bar(settings.method.name, s.iterations) as bar,
        SummaryWriter(log_folder) as board,
        (log_folder / "training.jsonl").open("a") as log,
    ):
        for step, raw in enumerate(batches):
            for name, lines in raw.broken.items():
                if not broken[name].issuperset(lines):
                    known, broken[name] = broken[name], broken[name] | set(lines)
                    report_broken(sets[name], broken[name], settings.data.max_bad_images, known)
            batch = raw.to(device)
            # sampling and jitter depend on (seed, step) only, as the batches do; torch's generator on the CPU takes
            # just 32 bits of a seed
            torch.manual_seed(int(np.random.SeedSequence([s.seed, step]).generate_state(1)[0]))
            losses, facts = method.losses(batch, step)
            total = torch.stack(list(losses.values())).sum()
            count = len(batch.labeled.images) + (len(batch.strong.images) if batch.strong else 0)
            images, window_images = images + count, window_images + count
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(parameters, s.clip_gradient or math.inf)
            if torch.isfinite(norm):
                optimizer.step()
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                bad = ", ".join(k for k, v in losses.items() if not torch.isfinite(v)) or "gradient"
                say(f"step {step}: not finite ({bad}); step skipped ({skipped} so far)")
                if in_a_row == MAX_SKIPPED:
                    raise UserError(
                        f"step {step}: the loss was not finite {in_a_row} times in a row; lower training.lr "
                        f"(now {s.lr:g}) or set training.clip_gradient=10"
                    )
            update_teacher(teacher, student, ema_momentum(step, settings.method.ema_momentum))

            numbers = {"loss": total.item(), **{k: v.item() for k, v in losses.items()}, **facts}
            for key, value in numbers.items():
                window.setdefault(key, []).append(value)
            last = step + 1 == s.iterations
            scores = validate(step) if validate and s.evaluate_every and (step + 1) % s.evaluate_every == 0 else {}
            if (step + 1) % s.log_every == 0 or last or scores:
                now = time.monotonic()
                means = {k: _mean(v) for k, v in window.items()}
                means |= {"lr": learning_rate(step, s), "images_per_second": window_images / (now - window_started)}
                means |= {"skipped": skipped, **scores}
                log.write(json.dumps({"step": step + 1, **{k: _rounded(v) for k, v in means.items()}}) + "\n")
                log.flush()
                for key, value in means.items():
                    board.add_scalar(key, value, step + 1)
                window, window_images, window_started = {}, 0, now
                note = f"loss {means['loss']:.3f}"
                if "pseudo_boxes_cls" in means:
                    note += f", {means['pseudo_boxes_cls']:.1f} pseudo boxes an image"
            bar.advance(note if (step + 1) >= s.log_every or last else f"loss {numbers['loss']:.3f}")
    seconds = time.monotonic() - started
    unreadable = {name: sorted(lines) for name, lines in broken.items() if lines}
    return {
        "steps": s.iterations,
        "skipped": skipped,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "unreadable": unreadable,
    }


def _mean(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else 0.0


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
