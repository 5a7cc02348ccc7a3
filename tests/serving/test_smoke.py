"""When an answer counts as the recorded one; what a deployment makes of it is tested on a real Triton."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softteacher.errors import UserError
from softteacher.serving import smoke as module
from softteacher.serving.outputs import MASKS
from softteacher.serving.smoke import compare, read_smoke

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


def clear() -> dict[str, np.ndarray]:
    """Two images with ten detections of .5 or more in all, and one that is not clear."""
    boxes = [[[9 * n, 9 * i, 9 * n + 8, 9 * i + 8] for n in range(6)] for i in range(2)]
    return {
        "images": np.zeros((2, 64, 64, 3), np.uint8),
        "num_detections": np.array([[6], [5]], np.int32),
        "detection_boxes": np.array(boxes, np.float32),
        "detection_scores": np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]] * 2, np.float32),
        "detection_classes": np.zeros((2, 6), np.int32),
    }


def masked(record: Callable[[], dict[str, np.ndarray]]) -> Callable[[], dict[str, np.ndarray]]:
    def run() -> dict[str, np.ndarray]:
        answer = record()
        return answer | {MASKS: np.full((*answer["detection_scores"].shape, 28, 28), 0.5, np.float32)}

    return run


def swapped(answer: dict[str, np.ndarray]) -> None:
    answer["detection_boxes"][0, :2] = answer["detection_boxes"][0, 1::-1].copy()


def put(name: str, index: tuple[int, ...], value: float) -> Change:
    return lambda answer: answer[name].__setitem__(index, value)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """How an answer that is changed so compares."""

    def run(
        change: Change, record: Callable[[], dict[str, np.ndarray]] = recorded, exact: bool = True
    ) -> dict[str, Any]:
        answer = record()
        change(answer)
        monkeypatch.setattr(module, "infer", lambda *_: (answer, "4"))
        return compare(None, "http://localhost:8000", "cards", 4, record(), exact)

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
def test_the_like_passes(ask: Callable[..., dict[str, Any]], change: Change, box: float, score: float) -> None:
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
def test_another_answer_does_not(ask: Callable[..., dict[str, Any]], change: Change, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ask(change)


@pytest.mark.parametrize("record", [clear, masked(clear)], ids=["boxes", "masks"])
def test_of_another_precision_nine_of_ten_clear_ones_do(ask: Callable[..., dict[str, Any]], record: Any) -> None:
    """By class and IoU, whatever the score; what is not clear may be missing."""

    def change(answer: dict[str, np.ndarray], lost: int = 0) -> None:
        answer["detection_boxes"] += 1  # an IoU of .62, as in the last line, is another place
        answer["detection_boxes"][..., 0:3:2] -= 1
        answer["detection_scores"][0, 0] = 0.3
        answer["num_detections"][0] = 5
        answer["detection_classes"][1, :lost] = 1

    facts = ask(change, record, exact=False)
    assert (facts["images"], facts["detections"], facts["found"]) == (2, 10, 10)
    assert facts["max_box_difference"] == 1
    assert facts["max_score_difference"] == pytest.approx(0.6)
    assert ask(lambda answer: change(answer, 1), record, exact=False)["found"] == 9
    with pytest.raises(UserError, match="of 10 clear detections that were recorded at export, it finds 8"):
        ask(lambda answer: change(answer, 2), record, exact=False)
    with pytest.raises(UserError, match="it finds 0"):
        ask(lambda answer: answer["detection_boxes"].__iadd__(1), record, exact=False)


def test_masks_are_compared(ask: Callable[..., dict[str, Any]]) -> None:
    assert ask(put(MASKS, (0, 1, 3, 3), 0.54), masked(recorded))["detections"] == 3
    with pytest.raises(UserError, match=r"the like of 2: .*, the mask by 0\.05"):
        ask(put(MASKS, (0, 2, 3, 3), 0.56), masked(recorded))
    with pytest.raises(UserError, match=f"no output {MASKS}, it was recorded"):
        ask(lambda answer: answer.pop(MASKS), masked(recorded))
    for record in (masked(recorded), masked(clear)):
        with pytest.raises(UserError, match=f"{MASKS} holds NaN"):
            ask(put(MASKS, (0, 0, 3, 3), np.nan), record, exact=False)


def test_a_flipped_bit_is_a_torn_file(tmp_path: Path) -> None:
    """Or is in what nobody reads, such as the time of the archive's entries."""
    np.savez_compressed(tmp_path / "smoke.npz", allow_pickle=False, **recorded())
    whole = (tmp_path / "smoke.npz").read_bytes()
    told = []
    for bit in range(0, 8 * len(whole), 13):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "smoke.npz").write_bytes(flipped)
        try:
            read_smoke(tmp_path)
        except UserError as e:
            told.append(str(e))
    assert len(told) > 300
    assert all("smoke.npz" in line and "; run `softteacher export` again" in line for line in told)
