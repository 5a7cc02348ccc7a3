"""A training that is killed 20 times at random moments, against one that is not: are the weights the same bits?

    python benchmarks/resume.py

`softteacher train` on digits in a process of its own gets SIGKILL after a random time, in its start, in a step or in
writing a checkpoint, and is started again with the same command. Writes `results/resume.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result

from softteacher.data.split import split
from softteacher.demo.digits import make_digits

WEIGHTS = ("student.pt", "teacher.pt", "metrics.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--longest", type=float, default=14.0, help="seconds after a start until which a kill may come")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    a = parser.parse_args()
    moments = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_digits(root / "digits", train=40, val=8)
        split(str(root / "digits"), str(root / "split"), percent=25, stratify=True)
        command = [sys.executable, "-m", "softteacher", "train", "--preset", "demo"]
        for name in ("labeled", "unlabeled", "validation"):
            command += [f"--{name}", str(root / "split" / f"{name}.json")]
        settings = {"training.iterations": a.iterations, "training.checkpoint_every": 5, "training.log_every": 5}
        settings |= {"data.short_side": 96, "method.pool_threshold": 0.1, "method.cls_threshold": 0.1}
        command += [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
        started = time.monotonic()
        start([*command, "--out", str(root / "whole")]).wait()
        whole = time.monotonic() - started

        started, kills, steps = time.monotonic(), 0, []
        while True:
            process = start([*command, "--out", str(root / "killed")])
            try:
                process.wait(moments.uniform(0.5, a.longest) if kills < a.kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                steps.append(max((int(p.name[5:14]) for p in root.glob("killed/checkpoints/step-*.pt")), default=0))
                print(f"kill {kills}: checkpoint of step {steps[-1]}", flush=True)
        killed = time.monotonic() - started
        if process.returncode or kills < a.kills:
            sys.exit(f"ended after {kills} kills with code {process.returncode}; raise --iterations")
        digests = [{n: digest(root / run / n) for n in WEIGHTS} for run in ("whole", "killed")]
        logs = [log(root / run) for run in ("whole", "killed")]
    same = digests[0] == digests[1] and logs[0] == logs[1]
    print(f"{kills} kills, {killed:.0f} s instead of {whole:.0f}; the same bits: {same}")
    write_result(
        "resume",
        {
            "kills": kills,
            "identical": same,
            "iterations": a.iterations,
            "checkpoint_steps": steps,
            "seconds": {"whole": whole, "killed": killed},
            "sha256": digests[1],
        },
    )
    sys.exit(not same)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def log(run: Path) -> list[dict[str, float]]:
    """The training log without its clock."""
    rows = map(json.loads, (run / "training.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


if __name__ == "__main__":
    main()
