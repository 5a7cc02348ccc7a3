"""`softteacher train` with pseudo boxes that are true: how far Soft Teacher would come with a teacher that never errs.

    python benchmarks/oracle.py train --labeled ... --unlabeled ... --validation ... --out DIR

The hidden label of every object that a pseudo box finds which teaches the classification stands in its place; all
others are background. Regression is taught the same boxes, as by `method.reg_confident`. `benchmarks/accuracy.py` runs
it as the method `soft_teacher-oracle`. Faster R-CNN only.
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
from softteacher.methods.soft_teacher import SoftTeacher

SURE = 0.999  # above every threshold


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


if __name__ == "__main__":
    METHODS["soft_teacher"] = Oracle
    main()
