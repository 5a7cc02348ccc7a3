"""`softteacher train` with pseudo boxes that are true: how far a method would come with a teacher that never errs.

    python benchmarks/oracle.py train --labeled ... --unlabeled ... --validation ... --out DIR

`--method soft_teacher` (`soft_teacher-oracle` of `benchmarks/accuracy.py`): the hidden label of every object that a
pseudo box finds which teaches the classification stands in its place; all others are background. Regression is taught
the same boxes, as by `method.reg_confident`. Faster R-CNN only.

`--method mean_teacher` (`mean_teacher-oracle`): all hidden labels, found or not. It is the limit of whatever labels the
unlabelled images of as many steps: what is missing to `supervised_full` then is not for want of labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from softteacher.cli import main
from softteacher.detections import Detections
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.errors import UserError
from softteacher.methods import METHODS
from softteacher.methods.base import Unlabeled
from softteacher.methods.mean_teacher import MeanTeacher
from softteacher.methods.soft_teacher import SoftTeacher

SURE = 2.0  # above every threshold


class Oracle(SoftTeacher):
    """Soft Teacher whose pseudo boxes are the hidden labels of the objects that its teacher finds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if type(self.student) is not FasterRCNN:
            raise UserError(f"{self.student.settings.name}: the oracle is for Faster R-CNN")

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `SoftTeacher`. An object is found by a box of its class that teaches, at an IoU of .5."""
        true = []
        for detections, boxes, labels in zip(found, part.weak.boxes, part.weak.labels, strict=True):
            sure = self.confident(detections, self.settings.cls_threshold)
            hit = (box_iou(boxes, sure.boxes) >= 0.5) & (labels[:, None] == sure.labels)
            known = hit.any(1)
            true.append(Detections(boxes[known], torch.full_like(boxes[known, 0], SURE), labels[known]))
        return super().unsupervised_losses(true, part)


class AllObjects(MeanTeacher):
    """Mean teacher whose pseudo boxes are the hidden labels."""

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `MeanTeacher`."""
        pairs = zip(part.weak.boxes, part.weak.labels, strict=True)
        true = [Detections(boxes, torch.full_like(boxes[:, 0], SURE), labels) for boxes, labels in pairs]
        return super().unsupervised_losses(true, part)


if __name__ == "__main__":
    METHODS |= {"soft_teacher": Oracle, "mean_teacher": AllObjects}
    main()
