"""The training loop. It doesn't know which method it runs: forward, sum of the loss terms, step, EMA, log.

A run can be cut anywhere: what step t does depends on `Progress` and the weights only, which a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softteacher import distributed
from softteacher.config import Settings, TrainingSettings
from softteacher.console import Bar, say
from softteacher.data.check import report_broken
from softteacher.data.coco import CocoDataset
from softteacher.data.loader import Batch
from softteacher.detectors.base import Detector
from softteacher.device import is_out_of_memory
from softteacher.errors import UserError
from softteacher.methods import Method
from softteacher.training.checkpoint import Checkpoints
from softteacher.training.ema import ema_momentum, update_teacher
from softteacher.training.interrupt import Stopped, StopRequest
from softteacher.training.log import TrainingLog, window_means
from softteacher.training.watch import guard, warn

MAX_SKIPPED = 20


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then by 10 down after each of `lr_steps`, or a cosine."""
    warm = min(1.0, step / settings.warmup_iterations) if settings.warmup_iterations else 1.0
    if settings.lr_schedule == "cosine":
        fall = (1 + math.cos(math.pi * step / settings.iterations)) / 2
    else:
        fall = 0.1 ** sum(step >= round(share * settings.iterations) for share in settings.lr_steps)
    return settings.lr * (settings.warmup_factor + (1 - settings.warmup_factor) * warm) * fall


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        skipped: steps whose gradient was not finite.
        in_a_row: how many steps up to now were skipped, one after the other.
        images: views that the student saw, in all processes.
        seconds: spent, evaluations included.
        evaluating: seconds of them spent in evaluations.
        broken: what is wrong with images that could not be read, by data set.
        window: the numbers of the steps since the last line of the log.
        log: the lines of `training.jsonl`.
        evaluated: step of the last validation.
        worse: validations since the best one.
        best: step, metrics and weights of the best validation, by the teacher's AP.
        supervised: best AP of the teacher before it labelled anything.
        harm: how often the guard stepped in.
        said: keys of the warnings that were given.
    """

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    images: int = 0
    seconds: float = 0.0
    evaluating: float = 0.0
    broken: dict[str, list[str]] = field(default_factory=dict)
    window: dict[str, list[float]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    evaluated: int = 0
    worse: int = 0
    best: dict[str, Any] | None = None
    supervised: float | None = None
    harm: int = 0
    said: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What the provenance of a model says of its training."""
        return {
            "steps": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "evaluation_share": self.evaluating / max(self.seconds, 1e-9),
            "images_per_second": self.images / max(self.seconds - self.evaluating, 1e-9),
            "best_step": self.best and self.best["step"],
            "supervised_phase_AP": self.supervised,
            "guard_stepped_in": self.harm,
            "warnings": self.said,
            "unreadable": self.broken,
        }


class Trainer:
    """Trains a student; the teacher follows.

    Args:
        student: trained in place.
        teacher: moved in place.
        method: gives the losses.
        settings: optimisation.
        device: where the detectors are.
    """

    def __init__(
        self, student: Detector, teacher: Detector, method: Method, settings: Settings, device: torch.device
    ) -> None:
        self.student, self.teacher, self.settings, self.device = student, teacher, settings, device
        self.method = method
        self.progress = Progress()
        s = settings.training
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        head: list[nn.Parameter] = []
        backbone: list[nn.Parameter] = []
        bare: list[nn.Parameter] = []  # of a transformer, as its recipe has it: norms and position biases don't decay
        for name, p in student.named_parameters():
            undecayed = s.optimizer == "adamw" and (".norm" in name or "relative_position_bias_table" in name)
            part = head if not name.startswith("backbone.") else bare if undecayed else backbone
            part += [p] if p.requires_grad else []
        groups: list[dict[str, Any]] = [{"params": head, "scale": 1.0}, {"params": backbone, "scale": s.backbone_lr}]
        groups += [{"params": bare, "scale": s.backbone_lr, "weight_decay": 0.0}] if bare else []
        self.optimizer: torch.optim.Optimizer
        if s.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, s.lr, weight_decay=s.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=student.precision == torch.float16)
        losses = _Losses(student, method)
        # no buffer ever changes; the option's name depends on torch's age
        known = inspect.signature(DistributedDataParallel).parameters
        options: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        parallel = distributed.world_size() > 1
        # of 1x1 kernels, whose channels_last strides are ambiguous; they are copied, which costs nothing to speak of
        warnings.filterwarnings("ignore", message="(?s).*Grad strides do not match bucket view strides")
        self.losses: Any = DistributedDataParallel(losses, **options) if parallel else losses

    def step(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        """One optimizer step on the mean gradient of some batches, and one of the teacher.

        Returns:
            Losses and facts of the method, means over the batches.
        """
        p, s = self.progress, self.settings.training
        self.optimizer.zero_grad(set_to_none=True)
        numbers: dict[str, Tensor | float] = {}
        for n, batch in enumerate(batches):
            batch = batch.to(self.device)
            parts = batch.parts() if s.separate_backward else [batch]
            for part in parts:
                last = n + 1 == len(batches) and part is parts[-1]
                # gradients travel between processes once a step
                parallel = isinstance(self.losses, DistributedDataParallel)
                with self.losses.no_sync() if parallel and not last else contextlib.nullcontext():
                    losses, facts = self.losses(part)
                    if not losses:  # nothing is learnt from unlabelled images now
                        continue
                    total = torch.stack(list(losses.values())).sum()
                    self.scaler.scale(total / len(batches)).backward()
                seen = {"loss": total.detach(), **{k: v.detach() for k, v in losses.items()}, **facts}
                for key, value in seen.items():
                    numbers[key] = numbers.get(key, 0.0) + value / len(batches)
            p.images += distributed.world_size() * sum(len(v.images) for v in (batch.labeled, batch.strong) if v)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(p.step, s) * group["scale"]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, s.clip_gradient or math.inf)
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            p.in_a_row = 0
        else:
            p.skipped, p.in_a_row = p.skipped + 1, p.in_a_row + 1
            terms = {k: v for k, v in numbers.items() if isinstance(v, Tensor) and k != "loss"}
            bad = ", ".join(k for k, v in terms.items() if not torch.isfinite(v)) or "gradient"
            say(f"step {p.step}: not finite ({bad}); step skipped ({p.skipped} so far)")
            if p.in_a_row == MAX_SKIPPED:
                raise UserError(
                    f"step {p.step}: the loss was not finite {p.in_a_row} times in a row; lower training.lr "
                    f"(now {s.lr:g}) or set training.clip_gradient=10"
                )
        self.scaler.update()
        method = self.settings.method
        update_teacher(self.teacher, self.student, ema_momentum(p.step, method.ema_momentum, method.ema_ramp))
        p.step += 1
        if unsup := [v for k, v in numbers.items() if k.startswith("unsup_")]:
            numbers["unsup_over_sup"] = sum(unsup) / (numbers["loss"] - sum(unsup))
        return numbers

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.method.state(),
            "progress": dict(vars(self.progress)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.method.load_state(state["method"])
        self.progress = Progress(**state["progress"])


def run_training(
    trainer: Trainer,
    batches: Iterator[Batch],
    sets: dict[str, CocoDataset],
    log_folder: Path | None = None,
    checkpoints: Checkpoints | None = None,
    validate: Callable[[], dict[str, dict[str, Any]]] | None = None,
    burn_in: Checkpoints | None = None,
) -> None:
    """Train from where the trainer's progress stands to the end, or to an early stop.

    Args:
        trainer: of a new run, or with the state of a checkpoint.
        batches: of the steps that are left.
        sets: the data sets by the names that `Batch.broken` uses.
        log_folder: gets `training.jsonl` and TensorBoard events; none in all processes but one.
        checkpoints: written every `checkpoint_every` steps, at the end and when the process is told to stop; none:
            in all processes but one, or without checkpoints.
        validate: metrics, at least of `teacher`, every `evaluate_every` steps and at the end, and that of burn-in.
        burn_in: gets the state at the end of burn-in, for runs of other methods.

    Raises:
        UserError: too many unreadable images, out of memory, or a loss that stays not finite.
        Stopped: SIGTERM or SIGINT came; the last checkpoint holds the step that was under way.
    """
    s, p = trainer.settings.training, trainer.progress
    window: dict[str, list[Tensor | float]] = {k: list(v) for k, v in p.window.items()}
    with (
        Bar(trainer.settings.method.name, s.iterations, p.step) as bar,
        TrainingLog(log_folder, p.log) as log,
        _memory_explained(p),
        StopRequest().watching() as request,
    ):
        window_started, window_images = time.monotonic(), p.images
        saved, note = p.step, ""

        def state() -> dict[str, Any]:
            p.window = {k: [float(x) for x in v] for k, v in window.items()}
            return trainer.state()

        def save(wait: bool) -> None:
            nonlocal saved
            if checkpoints and saved != p.step:
                checkpoints.save(p.step, state(), wait)
            elif checkpoints and wait:
                checkpoints.finish(strict=True)
            saved = p.step

        while True:
            ends = (trainer.settings.burn_in_steps, s.iterations)  # the first is what the guard compares with
            due = s.evaluate_every and p.step and (p.step % s.evaluate_every == 0 or p.step in ends)
            if validate and due and p.evaluated != p.step:
                started = time.monotonic()
                try:
                    with request.at_once():
                        metrics = validate()
                except Stopped:
                    save(wait=True)
                    raise
                _judge(trainer, metrics)
                guard(trainer, metrics["teacher"]["AP"])
                seconds = time.monotonic() - started
                p.evaluating, p.seconds = p.evaluating + seconds, p.seconds + seconds
                window_started += seconds
                scores = {f"{name}_AP": m["AP"] for name, m in metrics.items()}
                log.write({"step": p.step, **scores, "evaluation_seconds": seconds})
                saved = -1  # the checkpoint of this step, if there is one, doesn't know of the evaluation
            if "unlabeled" in sets and p.step <= trainer.settings.burn_in_steps:
                p.worse = 0  # patience is for pseudo labels, which burn-in hasn't seen
            if s.patience and p.worse >= s.patience:
                say(f"step {p.step}: {p.worse} validations without a better teacher: stopped early")
                break
            if p.step == s.iterations:
                break
            if burn_in and p.step == trainer.settings.burn_in_steps:
                burn_in.save(p.step, state(), wait=True)
            if s.checkpoint_every and p.step % s.checkpoint_every == 0 and p.step:
                save(wait=False)
            if any(distributed.mean([float(request.signal)], trainer.device)):
                save(wait=True)
                request.stop()

            started = time.monotonic()
            parts = [next(batches) for _ in range(s.accumulate)]
            for part in parts:
                for name, lines in part.broken.items():
                    known = p.broken.get(name, [])
                    if not set(known).issuperset(lines):
                        p.broken[name] = sorted({*known, *lines})
                        report_broken(sets[name], p.broken[name], trainer.settings.data.max_bad_images, known)
            for key, value in trainer.step(parts).items():
                window.setdefault(key, []).append(value)
            p.seconds += time.monotonic() - started
            if p.step % s.log_every == 0 or p.step == s.iterations:
                line = window_means(window, trainer.device)
                now = time.monotonic()
                rate = (p.images - window_images) / (now - window_started)
                window, window_images, window_started = {}, p.images, now
                line |= {"lr": learning_rate(p.step - 1, s), "images_per_second": rate, "skipped": p.skipped}
                log.write({"step": p.step, **line})
                warn(trainer, line)
                note = f"loss {line['loss']:.3f}" if "loss" in line else "loss not finite"
                if "pseudo_boxes_cls" in line:
                    note += f", {line['pseudo_boxes_cls']:.1f} pseudo boxes an image"
            bar.advance(note)
        if s.checkpoint_every:
            save(wait=False)  # if the last evaluation is cut off, the training isn't lost


def _judge(trainer: Trainer, metrics: dict[str, dict[str, Any]]) -> None:
    """Keep the weights if the teacher is better than it ever was."""
    p = trainer.progress
    p.evaluated = p.step
    if p.best and metrics["teacher"]["AP"] <= p.best["metrics"]["teacher"]["AP"]:
        p.worse += 1
        return
    p.worse = 0
    weights = {
        name: {k: v.detach().cpu().clone() for k, v in detector.state_dict().items()}
        for name, detector in (("teacher", trainer.teacher), ("student", trainer.student))
    }
    p.best = {"step": p.step, "metrics": metrics, **weights}


class _Losses(nn.Module):
    """A method's losses as the forward of a module, which is what DistributedDataParallel hooks into."""

    def __init__(self, student: Detector, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        return self.method.losses(batch)


@contextlib.contextmanager
def _memory_explained(progress: Progress) -> Iterator[None]:
    """Out of memory is the user's to mend: say with which settings."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        text = (str(e).splitlines() or [""])[0][:200]
        if "DataLoader worker" in text:
            what = f"a loader process was killed ({text}); lower data.workers or data.short_side"
        elif is_out_of_memory(e):
            what = (
                f"out of memory ({text}); set training.separate_backward=true, or lower data.short_side, "
                "training.unlabeled_per_batch (and raise training.accumulate), detector.roi_batch or "
                "detector.proposals_train"
            )
        else:
            raise
        raise UserError(f"step {progress.step}: {what}") from e
