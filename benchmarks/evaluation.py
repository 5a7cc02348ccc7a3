"""COCO evaluation of 5,000 images, 100 detections each, 80 classes: `coco_metrics` against pycocotools.

    python benchmarks/evaluation.py

The same work: from a `CocoDataset` and COCO results to the twelve numbers, AP per class and the curve. Ours is timed
before and after pycocotools. Data are generated: 7 boxes an image as in COCO, detections around them and of nothing.
Writes `results/evaluation.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import peak_gb, write_result
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from softteacher.data.coco import CocoDataset
from softteacher.data.records import Annotations, ImageRecord
from softteacher.detections import Detections
from softteacher.evaluation.metrics import KEYS, coco_metrics, coco_results

CLASSES, DETECTIONS, SIZE = 80, 100, np.array([640, 480])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    count = parser.parse_args().images
    dataset, found = generate(count)
    conversion, results = timed(lambda: coco_results(dataset, found))
    first, ours = timed(lambda: coco_metrics(dataset, results))
    print(f"ours: {first:.1f} s, and {conversion:.1f} s to write the detections in COCO results format", flush=True)
    judge, theirs = timed(lambda: pycocotools_metrics(dataset, results))
    second, _ = timed(lambda: coco_metrics(dataset, results))
    seconds = (first + second) / 2
    print(f"pycocotools: {judge:.1f} s; ours again: {second:.1f} s; {judge / seconds:.1f} times as fast")
    write_result(
        "evaluation",
        {
            "images": count,
            "detections": len(results),
            "ground_truth": len(dataset.annotations),
            "AP": ours["AP"],
            "ratio": judge / seconds,
            "ratio_with_coco_results": (judge + conversion) / (seconds + conversion),
            "seconds": {"coco_metrics": seconds, "pycocotools": judge, "coco_results": conversion},
            "largest_difference": difference(ours, theirs),
            "peak_gb": peak_gb(),
        },
    )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def generate(count: int) -> tuple[CocoDataset, dict[int, Detections]]:
    rng = np.random.default_rng(0)
    boxes = rng.poisson(7.3, count)
    image_index = np.repeat(np.arange(count), boxes)
    size = np.minimum(np.exp(rng.uniform(np.log(8), np.log(350), (len(image_index), 2))), SIZE - 1)
    bbox = np.concatenate([rng.random(size.shape) * (SIZE - size), size], 1).round(2)
    labels = rng.integers(0, CLASSES, (count, 3))[image_index, rng.integers(0, 3, len(image_index))]
    area = bbox[:, 2:].prod(1) * rng.uniform(0.4, 1, len(bbox))  # of masks
    annotations = Annotations(
        image_index, bbox, labels, area, rng.random(len(bbox)) < 0.01, np.arange(1, len(bbox) + 1)
    )
    images = [ImageRecord(n, f"{n}.jpg", *SIZE.tolist()) for n in range(1, count + 1)]
    dataset = CocoDataset(images, [(n + 1, f"class {n}") for n in range(CLASSES)], annotations, "/nowhere")
    found = {}
    for image, rows in zip(images, np.split(np.arange(len(bbox)), np.cumsum(boxes)[:-1]), strict=True):
        rows = np.repeat(rows, 5)[:DETECTIONS]
        near = bbox[rows] + rng.normal(0, 0.08, (len(rows), 4)) * bbox[rows][:, [2, 3, 2, 3]]
        near_labels = np.where(rng.random(len(rows)) < 0.85, labels[rows], rng.integers(0, CLASSES, len(rows)))
        rest = DETECTIONS - len(rows)
        box = np.concatenate([near, rng.random((rest, 4)) * [500, 400, 140, 80] + [0, 0, 1, 1]])
        box[:, 2:] += box[:, :2]
        label = np.concatenate([near_labels, rng.integers(0, CLASSES, rest)])
        score = rng.random(DETECTIONS) * np.where(np.arange(DETECTIONS) < len(rows), 1, 0.5)
        found[image.id] = Detections(box.astype(np.float32), score.astype(np.float32), label)
    return dataset, found


def pycocotools_metrics(dataset: CocoDataset, results: list[dict[str, Any]]) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset.to_json() | {"info": {}}
        truth.createIndex()
        ev = COCOeval(truth, truth.loadRes(results), "bbox")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    precision = ev.eval["precision"][:, :, :, 0, -1]
    present = (precision > -1).all((0, 1))
    return {
        **dict(zip(KEYS, ev.stats.tolist(), strict=True)),
        "per_class": {
            name: float(precision[:, :, n].mean()) if present[n] else None for n, name in enumerate(dataset.classes)
        },
        "curve": {iou: precision[n][:, present].mean(1).round(4).tolist() for iou, n in (("0.5", 0), ("0.75", 5))},
    }


def difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference of any two numbers."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max(difference(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    return 0.0 if ours is theirs is None else abs(ours - theirs)


if __name__ == "__main__":
    main()
