"""Step 1: a COCO data set becomes a labelled, an unlabelled and a validation part, written down for good."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softteacher import storage
from softteacher.choices import check_percent
from softteacher.config import DataSettings
from softteacher.console import say
from softteacher.data.check import check_images
from softteacher.data.coco import CocoDataset, load_coco, require_same_classes
from softteacher.data.images import SUFFIXES
from softteacher.data.records import Annotations, ImageRecord, without_gc
from softteacher.errors import UserError

FILES = ("labeled", "unlabeled", "validation", "split")  # that are written, each with .json


def split(
    data: str,
    out: str,
    *,
    percent: float,
    fold: int = 1,
    seed: int = 0,
    validation_fraction: float | None = None,
    stratify: bool = False,
    unlabeled: str | None = None,
    max_bad_images: float = DataSettings().max_bad_images,
) -> dict[str, Any]:
    """Split a data set by image id, without replacement, the same on every machine.

    The order of the images is that of sha256(seed, fold, image id), so it depends on nothing else.

    Args:
        data: folder or `s3://` prefix with `images/` and `annotations/` (a train and a val json, or one), or a json.
        out: folder or prefix for `labeled.json`, `unlabeled.json`, `validation.json` and `split.json`.
        percent: share of the training images that is labelled, rounded down as in COCO's 1, 5, 10 % splits; 100 if
            there are others, `unlabeled`.
        fold: number of the fold, from 1.
        seed: of all folds.
        validation_fraction: take this share of the images for validation instead of the data set's own val json.
        stratify: every class gets at least one labelled image where the data allows.
        unlabeled: further images that have no json, folder or prefix; those that are in the data set are left out.
        max_bad_images: share of broken images that is survived.

    Returns:
        What `split.json` says.

    Raises:
        UserError: anything wrong with the data or the arguments, or a part would replace the data; nothing is written.
    """
    check_percent(percent, unlabeled)
    if fold < 1:
        raise UserError(f"--fold {fold}: folds count from 1")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction:g}: must be between 0 and 1, e.g. 0.2")
    if not 0 <= max_bad_images <= 1:
        raise UserError(f"--max-bad-images {max_bad_images:g}: must be from 0 to 1, e.g. 0.01")
    train_json, val_json = find_annotations(data)
    written = {storage.place(storage.join(out, f"{name}.json")) for name in FILES}
    for source in filter(None, (train_json, val_json)):
        if storage.place(source) in written:
            raise UserError(f"--out {out}: a part would replace {source}, which is the data; choose another folder")
    train = load_coco(train_json)
    seen: dict[str, int] = {}
    for image, where in zip(train.images, _places(train), strict=True):
        if (other := seen.setdefault(where, image.id)) != image.id:
            raise UserError(
                f"{train_json}: images {other} and {image.id} are one file, {image.file_name!r}, which could be "
                "labelled here and validated on there; merge them: one image, with the boxes of both"
            )
    sources = {train_json: hashlib.sha256(storage.read_bytes(train_json)).hexdigest()}
    if validation_fraction is not None:
        order = _order(train, seed, "validation")
        held_out = max(1, int(len(train) * validation_fraction))
        if held_out >= len(train) - 1:
            raise UserError(f"--validation-fraction {validation_fraction:g} leaves no images to train on; lower it")
        validation, train = train.select(order[:held_out]), train.select(order[held_out:])
    elif val_json:
        validation = load_coco(val_json)
        sources[val_json] = hashlib.sha256(storage.read_bytes(val_json)).hexdigest()
        require_same_classes(train, validation)
        train = without(train, validation)
        if not len(train):
            raise UserError(f"{train_json}: all its images are in {val_json}, too; give others, or one json as --data")
    else:
        raise UserError(f"{train_json}: there is no val json beside it; pass --validation-fraction 0.2")

    more = images_only(unlabeled) if unlabeled else None
    if more is not None and not more:
        raise UserError(f"{unlabeled}: no images in it ({', '.join(SUFFIXES)}); check --unlabeled")

    train = check_images(train, max_bad_images, "check train")
    validation = check_images(validation, max_bad_images, "check val")
    if validation.annotations.crowd.all():
        raise UserError(f"{validation.source}: the validation images have no boxes; take more of them, or others")
    chosen = _choose(train, _order(train, seed, f"fold {fold}"), max(1, int(len(train) * percent / 100)), stratify)
    labeled = train.select(chosen)
    rest = train.select(np.setdiff1d(np.arange(len(train)), chosen))
    if not (~labeled.annotations.crowd).any():
        raise UserError(
            f"{train_json}: {percent:g} % gives {len(labeled)} labelled images without one box; "
            "raise --percent or pass --stratify"
        )
    missing = [name for name, n in labeled.class_counts().items() if not n and train.class_counts()[name]]
    if missing:
        say(f"warning: no labelled box of {', '.join(missing)}; they can't be learnt (try --stratify or more percent)")
    bare = len(labeled) - len(np.unique(labeled.annotations.image_index))
    if 2 * bare > len(labeled):
        say(
            f"warning: {bare} of the {len(labeled)} labelled images have no box: each teaches that all in it is "
            "background; take those out of the json that nobody has labelled yet"
        )
    if more:
        more = check_images(without(more, train, validation), max_bad_images, "check unlabeled")
        rest = merge_images(rest, more, max(i.id for i in [*train.images, *validation.images]) + 1)
    if percent == 100 and not len(rest):
        raise UserError(f"{unlabeled}: all its images are in the data set; give others, or a lower --percent")

    parts = {"labeled": labeled, "unlabeled": rest, "validation": validation}
    facts = {
        "percent": percent,
        "fold": fold,
        "seed": seed,
        "stratify": stratify,
        "source_sha256": sources,
        **{
            name: {
                "images": len(part),
                "ids": [i.id for i in part.images] if len(part) <= 20_000 else None,
                "ids_sha256": hashlib.sha256(json.dumps([i.id for i in part.images]).encode()).hexdigest(),
                "fingerprint": part.fingerprint(),
                "boxes_per_class": part.class_counts(),
            }
            for name, part in parts.items()
        },
    }
    with storage.output_folder(out) as folder:
        for name, part in parts.items():
            part.save(folder / f"{name}.json")
        (folder / "split.json").write_text(json.dumps(facts, indent=1))
    say(f"split: {len(labeled)} labelled, {len(rest)} unlabelled, {len(validation)} validation images -> {out}")
    return facts


def find_annotations(data: str) -> tuple[str, str | None]:
    """The train and val json of a data set: `annotations/*train*.json` and `*val*.json`, or its only json.

    Or `train/_annotations.coco.json` and `valid/_annotations.coco.json`, as Roboflow exports them.

    Raises:
        UserError: there is none, or more than one could be meant.
    """
    if data.endswith(".json"):
        return data, None
    if not storage.exists(data):
        raise UserError(f"{data}: no such folder or prefix; check --data")
    roboflow = [storage.join(data, f"{part}/_annotations.coco.json") for part in ("train", "valid")]
    if storage.exists(roboflow[0]):
        return roboflow[0], roboflow[1] if storage.exists(roboflow[1]) else None
    folder = storage.join(data, "annotations")
    files = [f.name for f in storage.list_files(folder)] if storage.exists(folder) else []
    names = sorted(n for n in files if n.endswith(".json") and "/" not in n)
    instances = [n for n in names if n.startswith("instances_")] or names
    train = [n for n in instances if "train" in n.lower()]
    val = [n for n in instances if "val" in n.lower() and "train" not in n.lower()]
    if not train and not val and len(instances) == 1:
        train = instances
    if len(train) != 1 or len(val) > 1:
        found = ", ".join(names) or "no json"
        raise UserError(
            f"{data}: needs annotations/instances_train.json (and instances_val.json) in COCO format, found {found}; "
            "name them so, or pass one json as --data"
        )
    return storage.join(folder, train[0]), storage.join(folder, val[0]) if val else None


def load_unlabeled(source: str) -> CocoDataset:
    """Unlabelled images: of a manifest or COCO json, whose boxes are optional, or of a folder or prefix.

    Raises:
        UserError: there is no such thing, or the json is wrong.
    """
    return load_coco(source, labeled=False) if source.endswith(".json") else images_only(source)


@without_gc()
def images_only(folder: str) -> CocoDataset:
    """A folder or prefix of images as a data set without classes and boxes; ids count from 1 by sorted name.

    Raises:
        UserError: there is no such folder.
    """
    if not storage.exists(folder):
        raise UserError(f"{folder}: no such folder or prefix; check --unlabeled")
    names = [f.name for f in storage.list_files(folder) if f.name.lower().endswith(SUFFIXES)]
    records = [ImageRecord(n + 1, name) for n, name in enumerate(names)]
    none = np.zeros(0, np.int64)
    annotations = Annotations(none, np.zeros((0, 4)), none, np.zeros(0), none.astype(bool), none)
    root = folder if storage.is_s3(folder) else str(Path(folder).absolute())
    return CocoDataset(records, [], annotations, root, folder)


@without_gc()
def merge_images(dataset: CocoDataset, more: CocoDataset, first: int) -> CocoDataset:
    """A data set with the images (not the boxes) of another one added under new ids from `first`."""
    added = [
        ImageRecord(first + n, i.file_name, i.width, i.height, i.root or more.root) for n, i in enumerate(more.images)
    ]
    return replace(dataset, images=dataset.images + added)


def without(dataset: CocoDataset, *others: CocoDataset) -> CocoDataset:
    """A data set without the image files that others have, too; says how many these are.

    A detector that learns from validation images, be it without their boxes, has no score that can be believed.
    """
    known = in_others(dataset, *others)
    if not len(known):
        return dataset
    many = f"{len(known)} of its {len(dataset)} images"
    say(f"{dataset.source}: {many} are in {' and '.join({o.source: o for o in others})}, too; they are left out")
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), known))


def in_others(dataset: CocoDataset, *others: CocoDataset) -> np.ndarray:
    """[N] int64, the positions of the images whose files others have, too."""
    taken = {place for other in others for place in _places(other)}
    return np.array([n for n, place in enumerate(_places(dataset)) if place in taken], np.int64)


def _places(dataset: CocoDataset) -> Iterator[str]:
    """Where each image lies, the same however its folder is written."""
    real: dict[str, str] = {}
    for image in dataset.images:
        root = image.root or dataset.root
        if root not in real:
            real[root] = storage.place(root)
        yield f"{real[root]}/{posixpath.normpath(image.file_name)}"


def _order(dataset: CocoDataset, seed: int, use: str) -> np.ndarray:
    keys = [hashlib.sha256(f"{seed} {use} {i.id}".encode()).digest() for i in dataset.images]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _choose(dataset: CocoDataset, order: np.ndarray, count: int, stratify: bool) -> np.ndarray:
    """The first `count` images of the order; stratified: first one image for each class, the rarest class first."""
    if not stratify:
        return order[:count]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    a = dataset.annotations
    classes_of: dict[int, set[int]] = {}
    for image, label in zip(a.image_index[~a.crowd].tolist(), a.labels[~a.crowd].tolist(), strict=True):
        classes_of.setdefault(image, set()).add(label)
    frequency = np.bincount(a.labels[~a.crowd], minlength=len(dataset.categories))
    chosen: list[int] = []
    covered: set[int] = set()
    for label in np.argsort(frequency, kind="stable").tolist():
        candidates = [i for i, classes in classes_of.items() if label in classes]
        if label not in covered and candidates and len(chosen) < count:
            chosen.append(min(candidates, key=lambda i: place[i]))
            covered |= classes_of[chosen[-1]]
    first = set(chosen)
    rest = [i for i in order.tolist() if i not in first]
    return np.array(chosen + rest[: count - len(chosen)], np.int64)
