"""Which detections are right, and what the wrong ones are taken for: a confusion matrix and a ROC curve."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.extra.extra import ExtraEval

from softteacher.data.coco import CocoDataset
from softteacher.data.records import without_gc

IOU = 0.5  # from which on a detection is on an object
ABOVE = 0.5  # score of the detections in the matrix
STEPS = 101  # points of the curve
BACKGROUND = "background"


@without_gc()
def confusion(dataset: CocoDataset, results: list[dict[str, Any]]) -> dict[str, Any]:
    """How detections and objects meet; detections in crowd regions are left out.

    The curve is a true ROC curve, of the score as a test for "this detection is right" (an object of its class at an
    IoU of .5), among the detections that the detector gave. Objects that it missed are not in it, they are in recall.

    Args:
        dataset: ground truth, with N classes.
        results: COCO results format.

    Returns:
        `classes`: N names and `background`. `matrix`: [N + 1, N + 1] counts of the detections with a score above
        `above`, rows are what is there, columns what was found: the last row is what was found where nothing is, the
        last column what was missed. `roc`: `fpr`, `tpr` and `threshold`, of equal length; empty unless some
        detections are right and some wrong.
    """
    truth = dataset.to_json()
    for n, row in enumerate(truth["annotations"], start=1):
        row["id"] = n  # the library takes 0 for none
    rows = [{**r, "id": n, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0} for n, r in enumerate(results, start=1)]
    place = {category: n for n, (category, _) in enumerate(dataset.categories)}
    nothing = len(place)
    matrix = np.zeros((nothing + 1, nothing + 1), int)
    found, objects = _match(truth, [row for row in rows if row["score"] > ABOVE], by_class=False)
    for d in found:
        matrix[place[d["of"]["category_id"]] if d["of"] else nothing, place[d["category_id"]]] += 1
    for missed in objects:
        matrix[place[missed["category_id"]], nothing] += 1
    judged, _ = _match(truth, rows, by_class=True)
    return {
        "classes": [*dataset.classes, BACKGROUND],
        "matrix": matrix.tolist(),
        "above": ABOVE,
        "roc": _roc(np.array([d["score"] for d in judged]), np.array([bool(d["of"]) for d in judged], bool)),
    }


def _match(
    truth: dict[str, Any], rows: list[dict[str, Any]], *, by_class: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Detections outside crowd regions, each with the object that it is `of` or none, and objects that none is of."""
    if not rows or not truth["annotations"]:
        return [row | {"of": None} for row in rows], [a for a in truth["annotations"] if not a["iscrowd"]]
    with warnings.catch_warnings(action="ignore"):
        evaluated = ExtraEval(COCO(truth), COCO(truth | {"annotations": rows}), iou_tresh=IOU, useCats=by_class)
    objects = evaluated.cocoGt.anns
    found = [d | {"of": objects.get(d.get("gt_id"))} for d in evaluated.cocoDt.anns.values()]
    return (
        [d for d in found if not (d["of"] and d["of"]["iscrowd"])],
        [a for a in objects.values() if a.get("dt_id") is None and not a["iscrowd"]],
    )


def _roc(scores: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    """Shares of the wrong and of the right detections with at least a score, for scores from 1 down to 0."""
    if right.all() or not right.any():
        return {"fpr": [], "tpr": [], "threshold": []}
    grid = np.linspace(1, 0, STEPS).round(4)
    shares = [1 - np.searchsorted(np.sort(scores[of]), grid) / of.sum() for of in (~right, right)]
    return {"fpr": shares[0].round(4).tolist(), "tpr": shares[1].round(4).tolist(), "threshold": grid.tolist()}
