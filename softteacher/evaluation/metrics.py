"""COCO metrics of boxes and masks: pycocotools' numbers, computed by faster-coco-eval."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask

from softteacher.data.coco import CocoDataset
from softteacher.data.records import without_gc
from softteacher.detections import Detections, paste_masks

Kind = Literal["bbox", "segm"]
KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
LOW_SCORE = 0.001  # the other threshold that papers report AP at
LOW_SCORES = "AP_low_scores"  # AP of the detections above it, which `evaluate` gives beside the twelve


@without_gc()
def coco_results(dataset: CocoDataset, found: dict[int, Detections]) -> list[dict[str, Any]]:
    """Detections in COCO results format; boxes to .01 pixel, scores to 1e-5, masks as compressed run lengths.

    Args:
        dataset: classes and image sizes.
        found: numpy, in original pixels, by image id.
    """
    size = {image.id: (image.height, image.width) for image in dataset.images}
    return [
        {
            "image_id": image_id,
            "category_id": dataset.categories[label][0],
            "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 5),
            **more,
        }
        for image_id, d in sorted(found.items())
        for (x1, y1, x2, y2), score, label, more in zip(
            d.boxes.tolist(), d.scores.tolist(), d.labels.tolist(), run_lengths(d, *size[image_id]), strict=True
        )
    ]


@without_gc()
def coco_metrics(dataset: CocoDataset, results: list[dict[str, Any]], masks: bool = False) -> dict[str, Any]:
    """The twelve COCO numbers, AP per class, and the precision-recall curve, of boxes and if asked for of masks.

    Args:
        dataset: ground truth.
        results: COCO results format.
        masks: results and ground truth have masks, see `require_masks`.

    Returns:
        `AP`, `AP50`, ... (-1 where no box of that size exists, as pycocotools has it), `per_class`: AP by class name
        (none without ground truth), `curve`: 101 precisions at recalls 0 to 1 for IoU .5 and .75, mean over classes.
        `segm`: the same of the masks; small, medium and large is the mask's own area, as if the results had no box.
    """
    metrics = _numbers(dataset, results, "bbox")
    if masks:
        metrics["segm"] = _numbers(dataset, results, "segm")
    return metrics


@without_gc()
def average_precision(dataset: CocoDataset, results: list[dict[str, Any]]) -> float:
    """`AP` of the boxes as `coco_metrics` has it, without the counting for the other numbers.

    Args:
        dataset: ground truth.
        results: COCO results format.
    """
    ev = evaluator(dataset, results, "bbox")
    only_ap(ev)
    ev.evaluate()
    ev.accumulate()
    precision = ev.eval["precision"]
    return float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0


def only_ap(ev: COCOeval_faster) -> None:
    """Make an evaluator that has not run yet count objects of all sizes and 100 detections only, as AP does."""
    ev.params.areaRng, ev.params.areaRngLbl = ev.params.areaRng[:1], ev.params.areaRngLbl[:1]
    ev.params.maxDets = ev.params.maxDets[-1:]


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The plain numbers of a score, without the table of classes, the curve and the masks' own score."""
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def evaluator(
    dataset: CocoDataset, results: list[dict[str, Any]], kind: Kind, *, separate: bool = False
) -> COCOeval_faster:
    """faster-coco-eval over a data set and results, which has not run yet.

    Args:
        dataset: ground truth.
        results: COCO results format.
        kind: boxes (`bbox`) or masks (`segm`).
        separate: matching and counting are two steps.
    """
    truth = dataset.to_json()
    for n, row in enumerate(truth["annotations"], start=1):
        # the library takes negative ids for something else; id 0 counts as never found, as pycocotools has it
        row["id"] = row["id"] and n
    if kind == "bbox":
        areas = [r["bbox"][2] * r["bbox"][3] for r in results]
    else:
        areas = [float(a) for a in coco_mask.area([r["segmentation"] for r in results])] if results else []
    rows = [
        {**r, "id": n, "area": area, "iscrowd": 0}
        for n, (r, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]
    with warnings.catch_warnings(action="ignore"):  # of id 0
        return COCOeval_faster(COCO(truth), COCO(truth | {"annotations": rows}), kind, separate_eval=separate)


def run_lengths(d: Detections, height: int, width: int) -> Iterator[dict[str, Any]]:
    """For each detection `segmentation`, compressed run lengths of its mask; nothing for those without masks.

    Args:
        d: in pixels of the image.
        height: of the image.
        width: of the image.
    """
    for n in range(len(d)):
        if d.masks is None:
            yield {}
        else:
            encoded = coco_mask.encode(np.asfortranarray(paste_masks(d[n : n + 1], height, width)[0].astype(np.uint8)))
            yield {"segmentation": {"size": [height, width], "counts": encoded["counts"].decode()}}


def _numbers(dataset: CocoDataset, results: list[dict[str, Any]], kind: Kind) -> dict[str, Any]:
    ev = evaluator(dataset, results, kind)
    ev.run()
    precision = ev.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all areas, 100 detections
    present = (precision > -1).all((0, 1))
    mean = precision[:, :, present if present.any() else slice(None)].mean(2)
    return {
        **{key: float(value) for key, value in zip(KEYS, ev.stats, strict=True)},
        "per_class": {
            name: float(precision[:, :, n].mean()) if present[n] else None for n, name in enumerate(dataset.classes)
        },
        "curve": {iou: mean[n].round(4).tolist() for iou, n in (("0.5", 0), ("0.75", 5))},
    }
