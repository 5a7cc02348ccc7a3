"""`report.html` of the gate: the verdict, the gain with its interval, each class, and where the two differ most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections
from softteacher.evaluation.bootstrap import CONFIDENCE, MIN_IMAGES, Difference
from softteacher.evaluation.examples import SHOWN_SCORE, example, image_f1
from softteacher.evaluation.page import render
from softteacher.serving.decision import Decision

GALLERY = 3  # images where the new model is better, and as many where the champion is
MARGIN = 4.0  # percent of the picture of an interval, on each side

Found = tuple[dict[int, Detections], dict[int, Detections]]


def write_report(decision: Decision, name: str, dataset: CocoDataset | None = None, found: Found | None = None) -> str:
    """The page as a string of HTML without any outside reference.

    Args:
        decision: of the gate.
        name: of the model.
        dataset: the validation set, if there is a champion.
        found: detections of the new model and of the champion by image id, in labels of the data set.
    """
    c = decision.comparison
    return render(
        "serving/gate.html",
        decision=decision,
        name=name,
        c=c,
        verdict=verdict(decision),
        classes=sorted(c.classes, key=lambda d: d.change) if c else [],
        confidence=f"{CONFIDENCE:.0%}",
        min_images=MIN_IMAGES,
        galleries=_galleries(dataset, found) if dataset and found else [],
        shown_score=SHOWN_SCORE,
        scale=_scale,
    )


def verdict(decision: Decision) -> str:
    """The decision in a sentence or two."""
    c = decision.comparison
    if c is None:
        return f"The new model goes live: {decision.reason}."
    gain = f"Its AP is {decision.ap:.3f}, that of version {c.version} {decision.champion_ap:.3f}"
    if decision.deploy:
        return f"The new model goes live. {gain}; no class falls too far, and it is fast enough."
    return f"Version {c.version} stays. {gain}. Against the new model: {'; '.join(decision.rejections)}."


def _scale(delta: float, differences: Sequence[Difference]) -> Callable[[float], float]:
    """Where a change lies in a picture that holds these intervals, zero and delta: percent from the left."""
    ends = [v for d in differences for v in (d.low, d.high) if v is not None]
    low, high = min(0.0, delta, *ends), max(0.0, delta, *ends)
    return lambda value: round(MARGIN + (100 - 2 * MARGIN) * (value - low) / max(high - low, 1e-9), 2)


def _galleries(dataset: CocoDataset, found: Found) -> list[tuple[str, list[tuple[list[str], str]]]]:
    shown = [{i: d[d.scores > SHOWN_SCORE] for i, d in side.items()} for side in found]
    lead = []
    for index, image in enumerate(dataset.images):
        new, old = (image_f1(dataset, index, side[image.id]) for side in shown)
        lead.append((new - old, index))
    lead.sort()
    chosen = {
        "Where the new model is better": [i for gain, i in reversed(lead[-GALLERY:]) if gain > 0],
        "Where the champion is better": [i for gain, i in lead[:GALLERY] if gain < 0],
    }
    galleries = []
    for title, indices in chosen.items():
        cards = []
        for index in indices:
            image = dataset.images[index]
            pictures = [example(dataset, index, side[image.id]) for side in shown]
            cards.append((pictures, f"{image.file_name} (id {image.id})"))
        if cards:
            galleries.append((title, cards))
    return galleries
