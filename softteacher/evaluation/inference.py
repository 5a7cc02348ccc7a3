"""Run a detector over a data set and score it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from softteacher.config import Settings
from softteacher.console import Bar
from softteacher.data.check import read_image, report_broken
from softteacher.data.coco import CocoDataset
from softteacher.data.images import BadImage, inference_size, resize
from softteacher.data.loader import pad
from softteacher.detections import Detections
from softteacher.detectors.faster_rcnn import FasterRCNN
from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.storage import MissingFile


@torch.inference_mode()
def detect_dataset(
    detector: FasterRCNN, dataset: CocoDataset, settings: Settings, device: torch.device, title: str = "evaluate"
) -> dict[int, Detections]:
    """Detections (numpy, pixels of the original image) by image id; broken images are counted and left out.

    Raises:
        UserError: more images are broken than `data.max_bad_images` allows.
    """
    was_training = detector.training
    detector.eval()
    # images of like shape share a batch, so that little is padded
    order = sorted(range(len(dataset)), key=lambda i: dataset.images[i].height / max(dataset.images[i].width, 1))
    found: dict[int, Detections] = {}
    broken: list[str] = []
    size = settings.training.evaluate_batch
    with Bar(title, len(dataset)) as bar:
        for start in range(0, len(order), size):
            ids, images, scales = [], [], []
            for index in order[start : start + size]:
                try:
                    image = read_image(dataset, index)[0]
                except (BadImage, MissingFile) as e:
                    broken.append(str(e))
                    continue
                width, height = inference_size(*image.size, settings.data.short_side, settings.data.max_long_side)
                ids.append(dataset.images[index].id)
                images.append(np.asarray(resize(image, width, height)))
                scales.append(np.array([width / image.width, height / image.height] * 2, np.float32))
            if images:
                sizes = torch.tensor([i.shape[:2] for i in images])
                batch = detector(pad(images).to(device), sizes.to(device))
                for image_id, detections, scale in zip(ids, batch, scales, strict=True):
                    found[image_id] = detections.numpy()
                    found[image_id].boxes = found[image_id].boxes / scale
            bar.advance(steps=len(order[start : start + size]))
    detector.train(was_training)
    report_broken(dataset, broken, settings.data.max_bad_images)
    return found


def score(
    detector: FasterRCNN, dataset: CocoDataset, settings: Settings, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]], CocoDataset]:
    """COCO metrics of a detector, its detections in COCO results format, and the data set without broken images."""
    found = detect_dataset(detector, dataset, settings, device)
    dataset = dataset.select([n for n, image in enumerate(dataset.images) if image.id in found])
    results = coco_results(dataset, found)
    return coco_metrics(dataset, results), results, dataset
