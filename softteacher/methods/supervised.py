"""Supervised training: the baseline, and the labelled half of every other method."""

from __future__ import annotations

from torch import Tensor

from softteacher.data.loader import Batch
from softteacher.methods.base import Method


class Supervised(Method):
    """Labelled images only. The teacher is the moving average of the student, here as in every method."""

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `Method`."""
        return self.labeled_losses(batch), {}
