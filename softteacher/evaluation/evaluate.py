"""Step 3: score a model folder the COCO way and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softteacher import storage
from softteacher.choices import Weights
from softteacher.config import Settings
from softteacher.console import say
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset, load_coco, require_classes
from softteacher.data.images import BadImage, original_size
from softteacher.data.masks import require_masks
from softteacher.data.records import ImageRecord
from softteacher.detections import Detections
from softteacher.detectors.base import Detector
from softteacher.device import find_device, find_precision, set_threads
from softteacher.errors import UserError
from softteacher.evaluation.confusion import confusion
from softteacher.evaluation.inference import Scored, detect_dataset, score_found
from softteacher.evaluation.metrics import LOW_SCORE, LOW_SCORES, average_precision, coco_results
from softteacher.evaluation.partial import load_found, save_found
from softteacher.evaluation.report import Section, write_report
from softteacher.evaluation.shard import Shard
from softteacher.model_folder import WEIGHTS, ModelFolder


def evaluate(
    model: str,
    data: str,
    out: str,
    *,
    weights: Weights | None = None,
    shard: Shard | None = None,
    parts: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Score teacher and student on a data set, at once or in shards: the numbers are the same.

    Args:
        model: model folder, local or `s3://`.
        data: manifest or COCO json with boxes.
        out: folder for `metrics.json`, `detections.json` (COCO results format) and `report.html`.
        weights: score only these; otherwise both, and detections and report are the teacher's.
        shard: only look at this share of the images, and write what is found there.
        parts: what all the shards wrote; nothing is looked at then.
        overrides: settings on top of the model's, of the device and of what is found, see `change_settings`.

    Returns:
        What `metrics.json` says: the COCO numbers and `per_class` of the weights that the report shows, of masks under
        `segm`, their `confusion`, the `overrides`, and the COCO numbers again under `teacher` and `student`. All are of
        detections above `detector.score_threshold`, but for `AP_low_scores`, of those above 0.001, which detectors with
        masks don't have. Of a shard: `images`.

    Raises:
        UserError: bad input; nothing is written then.
    """
    refuse_model(out, model)
    with storage.local_input(model) as path:
        source = ModelFolder(path, model, overrides)
        dataset = load_labelled(source, data)
        found: dict[Weights, dict[int, Detections]] = {}
        for name in [weights] if weights else WEIGHTS:
            if parts:
                found[name] = load_found(parts, name, source, dataset)
            else:
                detector, device = load_detector(source, name)
                if not source.settings.detector.masks:  # each detection would cost one
                    lowest = min(LOW_SCORE, source.settings.detector.score_threshold)
                    detector.settings = detector.settings.model_copy(update={"score_threshold": lowest})
                found[name] = detect_dataset(detector, dataset, source.settings, device, shard=shard)
        if shard:
            with storage.output_folder(out) as folder:
                for name in found:
                    save_found(folder, name, found[name], shard, source, dataset)
            return {"images": len(found[weights or "teacher"])}
        scored: dict[Weights, Scored] = {}
        for name in found:
            scored[name] = score_at_both_thresholds(dataset, found[name], source.settings)
            say_score(name, scored[name].metrics)
        with storage.output_folder(out) as folder:
            return write_evaluation(folder, source, scored, weights or "teacher")


def refuse_model(out: str, model: str) -> None:
    """Refuse to write an evaluation into the model folder itself, whose own metrics would go.

    Args:
        out: where it is to be written.
        model: the model folder.

    Raises:
        UserError: they are the same place.
    """
    if storage.place(out) == storage.place(model):
        raise UserError(
            f"--out {out}: is the model itself, whose metrics.json would be replaced; choose another folder"
        )


def load_labelled(source: ModelFolder, data: str, images: str | None = None) -> CocoDataset:
    """The data set that a model is scored on.

    Args:
        source: the model.
        data: manifest or COCO json with boxes, and for a detector with masks with these.
        images: folder or prefix of its images; none: where the data set says.

    Returns:
        The data set; for a detector with masks with the size of every image that can be read, as run lengths have it.

    Raises:
        UserError: it can't be read, has other classes than the model, or lacks masks.
    """
    dataset = load_coco(data, images)
    require_classes(dataset, source.categories, source.name, "use a data set with the classes of the model")
    if not source.settings.detector.masks:
        return dataset
    require_masks(dataset)

    def sized(index: int) -> ImageRecord:
        record = dataset.images[index]
        if record.width:
            return record
        try:
            width, height = original_size(read_image(dataset, index, short_side=1)[0])
        except (BadImage, storage.MissingFile):
            return record  # who looks at all images says so
        return replace(record, width=width, height=height)

    # a labelling tool may not tell the size of an image that nobody has drawn in
    with ThreadPoolExecutor(max(1, source.settings.data.workers)) as pool:
        return replace(dataset, images=list(pool.map(sized, range(len(dataset)))))


def load_detector(source: ModelFolder, weights: Weights) -> tuple[Detector, torch.device]:
    """A detector of a model folder, on the device and with the precision of its settings."""
    device = find_device(source.settings.training.device)
    set_threads()
    detector = source.detector(weights).to(device)
    detector.precision = find_precision(source.settings.training.precision, device)
    return detector, device


def score_at_both_thresholds(dataset: CocoDataset, found: dict[int, Detections], settings: Settings) -> Scored:
    """How those above `detector.score_threshold` do, and AP of all of them, from a score of `LOW_SCORE` on."""
    above = {image: d[d.scores > settings.detector.score_threshold] for image, d in found.items()}
    scored = score_found(dataset, above, settings)
    if not settings.detector.masks:
        scored.metrics[LOW_SCORES] = average_precision(scored.dataset, coco_results(scored.dataset, found))
    return scored


def say_score(name: str, metrics: dict[str, Any]) -> None:
    """The line for the user about one detector's score, and one about that of its masks."""
    for what, ap in (("", metrics), (" masks", metrics.get("segm"))):
        if ap:
            low = f"; down to a score of {LOW_SCORE:g}: AP {ap[LOW_SCORES]:.4f}" if LOW_SCORES in ap else ""
            say(f"evaluate: {name}{what} AP {ap['AP']:.4f}, AP50 {ap['AP50']:.4f}, AP75 {ap['AP75']:.4f}{low}")


def write_evaluation(
    folder: Path,
    source: ModelFolder,
    scored: dict[Weights, Scored],
    shown: Weights,
    sections: Sequence[Section] = (),
) -> dict[str, Any]:
    """Write `metrics.json`, `detections.json` and `report.html`; returns the metrics.

    Args:
        folder: where to.
        source: the model.
        scored: what `score` gave for each of its weights.
        shown: whose detections are written.
        sections: further ones of the report.
    """
    numbers, results, readable = scored[shown]
    metrics = numbers | {"weights": shown, "confusion": confusion(readable, results), "overrides": source.overrides}
    metrics |= {name: found.metrics for name, found in scored.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "detections.json").write_text(json.dumps(results))
    page = write_report(readable, results, metrics, source.provenance, sections)
    # a file name need not be valid Unicode
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return metrics
