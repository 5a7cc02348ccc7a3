"""Score thresholds of pseudo boxes: one for all classes (paper), or one per class that follows the teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softteacher import distributed
from softteacher.config import MethodSettings
from softteacher.detections import Detections

WINDOW = 512  # images whose scores decide; a class of 1 box in 30 images then has some 17
FEWEST = 32  # images before the adaptive thresholds are believed


class ClassThresholds:
    """`method.threshold`: fixed, or adaptive in the spirit of LabelMatch (arXiv 2206.06608, section 3.2).

    Adaptive: over the last images that the teacher has seen, the score of each class above which there are
    `method.adaptive_share` times as many boxes per image as the labelled images have. A young teacher whose scores
    are low teaches from the start, a sure one is not believed more often than objects can be there.

    Args:
        settings: of the method.
        frequency: [C] labelled boxes of each class per labelled image.
    """

    def __init__(self, settings: MethodSettings, frequency: Tensor) -> None:
        self.settings, self.frequency = settings, frequency
        self.scores: Tensor | None = None  # [n, K] of the last images, n <= WINDOW; on the CPU
        self.labels: Tensor | None = None
        self.values: Tensor | None = None  # [C]

    def observe(self, scores: Tensor, labels: Tensor) -> None:
        """Take note of the teacher's detections: scores [B, K] (0: none) and labels [B, K], of each process."""
        if self.settings.threshold == "fixed":
            return
        parts = distributed.gather((scores.cpu(), labels.cpu()))
        self.scores = _stack([self.scores, *(s for s, _ in parts)])[-WINDOW:]
        self.labels = _stack([self.labels, *(n for _, n in parts)])[-WINDOW:]
        self.values = self.quantiles(self.scores, self.labels) if len(self.scores) >= FEWEST else None

    def above(self, found: Detections, fixed: float) -> Tensor:
        """Which boxes teach, [N] bool; strictly above, as in the reference.

        Args:
            found: boxes, scores, labels.
            fixed: the threshold if it is not adaptive, or not yet.
        """
        if self.values is None:
            return found.scores > fixed
        return found.scores > self.values.to(found.scores.device)[found.labels]

    def facts(self) -> dict[str, float]:
        """The mean of the adaptive thresholds, for the log."""
        return {} if self.values is None else {"adaptive_threshold": float(self.values.mean())}

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"threshold_scores": self.scores, "threshold_labels": self.labels}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.scores, self.labels = state["threshold_scores"], state["threshold_labels"]
        if self.scores is not None and self.labels is not None and len(self.scores) >= FEWEST:
            self.values = self.quantiles(self.scores, self.labels)

    def quantiles(self, scores: Tensor, labels: Tensor) -> Tensor:
        """[C]: the thresholds of n images, from scores [n, K] (0: none; K > 0) and labels [n, K], both on the CPU."""
        flat, order = scores.flatten().sort(descending=True)
        classes = labels.flatten()[order]
        classes, order = torch.where(flat > 0, classes, len(self.frequency)).sort(stable=True)
        flat = flat[order]  # class by class, best first; unused places last
        bounds = torch.searchsorted(classes, torch.arange(len(self.frequency) + 1))
        wanted = self.settings.adaptive_share * self.frequency.cpu() * len(scores)
        index = bounds[:-1] + wanted.round().long()
        enough = index < bounds[1:]
        return torch.where(enough, flat[index.clamp(max=len(flat) - 1)], 0.0)


def _stack(parts: list[Tensor | None]) -> Tensor:
    """Rows of different length under each other, filled up with 0."""
    known = [part for part in parts if part is not None]
    width = max(part.shape[1] for part in known)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in known])
