"""STAC's first half: a finished teacher labels the unlabelled images once, for good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from softteacher import distributed, storage
from softteacher.config import Settings
from softteacher.console import say
from softteacher.data.coco import CocoDataset
from softteacher.data.records import Annotations
from softteacher.errors import UserError
from softteacher.evaluation.inference import detect_dataset
from softteacher.model_folder import ModelFolder


def self_label(
    model: str, unlabeled: CocoDataset, categories: list[tuple[int, str]], settings: Settings, device: torch.device
) -> CocoDataset:
    """The unlabelled images with the teacher's boxes above `method.cls_threshold`.

    Args:
        model: model folder, local or `s3://`, whose teacher labels; of the same classes.
        unlabeled: images; what their json says of boxes is not looked at.
        categories: of the training set.
        settings: of this run.
        device: where the teacher runs.

    Raises:
        UserError: no such model, other classes, or the teacher is sure of nothing.
    """
    here = {"data": ("max_bad_images", "workers"), "training": ("evaluate_batch",)}  # of this run, not of that
    overrides = [f"{group}.{key}={getattr(getattr(settings, group), key)}" for group in here for key in here[group]]
    with storage.local_input(model) as path:
        source = ModelFolder(path, model, overrides)
        if source.categories != categories:
            raise UserError(
                f"method.label_model={model}: has other classes than the labelled set; give one with the same"
            )
        teacher = source.detector("teacher").to(device)
    found = detect_dataset(teacher, unlabeled, source.settings, device, "label")
    rows = [
        (index, d.boxes[n], int(d.labels[n]))
        for index, image in enumerate(unlabeled.images)
        if (d := found.get(image.id))
        for n in np.flatnonzero(d.scores > settings.method.cls_threshold)
    ]
    if not rows:
        raise UserError(
            f"method.label_model={model}: finds nothing in the {len(unlabeled)} unlabelled images with a score above "
            f"method.cls_threshold={settings.method.cls_threshold:g}; lower it"
        )
    boxes = np.array([box for _, box, _ in rows], np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    index, labels = (np.array([row[n] for row in rows], np.int64) for n in (0, 2))
    annotations = Annotations(
        index, boxes, labels, boxes[:, 2] * boxes[:, 3], np.zeros(len(rows), bool), np.arange(1, len(rows) + 1)
    )
    if distributed.rank() == 0:
        say(f"label: {len(rows) / len(unlabeled):.2f} pseudo boxes an image, by the teacher of {model}")
    return replace(unlabeled, categories=categories, annotations=annotations)
