"""Seconds a training step of Soft Teacher: ours against mmdetection 3.3.0's, and against its own lower limit.

    SOFTTEACHER_SHARED=TOOLS python benchmarks/training.py --reference DIR
                                                       # DIR: environment of the reference, by its `setup DIR`
                                                       # TOOLS: holds its tools/reference_speed, which is not ours
    python benchmarks/training.py --profile            # ours alone, and where its time goes

The same work on both sides: Faster R-CNN R50-FPN, 512 x 512, 1 labelled and 4 unlabelled images, 20 pseudo boxes an
image through every loss, 1000 proposals, 512 RoIs an image, stem and first stage frozen, SGD, EMA; no image loading.
Both sides run alternately, each in a process of its own, with the same threads. The limit: a supervised step on the
same five images plus the teacher's detection on four. Random weights give no pseudo boxes, so the scores are made live
the way the reference's script does it. Writes `results/training.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from common import write_result
from torch.profiler import ProfilerActivity, profile

from softteacher.config import Settings, load_settings
from softteacher.data.loader import Batch, Views
from softteacher.detectors.base import MEAN, STD
from softteacher.detectors.build import build
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.device import find_precision, keep_memory
from softteacher.methods import build_method
from softteacher.training.trainer import Trainer

SHARED = Path(os.environ.get("SOFTTEACHER_SHARED", Path(__file__).parents[2] / "shared"))
REFERENCE = SHARED / "tools" / "reference_speed" / "bench_mmdet.py"
SIDE, LABELED, UNLABELED, CLASSES, PSEUDO_BOXES = 512, 1, 4, 80, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="environment with mmdetection, made by its setup script")
    parser.add_argument("--rounds", type=int, default=2, help="times that the sides take turns")
    parser.add_argument("--iterations", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true", help="only profile one step of ours")
    parser.add_argument("--measure", choices=["fp32", "bf16"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.reference and not REFERENCE.is_file():
        parser.error(
            f"--reference: {REFERENCE}: no such file; let SOFTTEACHER_SHARED name the folder with tools/ in it"
        )
    if a.measure or a.profile:
        measure(a.measure or "fp32", a.iterations, a.threads, a.profile)
        return
    device = torch.device("cpu")
    fast_bf16 = find_precision("auto", device) == torch.bfloat16
    precisions = ["fp32", "bf16"] if fast_bf16 else ["fp32"]
    ours: dict[str, list[dict[str, list[float]]]] = {p: [] for p in precisions}
    reference: list[float] = []
    for turn in range(a.rounds):
        if a.reference:
            reference += reference_steps(a.reference, a.iterations, a.threads)
            print(f"turn {turn + 1}: reference {statistics.median(reference):.2f} s a step", flush=True)
        for precision in precisions:
            command = [sys.executable, __file__, "--measure", precision]
            options = ["--iterations", str(a.iterations), "--threads", str(a.threads)]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            ours[precision].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}: ours {precision} {ours[precision][-1]}", flush=True)
    figures: dict[str, Any] = {"images_per_step": LABELED + UNLABELED, "threads": a.threads}
    figures["seconds_reference"] = statistics.median(reference) if reference else None
    for precision in ("fp32", "bf16"):
        if precision not in ours:
            figures |= {f"ratio_{precision}": None, "why_no_bf16": "this processor does not multiply bf16 matrices"}
            continue
        part = {k: statistics.median([s for turn in ours[precision] for s in turn[k]]) for k in ours[precision][0]}
        step, limit = part["step"], part["supervised"] + part["teacher"]
        ratio = figures["seconds_reference"] / step if reference else None
        figures[f"ratio_{precision}"] = ratio
        figures[precision] = {"seconds": part, "overhead_over_limit": step / limit - 1}
        text = f"{ratio:.2f} times the reference's images/s, " if ratio else ""
        print(f"{precision}: {step:.2f} s a step, {text}{step / limit - 1:+.1%} over the limit of {limit:.2f} s")
    figures["overhead_over_limit"] = figures["bf16" if fast_bf16 else "fp32"]["overhead_over_limit"]
    write_result("training", figures)


def reference_steps(environment: Path, iterations: int, threads: int) -> list[float]:
    """Seconds of the reference's steps, by the script that comes with it."""
    command = [environment.absolute() / "bin" / "python", REFERENCE.name, "--size", f"{SIDE}x{SIDE}"]
    command += ["--sup", LABELED, "--unsup", UNLABELED, "--boxes", PSEUDO_BOXES, "--threads", threads]
    command += ["--iters", iterations]
    done = subprocess.run([*map(str, command)], cwd=REFERENCE.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the reference failed: {done.stderr[-2000:]}")
    return [float(s) for s in re.findall(r"^iter \d+ ([\d.]+)s", done.stdout, re.M)][-iterations:]


def measure(precision: str, iterations: int, threads: int, profiled: bool) -> None:
    """Time our steps and those of the limit, one of each in turn; the last line printed is JSON."""
    torch.set_num_threads(threads)
    keep_memory()
    torch.manual_seed(0)
    batch, device = make_batch(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "r50.pth"))
        torch.save(backbone(batch), weights)
        # so small that the pseudo boxes stay; it costs the same
        overrides = [f"detector.backbone_weights={weights}", "training.lr=1e-9"]
        settings = load_settings("coco-10pct", [*overrides, f"training.precision={precision}"])
        student = build(settings.detector, CLASSES).to(memory_format=torch.channels_last)
    student.precision = find_precision(precision, device)
    threshold = make_scores_live(student, batch)
    chosen = {f"{k}_threshold": threshold for k in ("pool", "rpn", "cls")} | {"reg_variance_threshold": 1e9}
    settings = settings.model_copy(update={"method": settings.method.model_copy(update=chosen)})
    teacher = copy.deepcopy(student).requires_grad_(False)
    soft_teacher = trainer(student, teacher, settings, device)
    if profiled:
        soft_teacher.step([batch])
        with profile(activities=[ProfilerActivity.CPU]) as found:
            soft_teacher.step([batch])
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))
        return
    baseline = settings.model_copy(update={"method": settings.method.model_copy(update={"name": "supervised"})})
    supervised = trainer(copy.deepcopy(student), copy.deepcopy(teacher), baseline, device)
    weak, strong, labeled = batch.weak, batch.strong, batch.labeled
    assert weak is not None
    assert strong is not None
    five = Views(
        *(torch.cat([getattr(labeled, k), getattr(strong, k)]) for k in ("images", "sizes", "matrices")),
        *(getattr(labeled, k) + getattr(strong, k) for k in ("boxes", "labels", "seeds")),
    )

    @torch.no_grad()
    def detect() -> None:
        teacher.detect(teacher.features(weak.images), weak.sizes, training=True)

    seconds: dict[str, list[float]] = {"step": [], "supervised": [], "teacher": []}
    for n in range(iterations + 1):
        works = (lambda: soft_teacher.step([batch]), lambda: supervised.step([Batch(five)]), detect)
        for name, work in zip(seconds, works, strict=True):
            start = time.perf_counter()
            result = work()
            if n:
                seconds[name].append(time.perf_counter() - start)
            if name == "step":
                boxes = {k: v for k, v in result.items() if k.startswith("pseudo_boxes")}
                if any(abs(v - PSEUDO_BOXES) > 3 for v in boxes.values()):
                    sys.exit(f"not the same work: {boxes}")
    print(json.dumps(seconds))


def trainer(student: FasterRCNN, teacher: FasterRCNN, settings: Settings, device: torch.device) -> Trainer:
    method = build_method(settings, student, teacher, {str(n): 1.0 for n in range(CLASSES)})
    return Trainer(student, teacher, method, settings, device)


def make_batch() -> Batch:
    """Smooth backgrounds with textured rectangles; the strong view is the weak one flipped."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)

    def scene() -> tuple[torch.Tensor, torch.Tensor]:
        waves = [50 * np.sin(x / rng.uniform(30, 70)) + 30 * np.cos(y / rng.uniform(30, 70)) for _ in range(3)]
        image, boxes = 110 + np.stack(waves), []
        for width, height in rng.uniform(0.08, 0.5, (7, 2)) * SIDE:
            left, top = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
            box = np.array([left, top, left + width, top + height]).astype(int)
            image[:, box[1] : box[3], box[0] : box[2]] = rng.uniform(0, 255, (3, 1, 1))
            boxes.append(box)
        noisy = (image + rng.normal(0, 15, image.shape)).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(noisy), torch.from_numpy(np.stack(boxes)).float()

    def views(scenes: list[tuple[torch.Tensor, torch.Tensor]], flip: bool) -> Views:
        matrix = torch.tensor([[-1.0, 0, SIDE], [0, 1, 0], [0, 0, 1]]) if flip else torch.eye(3)
        images = torch.stack([i.flip(-1) if flip else i for i, _ in scenes])
        count = len(scenes)
        return Views(
            images.contiguous(memory_format=torch.channels_last),
            torch.full((count, 2), SIDE),
            matrix.double().repeat(count, 1, 1),
            [b for _, b in scenes],
            [torch.from_numpy(rng.integers(0, CLASSES, len(b))) for _, b in scenes],
            list(range(count)),
        )

    unlabeled = [scene() for _ in range(UNLABELED)]
    labeled = views([scene() for _ in range(LABELED)], flip=False)
    return Batch(labeled, views(unlabeled, flip=False), views(unlabeled, flip=True))


@torch.no_grad()
def backbone(batch: Batch) -> dict[str, torch.Tensor]:
    """Random ResNet-50 weights with the batch norm statistics of these images, so that activations stay of order 1."""
    network = torchvision.models.resnet50()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    network.train()((batch.strong.images[:2].float() - mean) / std)  # type: ignore[union-attr]
    return network.state_dict()


@torch.no_grad()
def make_scores_live(detector: FasterRCNN, batch: Batch) -> float:
    """Scale and shift the class logits until about 400 scores an image pass .05; the score that 20 boxes reach."""
    weak = batch.weak
    assert weak is not None
    features = detector.features(weak.images)
    boxes, _ = detector.proposals(detector.rpn(features), weak.sizes, training=True)
    logits, _ = detector.box_head(features, boxes)
    gain = 2 / (logits[:, :-1] - logits[:, :-1].mean(0)).std()
    logits = logits * gain
    mean = logits[:, :-1].mean(0)
    low, high = -40.0, 80.0
    for _ in range(24):
        background = (low + high) / 2
        moved = torch.cat([logits[:, :-1] - mean, logits[:, -1:] + background], 1)
        many = (moved.softmax(-1)[:, :-1] > 0.05).sum() > 400 * UNLABELED
        low, high = (background, high) if many else (low, background)
    detector.head_logits.weight.mul_(gain)
    detector.head_logits.bias[:-1] = -mean
    detector.head_logits.bias[-1] = background
    found, scores, _ = detector.detect(features, weak.sizes, training=True)
    real = (found[..., 2:] - found[..., :2]).amin(-1) > 0.1  # others are clipped to nothing, and are no pseudo boxes
    return float(scores[real].sort(descending=True).values[PSEUDO_BOXES * UNLABELED - 1]) - 1e-6


if __name__ == "__main__":
    main()
