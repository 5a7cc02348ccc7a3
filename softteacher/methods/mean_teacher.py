"""Mean teacher for detection: what the teacher is sure of is the truth, all else is background (hard pseudo labels)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from softteacher.detections import Detections
from softteacher.methods.base import TeacherMethod, Unlabeled, to_strong_view
from softteacher.methods.diagnostics import box_counts


class MeanTeacher(TeacherMethod):
    """The end-to-end baseline of the paper's Table 3: no reliability of negatives, no box jittering."""

    def unsupervised_losses(
        self, found: list[Detections], part: Unlabeled
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The supervised losses on the strong views, with pseudo boxes above `cls_threshold` as the truth."""
        sure = [
            to_strong_view(self.confident(d, self.settings.cls_threshold), matrix, size)[0]
            for d, matrix, size in zip(found, part.to_strong, part.strong.sizes, strict=True)
        ]
        views = replace(part.strong, boxes=[d.boxes for d in sure], labels=[d.labels for d in sure])
        return self.student.losses(views), box_counts(len(found), pool=found, cls=sure)
