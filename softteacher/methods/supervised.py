"""Supervised training: the baseline, and the labelled half of every other method."""

from __future__ import annotations

from torch import Tensor

from softteacher.config import Settings
from softteacher.data.loader import Batch
from softteacher.detectors.base import Detector


class Supervised:
    """Labelled images only. The teacher is the moving average of the student, here as in every method."""

    def __init__(self, student: Detector, teacher: Detector, settings: Settings) -> None:
        self.student = student

    def losses(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `softteacher.methods.Method`."""
        return self.student.losses(batch.labeled), {}
