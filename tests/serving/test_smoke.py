"""When an answer counts as the recorded one; what a deployment makes of it is tested on a real Triton."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from softteacher.errors import UserError
from softteacher.serving import smoke as module
from softteacher.serving.smoke import compare

Change = Callable[[dict[str, np.ndarray]], Any]
BOXES = [[2, 2, 20, 20], [40, 5, 60, 30], [10, 40, 30, 60]]


def recorded() -> dict[str, np.ndarray]:
    """One image with three detections in four rows; the scores of the first two are all but equal."""
    return {
        "images": np.zeros((1, 64, 64, 3), np.uint8),
        "num_detections": np.array([[3]], np.int32),
        "detection_boxes": np.array([[*BOXES, [0, 0, 0, 0]]], np.float32),
        "detection_scores": np.array([[0.8000001, 0.8, 0.3, 0]], np.float32),
        "detection_classes": np.array([[0, 0, 1, 0]], np.int32),
    }


def swapped(answer: dict[str, np.ndarray]) -> None:
    answer["detection_boxes"][0, :2] = answer["detection_boxes"][0, 1::-1].copy()


def put(name: str, index: tuple[int, ...], value: float) -> Change:
    return lambda answer: answer[name].__setitem__(index, value)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], dict[str, Any]]:
    """How an answer that is changed so compares."""

    def run(change: Change) -> dict[str, Any]:
        answer = recorded()
        change(answer)
        monkeypatch.setattr(module, "infer", lambda *_: (answer, "4"))
        return compare(None, "http://localhost:8000", "cards", 4, recorded())

    return run


@pytest.mark.parametrize(
    ("change", "box", "score"),
    [
        (lambda answer: None, 0, 0),
        (swapped, 0, 1e-7),
        (put("detection_boxes", (0, 0, 0), 2.4), 0.4, 0),
        (put("detection_scores", (0, 2), 0.3005), 0, 0.0005),
    ],
)
def test_the_like_passes(ask: Callable[[Change], dict[str, Any]], change: Change, box: float, score: float) -> None:
    facts = ask(change)
    assert (facts["images"], facts["detections"]) == (1, 3)
    assert facts["max_box_difference"] == pytest.approx(box, abs=1e-6)
    assert facts["max_score_difference"] == pytest.approx(score, abs=1e-7)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (put("detection_boxes", (0, 0, 0), 2.6), "of the 3 detections of image 0 .* the like of 2: the"),
        (put("detection_scores", (0, 2), 0.302), "the like of 2: the"),
        (put("detection_classes", (0, 1), 1), "the like of 2: the"),
        (put("detection_boxes", (0, 0), 0), "the like of 2: the"),
        (put("num_detections", (0, 0), 2), "2 detections, 3 were recorded"),
        (put("num_detections", (0, 0), 0), "0 detections, 3 were recorded"),
        (put("num_detections", (0, 0), 9), "9 detections, 3 were recorded"),
        (put("num_detections", (0, 0), -1), "-1 detections, 3 were recorded"),
    ],
)
def test_another_answer_does_not(ask: Callable[[Change], dict[str, Any]], change: Change, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ask(change)
