"""`Detections`: the one type for boxes with scores and labels, from pseudo boxes to the client's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Detections:
    """Boxes of one image; arrays are all `torch.Tensor` or all `numpy.ndarray`.

    Attributes:
        boxes: [N, 4] float, xyxy, absolute pixels of the image they belong to.
        scores: [N] float, 0 to 1.
        labels: [N] int64, index into the class list (0 .. C-1; background is not a label).
        masks: [N, 28, 28] float, probability of each cell of the box's frame to belong to the object, see
            `paste_masks`; none from detectors without masks.

    Example:
        >>> import numpy as np
        >>> found = Detections(np.array([[0., 0., 9., 9.]]), np.array([.8]), np.array([2]))
        >>> len(found[found.scores > .9])
        0
    """

    boxes: Any
    scores: Any
    labels: Any
    masks: Any = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, keep: Any) -> Detections:
        """The detections that a boolean mask, index array or slice keeps."""
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks)

    def numpy(self) -> Detections:
        """The same detections as numpy arrays on the CPU (float32, int64; masks float16, as they are many)."""
        if not hasattr(self.boxes, "detach"):
            return self
        boxes, scores = (x.detach().float().cpu().numpy() for x in (self.boxes, self.scores))
        masks = None if self.masks is None else self.masks.detach().half().cpu().numpy()
        return Detections(boxes, scores, self.labels.detach().cpu().numpy(), masks)


def paste_masks(detections: Detections, height: int, width: int) -> np.ndarray:
    """The masks at their places in the image: bilinear between cells, nothing outside the box, from .5 on.

    Args:
        detections: N boxes with masks, in pixels of the image.
        height: of the image.
        width: of the image.

    Returns:
        [N, height, width] bool.

    Example:
        >>> square = Detections(np.array([[2., 1., 6., 3.]]), np.array([.9]), np.array([0]), np.ones((1, 28, 28)))
        >>> paste_masks(square, 4, 8).sum(2).tolist()
        [[0, 4, 4, 0]]
    """
    found = detections.numpy()
    pasted = np.zeros((len(found), height, width), bool)
    for out, (x1, y1, x2, y2), mask in zip(pasted, found.boxes.tolist(), found.masks.astype(np.float32), strict=True):
        rows, by_row = _bilinear(y1, y2, height, mask.shape[0])
        columns, by_column = _bilinear(x1, x2, width, mask.shape[1])
        out[rows, columns] = by_row @ mask @ by_column.T >= 0.5
    return pasted


def _bilinear(low: float, high: float, size: int, cells: int) -> tuple[slice, np.ndarray]:
    """The pixels of an axis whose centres are in a box, and the weights [pixels, cells] of the mask's cells there."""
    inside = slice(max(0, int(np.ceil(low - 0.5))), max(0, min(size, int(np.ceil(high - 0.5)))))
    centres = np.arange(inside.start, inside.stop, dtype=np.float32) + 0.5
    # at the rim, half a cell from the last centre, the last cell counts whole
    at = ((centres - low) / max(high - low, 1e-6) * cells - 0.5).clip(0, cells - 1)
    return inside, (1 - np.abs(at[:, None] - np.arange(cells, dtype=np.float32))).clip(min=0)


def match_boxes(a: Detections, b: Detections, iou: float) -> list[tuple[int, int]]:
    """The boxes of two numpy `Detections` that are the same object: of one class, and overlapping.

    Args:
        a: N boxes; the best score chooses first, each the free box of `b` that it overlaps most.
        b: M boxes; each is chosen once.
        iou: of a pair, at least.

    Returns:
        Pairs (index in `a`, index in `b`), by falling score in `a`.

    Example:
        >>> a = Detections(np.array([[0., 0., 8., 8.], [1., 0., 9., 8.]]), np.array([.6, .9]), np.array([0, 0]))
        >>> match_boxes(a, a[[0]], iou=0.5)
        [(1, 0)]
    """
    overlap = np.where(a.labels[:, None] == b.labels, pairwise_iou(a, b), -1.0)
    pairs = []
    for row in np.argsort(-a.scores, kind="stable").tolist() if len(b) else []:
        best = int(overlap[row].argmax())
        if overlap[row, best] >= iou:
            overlap[:, best] = -1
            pairs.append((row, best))
    return pairs


def pairwise_iou(a: Detections, b: Detections) -> np.ndarray:
    """IoU [len(a), len(b)] of the boxes of two numpy `Detections`."""
    low = np.maximum(a.boxes[:, None, :2], b.boxes[None, :, :2])
    high = np.minimum(a.boxes[:, None, 2:], b.boxes[None, :, 2:])
    overlap = (high - low).clip(0).prod(2)
    area_a, area_b = ((d.boxes[:, 2:] - d.boxes[:, :2]).prod(1) for d in (a, b))
    return overlap / np.maximum(area_a[:, None] + area_b[None] - overlap, 1e-9)
