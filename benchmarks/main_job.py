"""The main job as a user runs it: AP of supervised, student and teacher, and the time of each step.

    python benchmarks/main_job.py                       # the embedded digits
    python benchmarks/main_job.py --name cards --data DIR --preset small --set detector.backbone_weights=FILE

Writes `results/main_job-<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="digits", help="of the data set, for the result file")
    parser.add_argument("--data", help="folder or s3:// prefix; by default the embedded digits")
    parser.add_argument("--preset", help="by default the demo's own choice")
    parser.add_argument("--percent", help="share of labelled images; by default the demo's own choice")
    parser.add_argument("--set", action="append", default=[], help="setting, key=value; repeatable")
    parser.add_argument("--quick", action="store_true", help="40 iterations: does it run?")
    parser.add_argument("--out", help="keep what the run makes in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or scratch
        command = [str(Path(sys.executable).with_name("softteacher")), "demo", "--out", out]
        for option, value in (("--data", args.data), ("--preset", args.preset), ("--percent", args.percent)):
            command += [option, value] if value else []
        for setting in [*args.set, *(["training.iterations=40"] if args.quick else [])]:
            command += ["--set", setting]
        subprocess.run(command, check=True)
        facts = json.loads(Path(out, "summary.json").read_text())
    write_result(
        f"main_job-{args.name}", {key: facts[key] for key in ("images", "ap", "seconds")} | {"quick": args.quick}
    )


if __name__ == "__main__":
    main()
