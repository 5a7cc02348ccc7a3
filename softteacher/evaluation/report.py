"""`report.html`: one self-contained page: verdict, numbers, figures, classes, the best and the worst images."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections
from softteacher.evaluation.examples import SHOWN_SCORE, example, image_f1
from softteacher.evaluation.metrics import KEYS, LOW_SCORE, LOW_SCORES
from softteacher.evaluation.page import inline, render
from softteacher.evaluation.plots import recall_curve

GALLERY = 6
MEANINGS = {
    "AP": "mean over IoU .50 to .95",
    "AP50": "detections that overlap by half count",
    "AP75": "detections must fit well",
    "APs": "small objects, under 32 x 32 pixels",
    "APm": "medium objects",
    "APl": "large objects, over 96 x 96 pixels",
    "AR1": "share of objects found, 1 detection an image",
    "AR10": "the same, 10 detections an image",
    "AR100": "share of objects found, 100 detections an image",
    "ARs": "the same, small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
    LOW_SCORES: f"AP with the detections that have a score from {LOW_SCORE} on",
}

Section = tuple[str, str, bytes]  # title, text, PNG


def write_report(
    dataset: CocoDataset,
    results: list[dict[str, Any]],
    metrics: dict[str, Any],
    provenance: dict[str, Any],
    sections: Sequence[Section] = (),
) -> str:
    """The page as a string of HTML without any outside reference.

    Args:
        dataset: ground truth.
        results: detections in COCO results format.
        metrics: of `evaluate`.
        provenance: of the model folder.
        sections: further figures, each with title and text.
    """
    found = _by_image(dataset, results)
    order = sorted(range(len(dataset)), key=lambda i: image_f1(dataset, i, found[dataset.images[i].id]))
    scored = [i for i in order if len(dataset.targets(i)[0])]
    counts = dataset.class_counts()
    columns = [name for name in ("teacher", "student") if name in metrics]
    return render(
        "evaluation/report.html",
        metrics=metrics,
        keys=(*KEYS, LOW_SCORES),
        meanings=MEANINGS,
        columns=columns,
        verdict=verdict(metrics, len(dataset)),
        sections=[(title, text, inline(png)) for title, text, png in sections],
        curve=inline(recall_curve(metrics["curve"])),
        tables=[
            (title, [metrics[name][key] if key else metrics[name] for name in columns])
            for title, key in (("COCO numbers", None), ("COCO numbers of the masks", "segm"))
            if not key or key in metrics
        ],
        classes=[(name, counts[name], [metrics[c]["per_class"][name] for c in columns]) for name in dataset.classes],
        galleries=[
            ("Best images", [_card(dataset, i, found, results) for i in reversed(scored[-GALLERY:])]),
            ("Worst images", [_card(dataset, i, found, results) for i in scored[:GALLERY]]),
        ],
        provenance=provenance,
        images=len(dataset),
        source=dataset.source,
        shown_score=SHOWN_SCORE,
    )


def verdict(metrics: dict[str, Any], images: int) -> str:
    """The result in a sentence or two."""
    shown = metrics["weights"]
    other = "student" if shown == "teacher" else "teacher"
    if metrics["AP"] < 0:  # as COCO's evaluation says it
        return f"There is no object to find on {images} image{'s' * (images != 1)}, so there is no AP."
    text = f"The {shown} reaches an AP of {metrics['AP']:.3f} on {images} image{'s' * (images != 1)}"
    if other in metrics and shown in metrics:
        lead = round(metrics["AP"] - metrics[other]["AP"], 3)
        than = f"{abs(lead):.3f} {'above' if lead > 0 else 'below'} the {other}"
        text += f", {than}" if lead else f", as the {other} does"
    known = {name: ap for name, ap in metrics["per_class"].items() if ap is not None}
    if len(known) > 1:
        best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        text += f". Best class: {best} ({known[best]:.3f}); worst: {worst} ({known[worst]:.3f})"
    return f"{text}."


def _by_image(dataset: CocoDataset, results: list[dict[str, Any]]) -> dict[int, Detections]:
    label = {category: n for n, (category, _) in enumerate(dataset.categories)}
    rows: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in results:
        if row["score"] > SHOWN_SCORE:
            rows[row["image_id"]].append(row)
    found = {}
    for image in dataset.images:
        boxes = np.array([r["bbox"] for r in rows[image.id]], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([r["score"] for r in rows[image.id]], np.float32)
        labels = np.array([label[r["category_id"]] for r in rows[image.id]], np.int64)
        found[image.id] = Detections(boxes, scores, labels)
    return found


def _card(
    dataset: CocoDataset, index: int, found: dict[int, Detections], results: list[dict[str, Any]]
) -> tuple[str, str]:
    record = dataset.images[index]
    shown = [r for r in results if r["image_id"] == record.id and r["score"] > SHOWN_SCORE]
    # one at a time: of a large photograph each takes as much as a grey copy of it
    masks = (coco_mask.decode(r["segmentation"]) > 0 for r in shown if "segmentation" in r)
    return example(dataset, index, found[record.id], masks), f"{record.file_name} (id {record.id})"
