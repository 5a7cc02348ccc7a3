"""`softteacher train` with pseudo boxes that are true: how far Soft Teacher would come with a teacher that never errs.

    python benchmarks/oracle.py train --labeled ... --unlabeled ... --validation ... --out DIR

In place of every object that the teacher finds stands its hidden label; what it doesn't find stays background, as ever.
`benchmarks/accuracy.py` runs it as the method `soft_teacher-oracle`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from softteacher.cli import main
from softteacher.detections import Detections
from softteacher.methods import METHODS
from softteacher.methods.base import Unlabeled
from softteacher.methods.soft_teacher import SoftTeacher

SURE = 0.999  # above every threshold


class Oracle(SoftTeacher):
    """Soft Teacher whose pseudo boxes are the hidden labels of the objects that its teacher finds."""

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
