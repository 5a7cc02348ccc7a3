"""What `detector.refine_boxes` makes of trained models: AP without and with it, and what it costs.

    python benchmarks/refine.py --name cards-supervised --model DIR --data validation.json

Of each model both are run in turn. Writes `results/refine-<name>.json`.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from common import write_result

from softteacher.evaluation.evaluate import load_detector, load_labelled
from softteacher.evaluation.inference import score
from softteacher.model_folder import ModelFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of model and data, for the result file")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="manifest or COCO json whose labels the model has not learned")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    models = {}
    for name, value in (("plain", "false"), ("refined", "true")):
        source = ModelFolder(a.model, a.model, [f"detector.refine_boxes={value}"])
        models[name] = load_detector(source, "teacher")
    dataset = load_labelled(source, a.data)
    aps: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {}
    for n in range(a.rounds + 1):  # the first is not timed: files are cold, kernels not chosen
        for name, (detector, device) in models.items():
            start = time.perf_counter()
            metrics = score(detector, dataset, source.settings, device).metrics
            if n:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
            aps[name] = {key: metrics[key] for key in ("AP", "AP50", "AP75")}
    figures: dict[str, Any] = {"images": len(dataset), "method": source.settings.method.name, **aps, "seconds": seconds}
    figures["time_ratio"] = median(r / p for p, r in zip(seconds["plain"], seconds["refined"], strict=True))
    write_result(f"refine-{a.name}", figures)


if __name__ == "__main__":
    main()
