"""How the answers of the live model and of a candidate are compared."""

import numpy as np
import pytest

from softteacher.detections import Detections
from softteacher.serving.canary import CanaryReport


def found(*rows: tuple[float, int, list[float]]) -> Detections:
    scores, labels, boxes = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    )


SQUARE, NEAR, FAR = [0, 0, 10, 10], [0, 0, 10, 14], [20, 20, 30, 30]  # SQUARE and NEAR: IoU .71
THIRD = [0, 0, 10, 30]  # IoU with SQUARE .33


@pytest.mark.parametrize(
    ("live", "candidate", "boxes", "matched", "difference"),
    [
        (found((0.9, 0, SQUARE)), found((0.5, 0, NEAR)), (1, 1), 1, 0.4),
        (found((0.9, 0, SQUARE)), found((0.9, 1, SQUARE)), (1, 1), 0, 0),  # another class
        (found((0.9, 0, SQUARE)), found((0.9, 0, THIRD)), (1, 1), 0, 0),
        (found((0.9, 0, SQUARE)), found((0.7, 0, SQUARE), (0.8, 0, NEAR)), (1, 2), 1, 0.1),  # the best score first
        (found((0.9, 0, SQUARE), (0.6, 1, FAR)), found((0.7, 1, FAR), (0.9, 0, SQUARE)), (2, 2), 2, 0.05),
        (found((0.9, 0, SQUARE), (0.2, 0, FAR)), found((0.1, 0, FAR)), (1, 0), 0, 0),  # junk isn't compared
        (found(), found((0.9, 0, [5, 5, 5, 5])), (0, 1), 0, 0),
        (found((0.9, 0, [5, 5, 5, 5])), found((0.9, 0, [5, 5, 5, 5])), (1, 1), 0, 0),  # no area, no match
        (found(), found(), (0, 0), 0, 0),
    ],
)
def test_pairs(
    live: Detections, candidate: Detections, boxes: tuple[int, int], matched: int, difference: float
) -> None:
    canary = CanaryReport("x", 2, 0.1)
    for n in (1, 2):  # counts add up, the mean stays
        canary.add([live], [candidate], (2.0, 3.0))
        assert (canary.images, canary.boxes_live, canary.boxes_candidate) == (n, n * boxes[0], n * boxes[1])
        assert canary.matched == n * matched
        assert canary.score_difference == pytest.approx(difference, abs=1e-6)
        assert (canary.seconds_live, canary.seconds_candidate) == (2 * n, 3 * n)
