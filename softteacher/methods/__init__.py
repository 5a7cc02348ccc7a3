"""Training methods: each is a small file over the same trainer.

A method is built from (student, teacher, settings) and has `losses(batch, step)`; the trainer does the rest.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from softteacher.config import Settings
from softteacher.data.loader import Batch
from softteacher.detectors.base import Detector
from softteacher.detectors.mask_rcnn import MaskRCNN
from softteacher.methods.mask_soft_teacher import MaskSoftTeacher
from softteacher.methods.soft_teacher import SoftTeacher
from softteacher.methods.supervised import Supervised


class Method(Protocol):
    """What the trainer asks of a method."""

    def losses(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted loss terms whose sum is minimised, and numbers for the log."""


def build_method(settings: Settings, student: Detector, teacher: Detector) -> Method:
    """The method that `method.name` names."""
    methods: dict[str, Any] = {"soft_teacher": SoftTeacher, "supervised": Supervised}
    if isinstance(student, MaskRCNN):
        methods["soft_teacher"] = MaskSoftTeacher
    return methods[settings.method.name](student, teacher, settings)
