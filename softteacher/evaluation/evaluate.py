"""Step 3: score a model folder the COCO way and write the report."""

from __future__ import annotations

import json
from typing import Any

from softteacher import storage
from softteacher.console import say
from softteacher.data.coco import load_coco
from softteacher.data.masks import require_masks
from softteacher.device import find_device, find_precision
from softteacher.errors import UserError
from softteacher.evaluation.inference import score
from softteacher.evaluation.report import write_report
from softteacher.model_folder import WEIGHTS, ModelFolder, Weights


def evaluate(model: str, data: str, out: str, *, weights: Weights | None = None) -> dict[str, Any]:
    """Score teacher and student on a data set.

    Args:
        model: model folder, local or `s3://`.
        data: manifest or COCO json with boxes.
        out: folder for `metrics.json`, `detections.json` (COCO results format) and `report.html`.
        weights: score only these; otherwise both, and detections and report are the teacher's.

    Returns:
        What `metrics.json` says: the COCO numbers and `per_class` of the weights that the report shows, of masks under
        `segm`, and the same under `teacher` and `student`.

    Raises:
        UserError: bad input; nothing is written then.
    """
    with storage.local_input(model) as path:
        source = ModelFolder(path, model)
        dataset = load_coco(data)
        if dataset.categories != source.categories:
            raise UserError(
                f"{data}: its classes are not those that {model} was trained on; use a data set with the same"
            )
        settings = source.settings
        if settings.detector.masks:
            require_masks(dataset)
        device = find_device(settings.training.device)
        scored: dict[str, Any] = {}
        for name in [weights] if weights else WEIGHTS:
            detector = source.detector(name).to(device)
            detector.precision = find_precision(settings.training.precision, device)
            scored[name] = score(detector, dataset, settings, device)
            of_boxes = scored[name][0]
            for what, ap in (("", of_boxes), (" masks", of_boxes.get("segm"))):
                if ap:
                    say(f"evaluate: {name}{what} AP {ap['AP']:.4f}, AP50 {ap['AP50']:.4f}, AP75 {ap['AP75']:.4f}")
        shown: Weights = weights or "teacher"
        numbers, results, readable = scored[shown]
        metrics = numbers | {"weights": shown} | {name: found[0] for name, found in scored.items()}
        with storage.output_folder(out) as folder:
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
            (folder / "detections.json").write_text(json.dumps(results))
            page = write_report(readable, results, metrics, source.provenance)
            # a file name need not be valid Unicode
            (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return metrics
