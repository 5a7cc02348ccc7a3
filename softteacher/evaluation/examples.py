"""The images that a report shows: which, and how."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np

from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections, pairwise_iou
from softteacher.evaluation.draw import draw
from softteacher.evaluation.page import inline

SHOWN_SCORE = 0.3


def image_f1(dataset: CocoDataset, index: int, found: Detections) -> float:
    """How good the boxes of an image are: F1 at IoU .5, finer by mean IoU; only for choosing examples.

    Args:
        dataset: ground truth.
        index: which image.
        found: those that would be shown.
    """
    boxes, labels = dataset.targets(index)
    if not len(found) or not len(boxes):
        return 0.0 if len(found) or len(boxes) else 1.0
    iou = pairwise_iou(Detections(boxes, np.ones(len(boxes)), labels), found)
    best = np.where(labels[:, None] == found.labels, iou, 0).max(1)
    return 2 * float(best[best > 0.5].sum()) / (len(boxes) + len(found))


def example(dataset: CocoDataset, index: int, found: Detections, masks: Iterable[np.ndarray] = ()) -> str:
    """The `src` of a picture of an image with detections and ground truth.

    Args:
        dataset: ground truth.
        index: which image.
        found: what to draw.
        masks: [H, W] bool of each, if the detector has masks.
    """
    boxes, labels = dataset.targets(index)
    truth = Detections(boxes, np.ones(len(boxes)), labels)
    picture = draw(read_image(dataset, index)[0], found, dataset.classes, truth, masks)
    picture.thumbnail((640, 640))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return inline(buffer.getvalue(), "jpeg")
