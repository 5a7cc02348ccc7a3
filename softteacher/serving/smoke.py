"""The smoke test: a model on Triton has to answer real images as ONNX Runtime did when it was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from softteacher.detections import match_boxes
from softteacher.errors import UserError
from softteacher.serving.client import infer
from softteacher.serving.outputs import MASKS, OUTPUTS, to_detections

BOX_TOLERANCE = 0.5  # pixels of the canvas
SCORE_TOLERANCE = 1e-3
CLEAR_SCORE, CLEAR_IOU, CLEAR_SHARE = 0.5, 0.7, 0.9  # of precisions other than fp32
MASK_TOLERANCE = 0.05  # probability; a box that is moved within its tolerance moves its mask


def read_smoke(folder: Path) -> dict[str, np.ndarray]:
    """The images and the recorded answers of `smoke.npz` in an onnx folder or a version folder.

    Raises:
        UserError: it is torn, lacks an output, or the recorded answers are not finite.
    """
    try:
        with np.load(folder / "smoke.npz") as file:
            smoke = {name: file[name] for name in {"images", *OUTPUTS, *file.files}}
    except Exception as e:  # those of zipfile, zlib and numpy's parser share no base
        why = " ".join(str(e).split())
        raise UserError(f"{folder / 'smoke.npz'}: torn, or not ours ({why}); run `softteacher export` again") from None
    if broken := [name for name, values in smoke.items() if not np.isfinite(values).all()]:
        raise UserError(f"{folder / 'smoke.npz'}: {', '.join(sorted(broken))} held NaN at export; train again")
    return smoke


def compare(
    server: Any, url: str, name: str, version: int, smoke: dict[str, np.ndarray], exact: bool = True
) -> dict[str, Any]:
    """Ask a model about the smoke images, naming no version, and compare with the recorded answers.

    Args:
        server: from `connect`.
        url: what errors call it.
        name: of the model.
        version: that has to answer.
        smoke: from `read_smoke`.
        exact: the engine computes in fp32, as the recorded answers were; of another precision only the clear detections
            are asked for, at about their places.

    Returns:
        `images`, `detections`, `max_box_difference` (pixels of the canvas), `max_score_difference`.

    Raises:
        UserError: another version answered, or another answer came.
    """
    answer, answered = infer(server, url, name, smoke["images"])
    if answered != str(version):
        raise UserError(f"Triton at {url} answered with version {answered} of {name} instead of {version}")
    who = f"smoke inference with {name} {version}"
    for key in smoke.keys() - {"images"}:
        if key not in answer:
            raise UserError(f"{who}: no output {key}, it was recorded")
        if answer[key].shape != smoke[key].shape:
            got, recorded = list(answer[key].shape), list(smoke[key].shape)
            raise UserError(f"{who}: {key} has the shape {got}, {recorded} was recorded")
        if not np.isfinite(answer[key]).all():
            raise UserError(f"{who}: {key} holds NaN or infinite values")
    if not exact:
        return _roughly(answer, smoke, who)
    detections, box_difference, score_difference = 0, 0.0, 0.0
    for i, n in enumerate(smoke["num_detections"][:, 0]):
        if (count := int(answer["num_detections"][i, 0])) != n:
            raise UserError(f"{who}: image {i} has {count} detections, {n} were recorded at export")
        # each with each, as boxes of all but equal scores may stand in another order
        differences = []
        for key in ("detection_boxes", "detection_scores", MASKS, "detection_classes"):
            if key in smoke:
                each = np.abs(smoke[key][i, :n, None] - answer[key][i, None, :n])
                differences.append(each.max(axis=tuple(range(2, each.ndim))))
            else:
                differences.append(np.zeros((n, n)))
        boxes, scores, masks, classes = differences
        like = (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE) & (masks <= MASK_TOLERANCE) & (classes == 0)
        if not (like.any(0).all() and like.any(1).all()):
            raise UserError(
                f"{who}: of the {n} detections of image {i} that were recorded at export it has the like of"
                f" {like.any(1).sum()}: the class, the box by {BOX_TOLERANCE} px, the score by {SCORE_TOLERANCE}"
                + (f", the mask by {MASK_TOLERANCE}" if MASKS in smoke else "")
            )
        detections += int(n)
        nearest = np.where(like, boxes, np.inf).argmin(1) if n else np.zeros(0, np.int64)
        box_difference = max(box_difference, float(boxes[np.arange(n), nearest].max(initial=0)))
        score_difference = max(score_difference, float(scores[np.arange(n), nearest].max(initial=0)))
    return {
        "images": len(smoke["images"]),
        "detections": detections,
        "max_box_difference": box_difference,
        "max_score_difference": score_difference,
    }


def _roughly(answer: dict[str, np.ndarray], smoke: dict[str, np.ndarray], who: str) -> dict[str, Any]:
    clear, found, box_difference, score_difference = 0, 0, 0.0, 0.0
    for i in range(len(smoke["images"])):
        recorded, got = (to_detections(x, i, (1, 1), smoke["images"].shape[2:0:-1]) for x in (smoke, answer))
        recorded = recorded[recorded.scores >= CLEAR_SCORE]
        clear += len(recorded)
        for n, m in match_boxes(recorded, got, CLEAR_IOU):
            found += 1
            box_difference = max(box_difference, float(np.abs(recorded.boxes[n] - got.boxes[m]).max()))
            score_difference = max(score_difference, abs(float(recorded.scores[n] - got.scores[m])))
    if found < CLEAR_SHARE * clear:
        raise UserError(f"{who}: of {clear} clear detections that were recorded at export, it finds {found}")
    return {
        "images": len(smoke["images"]),
        "detections": clear,
        "found": found,
        "max_box_difference": box_difference,
        "max_score_difference": score_difference,
    }
