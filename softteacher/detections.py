"""`Detections`: the one type for boxes with scores and labels, from pseudo boxes to the client's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Detections:
    """Boxes of one image; arrays are all `torch.Tensor` or all `numpy.ndarray`.

    Attributes:
        boxes: [N, 4] float, xyxy, absolute pixels of the image they belong to.
        scores: [N] float, 0 to 1.
        labels: [N] int64, index into the class list (0 .. C-1; background is not a label).

    Example:
        >>> import numpy as np
        >>> found = Detections(np.array([[0., 0., 9., 9.]]), np.array([.8]), np.array([2]))
        >>> len(found[found.scores > .9])
        0
    """

    boxes: Any
    scores: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, keep: Any) -> Detections:
        """The detections that a boolean mask, index array or slice keeps."""
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def numpy(self) -> Detections:
        """The same detections as numpy arrays on the CPU (float32, int64)."""
        if not hasattr(self.boxes, "detach"):
            return self
        boxes, scores = (x.detach().float().cpu().numpy() for x in (self.boxes, self.scores))
        return Detections(boxes, scores, self.labels.detach().cpu().numpy())
