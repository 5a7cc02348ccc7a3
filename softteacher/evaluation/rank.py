"""Which unlabelled images to label next: where the teacher is in doubt, and classes are short of labels."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from softteacher import storage
from softteacher.console import say
from softteacher.data.check import read_image
from softteacher.data.coco import CocoDataset, load_coco, require_classes
from softteacher.data.split import load_unlabeled
from softteacher.detections import Detections
from softteacher.errors import UserError
from softteacher.evaluation.draw import contact_sheet, tile
from softteacher.evaluation.evaluate import load_detector
from softteacher.evaluation.inference import detect_dataset
from softteacher.evaluation.metrics import run_lengths
from softteacher.evaluation.observe import Observed, Observer
from softteacher.evaluation.partial import load_found, save_found
from softteacher.evaluation.shard import Shard
from softteacher.model_folder import ModelFolder

LOWEST_SCORE = 0.05  # boxes below are junk
PRE_LABEL_SCORE = 0.3  # boxes above are worth correcting
UNSURE = (0.2, 0.8)  # scores that could be either
MOST_ENTROPY = 5.0  # bits; hundreds of half-seen boxes are no better than five
SAME = 0.98  # cosine similarity of near-duplicates
ON_SHEET = 100  # images; a JPEG has at most 65,535 rows
TO_LABEL = "to_label.json"
TERMS = ("variance", "entropy", "shortage")


def rank(
    model: str,
    unlabeled: str,
    out: str,
    *,
    top: int = 100,
    labeled: str | None = None,
    shard: Shard | None = None,
    parts: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rank unlabelled images by what their labels would teach, at once or in shards: the list is the same.

    Three terms, each turned into the image's rank among all (0 to 1); the score is their mean:

    - `variance`: box regression variance, mean over the boxes weighted by their score;
    - `entropy`: binary entropy of the scores between .2 and .8, in bits, summed up to 5;
    - `shortage`: over the classes seen, the best score times 1 / sqrt(labelled boxes + 1).

    An image that looks like one already taken (see `choose`) comes after all others.

    Args:
        model: model folder, local or `s3://`; its teacher looks.
        unlabeled: manifest, COCO json, folder or `s3://` prefix of images.
        out: folder for `ranking.csv`, `ranking.json`, `to_label.json` (COCO json of the images, with the teacher's
            boxes and masks to correct) and `contact_sheet.jpg`.
        top: number of images.
        labeled: the labelled part, for the labels of each class; none: what the model was trained on if it is still
            there, else its validation set.
        shard: only look at this share of the images, and write what is found there.
        parts: what all the shards wrote; nothing is looked at then.
        overrides: settings on top of the model's, of the device and of what is found, see `change_settings`.

    Returns:
        The first `top`: `rank`, `file_name`, `uri`, `score`, the terms, `variance_max`, `classes`, `reason`. Of a shard
        nothing.

    Raises:
        UserError: bad input; nothing is written then.
    """
    if top < 1:
        raise UserError(f"--top {top}: must be 1 or more")
    if not shard:
        _refuse_corrected(out)
    with storage.local_input(model) as path:
        source = ModelFolder(path, model, overrides)
        dataset = load_unlabeled(unlabeled)
        if not len(dataset):
            raise UserError(f"{unlabeled}: no images in it; give the images that might be labelled")
        counts, origin = _label_counts(source, labeled)
        sure: dict[int, Detections] = {}

        def without_masks(image_id: int, d: Detections) -> Detections:
            # an image's hundred masks take 157 kB; kept are those of the boxes that a person may get to correct
            sure[image_id] = d[d.scores > PRE_LABEL_SCORE]
            return replace(d, masks=None)

        if parts:
            found, sure = (load_found(parts, name, source, dataset) for name in ("observed", "sure"))
        else:
            detector, device = load_detector(source, "teacher")
            observer = Observer(detector, source.settings, source.classes)
            found = detect_dataset(observer, dataset, source.settings, device, "rank", shard, without_masks)
        if shard:
            with storage.output_folder(out) as folder:
                save_found(folder, "observed", found, shard, source, dataset)
                save_found(folder, "sure", sure, shard, source, dataset)
            return []
    dataset = dataset.select([n for n, image in enumerate(dataset.images) if image.id in found])
    seen = [d for image in dataset.images if isinstance(d := found[image.id], Observed)]
    measured = [measure(d, 1 / np.sqrt(counts + 1)) for d in seen]
    terms = np.stack([_share_below(np.array([m[name] for m in measured])) for name in TERMS], 1)
    scores = terms.mean(1)
    names = [image.file_name for image in dataset.images]
    order = sorted(range(len(names)), key=lambda n: (-round(scores[n], 9), names[n], dataset.images[n].id))
    chosen, skipped = choose(order, np.stack([d.feature for d in seen]), top)
    rows = []
    for place, n in enumerate(chosen, start=1):
        rows.append({
            "rank": place,
            "file_name": names[n],
            "uri": dataset.uri(n),
            "score": round(float(scores[n]), 4),
            **{name: round(float(value), 4) for name, value in zip(TERMS, terms[n], strict=True)},
            "variance_mean": round(measured[n]["variance"], 5),
            "variance_max": round(measured[n]["variance_max"], 5),
            "classes": sorted({source.classes[label] for label in sure[dataset.images[n].id].labels.tolist()}),
            "reason": _reason(terms[n], seen[n], source.classes, counts),
        })  # fmt: skip
    with storage.output_folder(out) as folder:
        _write_list(folder, rows)
        tree = _empty_coco(dataset, source)
        tiles: list[Image.Image] = []
        for row, n in zip(rows, chosen, strict=True):
            picture, boxes = read_image(dataset, n)[0], sure[dataset.images[n].id]
            _add_image(tree, dataset, n, picture.size, boxes)
            if len(tiles) < ON_SHEET:
                caption = f"{row['rank']}. {row['file_name']}: {row['reason']}"
                tiles.append(tile(picture, boxes, source.classes, caption))
        tree["softteacher"]["sha256"] = _digest(tree)
        (folder / TO_LABEL).write_text(json.dumps(tree))
        contact_sheet(tiles).save(folder / "contact_sheet.jpg", quality=88)
    say(
        f"rank: {len(rows)} of {len(dataset)} images -> {out}; labels counted in {origin}; "
        f"{skipped} near-duplicates put behind the others"
    )
    return rows


def measure(d: Observed, rarity: np.ndarray) -> dict[str, float]:
    """The terms of one image, and the largest variance. An image without boxes has 0 in all.

    Args:
        d: the teacher's detections.
        rarity: [C] what a class is worth, 1 for one without labels.
    """
    kept = d.scores > LOWEST_SCORE
    scores, variance, labels = d.scores[kept].astype(np.float64), d.variance[kept], d.labels[kept]
    p = scores[(scores >= UNSURE[0]) & (scores <= UNSURE[1])]
    best = np.zeros(len(rarity))
    np.maximum.at(best, labels, scores)
    return {
        "variance": float((variance * scores).sum() / scores.sum()) if len(scores) else 0.0,
        "variance_max": float(variance.max(initial=0)),
        "entropy": min(MOST_ENTROPY, float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum())),
        "shortage": float((best * rarity).sum()),
    }


def choose(order: list[int], features: np.ndarray, top: int) -> tuple[list[int], int]:
    """The first `top` of an order, near-duplicates of one already taken behind all others.

    Args:
        order: indices, best first.
        features: [N, C]; two are near-duplicates at a cosine similarity above .98, the mean of all taken off (without
            that all images of one camera would look the same).
        top: how many.

    Returns:
        The indices, and how many near-duplicates were met on the way.
    """
    centred = features - features.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-9)
    taken: list[int] = []
    later: list[int] = []
    of_taken = np.empty((min(top, len(order)), centred.shape[1]), centred.dtype)
    for n in order:
        if len(taken) == top:
            break
        if (of_taken[: len(taken)] @ centred[n]).max(initial=-1) > SAME:
            later.append(n)
        else:
            of_taken[len(taken)] = centred[n]
            taken.append(n)
    return (taken + later)[:top], len(later)


def _share_below(values: np.ndarray) -> np.ndarray:
    """For each of N values the share of the others that is smaller: its rank, 0 to 1, equal values alike."""
    values = values.round(9)  # what differs by rounding only is equal
    return np.searchsorted(np.sort(values), values) / max(1, len(values) - 1)


def _label_counts(source: ModelFolder, labeled: str | None) -> tuple[np.ndarray, str]:
    """Labelled boxes of each class [C], and where they were counted."""
    if labeled is not None:
        dataset = load_coco(labeled)
        require_classes(dataset, source.categories, source.name, "give labels with the classes of the model")
        return np.array(list(dataset.class_counts().values())), labeled
    trained_on = source.provenance.get("data", {}).get("labeled", {})
    try:
        dataset = load_coco(trained_on["source"])
        if dataset.fingerprint() == trained_on["fingerprint"]:
            return np.array(list(dataset.class_counts().values())), f"{dataset.source}, which the model was trained on"
    except (UserError, KeyError, TypeError, AttributeError):
        pass  # the model has travelled
    return np.array(list(source.validation().class_counts().values())), "the model's validation set (see --labeled)"


def _reason(terms: np.ndarray, d: Observed, classes: list[str], counts: np.ndarray) -> str:
    """The strongest term in words, and any other that is nearly as strong."""
    unsure = int(((d.scores >= UNSURE[0]) & (d.scores <= UNSURE[1])).sum())
    seen = d.labels[d.scores > LOWEST_SCORE]
    if not len(seen):
        return "nothing found"
    if not terms.max():
        return "nothing stands out"
    rare = min(seen.tolist(), key=lambda label: (counts[label], label))
    words = {
        "variance": "box edges unsure",
        "entropy": f"{unsure} box{'es' * (unsure != 1)} between yes and no",
        "shortage": f"rare class {classes[rare]} ({counts[rare]} labels)",
    }
    strong = [n for n in np.argsort(-terms, kind="stable") if terms[n] >= 0.9 * terms.max()]
    return ", ".join(words[TERMS[n]] for n in strong)


def _write_list(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "ranking.json").write_text(json.dumps(rows, indent=1))
    # a file name need not be valid Unicode
    with (folder / "ranking.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"classes": ";".join(row["classes"])} for row in rows)


def _empty_coco(dataset: CocoDataset, source: ModelFolder) -> dict[str, Any]:
    categories = [{"id": i, "name": name} for i, name in source.categories]
    return {"softteacher": {"root": dataset.root}, "images": [], "annotations": [], "categories": categories}


def _digest(tree: dict[str, Any]) -> str:
    """sha256 of all that a person may correct in `to_label.json`."""
    content = [tree[key] for key in ("images", "annotations", "categories")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_corrected(out: str) -> None:
    """Refuse to write over a `to_label.json` that is not as `rank` has written it: there is somebody's work in it."""
    where = storage.join(out, TO_LABEL)
    try:
        tree = json.loads(storage.read_bytes(where))
        if tree["softteacher"]["sha256"] == _digest(tree):
            return
    except storage.MissingFile:
        return
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{where}: is not as `softteacher rank` writes it, and what was corrected would go; move it, or choose another "
        "--out"
    )


def _add_image(
    tree: dict[str, Any], dataset: CocoDataset, index: int, size: tuple[int, int], boxes: Detections
) -> None:
    """Put an image, its boxes and masks into a COCO json; `score` is an extra key of each box."""
    record = dataset.images[index]
    root = {"root": record.root} if record.root else {}
    width, height = size
    tree["images"].append({"id": record.id, "file_name": record.file_name, "width": width, "height": height} | root)
    masks = run_lengths(boxes, height, width)
    for (x1, y1, x2, y2), score, label, mask in zip(
        boxes.boxes.tolist(), boxes.scores.tolist(), boxes.labels.tolist(), masks, strict=True
    ):
        x, y, w, h = (round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1))
        tree["annotations"].append({
            "id": len(tree["annotations"]) + 1,
            "image_id": record.id,
            "category_id": tree["categories"][label]["id"],
            "bbox": [x, y, w, h],
            "area": float(coco_mask.area(mask["segmentation"])) if mask else round(w * h, 2),
            "iscrowd": 0,
            "score": round(score, 4),
            **mask,
        })  # fmt: skip
