"""The paper's Figure 3 for a data set of one's own: which teacher boxes are right, and what tells that they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from softteacher import storage
from softteacher.choices import Weights
from softteacher.config import MethodSettings
from softteacher.data.coco import CocoDataset
from softteacher.detections import Detections, match_boxes, pairwise_iou
from softteacher.evaluation.evaluate import load_detector, load_labelled, refuse_model, say_score, write_evaluation
from softteacher.evaluation.inference import Scored, detect_dataset, score_found
from softteacher.evaluation.observe import Observed, Observer
from softteacher.evaluation.plots import iou_scatter, threshold_curve
from softteacher.methods.thresholds import ClassThresholds
from softteacher.model_folder import WEIGHTS, ModelFolder

ENOUGH = 30  # boxes above the pool's threshold, for the IoU figures; of fewer nothing can be seen
BINS = 8
NEARLY = 0.9  # of the best F1 is as good as the best


def analyze(
    model: str,
    data: str,
    out: str,
    *,
    weights: Weights = "teacher",
    images: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a model, and look at its boxes as the paper's Figure 3 does.

    Args:
        model: model folder, local or `s3://`.
        data: manifest or COCO json with boxes.
        out: folder for all that `evaluate` writes, `precision_recall.png`, `iou_over_score.png`,
            `iou_over_variance.png`, and `analysis.json` with the numbers in them; the report has them too.
        weights: whose boxes are looked at.
        images: folder or prefix of the images; none: where the data set says.
        overrides: settings on top of the model's, of the device and of what is found, see `change_settings`.

    Returns:
        What `analysis.json` says, see `summarize`.

    Raises:
        UserError: bad input; nothing is written then.
    """
    refuse_model(out, model)
    with storage.local_input(model) as path:
        source = ModelFolder(path, model, overrides)
        dataset = load_labelled(source, data, images)
        scored: dict[Weights, Scored] = {}
        observed: dict[int, Observed] = {}
        for name in WEIGHTS:
            detector, device = load_detector(source, name)
            module = Observer(detector, source.settings, source.classes) if name == weights else detector
            found = detect_dataset(module, dataset, source.settings, device, "analyze")
            scored[name] = score_found(dataset, found, source.settings)
            say_score(name, scored[name].metrics)
            if name == weights:
                observed = {image_id: d for image_id, d in found.items() if isinstance(d, Observed)}
        readable = scored[weights].dataset
        boxes = match(readable, observed)
        facts: dict[str, Any] = {"weights": weights, "source": data, "images": len(readable)}
        facts |= summarize(boxes, readable.class_counts(), source.settings.method)
        at, seen = facts["localisation"], boxes["score"] > facts["localisation"]["above"]
        x = {name: boxes[name][seen] for name in ("score", "variance")}
        iou = boxes["iou"][seen]
        best = facts["best_f1"]["threshold"]
        pictures = {
            "precision_recall": threshold_curve(
                facts["curve"], facts["at"].get("cls_threshold", {}).get("threshold"), best
            ),
            "iou_over_score": iou_scatter(x["score"], iou, at["score"]["bins"], "score", at["score"]["correlation"]),
            "iou_over_variance": iou_scatter(
                x["variance"], iou, at["variance"]["bins"], "box variance", at["variance"]["correlation"]
            ),
        }
        texts = _texts(facts, source.settings.method)
        sections = [(title, text, pictures[name]) for name, (title, text) in texts.items()]
        with storage.output_folder(out) as folder:
            for file, png in pictures.items():
                (folder / f"{file}.png").write_bytes(png)
            (folder / "analysis.json").write_text(json.dumps(facts, indent=1))
            write_evaluation(folder, source, scored, weights, sections)
    return facts


def match(dataset: CocoDataset, found: dict[int, Observed]) -> dict[str, np.ndarray]:
    """Which detections are right: greedy by score, at an IoU of at least .5 with a box of the class not yet taken.

    A detection that matches nothing and lies in a crowd region of its class (more than half of it) is left out.

    Args:
        dataset: ground truth.
        found: detections by image id, in pixels of the original images.

    Returns:
        For each of N detections `score`, `variance`, `label`, `correct` (bool), and `iou`, the best with any box of
        its class.
    """
    crowds: dict[int, list[int]] = {}
    for row in np.flatnonzero(dataset.annotations.crowd).tolist():
        crowds.setdefault(int(dataset.annotations.image_index[row]), []).append(row)
    parts = []
    for index, image in enumerate(dataset.images):
        d = found[image.id]
        boxes, labels = dataset.targets(index)
        mine, truth = Detections(d.boxes, d.scores, d.labels), Detections(boxes, np.ones(len(boxes)), labels)
        correct = np.zeros(len(d), bool)
        correct[[n for n, _ in match_boxes(mine, truth, iou=0.5)]] = True
        iou = pairwise_iou(mine, truth) * (d.labels[:, None] == labels)
        crowd = dataset.annotations.bbox[crowds.get(index, [])]
        of_class = d.labels[:, None] == dataset.annotations.labels[crowds.get(index, [])]
        low, high = crowd[:, :2], crowd[:, :2] + crowd[:, 2:]
        sides = np.minimum(d.boxes[:, None, 2:], high) - np.maximum(d.boxes[:, None, :2], low)
        area = (d.boxes[:, 2:] - d.boxes[:, :2]).prod(1, keepdims=True)
        keep = correct | ~((sides.clip(0).prod(2) > 0.5 * area) & of_class).any(1)
        columns = (d.scores, d.variance, d.labels, correct, iou.max(1, initial=0))
        parts.append([column[keep] for column in columns])
    names = ("score", "variance", "label", "correct", "iou")
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def summarize(boxes: dict[str, np.ndarray], objects: dict[str, int], method: MethodSettings) -> dict[str, Any]:
    """The numbers of the figures.

    Args:
        boxes: of `match`.
        objects: ground truth boxes by class name, in label order.
        method: thresholds.

    Returns:
        `objects`, `detections`, `curve` (over the score threshold), `best_f1`, `at` (precision and recall at the
        settings' thresholds, those under the pool's at that, of adaptive ones under `adaptive`), `per_class` (the same
        for each class), `localisation` (the boxes of the IoU figures: `above` which score, `boxes`, and of `score` and
        `variance` the rank `correlation` with IoU and the `bins`), `advice`. A number that doesn't exist is none.
    """
    total = sum(objects.values())
    lowest = max(0.0, np.floor(100 * boxes["score"].min(initial=1.0)) / 100 - 0.01)  # all are above it
    grid = np.round(np.arange(lowest, 1.0001, 0.01), 2)
    rows = [_at(boxes["score"], boxes["correct"], total, t) for t in grid.tolist()]
    best = max(rows, key=lambda row: row["f1"] or 0.0)
    adaptive = method.threshold == "adaptive"
    fixed = ("pool_threshold",) if adaptive else ("pool_threshold", "rpn_threshold", "cls_threshold")
    # no box under the pool's threshold teaches anything
    values = {name: max(getattr(method, name), method.pool_threshold) for name in fixed}
    thresholds = {name: np.full(len(objects), value) for name, value in values.items()}
    if adaptive:
        thresholds["adaptive"] = _adaptive(boxes, objects, method)
    per_class = {}
    for label, (name, count) in enumerate(objects.items()):
        own = boxes["label"] == label
        score, correct = boxes["score"][own], boxes["correct"][own]
        per_class[name] = {"objects": count} | {
            key: _at(score, correct, count, float(by_class[label])) for key, by_class in thresholds.items()
        }
    pool = method.pool_threshold if (boxes["score"] > method.pool_threshold).sum() >= ENOUGH else 0.0
    seen = boxes["score"] > pool
    most = np.inf if method.reg_variance_threshold is None else method.reg_variance_threshold
    iou, certain = boxes["iou"][seen], boxes["variance"][seen] < most
    facts: dict[str, Any] = {
        "objects": total,
        "detections": len(boxes["score"]),
        "curve": {key: [row[key] for row in rows] for key in ("threshold", "precision", "recall", "f1")},
        "best_f1": best if best["f1"] else dict.fromkeys(best),
        "at": {
            key: _at(boxes["score"], boxes["correct"], total, values.get(key, by_class[boxes["label"]]))
            for key, by_class in thresholds.items()
        },
        "localisation": {
            "above": pool,
            "boxes": int(seen.sum()),
            **{
                name: {"correlation": rank_correlation(boxes[name][seen], iou), "bins": _bins(boxes[name][seen], iou)}
                for name in ("score", "variance")
            },
            "mean_iou": float(iou.mean()) if len(iou) else None,
            "reg_variance_threshold": method.reg_variance_threshold,
            "share_under_threshold": float(certain.mean()) if len(iou) else None,
            "mean_iou_under_threshold": float(iou[certain].mean()) if certain.any() else None,
        },
        "per_class": per_class,
    }
    return facts | {"advice": _advice(facts, method)}


def _adaptive(boxes: dict[str, np.ndarray], objects: dict[str, int], method: MethodSettings) -> np.ndarray:
    """What `method.threshold=adaptive` would choose for each class on these images; that of training isn't known."""
    found = [torch.from_numpy(boxes[key])[None] for key in ("score", "label")]  # as of one image with all objects
    frequency = torch.tensor([*objects.values()], dtype=torch.float32)
    values = ClassThresholds(method, frequency).quantiles(*found).double().numpy() if len(boxes["score"]) else 0.0
    return np.maximum(np.full(len(objects), method.pool_threshold), values)


def _at(score: np.ndarray, correct: np.ndarray, objects: int, threshold: float | np.ndarray) -> dict[str, float | None]:
    """Precision, recall and F1 of the detections with a score above a threshold, or each above one of its own."""
    kept = score > threshold
    right, count = int(correct[kept].sum()), int(kept.sum())
    return {
        "threshold": threshold if isinstance(threshold, float) else None,
        "precision": right / count if count else None,
        "recall": right / objects if objects else None,
        "f1": 2 * right / (count + objects) if count and objects else None,
    }


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's, between -1 and 1; none where x or y doesn't vary."""
    from scipy.stats import spearmanr  # slow to import

    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(spearmanr(x, y).statistic)


def _bins(x: np.ndarray, iou: np.ndarray) -> list[dict[str, Any]]:
    """Mean and standard deviation of the IoU in up to `BINS` equal shares of the boxes, by x."""
    shares = np.array_split(np.argsort(x, kind="stable"), min(BINS, len(x)) or 1)
    return [
        {
            "middle": float(np.median(x[s])),
            "boxes": len(s),
            "mean": float(iou[s].mean()),
            "spread": float(iou[s].std()),
        }
        for s in shares
        if len(s)
    ]


def _advice(facts: dict[str, Any], method: MethodSettings) -> str:
    """One sentence on the threshold, from the numbers."""
    best = facts["best_f1"]
    if best["f1"] is None:
        return "Not one box is right: train longer, or look whether the labels fit the images."
    if method.threshold == "adaptive":
        at, here, more, less = facts["at"]["adaptive"], "the adaptive thresholds", "higher", "lower"
        setting, fewer = "adaptive_share", at["recall"] < (at["precision"] or 1.0)
    else:
        deciding = max(("cls_threshold", "pool_threshold"), key=lambda name: float(getattr(method, name)))
        at, here, more, less = (
            facts["at"]["cls_threshold"],
            f"{deciding} {getattr(method, deciding):g}",
            "lower",
            "higher",
        )
        setting, fewer = "cls_threshold", best["threshold"] < at["threshold"]
    recall, there = at["recall"], f"the best F1 ({best['f1']:.2f}) is at {best['threshold']:.2f}"
    if (at["f1"] or 0.0) >= NEARLY * best["f1"]:
        fits = "The adaptive thresholds fit" if method.threshold == "adaptive" else f"{here} fits"
        return f"{fits}: precision {at['precision']:.2f}, recall {recall:.2f}; {there}."
    if fewer:
        if best["threshold"] < method.pool_threshold:  # which stands before those of the classes
            setting = f"{setting}, and a lower method.pool_threshold"
        taught = "most objects are" if recall < 0.5 else f"{1 - recall:.0%} of the objects are"
        lost = f"{taught} taught as background; {there}. Try a {more} method.{setting}."
        return f"At {here} the recall is {recall:.2f}: {lost}"
    wrong = f"{1 - at['precision']:.0%} of the boxes above it are wrong"
    return f"At {here} the recall is {recall:.2f}, but {wrong}; {there}. Try a {less} method.{setting}."


def _texts(facts: dict[str, Any], method: MethodSettings) -> dict[str, tuple[str, str]]:
    """Title and text of each figure."""
    here = facts["localisation"]
    by = {name: here[name]["correlation"] for name in ("score", "variance")}
    if None in by.values():
        verdict = "There are too few boxes to say which of the two tells localisation better."
    else:
        strong, weak = ("variance", "score") if -by["variance"] > by["score"] else ("score", "variance")
        names = {"score": "the score", "variance": "box variance"}
        verdict = (
            f"Here {names[strong]} tells localisation better than {names[weak]} "
            f"(rank correlation {by[strong]:+.2f} against {by[weak]:+.2f})."
        )
    which = (
        f"{here['boxes']} boxes with a score above {here['above']:g}" if here["above"] else f"All {here['boxes']} boxes"
    )
    share = ""
    if here["mean_iou_under_threshold"] is not None and method.reg_variance_threshold is not None:
        share = (
            f" {here['share_under_threshold']:.0%} of them are under reg_variance_threshold "
            f"{method.reg_variance_threshold:g}: their mean IoU is {here['mean_iou_under_threshold']:.2f}, "
            f"that of all is {here['mean_iou']:.2f}."
        )
    return {
        "precision_recall": ("Which boxes to believe: the score threshold", facts["advice"]),
        "iou_over_score": ("Does the score tell how well a box fits?", f"{which}, each against its best ground truth."),
        "iou_over_variance": (
            "Does the box variance tell it?",
            f"The same boxes, by how far jittered copies spread after refinement. {verdict}{share}",
        ),
    }
