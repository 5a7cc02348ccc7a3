"""Run a detector over a data set and score it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from softteacher import distributed
from softteacher.config import Settings
from softteacher.console import Bar
from softteacher.data.check import read_image, report_broken
from softteacher.data.coco import CocoDataset
from softteacher.data.images import BadImage, inference_size, resize
from softteacher.data.loader import pad
from softteacher.detections import Detections
from softteacher.detectors.base import Detector
from softteacher.device import is_out_of_memory
from softteacher.errors import UserError
from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.evaluation.shard import Shard
from softteacher.storage import MissingFile, read_bytes


class Scored(NamedTuple):
    """What an evaluation gives.

    Attributes:
        metrics: of COCO, see `coco_metrics`.
        results: the detections in COCO results format.
        dataset: without the images that could not be read.
    """

    metrics: dict[str, Any]
    results: list[dict[str, Any]]
    dataset: CocoDataset


@torch.inference_mode()
def detect_dataset(
    detector: nn.Module,
    dataset: CocoDataset,
    settings: Settings,
    device: torch.device,
    title: str = "evaluate",
    shard: Shard | None = None,
    keep: Callable[[int, Detections], Detections] = lambda _, d: d,
    read: Callable[[str], bytes] = read_bytes,
) -> dict[int, Detections]:
    """Detections by image id; broken images are counted and left out.

    Of many processes each takes a share of the batches, and gets all detections.

    Args:
        detector: a `Detector`, or another module that is called like one, e.g. an `Observer`.
        dataset: its boxes are not looked at.
        settings: test size, batch, workers, and the share of broken images that is survived.
        device: where the detector is.
        title: of the progress bar.
        shard: detect in its share of the batches only, which are the same that they are without.
        keep: of the id and detections of an image what stays in memory; called as they come.
        read: gives the bytes of an image file; called from several threads.

    Returns:
        `Detections` of numpy arrays, in pixels of the original images.

    Raises:
        UserError: more images are broken than `data.max_bad_images` allows.
    """

    def load(index: int) -> tuple[int, np.ndarray, np.ndarray] | str:
        """Image id, resized image, and how much it was scaled; or what is wrong with it."""
        try:
            image = read_image(dataset, index, read)[0]
        except (BadImage, MissingFile) as e:
            return str(e)
        width, height = inference_size(*image.size, settings.data.short_side, settings.data.max_long_side)
        scale = np.array([width / image.width, height / image.height] * 2, np.float32)
        return dataset.images[index].id, np.asarray(resize(image, width, height)), scale

    was_training = detector.training
    detector.eval()
    # images of like shape share a batch, so that little is padded
    order = sorted(range(len(dataset)), key=lambda i: dataset.images[i].height / max(dataset.images[i].width, 1))
    size = settings.training.evaluate_batch
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    chunks = (shard.share(chunks) if shard else chunks)[distributed.rank() :: distributed.world_size()]
    found: dict[int, Detections] = {}
    broken: list[str] = []
    with Bar(title, sum(map(len, chunks))) as bar, ThreadPoolExecutor(max(1, settings.data.workers)) as pool:
        ahead = [[pool.submit(load, i) for i in chunk] for chunk in chunks[:1]]
        for chunk, after in zip(chunks, [*chunks[1:], []][: len(chunks)], strict=True):
            loaded = [future.result() for future in ahead.pop()]
            ahead.append([pool.submit(load, i) for i in after])  # read while the detector works
            broken += [x for x in loaded if isinstance(x, str)]
            good = [x for x in loaded if not isinstance(x, str)]
            if good:
                sizes = torch.tensor([image.shape[:2] for _, image, _ in good])
                try:
                    batch = detector(pad([image for _, image, _ in good]).to(device), sizes.to(device))
                except (RuntimeError, MemoryError) as e:
                    if not is_out_of_memory(e):
                        raise
                    less = "training.evaluate_batch=1" if size > 1 else "training.device=cpu"
                    raise UserError(f"{title}: out of memory; --set {less}") from e
                for (image_id, _, scale), detections in zip(good, batch, strict=True):
                    d = detections.numpy()
                    d.boxes = d.boxes / scale
                    found[image_id] = keep(image_id, d)
            bar.advance(steps=len(chunk))
    detector.train(was_training)
    shares = distributed.gather((found, broken))
    found = {image_id: d for part, _ in shares for image_id, d in part.items()}
    report_broken(dataset, [line for _, part in shares for line in part], settings.data.max_bad_images)
    return found


def score(
    detector: Detector,
    dataset: CocoDataset,
    settings: Settings,
    device: torch.device,
    read: Callable[[str], bytes] = read_bytes,
) -> Scored:
    """How a detector does on a data set with boxes."""
    return score_found(dataset, detect_dataset(detector, dataset, settings, device, read=read), settings)


def score_found(dataset: CocoDataset, found: dict[int, Detections], settings: Settings) -> Scored:
    """How detections that are there already do.

    Raises:
        UserError: the size of an image is not known, which masks need; its shard may have read it.
    """
    dataset = dataset.select([n for n, image in enumerate(dataset.images) if image.id in found])
    if settings.detector.masks and (odd := [n for n, image in enumerate(dataset.images) if not image.width]):
        raise UserError(
            f"{dataset.uri(odd[0])}: can't be read, and {dataset.source} doesn't tell its size, which masks need; put "
            "the image back, or write its width and height"
        )
    results = coco_results(dataset, found)
    metrics = distributed.once(lambda: coco_metrics(dataset, results, settings.detector.masks))
    return Scored(metrics, results, dataset)
