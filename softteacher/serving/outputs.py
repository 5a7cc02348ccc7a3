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
        size: (width, height) of the original, to clip to.
    """
    n = int(answer["num_detections"][index, 0])
    boxes = answer["detection_boxes"][index, :n] / np.array([*scale, *scale], np.float32)
    boxes = boxes.clip(0, np.array([*size, *size], np.float32))
    labels = answer["detection_classes"][index, :n].astype(np.int64)
    masks = answer[MASKS][index, :n].copy() if MASKS in answer else None
    return Detections(boxes, answer["detection_scores"][index, :n].copy(), labels, masks)
