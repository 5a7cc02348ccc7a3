"""Supervised training: the baseline, and the labelled half of every other method."""

from __future__ import annotations

import torch
from torch import Tensor

from softteacher.config import Settings
from softteacher.data.loader import Batch, Views
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.detectors.losses import classification_loss, regression_loss, rpn_loss, rpn_targets, sample_rois


def supervised_losses(detector: FasterRCNN, views: Views) -> dict[str, Tensor]:
    """The four losses of Faster R-CNN on labelled views, each of weight 1."""
    s, noise = detector.settings, views.noise()
    features = detector.features(views.images)
    with torch.no_grad():
        rpn = detector.rpn(features)
    targets = rpn_targets(rpn.anchors, views.sizes, views.boxes, s.rpn_batch, noise)
    losses = rpn_loss(*detector.rpn_at(features, targets.anchors), targets)
    proposals, scores = detector.proposals(rpn, views.sizes, training=True)
    rois = sample_rois(proposals, scores > 0, views.boxes, views.labels, s.roi_batch, detector.classes, noise)
    logits, deltas = detector.box_head(features, rois.boxes)
    return losses | {"cls": classification_loss(logits, rois), "box": regression_loss(deltas, rois)}


class Supervised:
    """Labelled images only. The teacher is the moving average of the student, here as in every method."""

    def __init__(self, student: FasterRCNN, teacher: FasterRCNN, settings: Settings) -> None:
        self.student = student

    def losses(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `softteacher.methods.Method`."""
        return supervised_losses(self.student, batch.labeled), {}
