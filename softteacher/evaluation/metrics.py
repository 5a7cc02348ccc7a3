"""COCO metrics, by pycocotools itself."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections

KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco_results(dataset: CocoDataset, found: dict[int, Detections]) -> list[dict[str, Any]]:
    """Detections (numpy, original pixels, by image id) in COCO results format; boxes to .01 pixel, scores to 1e-5."""
    return [
        {
            "image_id": image_id,
            "category_id": dataset.categories[label][0],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
        }
        for image_id, d in sorted(found.items())
        for (x1, y1, x2, y2), score, label in zip(d.boxes.tolist(), d.scores.tolist(), d.labels.tolist(), strict=True)
    ]


def coco_metrics(dataset: CocoDataset, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The twelve COCO numbers, AP per class, and the precision-recall curve.

    Args:
        dataset: ground truth.
        results: COCO results format.

    Returns:
        `AP`, `AP50`, ... (-1 where no box of that size exists, as pycocotools has it), `per_class`: AP by class name
        (none without ground truth), `curve`: 101 precisions at recalls 0 to 1 for IoU .5 and .75, mean over classes.
    """
    ev = evaluate_results(dataset, results)
    precision = ev.eval["precision"]  # [IoU, recall, class, area, max detections]
    per_class = precision[:, :, :, 0, -1].transpose(2, 0, 1).reshape(len(dataset.categories), -1)
    curve = precision[:, :, :, 0, -1]
    present = (curve > -1).all((0, 1))
    return {
        **{key: float(value) for key, value in zip(KEYS, ev.stats, strict=True)},
        "per_class": {
            name: float(p[p > -1].mean()) if (p > -1).any() else None
            for name, p in zip(dataset.classes, per_class, strict=True)
        },
        "curve": {iou: curve[n][:, present].mean(1).round(4).tolist() for iou, n in (("0.5", 0), ("0.75", 5))},
    }


def evaluate_results(dataset: CocoDataset, results: list[dict[str, Any]]) -> COCOeval:
    """pycocotools' evaluation object after evaluate, accumulate and summarize."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset.to_json()
        truth.createIndex()
        found = COCO()
        found.dataset = {
            "images": truth.dataset["images"],
            "categories": truth.dataset["categories"],
            "annotations": [
                {**r, "id": n + 1, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for n, r in enumerate(results)
            ],
        }
        found.createIndex()
        ev = COCOeval(truth, found, "bbox")
        ev.params.imgIds = [i.id for i in dataset.images]
        ev.params.catIds = [i for i, _ in dataset.categories]
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    ev.stats = np.asarray(ev.stats)
    return ev
