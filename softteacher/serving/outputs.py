"""What a served detector answers, by the field's names (EfficientNMS), and how that becomes `Detections`."""

from __future__ import annotations

import numpy as np

from softteacher.detections import Detections

OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
MASKS = "detection_masks"  # a fifth output, of detectors with masks


def to_detections(
    answer: dict[str, np.ndarray], index: int, scale: tuple[float, float], size: tuple[int, int]
) -> Detections:
    """One image of a batched answer as `Detections` in the pixels of the original image.

    Args:
        answer: the four outputs, or five.
        index: which image of the batch.
        scale: (x, y) from original to canvas pixels.
        size: (width, height) of the original, to clip to. What lies wholly outside, in the padding, is left out, and
            a mask is that of the clipped box.
    """
    n = int(answer["num_detections"][index, 0])
    boxes = answer["detection_boxes"][index, :n] / np.array([*scale, *scale], np.float32)
    whole, boxes = boxes, boxes.clip(0, np.array([*size, *size], np.float32))
    labels = answer["detection_classes"][index, :n].astype(np.int64)
    masks = answer[MASKS][index, :n].copy() if MASKS in answer else None
    if masks is not None:
        for row in np.flatnonzero((whole != boxes).any(1)):
            masks[row] = _of_part(masks[row], whole[row], boxes[row])
    found = Detections(boxes, answer["detection_scores"][index, :n].copy(), labels, masks)
    return found[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def _of_part(mask: np.ndarray, whole: np.ndarray, part: np.ndarray) -> np.ndarray:
    """A mask [S, S] in the frame of a box, in that of a part of the box: linear between the centres of its cells."""
    cells, weights = np.arange(len(mask)), []
    for low in (0, 1):  # x, y
        places = part[low] + (cells + 0.5) / len(mask) * (part[low + 2] - part[low])
        places = (places - whole[low]) / max(whole[low + 2] - whole[low], 1e-6) * len(mask) - 0.5
        weights.append(np.stack([np.interp(places, cells, unit) for unit in np.eye(len(mask))], axis=1))
    return (weights[1] @ mask @ weights[0].T).astype(mask.dtype)


def nonsense(answer: dict[str, np.ndarray], images: int, classes: int) -> str | None:
    """What is wrong with an answer that is no detector's; none if nothing is.

    Args:
        answer: the outputs.
        images: that were asked about.
        classes: that the detector knows.
    """
    if missing := [name for name in OUTPUTS if name not in answer]:
        return f"no output {', '.join(missing)}"
    counts, boxes, scores, labels = (answer[name] for name in OUTPUTS)
    rows = scores.shape[1] if scores.ndim == 2 else 0
    if counts.shape != (images, 1) or scores.shape != (images, rows) or labels.shape != (images, rows):
        return "outputs of a wrong shape"
    if boxes.shape != (images, rows, 4) or counts.min() < 0 or counts.max() > rows:
        return "boxes of a wrong shape or number"
    real = np.arange(rows) < counts  # [images, rows]
    if not np.isfinite(boxes[real]).all() or not ((scores[real] >= 0) & (scores[real] <= 1.001)).all():
        return "boxes that are not finite, or scores outside 0 to 1"
    if ((labels[real] < 0) | (labels[real] >= classes)).any():
        return f"labels outside its {classes} classes"
    return None
