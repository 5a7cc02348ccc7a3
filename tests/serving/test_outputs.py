"""Answers that no detector gives."""

from collections.abc import Callable

import numpy as np
import pytest

from softteacher.serving.outputs import MASKS, nonsense, to_detections


def good() -> dict[str, np.ndarray]:
    """Two images, three rows each, of which the first has two and the second one."""
    return {
        "num_detections": np.array([[2], [1]], np.int32),
        "detection_boxes": np.full((2, 3, 4), 5, np.float32),
        "detection_scores": np.array([[0.9, 0.5, 0], [1, 0, 0]], np.float32),
        "detection_classes": np.array([[0, 1, 0], [1, 0, 0]], np.int32),
    }


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda answer: answer[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda answer: None, None),
        (put("detection_boxes", (0, 2, 0), np.nan), None),  # behind the last detection
        (put("detection_boxes", (0, 1, 0), np.nan), "not finite"),
        (put("detection_boxes", (1, 0, 3), np.inf), "not finite"),
        (put("detection_scores", (1, 0), np.nan), "scores outside 0 to 1"),
        (put("detection_scores", (0, 1), 1.5), "scores outside 0 to 1"),
        (put("detection_scores", (0, 1), -0.1), "scores outside 0 to 1"),
        (put("detection_classes", (0, 0), 2), "labels outside its 2 classes"),
        (put("detection_classes", (0, 0), -1), "labels outside its 2 classes"),
        (put("num_detections", (0, 0), 4), "wrong shape or number"),
        (put("num_detections", (0, 0), -1), "wrong shape or number"),
        (lambda answer: answer.pop("detection_scores"), "no output detection_scores"),
        (lambda answer: answer.update(num_detections=np.ones((1, 1), np.int32)), "wrong shape"),
        (lambda answer: answer.update(detection_boxes=np.ones((2, 3, 5), np.float32)), "wrong shape"),
        (lambda answer: answer.update(detection_scores=np.ones(3, np.float32)), "wrong shape"),
    ],
)
def test_nonsense(change: Callable[[dict[str, np.ndarray]], object], complaint: str | None) -> None:
    answer = good()
    change(answer)
    found = nonsense(answer, images=2, classes=2)
    assert (found is None) == (complaint is None)
    assert complaint is None or complaint in (found or "")


def test_what_lies_in_the_padding() -> None:
    """An image of 100 x 60 on a larger canvas: boxes end at its edge and take their part of the mask with them."""
    mask = np.zeros((28, 28), np.float32)
    mask[:, :14] = 1
    answer = {
        "num_detections": np.array([[3]], np.int32),
        "detection_boxes": np.array([[[60, 10, 120, 50], [105, 10, 120, 50], [10, 10, 38, 38]]], np.float32),
        "detection_scores": np.array([[0.9, 0.8, 0.7]], np.float32),
        "detection_classes": np.array([[0, 1, 0]], np.int32),
        MASKS: np.stack([mask, mask, mask])[None],
    }
    found = to_detections(answer, 0, (1, 1), (100, 60))
    assert found.boxes.tolist() == [[60, 10, 100, 50], [10, 10, 38, 38]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    assert found.masks is not None
    np.testing.assert_array_equal(found.masks[1], mask)
    # half of the box of 60 is 30 of the 40 pixels that are left: 21 of 28 cells
    np.testing.assert_array_equal(found.masks[0] > 0.5, np.broadcast_to(np.arange(28) < 21, (28, 28)))
    assert (answer[MASKS][0, 0] == mask).all()
