"""`report.html`: one self-contained page with the numbers, the curve, the classes, the best and the worst images."""

from __future__ import annotations

import base64
import collections
import io
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torchvision.ops import box_iou

from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections
from softteacher.evaluation.draw import draw
from softteacher.evaluation.metrics import KEYS

SHOWN_SCORE = 0.3
GALLERY = 6


def write_report(
    dataset: CocoDataset, results: list[dict[str, Any]], metrics: dict[str, Any], provenance: dict[str, Any]
) -> str:
    """The page as a string of HTML without any outside reference.

    Args:
        dataset: ground truth.
        results: detections in COCO results format.
        metrics: of `evaluate`.
        provenance: of the model folder.
    """
    found = _by_image(dataset, results)
    order = sorted(range(len(dataset)), key=lambda i: _image_f1(dataset, i, found))
    scored = [i for i in order if len(dataset.targets(i)[0])]
    counts = dataset.class_counts()
    columns = [name for name in ("teacher", "student") if name in metrics]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("softteacher.evaluation").joinpath("report.html").read_text("utf-8")
    )
    return template.render(
        metrics=metrics,
        keys=KEYS,
        columns=columns,
        tables=[
            (title, [(name, m) for name in columns if (m := metrics[name].get(key) if key else metrics[name])])
            for title, key in (("COCO numbers", None), ("COCO numbers of the masks", "segm"))
        ],
        curve=_curve(metrics["curve"]),
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


def _image_f1(dataset: CocoDataset, index: int, found: dict[int, Detections]) -> float:
    """How good the shown boxes of an image are: F1 at IoU .5, finer by mean IoU; only for choosing examples."""
    d = found[dataset.images[index].id]
    boxes, labels = dataset.targets(index)
    if not len(d) or not len(boxes):
        return 0.0 if len(d) or len(boxes) else 1.0
    iou = box_iou(torch.from_numpy(boxes).float(), torch.from_numpy(d.boxes)).numpy()
    best = np.where(labels[:, None] == d.labels, iou, 0).max(1)
    return 2 * float(best[best > 0.5].sum()) / (len(boxes) + len(d))


def _card(
    dataset: CocoDataset, index: int, found: dict[int, Detections], results: list[dict[str, Any]]
) -> tuple[str, str]:
    record = dataset.images[index]
    boxes, labels = dataset.targets(index)
    truth = Detections(boxes, np.ones(len(boxes)), labels)
    shown = [r for r in results if r["image_id"] == record.id and r["score"] > SHOWN_SCORE]
    masks = [coco_mask.decode(r["segmentation"]) > 0 for r in shown if "segmentation" in r]
    picture = draw(read_image(dataset, index)[0], found[record.id], dataset.classes, truth, masks)
    picture.thumbnail((640, 640))
    return _inline(picture), f"{record.file_name} (id {record.id})"


def _inline(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curve(curve: dict[str, list[float]]) -> str:
    figure = Figure(figsize=(5, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for iou, precision in curve.items():
        axes.plot(np.linspace(0, 1, len(precision)), precision, label=f"IoU {iou}", linewidth=2)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
