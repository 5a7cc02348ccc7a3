"""Most memory of a training step of Soft Teacher with one backward and with two (`training.separate_backward`).

    python benchmarks/memory.py

Faster R-CNN R50-FPN, 512 x 512, the 4 labelled and 4 unlabelled images of a process of `coco-full`, fp32, on the CPU.
Each in a process of its own, of which the resident memory counts: weights, optimizer and Python, too. Writes
`results/memory.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import training
from common import peak_gb, write_result

from softteacher.config import load_settings
from softteacher.detectors.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["true", "false"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure)))
        return
    figures = {}
    for name, value in (("one_backward", "false"), ("separate_backward", "true")):
        done = subprocess.run([sys.executable, __file__, "--measure", value], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {figures[name]['step_gb']:.2f} GB more than before the step", flush=True)
    ratio = figures["separate_backward"]["step_gb"] / figures["one_backward"]["step_gb"]
    write_result("memory", figures | {"step_ratio": ratio})


def measure(separate: str) -> dict[str, float]:
    """GiB resident at most before and in two steps, the second of which has the optimizer's state."""
    torch.manual_seed(0)
    training.LABELED = training.UNLABELED = 4
    batch, device = training.make_batch(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "r50.pth"))
        torch.save(training.backbone(batch), weights)
        overrides = [f"detector.backbone_weights={weights}", f"training.separate_backward={separate}"]
        settings = load_settings("coco-full", [*overrides, "training.lr=1e-9", "training.precision=fp32"])
        student = build(settings.detector, training.CLASSES).to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False)
    trainer = training.trainer(student, teacher, settings, device)
    before = peak_gb()
    for _ in range(2):
        trainer.step([batch])
    return {"before_gb": before, "peak_gb": peak_gb(), "step_gb": peak_gb() - before}


if __name__ == "__main__":
    main()
